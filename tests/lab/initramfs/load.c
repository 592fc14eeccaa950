/* Load on a disk, with O_DIRECT: fills a part of it, or reads or writes it forever.
 *
 * load fill DEVICE AT BYTES       writes BYTES from offset AT on once, and exits
 * load read DEVICE AT BYTES N     starts N processes that read BYTES each, again and again, from offset
 *                                 AT on, side by side; exits, but these do not
 * load write DEVICE AT BYTES N    the same with writes
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PIECE (1 << 20)

static int failed(const char *what)
{
    printf("GUEST ERROR load %s: %s\n", what, strerror(errno));
    return 1;
}

int main(int argc, char **argv)
{
    size_t bytes, at;
    char *buffer;
    int fd;

    if (argc < 5) {
        printf("GUEST ERROR usage: load fill|read|write DEVICE AT BYTES [N]\n");
        return 2;
    }
    at = strtoull(argv[3], NULL, 0);
    bytes = strtoull(argv[4], NULL, 0);
    fd = open(argv[2], O_RDWR | O_DIRECT);
    if (fd < 0)
        return failed(argv[2]);
    if (posix_memalign((void **)&buffer, 4096, bytes > PIECE ? PIECE : bytes))
        return failed("memory");
    memset(buffer, 0x5a, bytes > PIECE ? PIECE : bytes);
    if (!strcmp(argv[1], "fill")) {
        for (size_t done = 0; done < bytes; done += PIECE)
            if (pwrite(fd, buffer, PIECE, at + done) != PIECE)
                return failed("fill");
        return 0;
    }
    for (int n = argc > 5 ? atoi(argv[5]) : 1; n > 0; n--, at += bytes) {
        if (fork())
            continue;
        while ((*argv[1] == 'r' ? pread(fd, buffer, bytes, at) : pwrite(fd, buffer, bytes, at)) > 0)
            ;
        return failed(argv[1]);
    }
    return 0;
}
