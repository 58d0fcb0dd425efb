#include "track/hash.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define XXH_STATIC_LINKING_ONLY /* for the size of XXH3_state_t */
#if defined(__x86_64__) || defined(__i386__)
#include <xxh_x86dispatch.h>
#else
#include <xxhash.h>
#endif

#include "base/status.h"
#include "format/checksum.h"

/* One step of a worker over a buffer: long enough that taking the lock does not
 * show, short enough that threads end together. */
#define BUFFER_STEP_BYTES (UINT64_C(1) << 20)
/* One pread: it stays in a core's L2 until it is hashed. */
#define READ_BYTES (UINT32_C(256) << 10)
/* Blocks of a hole filled in one step. */
#define HOLE_STEP_BLOCKS (UINT64_C(1) << 20)
#define IO_ALIGN 4096u

/* What to hash, and the cursor that the workers share under `lock`. Offsets of a
 * file range are absolute in the file. */
struct job {
    const struct vrep_hash_options *options;
    uint32_t block_size;
    uint32_t words; /* of out, per block */
    uint64_t len;
    uint64_t count;
    uint64_t *out;
    uint8_t *zeros;

    const uint8_t *data; /* NULL: read from fd */
    int fd;
    uint64_t offset;

    pthread_mutex_t lock;
    uint64_t next;               /* first block not yet handed out */
    bool seeks;                  /* the file system can tell holes */
    uint64_t data_from, data_to; /* the data extent last found */
    int status;                  /* the first failure ends all workers */
};

struct step {
    uint64_t first;
    uint64_t count;
    bool hole;
};

/* The hash of a whole zero block, once a worker has needed it. */
struct zero_hash {
    bool known;
    uint64_t value[2];
};

uint64_t vrep_hash_count(uint64_t len, uint32_t block_size)
{
    return len / block_size + (len % block_size != 0);
}

bool vrep_hash_is_zero(const void *data, size_t len)
{
    const uint8_t *p = data;
    uint64_t head = 0;

    if (len < sizeof head) {
        for (size_t i = 0; i < len; i++)
            head |= p[i];
        return head == 0;
    }
    memcpy(&head, p, sizeof head);
    /* The first word is zero and each byte equals the one a word before it. libc's
     * memcmp brings its own dispatch over vector widths. */
    return head == 0 && memcmp(p, p + sizeof head, len - sizeof head) == 0;
}

static void hash128(const void *data, size_t len, const void *secret, size_t secret_len,
                    uint64_t *out)
{
    XXH128_hash_t hash = secret == NULL ? XXH3_128bits(data, len)
                                        : XXH3_128bits_withSecret(data, len, secret, secret_len);

    out[0] = hash.low64;
    out[1] = hash.high64;
}

void vrep_hash_one128(const void *data, size_t len, const void *secret, size_t secret_len,
                      uint64_t out[2])
{
    vrep_checksum_prepare();
    hash128(data, len, secret, secret_len, out);
}

static void hash_any(const struct job *job, const void *data, size_t len, uint64_t *out)
{
    const void *secret = job->options->secret;
    size_t secret_len = job->options->secret_len;

    if (job->words == 2)
        hash128(data, len, secret, secret_len, out);
    else if (secret == NULL)
        *out = XXH3_64bits(data, len);
    else
        *out = XXH3_64bits_withSecret(data, len, secret, secret_len);
}

/* Hashes the blocks from `first` on that `len` bytes at `data` hold; only the last
 * block of the job may be short. */
static void hash_run(const struct job *job, struct zero_hash *zero, const uint8_t *data,
                     uint64_t len, uint64_t first)
{
    uint64_t *out = job->out + first * job->words;
    uint8_t *zeros = job->zeros == NULL ? NULL : job->zeros + first;

    while (len > 0) {
        size_t n = len < job->block_size ? (size_t)len : job->block_size;
        bool is_zero = vrep_hash_is_zero(data, n);

        if (is_zero && zero->known && n == job->block_size) {
            memcpy(out, zero->value, job->words * sizeof *out);
        } else {
            hash_any(job, data, n, out);
            if (is_zero && n == job->block_size) {
                memcpy(zero->value, out, job->words * sizeof *out);
                zero->known = true;
            }
        }
        if (zeros != NULL)
            *zeros++ = is_zero;
        out += job->words;
        data += n;
        len -= n;
    }
}

/* End of the file or device. Moves the file position. */
static int end_of_file(int fd, uint64_t *end)
{
    off_t at = lseek(fd, 0, SEEK_END);

    if (at < 0)
        return vrep_status_from_errno(errno);
    *end = (uint64_t)at;
    return VREP_OK;
}

/*
 * Finds the data extent at or after `at`, which lies inside the range; with no
 * data left it is empty and at the range's end. A file system (or a block device)
 * that cannot tell makes the rest one extent.
 */
static int find_extent(struct job *job, uint64_t at)
{
    uint64_t end = job->offset + job->len;
    off_t from, to;

    job->data_from = at;
    job->data_to = end;
    if (!job->seeks)
        return VREP_OK;

    from = lseek(job->fd, (off_t)at, SEEK_DATA);
    if (from < 0 && errno == ENXIO) {
        /* A hole up to the end of the file, or the file has just become shorter. */
        uint64_t size = 0;
        int status = end_of_file(job->fd, &size);

        if (status == VREP_OK && size < end)
            status = VREP_E_RANGE;
        job->data_from = end;
        return status;
    }
    to = from < 0 ? -1 : lseek(job->fd, from, SEEK_HOLE);
    if (to < 0) {
        /* No such whence here, or the hole moved under us: reading settles both. */
        job->seeks = errno == ENXIO;
        return VREP_OK;
    }
    if ((uint64_t)from < at || to < from) {
        /* A FUSE server may answer anything; our arithmetic may not depend on it. */
        job->seeks = false;
        return VREP_OK;
    }
    if ((uint64_t)from >= end) {
        job->data_from = end;
        return VREP_OK;
    }
    job->data_from = (uint64_t)from;
    if ((uint64_t)to < end)
        job->data_to = (uint64_t)to;
    return VREP_OK;
}

/* Chooses the next step over a file; called under the lock with blocks left. */
static int step_over_file(struct job *job, struct step *step)
{
    uint64_t at = job->offset + job->next * job->block_size;
    uint64_t end = job->offset + job->len;
    uint64_t limit = READ_BYTES > job->block_size ? READ_BYTES / job->block_size : 1;
    uint64_t until;

    if (at >= job->data_to) {
        int status = find_extent(job, at);

        if (status != VREP_OK)
            return status;
    }
    /* A block that only begins in a hole is read whole. */
    until = job->data_from == end ? job->count : (job->data_from - job->offset) / job->block_size;
    step->hole = until > job->next;
    if (step->hole) {
        limit = HOLE_STEP_BLOCKS;
    } else {
        until = vrep_hash_count(job->data_to - job->offset, job->block_size);
        if (until <= job->next) /* the extent vanished between two lseeks */
            until = job->next + 1;
    }
    step->count = until - job->next < limit ? until - job->next : limit;
    return VREP_OK;
}

static void fail(struct job *job, int status)
{
    pthread_mutex_lock(&job->lock);
    if (job->status == VREP_OK)
        job->status = status;
    pthread_mutex_unlock(&job->lock);
}

static bool take_step(struct job *job, struct step *step)
{
    bool taken = false;

    pthread_mutex_lock(&job->lock);
    if (job->status == VREP_OK && job->next < job->count) {
        step->first = job->next;
        if (job->data != NULL) {
            uint64_t limit =
                BUFFER_STEP_BYTES > job->block_size ? BUFFER_STEP_BYTES / job->block_size : 1;
            uint64_t left = job->count - job->next;

            step->hole = false;
            step->count = left < limit ? left : limit;
        } else {
            job->status = step_over_file(job, step);
        }
        taken = job->status == VREP_OK;
        if (taken)
            job->next += step->count;
    }
    pthread_mutex_unlock(&job->lock);
    return taken;
}

/* Reads exactly `len` bytes. Asks for whole I/O units, as O_DIRECT wants; what
 * lies past `len` is dropped. `buffer` has room for that. */
static int read_all(int fd, uint8_t *buffer, size_t len, uint64_t at)
{
    size_t asked = (len + IO_ALIGN - 1) & ~(size_t)(IO_ALIGN - 1);
    size_t done = 0;

    while (done < len) {
        ssize_t n = pread(fd, buffer + done, asked - done, (off_t)(at + done));

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return vrep_status_from_errno(errno);
        if (n == 0)
            return VREP_E_RANGE;
        done += (size_t)n;
    }
    return VREP_OK;
}

/* The hash of `len` zero bytes, of which the process need not hold that many. */
static void hash_zeros(const struct job *job, size_t len, uint64_t *out)
{
    static const uint8_t page[4096];
    const void *secret = job->options->secret;
    size_t secret_len = job->options->secret_len;
    bool wide = job->words == 2;
    XXH3_state_t state;

    if (len <= sizeof page) {
        hash_any(job, page, len, out);
        return;
    }
    /* These calls fail only for a NULL state or a short secret. */
    if (secret == NULL)
        (void)(wide ? XXH3_128bits_reset(&state) : XXH3_64bits_reset(&state));
    else
        (void)(wide ? XXH3_128bits_reset_withSecret(&state, secret, secret_len)
                    : XXH3_64bits_reset_withSecret(&state, secret, secret_len));
    while (len > 0) {
        size_t n = len < sizeof page ? len : sizeof page;

        (void)(wide ? XXH3_128bits_update(&state, page, n) : XXH3_64bits_update(&state, page, n));
        len -= n;
    }
    if (wide) {
        XXH128_hash_t hash = XXH3_128bits_digest(&state);

        out[0] = hash.low64;
        out[1] = hash.high64;
    } else {
        *out = XXH3_64bits_digest(&state);
    }
}

static void fill_hole(const struct job *job, struct zero_hash *zero, const struct step *step)
{
    uint64_t tail = job->len % job->block_size;
    bool short_end = tail != 0 && step->first + step->count == job->count;
    uint64_t whole = step->count - short_end;
    uint64_t *out = job->out + step->first * job->words;

    if (whole > 0 && !zero->known) {
        hash_zeros(job, job->block_size, zero->value);
        zero->known = true;
    }
    for (uint64_t i = 0; i < whole; i++, out += job->words)
        memcpy(out, zero->value, job->words * sizeof *out);
    if (short_end)
        hash_zeros(job, (size_t)tail, out);
    if (job->zeros != NULL)
        memset(job->zeros + step->first, 1, step->count);
}

static int read_step(const struct job *job, struct zero_hash *zero, const struct step *step,
                     uint8_t *buffer)
{
    uint64_t begin = step->first * job->block_size;
    uint64_t len = step->count * job->block_size;
    int status;

    if (len > job->len - begin)
        len = job->len - begin;
    status = read_all(job->fd, buffer, (size_t)len, job->offset + begin);
    if (status == VREP_OK)
        hash_run(job, zero, buffer, len, step->first);
    return status;
}

static void *work(void *arg)
{
    struct job *job = arg;
    struct zero_hash zero = {.known = false};
    void *buffer = NULL;
    struct step step = {.count = 0};

    if (job->data == NULL) {
        size_t room = job->block_size > READ_BYTES ? job->block_size : READ_BYTES;

        if (posix_memalign(&buffer, IO_ALIGN, room) != 0) {
            fail(job, VREP_E_NOMEM);
            return NULL;
        }
    }
    while (take_step(job, &step)) {
        if (step.hole) {
            fill_hole(job, &zero, &step);
        } else if (job->data == NULL) {
            int status = read_step(job, &zero, &step, buffer);

            if (status != VREP_OK)
                fail(job, status);
        } else {
            uint64_t begin = step.first * job->block_size;
            uint64_t len = step.count * job->block_size;

            if (len > job->len - begin)
                len = job->len - begin;
            hash_run(job, &zero, job->data + begin, len, step.first);
        }
    }
    free(buffer);
    return NULL;
}

/* Runs the job on the caller's thread and on as many helpers as there is work for. */
static int run(struct job *job)
{
    pthread_t helpers[VREP_HASH_THREADS_MAX];
    uint64_t step_bytes = job->data != NULL ? BUFFER_STEP_BYTES : READ_BYTES;
    uint64_t useful = vrep_hash_count(job->len, (uint32_t)step_bytes);
    unsigned started = 0;

    if (job->count == 0)
        return VREP_OK;
    vrep_checksum_prepare();
    pthread_mutex_init(&job->lock, NULL);
    if (job->options->threads > 1 && useful > 1) {
        sigset_t all, old;

        /* The host process's handlers belong on its own threads. */
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &old);
        while (started + 1 < job->options->threads && started + 1 < useful &&
               pthread_create(&helpers[started], NULL, work, job) == 0)
            started++;
        pthread_sigmask(SIG_SETMASK, &old, NULL);
    }
    work(job);
    for (unsigned i = 0; i < started; i++)
        pthread_join(helpers[i], NULL);
    pthread_mutex_destroy(&job->lock);
    return job->status;
}

static bool options_lawful(const struct vrep_hash_options *options)
{
    uint32_t size = options->block_size;

    return size >= VREP_HASH_BLOCK_MIN && size <= VREP_HASH_BLOCK_MAX && (size & (size - 1)) == 0 &&
           (options->bits == 64 || options->bits == 128) && options->threads >= 1 &&
           options->threads <= VREP_HASH_THREADS_MAX &&
           (options->secret == NULL ? options->secret_len == 0
                                    : options->secret_len >= VREP_HASH_SECRET_MIN);
}

static bool overlap(const void *a, uint64_t a_len, const void *b, uint64_t b_len)
{
    uintptr_t from_a = (uintptr_t)a, from_b = (uintptr_t)b;

    return from_a < from_b + b_len && from_b < from_a + a_len;
}

static struct job job_for(const struct vrep_hash_options *options, uint64_t len, uint64_t *out,
                          uint8_t *zeros)
{
    return (struct job){
        .options = options,
        .block_size = options->block_size,
        .words = options->bits / 64,
        .len = len,
        .count = vrep_hash_count(len, options->block_size),
        .out = out,
        .zeros = zeros,
        .fd = -1,
        .status = VREP_OK,
    };
}

int vrep_hash_blocks(const struct vrep_hash_options *options, const void *data, size_t len,
                     uint64_t *out, uint8_t *zeros)
{
    struct job job;

    if (!options_lawful(options))
        return VREP_E_INVALID;
    if (len == 0)
        return VREP_OK;
    job = job_for(options, len, out, zeros);
    if (data == NULL || out == NULL ||
        overlap(data, len, out, job.count * job.words * sizeof *out) ||
        (zeros != NULL && overlap(data, len, zeros, job.count)))
        return VREP_E_INVALID;
    job.data = data;
    return run(&job);
}

int vrep_hash_file(const struct vrep_hash_options *options, int fd, uint64_t offset, uint64_t len,
                   uint64_t *out, uint8_t *zeros)
{
    struct job job;
    uint64_t end = 0;
    off_t position;
    int status;

    if (!options_lawful(options) || (len > 0 && out == NULL))
        return VREP_E_INVALID;
    if (offset > INT64_MAX || len > INT64_MAX - offset)
        return VREP_E_RANGE;
    position = lseek(fd, 0, SEEK_CUR);
    if (position < 0)
        return vrep_status_from_errno(errno);
    status = end_of_file(fd, &end);
    if (status == VREP_OK && offset + len > end)
        status = VREP_E_RANGE;
    if (status == VREP_OK) {
        job = job_for(options, len, out, zeros);
        job.fd = fd;
        job.offset = offset;
        job.seeks = true;
        job.data_from = offset;
        job.data_to = offset; /* nothing found yet */
        status = run(&job);
    }
    if (lseek(fd, position, SEEK_SET) < 0 && status == VREP_OK)
        status = vrep_status_from_errno(errno);
    return status;
}
