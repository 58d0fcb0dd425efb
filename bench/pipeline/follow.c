/* Follows a ring as a target's appliance does: reads and checksums every record, and says that
 * all of it is durable. On SIGTERM it goes on until it stands at the head, then prints what it
 * saw. usage: follow RING CONTROL_FD DATA_FD SPACE_FD */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#if defined(__x86_64__)
#include <xxh_x86dispatch.h>
#else
#include <xxhash.h>
#endif

#include "base/status.h"
#include "ring/ring.h"

#define BATCH 64
#define IOV_MOST (VREP_WRITE_BYTES_MAX / 4096 + 2)

static volatile sig_atomic_t stop;

static void on_signal(int number)
{
    (void)number;
    stop = 1;
}

int main(int argc, char **argv)
{
    static struct iovec iov[IOV_MOST];
    struct vrep_ring_reader *reader;
    struct vrep_ring_desc desc;
    uint64_t at, records = 0, bytes = 0, sum = 0;
    struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGTERM, &action, NULL);
    sigset_t none;
    sigemptyset(&none); /* whoever started this waits for the same signal, blocked */
    sigprocmask(SIG_SETMASK, &none, NULL);
    int status = argc == 5 ? vrep_ring_reader_open(argv[1], atoi(argv[2]), atoi(argv[3]),
                                                   atoi(argv[4]), &reader)
                           : VREP_E_INVALID;
    if (status != VREP_OK) {
        fprintf(stderr, "follow: %s\n", vrep_status_text(status));
        return 1;
    }
    at = vrep_ring_reader_released(reader);
    for (;;) {
        status = vrep_ring_reader_wait(reader, at, 100);
        if (status != VREP_OK && stop)
            break;
        if (status != VREP_OK)
            continue;
        uint64_t head = vrep_ring_reader_head(reader);
        for (int n = 0; n < BATCH && at < head; n++) {
            int parts = 0;
            status = vrep_ring_reader_desc(reader, at + 1, &desc);
            if (status == VREP_OK && desc.chunk != VREP_NO_CHUNK)
                status = vrep_ring_reader_iov(reader, &desc, iov, IOV_MOST, &parts);
            if (status != VREP_OK) {
                fprintf(stderr, "follow: record %llu: %s\n", (unsigned long long)at + 1,
                        vrep_status_text(status));
                return 1;
            }
            for (int i = 0; i < parts; i++) {
                sum += XXH3_64bits(iov[i].iov_base, iov[i].iov_len);
                bytes += iov[i].iov_len;
            }
            records++;
            at++;
        }
        vrep_ring_reader_set(reader, at, at, at, 0);
    }
    printf("{\"records\": %llu, \"bytes\": %llu, \"sum\": %llu}\n", (unsigned long long)records,
           (unsigned long long)bytes, (unsigned long long)sum);
    vrep_ring_reader_close(reader);
    return 0;
}
