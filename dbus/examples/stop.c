/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Stop a guest by its process id and wait for its end: cc stop.c $(pkg-config --cflags --libs
 * libsystemd) -o stop && ./stop PID */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <systemd/sd-bus.h>

#define NAME "org.qkilld1"
#define FORCE UINT64_C(1)

int main(int argc, char **argv)
{
    sd_bus_error error = SD_BUS_ERROR_NULL;
    sd_bus_message *started = NULL, *call = NULL, *ended = NULL;
    const char *job, *result;
    sd_bus *bus = NULL;
    int r;

    if (argc != 2)
        return 2;
    r = sd_bus_open_system(&bus);
    if (r < 0)
        goto failed;
    r = sd_bus_call_method(bus, NAME, "/org/qkilld1", "org.qkilld1.Manager", "Terminate", &error,
                           &started, "ut", (uint32_t) strtoul(argv[1], NULL, 10), FORCE);
    if (r < 0 || (r = sd_bus_message_read(started, "o", &job)) < 0)
        goto failed;
    printf("%s\n", job);

    r = sd_bus_message_new_method_call(bus, &call, NAME, job, "org.qkilld1.Job", "Wait");
    if (r < 0)
        goto failed;
    /* No timeout, because Wait takes as long as the stop. */
    r = sd_bus_call(bus, call, UINT64_MAX, &error, &ended);
    if (r < 0 || (r = sd_bus_message_read(ended, "s", &result)) < 0)
        goto failed;

    /* The receipt: a dictionary of variants. */
    r = sd_bus_message_enter_container(ended, 'a', "{sv}");
    while (r >= 0 && (r = sd_bus_message_enter_container(ended, 'e', "sv")) > 0) {
        const char *key;
        uint64_t usec;

        r = sd_bus_message_read(ended, "s", &key);
        if (r >= 0 && strcmp(key, "elapsed-usec") == 0) {
            r = sd_bus_message_read(ended, "v", "t", &usec);
            if (r >= 0)
                printf("%s after %.3f s\n", result, (double) usec / 1e6);
        } else if (r >= 0) {
            r = sd_bus_message_skip(ended, "v");
        }
        if (r >= 0)
            r = sd_bus_message_exit_container(ended);
    }
    if (r < 0)
        goto failed;
    r = strcmp(result, "exited") == 0 ? 0 : 3;
    goto end;
failed:
    fprintf(stderr, "not stopped: %s\n", error.message ? error.message : strerror(-r));
    r = 1;
end:
    sd_bus_error_free(&error);
    sd_bus_message_unref(started);
    sd_bus_message_unref(call);
    sd_bus_message_unref(ended);
    sd_bus_flush_close_unref(bus);
    return r;
}
