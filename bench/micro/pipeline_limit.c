/* The least CPU time that a replicated 4 KiB write can cost on this machine: each step that no
 * design can leave out, alone, in C, with the kernel and libcrypto that the product uses. "sum" is
 * that of a guest's write, "sync" that of 4 KiB of a first sync, read and sealed in large pieces.
 * usage: pipeline_limit DIRECTORY; prints one JSON object of microseconds per 4 KiB.
 *
 * gcc -O2 -Isrc/_native bench/micro/pipeline_limit.c src/_native/crypto/gcm.c
 *     -lcrypto -o build/pipeline_limit */
#define _GNU_SOURCE
#include <fcntl.h>
#include <netinet/in.h>
#include <openssl/evp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "crypto/gcm.h"

#define BLOCK 4096
#define BATCH (256 * BLOCK)
#define TLS_RECORD 16384
#define PIECE (32 * BLOCK)
#define ROUNDS 100
#define WRITES (ROUNDS * 256)

static char *data, *other;

static double cpu_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static void must(int good, const char *what)
{
    if (!good) {
        perror(what);
        exit(1);
    }
}

static void move(int from, int to, size_t bytes, size_t piece)
{
    for (size_t at = 0; at < bytes; at += piece) {
        must(write(from, data + at % BATCH, piece) == (ssize_t)piece, "write");
        for (size_t got = 0; got < piece;) {
            ssize_t n = read(to, other + at % BATCH, piece - got);
            must(n > 0, "read");
            got += (size_t)n;
        }
    }
}

/* A request with its data one way and a reply back, 8 in one system call, over a Unix socket. */
static double nbd(void)
{
    int fd[2], size = 4 << 20;
    must(socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == 0, "socketpair");
    setsockopt(fd[0], SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    double begin = cpu_us();
    for (int i = 0; i < WRITES / 8; i++) {
        move(fd[0], fd[1], 8 * BLOCK, 8 * BLOCK);
        move(fd[1], fd[0], 128, 128);
    }
    return (cpu_us() - begin) / WRITES;
}

static double backing(int fd)
{
    uint64_t seed = 1;
    for (int i = 0; i < 32768; i++)
        must(pwrite(fd, data, BLOCK, (off_t)i * BLOCK) == BLOCK, "pwrite");
    double begin = cpu_us();
    for (int i = 0; i < WRITES; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        must(pwrite(fd, data, BLOCK, (off_t)(seed >> 49) * BLOCK) == BLOCK, "pwrite");
    }
    return (cpu_us() - begin) / WRITES;
}

static double reading(int fd)
{
    double begin = cpu_us();
    for (int i = 0; i < WRITES / 64; i++)
        must(pread(fd, data, 64 * BLOCK, (off_t)(i % 512) * 64 * BLOCK) == 64 * BLOCK, "pread");
    return (cpu_us() - begin) / WRITES;
}

static double gcm(int piece)
{
    unsigned char key[32] = {1}, nonce[12] = {0}, tag[16];
    EVP_CIPHER_CTX *c = EVP_CIPHER_CTX_new();
    int n;
    EVP_CIPHER *aes = EVP_CIPHER_fetch(vrep_gcm_context(), "AES-256-GCM", VREP_GCM_PROPERTIES);
    must(EVP_EncryptInit_ex(c, aes, NULL, key, nonce), "EVP");
    double begin = cpu_us();
    for (int i = 0; i < ROUNDS; i++)
        for (int at = 0; at < BATCH; at += piece) {
            memcpy(nonce, &at, 4);
            EVP_EncryptInit_ex(c, NULL, NULL, NULL, nonce);
            EVP_EncryptUpdate(c, (unsigned char *)other + at, &n, (unsigned char *)data + at,
                              piece);
            EVP_EncryptFinal_ex(c, tag, &n);
            EVP_CIPHER_CTX_ctrl(c, EVP_CTRL_GCM_GET_TAG, 16, tag);
        }
    EVP_CIPHER_CTX_free(c);
    EVP_CIPHER_free(aes);
    return (cpu_us() - begin) / WRITES;
}

static double loopback(void)
{
    struct sockaddr_in at = {.sin_family = AF_INET};
    socklen_t size = sizeof at;
    int server = socket(AF_INET, SOCK_STREAM, 0), a = socket(AF_INET, SOCK_STREAM, 0);
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    must(bind(server, (struct sockaddr *)&at, size) == 0 && listen(server, 1) == 0 &&
             getsockname(server, (struct sockaddr *)&at, &size) == 0 &&
             connect(a, (struct sockaddr *)&at, size) == 0,
         "loopback");
    int b = accept(server, NULL, NULL);
    double begin = cpu_us();
    move(a, b, (size_t)WRITES * BLOCK, TLS_RECORD);
    return (cpu_us() - begin) / WRITES;
}

/* Received bytes lie anywhere: a copy to aligned memory, and past the page cache. */
static double journal(int fd)
{
    char *room = aligned_alloc(BLOCK, BATCH);
    must(room != NULL, "aligned_alloc");
    memset(room, 0, BATCH);
    int refused = fcntl(fd, F_SETFL, O_DIRECT) != 0;
    double begin = cpu_us();
    for (int i = 0; i < ROUNDS; i++) {
        memcpy(room, data, BATCH);
        must(pwrite(fd, room, BATCH, (off_t)i * BATCH) == BATCH, "pwrite");
        if (i % 4 == 3)
            must(fdatasync(fd) == 0, "fdatasync");
        if (refused && i % 64 == 63)
            posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    }
    free(room);
    return (cpu_us() - begin) / WRITES;
}

int main(int argc, char **argv)
{
    must(argc == 2 && chdir(argv[1]) == 0, "directory");
    data = malloc(BATCH);
    other = malloc(BATCH);
    must(data != NULL && other != NULL, "malloc");
    for (int i = 0; i < BATCH; i++)
        data[i] = (char)(i * 2654435761u >> 13);
    memset(other, 0, BATCH);
    int image = open("limit.img", O_RDWR | O_CREAT | O_TRUNC, 0600);
    int log = open("limit.log", O_RDWR | O_CREAT | O_TRUNC, 0600);
    must(image >= 0 && log >= 0, "open");
    unlink("limit.img");
    unlink("limit.log");
    double n = nbd(), w = backing(image), r = reading(image), s = gcm(BLOCK), p = gcm(PIECE),
           t = gcm(TLS_RECORD), l = loopback(), j = journal(log);
    printf("{\"nbd\": %.2f, \"backing\": %.2f, \"read\": %.2f, \"seal\": %.2f, "
           "\"seal_large\": %.2f, \"tls\": %.2f, \"tcp\": %.2f, \"journal\": %.2f, "
           "\"sum\": %.2f, \"sync\": %.2f}\n",
           n, w, r, s, p, 2 * t, l, j, n + w + s + 2 * t + l + j, r + p + 2 * t + l + j);
    return 0;
}
