/* The least that can replicate: what vrep does with each write, with nothing checked and nothing
 * kept but what a write needs, in C, by as few threads as can overlap. So its rate is what this
 * machine's processors and disk let any such pipeline have.
 *
 * server   one client on a Unix socket, as null_nbd.c; it reads into a ring of 256 MiB, writes to
 *          FILE from there and answers; when the ring is full it waits
 * shipper  seals each payload (AES-256-GCM), sends it with a header of 64 bytes and its tag over
 *          TLS 1.3 on loopback TCP
 * target   another process: one thread receives, one appends to JOURNAL with O_DIRECT and syncs,
 * every 4 MiB or 20 ms, then tells through a pipe how many bytes are durable: only then is the
 *          ring's memory free
 *
 * usage: least_pipeline SOCKET BYTES FILE JOURNAL PEM
 *
 * gcc -O2 -Isrc/_native bench/micro/least_pipeline.c src/_native/crypto/gcm.c
 *     -lssl -lcrypto -lpthread -o build/least_pipeline */
#define _GNU_SOURCE
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/evp.h>
#include <openssl/ssl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>

#include "crypto/gcm.h"

#include "least_nbd.h"

#define RING (256u << 20)
#define PART (4u << 20)
#define HEADER 64
#define TAG 16
#define SEND_BYTES (1u << 20)
#define COMMIT_S 0.02

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void rest_ms(long ms)
{
    struct timespec t = {0, ms * 1000000};
    nanosleep(&t, NULL);
}

static void tls_must(int good, const char *what)
{
    if (!good) {
        fprintf(stderr, "%s: TLS\n", what);
        exit(1);
    }
}

/* ---- target ---------------------------------------------------------------- */

static char *parts[2];
static size_t filled[2];
static atomic_int full[2]; /* the receiver filled it; the writer empties it */

struct journal {
    int fd, durable;
};

static void *write_journal(void *arg)
{
    struct journal *j = arg;
    uint64_t total = 0, at = 0;
    for (int n = 0;; n ^= 1) {
        while (!atomic_load(&full[n]))
            usleep(100);
        size_t whole = (filled[n] + 4095) & ~(size_t)4095;
        must(pwrite(j->fd, parts[n], whole, (off_t)at) == (ssize_t)whole, "journal");
        must(fdatasync(j->fd) == 0, "fdatasync");
        at = (at + whole) % (1u << 30); /* a closed segment is another file's; here it is over */
        total += filled[n];
        filled[n] = 0;
        atomic_store(&full[n], 0);
        put(j->durable, &total, sizeof total);
    }
    return NULL;
}

static void target(int listener, const char *pem, const char *journal, int durable)
{
    SSL_CTX *context = SSL_CTX_new_ex(vrep_gcm_context(), VREP_GCM_PROPERTIES, TLS_server_method());
    SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION);
    tls_must(SSL_CTX_use_certificate_file(context, pem, SSL_FILETYPE_PEM) == 1 &&
                 SSL_CTX_use_PrivateKey_file(context, pem, SSL_FILETYPE_PEM) == 1,
             pem);
    int fd = accept(listener, NULL, NULL);
    SSL *tls = SSL_new(context);
    SSL_set_fd(tls, fd);
    tls_must(SSL_accept(tls) == 1, "accept");
    struct journal j = {open(journal, O_RDWR | O_CREAT | O_TRUNC | O_DIRECT, 0600), durable};
    must(j.fd >= 0, journal);
    for (int i = 0; i < 2; i++)
        must((parts[i] = aligned_alloc(4096, PART + TAG)) != NULL, "aligned_alloc");
    pthread_t writer;
    must(pthread_create(&writer, NULL, write_journal, &j) == 0, "thread");
    for (int n = 0;; n ^= 1) {
        while (atomic_load(&full[n]))
            usleep(100);
        double first_s = 0;
        size_t have = 0;
        while (have < PART) {
            struct pollfd p = {fd, POLLIN, 0};
            if (have && SSL_pending(tls) == 0) {
                int left_ms = (int)((first_s + COMMIT_S - now_s()) * 1e3);
                if (poll(&p, 1, left_ms > 0 ? left_ms : 0) == 0)
                    break;
            }
            int got = SSL_read(tls, parts[n] + have, (int)(PART - have));
            if (got <= 0)
                exit(0);
            if (!have)
                first_s = now_s();
            have += (size_t)got;
        }
        filled[n] = have;
        atomic_store(&full[n], 1);
    }
}

/* ---- source ---------------------------------------------------------------- */

static char *ring;          /* mapped twice, back to back */
static atomic_ullong head;  /* bytes of requests that are written and answered */
static atomic_ullong freed; /* bytes that are durable at the target */

static SSL *reach(int port)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    must(connect(fd, (struct sockaddr *)&at, sizeof at) == 0, "connect");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    SSL_CTX *context = SSL_CTX_new_ex(vrep_gcm_context(), VREP_GCM_PROPERTIES, TLS_client_method());
    SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION);
    SSL *tls = SSL_new(context);
    SSL_set_fd(tls, fd);
    tls_must(SSL_connect(tls) == 1, "connect");
    return tls;
}

/* Sealed bytes follow each other at the target in the order of the ring: a queue of how many bytes
 * of both are done at the end of each send. */
#define SENDS 65536
static struct {
    uint64_t sealed, taken;
} sends[SENDS];
static atomic_ullong sent;

static void *take_durable(void *arg)
{
    int fd = *(int *)arg;
    uint64_t total, done = 0;
    for (;;) {
        get(fd, &total, sizeof total);
        while (done < atomic_load(&sent) && sends[done % SENDS].sealed <= total)
            atomic_store(&freed, sends[done++ % SENDS].taken);
    }
    return NULL;
}

static void *ship(void *arg)
{
    SSL *tls = arg;
    unsigned char key[32] = {1}, nonce[12] = {0};
    EVP_CIPHER_CTX *c = EVP_CIPHER_CTX_new();
    EVP_EncryptInit_ex(c, EVP_CIPHER_fetch(vrep_gcm_context(), "AES-256-GCM", VREP_GCM_PROPERTIES),
                       NULL, key, nonce);
    char *out = malloc(SEND_BYTES + (34u << 20));
    must(out != NULL, "malloc");
    uint64_t tail = 0, seq = 0, sealed = 0;
    for (;;) {
        uint64_t to = atomic_load(&head);
        if (to - tail < 256 * 4096) {
            rest_ms(2);
            to = atomic_load(&head);
        }
        size_t bytes = 0;
        while (tail < to && bytes < SEND_BYTES) {
            struct request q;
            memcpy(&q, ring + tail % RING, sizeof q);
            uint32_t length = be32toh(q.bytes);
            if (be16toh(q.type) == 1) {
                int n;
                seq++;
                memset(out + bytes, 0, HEADER);
                memcpy(out + bytes, &q, sizeof q);
                memcpy(nonce, &seq, 8);
                EVP_EncryptInit_ex(c, NULL, NULL, NULL, nonce);
                EVP_EncryptUpdate(c, NULL, &n, (unsigned char *)out + bytes, HEADER);
                EVP_EncryptUpdate(c, (unsigned char *)out + bytes + HEADER, &n,
                                  (unsigned char *)ring + tail % RING + sizeof q, (int)length);
                EVP_EncryptFinal_ex(c, (unsigned char *)out + bytes + HEADER + length, &n);
                EVP_CIPHER_CTX_ctrl(c, EVP_CTRL_GCM_GET_TAG, TAG, out + bytes + HEADER + length);
                bytes += HEADER + length + TAG;
                tail += length;
            }
            tail += sizeof q;
        }
        for (size_t at = 0; at < bytes;) {
            int n = SSL_write(tls, out + at, (int)(bytes - at));
            tls_must(n > 0, "write");
            at += (size_t)n;
        }
        if (bytes) {
            uint64_t n = atomic_load(&sent);
            sealed += bytes;
            sends[n % SENDS].sealed = sealed;
            sends[n % SENDS].taken = tail;
            atomic_store(&sent, n + 1);
        }
    }
    return NULL;
}

static void serve(int fd, int file)
{
    static char replies[1 << 20];
    uint64_t have = atomic_load(&head), at = have;
    for (;;) {
        uint64_t room;
        while ((room = RING - (have - atomic_load(&freed))) < (33u << 20))
            rest_ms(1);
        ssize_t n = read(fd, ring + have % RING, room < (32u << 20) ? room : 32u << 20);
        if (n <= 0)
            return;
        have += (uint64_t)n;
        size_t out = 0;
        while (have - at >= sizeof(struct request)) {
            struct request q;
            memcpy(&q, ring + at % RING, sizeof q);
            uint32_t bytes = be32toh(q.bytes), type = be16toh(q.type);
            uint64_t whole = sizeof q + (type == 1 ? bytes : 0);
            if (type == 2) {
                atomic_store(&head, at);
                return;
            }
            if (have - at < whole)
                break;
            if (type == 1)
                must(pwrite(file, ring + at % RING + sizeof q, bytes, (off_t)be64toh(q.offset)) ==
                         (ssize_t)bytes,
                     "pwrite");
            uint32_t start[2] = {htobe32(0x67446698), 0};
            memcpy(replies + out, start, 8);
            memcpy(replies + out + 8, &q.cookie, 8);
            out += 16;
            if (out > sizeof replies - 16) {
                put(fd, replies, out);
                out = 0;
            }
            at += whole;
        }
        atomic_store(&head, at);
        put(fd, replies, out);
    }
}

static void make_ring(void)
{
    int fd = memfd_create("ring", 0);
    must(fd >= 0 && ftruncate(fd, RING) == 0, "ring");
    ring = mmap(NULL, 2 * (size_t)RING, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (size_t i = 0; i < 2; i++)
        must(mmap(ring + i * RING, RING, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) !=
                 MAP_FAILED,
             "mmap");
    memset(ring, 0, RING);
}

int main(int argc, char **argv)
{
    must(argc == 6, "usage: least_pipeline SOCKET BYTES FILE JOURNAL PEM");
    struct sockaddr_in at = {.sin_family = AF_INET};
    socklen_t size = sizeof at;
    int tcp = socket(AF_INET, SOCK_STREAM, 0), durable[2], file = open(argv[3], O_RDWR);
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    must(file >= 0, argv[3]);
    must(bind(tcp, (struct sockaddr *)&at, size) == 0 && listen(tcp, 1) == 0 &&
             getsockname(tcp, (struct sockaddr *)&at, &size) == 0 && pipe(durable) == 0,
         "loopback");
    if (fork() == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        target(tcp, argv[5], argv[4], durable[1]);
    }
    make_ring();
    SSL *tls = reach(ntohs(at.sin_port));
    int listener = least_listen(argv[1]);
    pthread_t shipper, taker;
    must(pthread_create(&shipper, NULL, ship, tls) == 0 &&
             pthread_create(&taker, NULL, take_durable, &durable[0]) == 0,
         "thread");
    for (;;) {
        int fd = accept(listener, NULL, NULL), room = 4 << 20;
        must(fd >= 0, "accept");
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &room, sizeof room);
        haggle(fd, strtoull(argv[2], NULL, 10));
        serve(fd, file);
        close(fd);
    }
}
