/* The least that a tap can do: an NBD server that receives each write into memory that a second
 * process sees, writes the file from there, and lets the other read and checksum it before that
 * memory is used again. No record, no change map, no order among commands but that of their coming;
 * nothing is checked: it serves measurements only. With FOLLOW 0 nobody reads what was written.
 * usage: least_tap SOCKET BYTES FILE FOLLOW
 *
 * gcc -O2 bench/micro/least_tap.c -lxxhash -o build/least_tap */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/futex.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#if defined(__x86_64__)
#include <xxh_x86dispatch.h>
#else
#include <xxhash.h>
#endif

#include "least_nbd.h"

/* As the ring of a group: so much may be unread. */
#define SLOTS 1024u
#define SLOT_BYTES (256u << 10)

struct shared {
    _Alignas(64) uint32_t written; /* slots that hold a write, since the beginning */
    _Alignas(64) uint32_t read;
    _Alignas(64) uint32_t bytes[SLOTS];
    _Alignas(4096) uint8_t data[SLOTS][SLOT_BYTES];
};

static struct shared *shared;

static uint32_t load(const uint32_t *word)
{
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

static void store_and_wake(uint32_t *word, uint32_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
    syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0);
}

static void wait_while(const uint32_t *word, uint32_t value)
{
    while (load(word) == value)
        syscall(SYS_futex, word, FUTEX_WAIT, value, NULL, NULL, 0);
}

static void follow(void)
{
    volatile uint64_t sum = 0;

    for (uint32_t at = 0;; at++) {
        wait_while(&shared->written, at);
        sum += XXH3_64bits(shared->data[at % SLOTS], shared->bytes[at % SLOTS]);
        store_and_wake(&shared->read, at + 1);
    }
}

static void serve(int fd, int file, int followed)
{
    for (;;) {
        struct request q;
        uint32_t at = shared->written;

        ssize_t head = recv(fd, &q, sizeof q, MSG_WAITALL);
        if (head != sizeof q)
            return;
        uint32_t bytes = be32toh(q.bytes), type = be16toh(q.type);
        uint8_t *data = shared->data[at % SLOTS];
        if (type == 2)
            return;
        must(bytes <= SLOT_BYTES, "a command is larger than a slot");
        if (type == 1) {
            if (followed && at - load(&shared->read) == SLOTS)
                wait_while(&shared->read, at - SLOTS);
            get(fd, data, bytes);
            must(pwrite(file, data, bytes, (off_t)be64toh(q.offset)) == (ssize_t)bytes, "pwrite");
            shared->bytes[at % SLOTS] = bytes;
            store_and_wake(&shared->written, at + 1);
        }
        struct __attribute__((packed)) {
            uint32_t magic, error;
            uint64_t cookie;
        } reply = {htobe32(0x67446698), 0, q.cookie};
        put(fd, &reply, sizeof reply);
        if (type == 0) {
            must(pread(file, data, bytes, (off_t)be64toh(q.offset)) == (ssize_t)bytes, "pread");
            put(fd, data, bytes);
        }
    }
}

int main(int argc, char **argv)
{
    must(argc == 5, "usage: least_tap SOCKET BYTES FILE FOLLOW");
    int file = open(argv[3], O_RDWR), followed = atoi(argv[4]);
    must(file >= 0, argv[3]);
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE,
                  MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    must(shared != MAP_FAILED, "mmap");
    if (followed && fork() == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        follow();
    }
    int listener = least_listen(argv[1]);
    for (;;) { /* a client asks for the size on a connection of its own */
        int fd = accept(listener, NULL, NULL), room = 4 << 20;
        must(fd >= 0, "accept");
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &room, sizeof room);
        haggle(fd, strtoull(argv[2], NULL, 10));
        serve(fd, file, followed);
        close(fd);
    }
}
