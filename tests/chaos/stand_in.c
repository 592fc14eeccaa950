/* A program that passes for a QEMU by its name, and notes each signal that reaches it.
 *
 *     qemu-system-x86_64 LOG MODE MILLISECONDS ...
 *
 * polite     exits so long after the first SIGTERM
 * flushing   the same, and until then writes to LOG.data every 100 ms
 * stubborn   never
 *
 * Lines of LOG, times in ns of CLOCK_MONOTONIC: READY TIME, SIGNAL TIME NUMBER SENDER-UID,
 * WROTE TIME, EXIT TIME.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static int log_fd;
static volatile long long asked;

static long long now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void note(const char *word, long long a, long long b)
{
    char line[128];
    int length = snprintf(line, sizeof line, "%s %lld %lld %lld\n", word, now(), a, b);

    if (write(log_fd, line, length) != length)
        _exit(3);
}

static void handle(int number, siginfo_t *info, void *context)
{
    (void)context;
    note("SIGNAL", number, info->si_uid);
    if (number == SIGTERM && !asked)
        asked = now();
}

int main(int argc, char **argv)
{
    struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_RESTART};
    struct timespec tick = {.tv_nsec = 20000000};
    char path[4096], block[4096];
    long long limit, wrote = 0;
    int data, flushing, stubborn;
    sigset_t every, none;

    if (argc < 4)
        return 2;
    log_fd = open(argv[1], O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    snprintf(path, sizeof path, "%s.data", argv[1]);
    data = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (log_fd < 0 || data < 0)
        return 2;
    flushing = strcmp(argv[2], "flushing") == 0;
    stubborn = strcmp(argv[2], "stubborn") == 0;
    limit = atoll(argv[3]) * 1000000LL;
    memset(block, 'x', sizeof block);
    for (int number = 1; number < NSIG; number++)
        if (number != SIGKILL && number != SIGSTOP && number != SIGCHLD)
            sigaction(number, &action, NULL);
    sigfillset(&every);
    note("READY", 0, 0);
    for (;;) {
        /* A signal that comes between the look and the wait must end the wait. */
        sigprocmask(SIG_BLOCK, &every, &none);
        if (asked && !stubborn)
            break;
        sigsuspend(&none);
        sigprocmask(SIG_SETMASK, &none, NULL);
    }
    sigprocmask(SIG_SETMASK, &none, NULL);
    while (now() - asked < limit) {
        nanosleep(&tick, NULL);
        if (flushing && now() - wrote > 100000000LL) {
            if (write(data, block, sizeof block) != sizeof block)
                return 3;
            wrote = now();
            note("WROTE", 0, 0);
        }
    }
    note("EXIT", 0, 0);
    return 0;
}
