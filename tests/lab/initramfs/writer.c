/* Writes numbered, checksummed records with O_DIRECT and says which ones the disk acknowledged.
 *
 * writer DEVICE RECORDS STRIDE PASSES
 *
 * RECORDS is their number, 0 to fill the disk. Record n (from 0) is one block of 4096 bytes. The
 * records are written in PASSES rounds: round p writes the p-th block of every STRIDE bytes. So with
 * a large stride, each write is in another qcow2 cluster, and later rounds write to all of these
 * clusters again.
 * Prints "ACK n" when the write of record n has returned, "WRITER DONE n" at the end.
 *
 * A record: 8 bytes magic, then little-endian u64 number, u64 FNV-1a of the payload, payload.
 * tests/lab/records.py reads them back.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <linux/fs.h>
#include <unistd.h>

#define BLOCK 4096
#define HEADER 24

static unsigned char block[BLOCK] __attribute__((aligned(BLOCK)));

static void fill(uint64_t number)
{
    uint64_t state = number * 0x9e3779b97f4a7c15ULL + 1, hash = 0xcbf29ce484222325ULL;

    memcpy(block, "QKLABREC", 8);
    memcpy(block + 8, &number, 8);
    for (int i = HEADER; i < BLOCK; i++) {
        state = state * 6364136223846793005ULL + 1442695040888963407ULL;
        block[i] = state >> 56;
        hash = (hash ^ block[i]) * 0x100000001b3ULL;
    }
    memcpy(block + 16, &hash, 8);
}

int main(int argc, char **argv)
{
    uint64_t size, records, stride, passes, per_pass, done = 0;
    int fd;

    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc != 5) {
        printf("GUEST ERROR usage: writer DEVICE RECORDS STRIDE PASSES\n");
        return 2;
    }
    records = strtoull(argv[2], NULL, 0);
    stride = strtoull(argv[3], NULL, 0);
    passes = strtoull(argv[4], NULL, 0);
    fd = open(argv[1], O_WRONLY | O_DIRECT);
    if (fd < 0 || ioctl(fd, BLKGETSIZE64, &size) < 0) {
        printf("GUEST ERROR %s: %s\n", argv[1], strerror(errno));
        return 1;
    }
    if (!passes || stride < passes * BLOCK || stride % BLOCK) {
        printf("GUEST ERROR stride %llu does not hold %llu blocks\n",
               (unsigned long long)stride, (unsigned long long)passes);
        return 2;
    }
    per_pass = size / stride;
    if (records && (records + passes - 1) / passes < per_pass)
        per_pass = (records + passes - 1) / passes;
    if (!records || records > per_pass * passes)
        records = per_pass * passes;
    printf("GUEST READY writer %llu records\n", (unsigned long long)records);
    for (uint64_t n = 0; n < records; n++) {
        uint64_t offset = (n % per_pass) * stride + (n / per_pass) * BLOCK;

        fill(n);
        if (pwrite(fd, block, BLOCK, (off_t)offset) != BLOCK) {
            printf("GUEST ERROR record %llu: %s\n", (unsigned long long)n, strerror(errno));
            return 1;
        }
        printf("ACK %llu\n", (unsigned long long)n);
        done++;
    }
    printf("WRITER DONE %llu\n", (unsigned long long)done);
    return 0;
}
