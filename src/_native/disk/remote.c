/* Remote: a disk that is read through a running VM's NBD server, for an image that is not what its
 * guest sees as it stands (qcow2).  To be read only.
 *
 * One connection, made at the first read and made anew after any failure; one request at a time.
 * Whatever goes wrong fails that read: a server that is gone, hangs for longer than a request may
 * take, has another size, or says what it may not.  The baseline of the NBD protocol is enough:
 * fixed newstyle, NBD_OPT_GO, simple replies. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "base/atomic.h"
#include "base/endian.h"
#include "base/status.h"
#include "disk/internal.h"

#define REQUEST_MS 5000
#define OPTION_BYTES_MAX 4096u /* of a reply in the handshake */

#define MAGIC UINT64_C(0x4e42444d41474943) /* NBDMAGIC */
#define OPTION_MAGIC UINT64_C(0x49484156454f5054)
#define OPTION_REPLY_MAGIC UINT64_C(0x3e889045565a9)
#define REQUEST_MAGIC 0x25609513u
#define REPLY_MAGIC 0x67446698u
#define FIXED_NEWSTYLE 1u
#define NO_ZEROES 2u
#define OPTION_GO 7u
#define REPLY_ACK 1u
#define REPLY_INFO 3u
#define REPLY_IS_ERROR 0x80000000u
#define INFO_EXPORT 0u
#define COMMAND_READ 0u

struct vrep_remote {
    pthread_mutex_t lock; /* held over a request */
    int fd;               /* -1: not connected */
    uint32_t stale;       /* atomic: who answered on the socket is asked no more */
    uint64_t handle;
    struct sockaddr_un address;
    char name[VREP_NAME_BYTES];
};

static int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* 0 or an errno. */
static int wait_for(int fd, short events, int64_t until_ms)
{
    for (;;) {
        int64_t left = until_ms - now_ms();
        struct pollfd one = {.fd = fd, .events = events};
        int ready = left > 0 ? poll(&one, 1, (int)left) : 0;
        if (ready > 0)
            return 0;
        if (ready == 0)
            return ETIMEDOUT;
        if (errno != EINTR)
            return errno;
    }
}

static int receive(int fd, struct iovec *iov, int iovcnt, uint64_t length, int64_t until_ms)
{
    while (length > 0) {
        struct msghdr message = {.msg_iov = iov, .msg_iovlen = (size_t)(iovcnt < 64 ? iovcnt : 64)};
        ssize_t n = recvmsg(fd, &message, MSG_DONTWAIT);
        if (n == 0)
            return ECONNRESET;
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno != EAGAIN)
            return errno;
        if (n < 0) {
            int error = wait_for(fd, POLLIN, until_ms);
            if (error != 0)
                return error;
            continue;
        }
        vrep_iov_advance(&iov, &iovcnt, (size_t)n);
        length -= (uint64_t)n;
    }
    return 0;
}

static int receive_flat(int fd, void *to, size_t bytes, int64_t until_ms)
{
    struct iovec iov = {.iov_base = to, .iov_len = bytes};
    return receive(fd, &iov, 1, bytes, until_ms);
}

static int send_all(int fd, const void *from, size_t bytes, int64_t until_ms)
{
    const char *at = from;
    while (bytes > 0) {
        ssize_t n = send(fd, at, bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno != EAGAIN)
            return errno;
        if (n < 0) {
            int error = wait_for(fd, POLLOUT, until_ms);
            if (error != 0)
                return error;
            continue;
        }
        at += n;
        bytes -= (size_t)n;
    }
    return 0;
}

/* ---- handshake ------------------------------------------------------------------- */

/* Replies to NBD_OPT_GO, until the last: EPROTO for what may not be, EIO for another size. */
static int hear_go(const struct vrep_disk *disk, int fd, int64_t until_ms)
{
    bool sized = false;
    for (;;) {
        uint8_t head[20], body[OPTION_BYTES_MAX];
        int error = receive_flat(fd, head, sizeof head, until_ms);
        if (error != 0)
            return error;
        uint32_t type = vrep_be_load_u32(head + 12), bytes = vrep_be_load_u32(head + 16);
        if (vrep_be_load_u64(head) != OPTION_REPLY_MAGIC ||
            vrep_be_load_u32(head + 8) != OPTION_GO || bytes > sizeof body)
            return EPROTO;
        error = receive_flat(fd, body, bytes, until_ms);
        if (error != 0)
            return error;
        if ((type & REPLY_IS_ERROR) != 0)
            return ENOENT; /* no such export */
        if (type == REPLY_ACK)
            return sized ? 0 : EPROTO;
        if (type != REPLY_INFO || bytes < 2)
            return EPROTO;
        if (vrep_be_load_u16(body) != INFO_EXPORT)
            continue;
        if (bytes != 12)
            return EPROTO;
        if (vrep_be_load_u64(body + 2) != disk->bytes)
            return EIO;
        sized = true;
    }
}

static int greet(const struct vrep_disk *disk, int fd, int64_t until_ms)
{
    uint8_t hello[18];
    int error = receive_flat(fd, hello, sizeof hello, until_ms);
    if (error != 0)
        return error;
    uint16_t flags = vrep_be_load_u16(hello + 16);
    if (vrep_be_load_u64(hello) != MAGIC || vrep_be_load_u64(hello + 8) != OPTION_MAGIC ||
        (flags & FIXED_NEWSTYLE) == 0)
        return EPROTO;
    size_t name = strlen(disk->remote->name);
    uint8_t go[4 + 16 + 4 + VREP_NAME_BYTES + 2];
    vrep_be_store_u32(go, flags & (FIXED_NEWSTYLE | NO_ZEROES));
    vrep_be_store_u64(go + 4, OPTION_MAGIC);
    vrep_be_store_u32(go + 12, OPTION_GO);
    vrep_be_store_u32(go + 16, (uint32_t)(4 + name + 2));
    vrep_be_store_u32(go + 20, (uint32_t)name);
    memcpy(go + 24, disk->remote->name, name);
    vrep_be_store_u16(go + 24 + name, 0); /* nothing is asked for beside the size */
    error = send_all(fd, go, 24 + name + 2, until_ms);
    return error != 0 ? error : hear_go(disk, fd, until_ms);
}

static int connected(struct vrep_disk *disk, int64_t until_ms)
{
    struct vrep_remote *remote = disk->remote;
    if (remote->fd >= 0)
        return 0;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return errno;
    int error = 0;
    /* Of a Unix socket it ends at once, or its backlog is full. */
    if (connect(fd, (const struct sockaddr *)&remote->address, sizeof remote->address) != 0)
        error = errno;
    if (error == 0)
        error = greet(disk, fd, until_ms);
    if (error != 0) {
        close(fd);
        return error;
    }
    remote->fd = fd;
    return 0;
}

/* ---- reading ----------------------------------------------------------------------- */

static int read_range(struct vrep_disk *disk, struct vrep_io *io, int64_t until_ms)
{
    struct vrep_remote *remote = disk->remote;
    if (vrep_load_acquire_u32(&remote->stale) != 0) {
        vrep_store_release_u32(&remote->stale, 0);
        if (remote->fd >= 0)
            close(remote->fd);
        remote->fd = -1;
    }
    int error = connected(disk, until_ms);
    if (error != 0)
        return error;
    uint8_t request[28], reply[16];
    vrep_be_store_u32(request, REQUEST_MAGIC);
    vrep_be_store_u16(request + 4, 0);
    vrep_be_store_u16(request + 6, COMMAND_READ);
    vrep_be_store_u64(request + 8, ++remote->handle);
    vrep_be_store_u64(request + 16, io->offset);
    vrep_be_store_u32(request + 24, (uint32_t)io->length);
    error = send_all(remote->fd, request, sizeof request, until_ms);
    if (error == 0)
        error = receive_flat(remote->fd, reply, sizeof reply, until_ms);
    if (error == 0 &&
        (vrep_be_load_u32(reply) != REPLY_MAGIC || vrep_be_load_u64(reply + 8) != remote->handle))
        error = EPROTO;
    if (error == 0 && vrep_be_load_u32(reply + 4) != 0)
        error = EIO; /* no data follow, but to connect anew costs little */
    if (error == 0)
        error = receive(remote->fd, io->iov, io->iovcnt, io->length, until_ms);
    if (error != 0) {
        close(remote->fd);
        remote->fd = -1;
    }
    return error;
}

int vrep_remote_read(struct vrep_io *io)
{
    struct vrep_disk *disk = io->disk;
    pthread_mutex_lock(&disk->remote->lock);
    int error = read_range(disk, io, now_ms() + REQUEST_MS);
    pthread_mutex_unlock(&disk->remote->lock);
    return error;
}

/* ---- open --------------------------------------------------------------------------- */

int vrep_remote_open(struct vrep_engine *engine, const char *where, uint64_t bytes,
                     struct vrep_disk **out)
{
    const char *colon = strchr(where, ':');
    if (colon == NULL || colon == where || (size_t)(colon - where) >= VREP_NAME_BYTES ||
        colon[1] != '/' || bytes == 0 || bytes % VREP_SECTOR_BYTES != 0)
        return VREP_E_INVALID;
    struct vrep_disk *disk = calloc(1, sizeof *disk);
    struct vrep_remote *remote = calloc(1, sizeof *remote);
    if (disk == NULL || remote == NULL || strlen(colon + 1) >= sizeof remote->address.sun_path) {
        bool large = disk != NULL && remote != NULL;
        free(disk);
        free(remote);
        return large ? VREP_E_INVALID : VREP_E_NOMEM;
    }
    memcpy(remote->name, where, (size_t)(colon - where));
    remote->address.sun_family = AF_UNIX;
    memcpy(remote->address.sun_path, colon + 1, strlen(colon + 1) + 1);
    remote->fd = -1;
    pthread_mutex_init(&remote->lock, NULL);
    disk->engine = engine;
    disk->fd = -1;
    disk->remote = remote;
    disk->read_only = true;
    disk->align_bytes = 1;
    disk->block_bytes = 4096;
    disk->bytes = bytes;
    *out = disk;
    return VREP_OK;
}

void vrep_remote_free(struct vrep_disk *disk)
{
    if (disk->remote->fd >= 0)
        close(disk->remote->fd);
    pthread_mutex_destroy(&disk->remote->lock);
    free(disk->remote);
}

void vrep_remote_forget(struct vrep_disk *disk)
{
    vrep_store_release_u32(&disk->remote->stale, 1);
}

bool vrep_disk_is_remote(const struct vrep_disk *disk)
{
    return disk->remote != NULL;
}
