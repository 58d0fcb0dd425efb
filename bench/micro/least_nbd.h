/* What the NBD servers of the measurements share: fixed newstyle for one client, nothing checked.
 * Numbers are those of the NBD protocol. */
#ifndef VREP_BENCH_LEAST_NBD_H
#define VREP_BENCH_LEAST_NBD_H

#include <endian.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define OPTION_MAGIC 0x49484156454f5054ull
#define REPLY_MAGIC 0x3e889045565a9ull
enum { EXPORT_NAME = 1, INFO = 6, GO = 7 };
enum { HAS_FLAGS = 1, SEND_FLUSH = 4, SEND_FUA = 8 };

static void must(int good, const char *what)
{
    if (!good) {
        perror(what);
        exit(1);
    }
}

static void get(int fd, void *to, size_t bytes)
{
    for (size_t have = 0; have < bytes;) {
        ssize_t n = read(fd, (char *)to + have, bytes - have);
        if (n <= 0)
            exit(n == 0 ? 0 : 1);
        have += (size_t)n;
    }
}

static void put(int fd, const void *from, size_t bytes)
{
    for (size_t done = 0; done < bytes;) {
        ssize_t n = write(fd, (const char *)from + done, bytes - done);
        if (n <= 0)
            exit(0);
        done += (size_t)n;
    }
}

static void answer(int fd, uint32_t option, uint32_t type, const void *data, uint32_t bytes)
{
    struct __attribute__((packed)) {
        uint64_t magic;
        uint32_t option, type, bytes;
    } reply = {htobe64(REPLY_MAGIC), htobe32(option), htobe32(type), htobe32(bytes)};
    put(fd, &reply, sizeof reply);
    put(fd, data, bytes);
}

static void haggle(int fd, uint64_t size)
{
    struct __attribute__((packed)) {
        uint64_t magic, option;
        uint16_t flags;
    } greeting = {htobe64(0x4e42444d41474943ull), htobe64(OPTION_MAGIC), htobe16(3)};
    struct __attribute__((packed)) {
        uint16_t type;
        uint64_t size;
        uint16_t flags;
    } export = {0, htobe64(size), htobe16(HAS_FLAGS | SEND_FLUSH | SEND_FUA)};
    static char room[65536];
    uint32_t client;
    put(fd, &greeting, sizeof greeting);
    get(fd, &client, 4);
    for (;;) {
        struct __attribute__((packed)) {
            uint64_t magic;
            uint32_t option, bytes;
        } asked;
        get(fd, &asked, sizeof asked);
        must(be32toh(asked.bytes) <= sizeof room, "option");
        get(fd, room, be32toh(asked.bytes));
        uint32_t option = be32toh(asked.option);
        if (option == EXPORT_NAME) {
            put(fd, &export.size, 10);
            if ((be32toh(client) & 2) == 0)
                put(fd, memset(room, 0, 124), 124);
            return;
        }
        if (option != GO && option != INFO) {
            answer(fd, option, 0x80000001u, NULL, 0);
            continue;
        }
        answer(fd, option, 3, &export, sizeof export);
        answer(fd, option, 1, NULL, 0);
        if (option == GO)
            return;
    }
}

struct __attribute__((packed)) request {
    uint32_t magic;
    uint16_t flags, type;
    uint64_t cookie, offset;
    uint32_t bytes;
};

/* A Unix socket that listens. */
static int least_listen(const char *path)
{
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    strncpy(name.sun_path, path, sizeof name.sun_path - 1);
    must(bind(listener, (struct sockaddr *)&name, sizeof name) == 0 && listen(listener, 4) == 0,
         path);
    return listener;
}

#endif
