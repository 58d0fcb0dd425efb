/* The least that an NBD server can do, so the most that a client can get: one client on a Unix
 * socket, fixed newstyle, simple replies. Writes go to FILE, or nowhere without one; reads are
 * answered with whatever the buffer holds. One system call reads all requests that are there, one
 * sends their replies. Nothing is checked: it serves measurements only, until its client leaves.
 * usage: null_nbd SOCKET BYTES [FILE]
 *
 * gcc -O2 bench/micro/null_nbd.c -o build/null_nbd */
#define _GNU_SOURCE
#include <fcntl.h>

#include "least_nbd.h"

#define BUFFER (64u << 20)
static void serve(int fd, int file)
{
    static char replies[1 << 20];
    char *buffer = malloc(BUFFER), *data = calloc(1, 32u << 20);
    size_t have = 0;
    must(buffer != NULL && data != NULL, "malloc");
    for (;;) {
        ssize_t n = read(fd, buffer + have, BUFFER - have);
        if (n <= 0)
            return;
        have += (size_t)n;
        size_t at = 0, out = 0;
        while (have - at >= sizeof(struct request)) {
            struct request q;
            memcpy(&q, buffer + at, sizeof q);
            uint32_t bytes = be32toh(q.bytes), type = be16toh(q.type);
            size_t whole = sizeof q + (type == 1 ? bytes : 0);
            if (type == 2)
                return;
            if (have - at < whole)
                break;
            if (type == 1 && file >= 0)
                must(pwrite(file, buffer + at + sizeof q, bytes, (off_t)be64toh(q.offset)) ==
                         (ssize_t)bytes,
                     "pwrite");
            uint32_t head[2] = {htobe32(0x67446698), 0};
            memcpy(replies + out, head, 8);
            memcpy(replies + out + 8, &q.cookie, 8);
            out += 16;
            if (type == 0 || out > sizeof replies - 16) {
                put(fd, replies, out);
                out = 0;
                if (type == 0)
                    put(fd, data, bytes);
            }
            at += whole;
        }
        put(fd, replies, out);
        memmove(buffer, buffer + at, have - at);
        have -= at;
    }
}

int main(int argc, char **argv)
{
    must(argc == 3 || argc == 4, "usage: null_nbd SOCKET BYTES [FILE]");
    int listener, file = -1;
    if (argc == 4)
        must((file = open(argv[3], O_RDWR)) >= 0, argv[3]);
    listener = least_listen(argv[1]);
    for (;;) {
        int fd = accept(listener, NULL, NULL), room = 4 << 20;
        must(fd >= 0, "accept");
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &room, sizeof room);
        haggle(fd, strtoull(argv[2], NULL, 10));
        serve(fd, file);
        close(fd);
    }
}
