#include "track/hash.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The oracle: XXH3 compiled into this file without any vector code. */
#define XXH_INLINE_ALL
#define XXH_VECTOR 0
#include <xxhash.h>

#include "check.h"

#define ROOM (UINT32_C(3) << 20)
#define MOST_BLOCKS (ROOM / VREP_HASH_BLOCK_MIN + 1)

static uint8_t *data; /* ROOM + 64 bytes */
static uint8_t secret[512];
static uint64_t out[2 * MOST_BLOCKS + 2];
static uint8_t zeros[MOST_BLOCKS + 1];

/* What goes through our pread and lseek below: the library under test binds to them. */
static struct {
    pthread_mutex_t lock;
    uint64_t bytes;     /* asked for */
    uint64_t interrupt; /* so many EINTR first */
    uint64_t most;      /* bytes given per call, 0: all */
    off_t end;          /* nothing from here on, 0: no such end */
    off_t broken;       /* EIO for a read across this offset, 0: none */
    int seek_error;     /* of SEEK_DATA and SEEK_HOLE, 0: none */
    off_t seek_shift;   /* added to what they answer */
    off_t cut;          /* the size told to the first SEEK_END, 0: the true one */
} reads = {.lock = PTHREAD_MUTEX_INITIALIZER};

ssize_t pread(int fd, void *buffer, size_t len, off_t at)
{
    pthread_mutex_lock(&reads.lock);
    bool interrupted = reads.interrupt > 0;
    reads.interrupt -= interrupted;
    reads.bytes += len;
    pthread_mutex_unlock(&reads.lock);

    if (interrupted) {
        errno = EINTR;
        return -1;
    }
    if (reads.broken != 0 && at <= reads.broken && reads.broken < at + (off_t)len) {
        errno = EIO;
        return -1;
    }
    if (reads.end != 0 && at >= reads.end)
        return 0;
    if (reads.most != 0 && len > reads.most)
        len = reads.most;
    return syscall(SYS_pread64, fd, buffer, len, at);
}

off_t lseek(int fd, off_t at, int whence)
{
    off_t got;

    if (whence == SEEK_END && reads.cut != 0) {
        got = reads.cut;
        reads.cut = 0;
        return got;
    }
    if (whence != SEEK_DATA && whence != SEEK_HOLE)
        return syscall(SYS_lseek, fd, at, whence);
    if (reads.seek_error != 0) {
        errno = reads.seek_error;
        return -1;
    }
    got = syscall(SYS_lseek, fd, at, whence);
    return got < 0 || got + reads.seek_shift < 0 ? got : got + reads.seek_shift;
}

static void reads_as_they_are(void)
{
    reads.seek_error = 0;
    reads.seek_shift = reads.cut = 0;
    reads.bytes = reads.interrupt = reads.most = 0;
    reads.end = reads.broken = 0;
}

static void fill_random(uint8_t *to, size_t len)
{
    for (size_t i = 0; i < len; i += 8) {
        uint64_t word = check_random();
        memcpy(to + i, &word, len - i < 8 ? len - i : 8);
    }
}

static bool naive_is_zero(const uint8_t *p, size_t len)
{
    for (size_t i = 0; i < len; i++)
        if (p[i] != 0)
            return false;
    return true;
}

/* Compares out and zeros with the oracle over `len` bytes at `p`. */
static void check_against_oracle(const struct vrep_hash_options *o, const uint8_t *p, uint64_t len)
{
    const uint64_t *got = out;

    for (uint64_t i = 0, at = 0; at < len; i++, at += o->block_size) {
        size_t n = len - at < o->block_size ? (size_t)(len - at) : o->block_size;

        if (o->bits == 64) {
            uint64_t want = o->secret == NULL
                                ? XXH3_64bits(p + at, n)
                                : XXH3_64bits_withSecret(p + at, n, o->secret, o->secret_len);
            CHECK_EQ(*got++, want);
        } else {
            XXH128_hash_t want = o->secret == NULL
                                     ? XXH3_128bits(p + at, n)
                                     : XXH3_128bits_withSecret(p + at, n, o->secret, o->secret_len);
            CHECK_EQ(*got++, want.low64);
            CHECK_EQ(*got++, want.high64);
        }
        CHECK_EQ(zeros[i], naive_is_zero(p + at, n));
    }
}

static void soil_results(void)
{
    memset(out, 0xa5, sizeof out);
    memset(zeros, 0xa5, sizeof zeros);
}

static void check_nothing_past(const struct vrep_hash_options *o, uint64_t len)
{
    uint64_t count = vrep_hash_count(len, o->block_size);

    CHECK_EQ(out[count * o->bits / 64], UINT64_C(0xa5a5a5a5a5a5a5a5));
    CHECK_EQ(zeros[count], 0xa5);
}

static struct vrep_hash_options random_options(void)
{
    struct vrep_hash_options o = {
        .block_size = VREP_HASH_BLOCK_MIN << check_random_below(13),
        .bits = check_random_below(2) ? 64 : 128,
        .threads = 1 + (uint32_t)check_random_below(5),
    };

    if (check_random_below(2)) {
        o.secret = secret;
        o.secret_len =
            VREP_HASH_SECRET_MIN + check_random_below(sizeof secret - VREP_HASH_SECRET_MIN + 1);
    }
    return o;
}

static uint64_t random_len(uint32_t block_size)
{
    uint64_t len = check_random_below(ROOM + 1);

    switch (check_random_below(4)) {
    case 0:
        return len;
    case 1:
        return len - len % block_size; /* whole blocks */
    case 2:
        return check_random_below(300); /* the short inputs of XXH3 */
    default:
        return check_random_below(5 * (uint64_t)block_size) % (ROOM + 1);
    }
}

static void buffer_is_like_the_oracle(void)
{
    for (unsigned round = 0; round < 250; round++) {
        struct vrep_hash_options o = random_options();
        uint64_t len = random_len(o.block_size), shift = check_random_below(64);
        uint8_t *p = data + shift;

        if (round % 40 == 0)
            fill_random(data, ROOM + 64);
        for (unsigned i = 0; i < 4 && len > 0; i++) {
            uint64_t at = check_random_below(len), n = check_random_below(len - at + 1);
            if (n > 200000)
                n = 200000;
            memset(p + at, 0, n);
        }
        soil_results();
        CHECK_OK(vrep_hash_blocks(&o, p, len, out, zeros));
        check_against_oracle(&o, p, len);
        check_nothing_past(&o, len);
    }
}

static void one_byte_makes_a_block_not_zero(void)
{
    struct vrep_hash_options o = {.block_size = 512, .bits = 128, .threads = 1};

    memset(data, 0, 1024);
    for (size_t len = 1; len <= 512; len += 1 + len / 7) {
        for (size_t at = 0; at < len; at++) {
            data[at + 3] = 1;
            CHECK(!vrep_hash_is_zero(data + 3, len));
            data[at + 3] = 0;
        }
        CHECK(vrep_hash_is_zero(data + 3, len));
    }
    CHECK(vrep_hash_is_zero(NULL, 0));
    data[1023] = 0x80;
    CHECK_OK(vrep_hash_blocks(&o, data, 1024, out, zeros));
    CHECK_EQ(zeros[0], 1);
    CHECK_EQ(zeros[1], 0);
    data[1023] = 0;
}

static void zeros_are_optional(void)
{
    struct vrep_hash_options o = {.block_size = 4096, .bits = 128, .threads = 2};

    fill_random(data, ROOM);
    memset(data + 8192, 0, 65536);
    CHECK_OK(vrep_hash_blocks(&o, data, ROOM, out, NULL));
    for (uint32_t i = 0; i < ROOM / 4096; i++)
        zeros[i] = naive_is_zero(data + i * 4096, 4096);
    check_against_oracle(&o, data, ROOM);
}

static void one_block_alone(void)
{
    uint64_t got[2];

    fill_random(data, 8192);
    for (size_t len = 0; len <= 8192; len += 1 + len / 5) {
        XXH128_hash_t want = XXH3_128bits(data, len);

        vrep_hash_one128(data, len, NULL, 0, got);
        CHECK_EQ(got[0], want.low64);
        CHECK_EQ(got[1], want.high64);
        want = XXH3_128bits_withSecret(data, len, secret, sizeof secret);
        vrep_hash_one128(data, len, secret, sizeof secret, got);
        CHECK_EQ(got[0], want.low64);
        CHECK_EQ(got[1], want.high64);
    }
}

static void known_vector(void)
{
    /* Bytes (131 i + 7) mod 256, block of 4096; computed with the Python package xxhash. */
    struct vrep_hash_options o = {.block_size = 4096, .bits = 128, .threads = 1};

    for (size_t i = 0; i < 4096; i++)
        data[i] = (uint8_t)(i * 131 + 7);
    CHECK_OK(vrep_hash_blocks(&o, data, 4096, out, zeros));
    CHECK_EQ(out[0], UINT64_C(0x9ddd66c14af0daff));
    CHECK_EQ(out[1], UINT64_C(0x3e0ff38fa88a55ea));
}

static void counts(void)
{
    CHECK_EQ(vrep_hash_count(0, 4096), 0);
    CHECK_EQ(vrep_hash_count(1, 4096), 1);
    CHECK_EQ(vrep_hash_count(4096, 4096), 1);
    CHECK_EQ(vrep_hash_count(4097, 4096), 2);
    CHECK_EQ(vrep_hash_count(UINT64_MAX, 512), UINT64_C(1) << 55);
}

static void unlawful_options(void)
{
    const struct vrep_hash_options good = {.block_size = 4096, .bits = 128, .threads = 1};
    struct vrep_hash_options o;

#define REFUSED(field, value)                                                                      \
    o = good;                                                                                      \
    o.field = (value);                                                                             \
    CHECK_STATUS(vrep_hash_blocks(&o, data, 4096, out, zeros), VREP_E_INVALID);                    \
    CHECK_STATUS(vrep_hash_file(&o, 0, 0, 0, out, zeros), VREP_E_INVALID)

    REFUSED(block_size, 0);
    REFUSED(block_size, 256);
    REFUSED(block_size, 4095);
    REFUSED(block_size, 12288);
    REFUSED(block_size, VREP_HASH_BLOCK_MAX * 2);
    REFUSED(bits, 0);
    REFUSED(bits, 32);
    REFUSED(bits, 127);
    REFUSED(threads, 0);
    REFUSED(threads, VREP_HASH_THREADS_MAX + 1);
    REFUSED(secret, secret);
    REFUSED(secret_len, sizeof secret);
    o = good;
    o.secret = secret;
    o.secret_len = VREP_HASH_SECRET_MIN - 1;
    CHECK_STATUS(vrep_hash_blocks(&o, data, 4096, out, zeros), VREP_E_INVALID);
    o.secret_len++;
    CHECK_OK(vrep_hash_blocks(&o, data, 4096, out, zeros));

    o = good;
    CHECK_OK(vrep_hash_blocks(&o, NULL, 0, NULL, NULL));
    CHECK_STATUS(vrep_hash_blocks(&o, NULL, 1, out, NULL), VREP_E_INVALID);
    CHECK_STATUS(vrep_hash_blocks(&o, data, 1, NULL, NULL), VREP_E_INVALID);
    CHECK_STATUS(vrep_hash_blocks(&o, out, sizeof out, out, NULL), VREP_E_INVALID);
    CHECK_STATUS(vrep_hash_blocks(&o, data, 8192, out, data + 4096), VREP_E_INVALID);
}

/* ---- files ---- */

/* A nameless file with the first `len` bytes of data. */
static int file_of(uint64_t len)
{
    char name[] = "/tmp/vrep-test-hash-XXXXXX";
    int fd = mkstemp(name);

    CHECK(fd >= 0);
    CHECK_EQ(unlink(name), 0);
    for (uint64_t done = 0; done < len;) {
        ssize_t n = pwrite(fd, data + done, len - done, (off_t)done);
        CHECK(n > 0);
        done += (uint64_t)n;
    }
    return fd;
}

static bool file_system_tells_holes(int fd)
{
    off_t size = lseek(fd, 0, SEEK_END), hole;

    CHECK_EQ(ftruncate(fd, size + (1 << 20)), 0);
    hole = lseek(fd, size, SEEK_DATA);
    CHECK_EQ(ftruncate(fd, size), 0);
    return hole < 0 && errno == ENXIO;
}

static void punch(int fd, uint64_t at, uint64_t len)
{
    if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)at, (off_t)len) == 0)
        memset(data + at, 0, len);
    else
        CHECK_EQ(errno, EOPNOTSUPP);
}

static void file_is_like_the_oracle(void)
{
    for (unsigned round = 0; round < 60; round++) {
        uint64_t size, offset, len;
        int fd;

        reads_as_they_are();
        fill_random(data, ROOM);
        size = ROOM - check_random_below(8192);
        fd = file_of(size);
        for (unsigned i = 0; i < 4; i++) {
            uint64_t at = check_random_below(size);
            punch(fd, at, 1 + check_random_below(size - at) / 3);
        }
        for (unsigned i = 0; i < 5; i++) {
            struct vrep_hash_options o = random_options();

            offset = check_random_below(size);
            if (check_random_below(2))
                offset &= ~UINT64_C(4095);
            len = check_random_below(2) ? size - offset : check_random_below(size - offset + 1);
            reads.most = check_random_below(2) ? 0 : 1 + check_random_below(100000);
            reads.interrupt = check_random_below(3);
            CHECK_EQ(lseek(fd, 77, SEEK_SET), 77);
            soil_results();
            CHECK_OK(vrep_hash_file(&o, fd, offset, len, out, zeros));
            check_against_oracle(&o, data + offset, len);
            check_nothing_past(&o, len);
            CHECK_EQ(lseek(fd, 0, SEEK_CUR), 77);
        }
        CHECK_EQ(close(fd), 0);
    }
}

static void holes_are_not_read(void)
{
    struct vrep_hash_options o = {.block_size = 4096, .bits = 128, .threads = 3};
    const uint64_t size = UINT64_C(2) << 20;
    int fd = file_of(0);

    if (!file_system_tells_holes(fd)) {
        printf("holes_are_not_read: /tmp does not tell holes\n");
        CHECK_EQ(close(fd), 0);
        return;
    }
    memset(data, 0, ROOM);
    fill_random(data + (1 << 20), 8192);
    CHECK_EQ(ftruncate(fd, (off_t)size), 0);
    CHECK_EQ(pwrite(fd, data + (1 << 20), 8192, 1 << 20), 8192);
    reads_as_they_are();
    CHECK_OK(vrep_hash_file(&o, fd, 0, size, out, zeros));
    check_against_oracle(&o, data, size);
    CHECK(reads.bytes >= 8192 && reads.bytes <= 65536);

    /* A hole that ends inside a block, and a range that ends inside a hole. */
    o.block_size = 65536;
    CHECK_OK(vrep_hash_file(&o, fd, 4096, size - 4096 - 100, out, zeros));
    check_against_oracle(&o, data + 4096, size - 4096 - 100);
    CHECK_EQ(close(fd), 0);
}

static void file_systems_that_cannot_tell_holes(void)
{
    static const int errors[] = {EINVAL, EOPNOTSUPP, ENOTTY, EIO};
    struct vrep_hash_options o = {.block_size = 4096, .bits = 128, .threads = 2};
    int fd;

    reads_as_they_are();
    fill_random(data, ROOM);
    fd = file_of(ROOM);
    punch(fd, 40960, 1 << 20);
    for (unsigned i = 0; i < sizeof errors / sizeof errors[0]; i++) {
        reads_as_they_are();
        reads.seek_error = errors[i];
        soil_results();
        CHECK_OK(vrep_hash_file(&o, fd, 4096, ROOM - 4096, out, zeros));
        check_against_oracle(&o, data + 4096, ROOM - 4096);
        CHECK(reads.bytes >= ROOM - 4096);
    }
    /* Data said to begin before the question, then holes before their data. */
    for (off_t shift = -1; shift >= -(1 << 20); shift *= 2) {
        reads_as_they_are();
        reads.seek_shift = shift;
        soil_results();
        CHECK_OK(vrep_hash_file(&o, fd, 1 << 20, ROOM - (1 << 20), out, zeros));
        check_against_oracle(&o, data + (1 << 20), ROOM - (1 << 20));
        check_nothing_past(&o, ROOM - (1 << 20));
    }
    /* The hole to the end is what is left of a file that was cut off meanwhile. */
    reads_as_they_are();
    CHECK_EQ(ftruncate(fd, 1 << 20), 0);
    reads.cut = ROOM;
    CHECK_STATUS(vrep_hash_file(&o, fd, 0, ROOM, out, zeros), VREP_E_RANGE);
    reads_as_they_are();
    CHECK_EQ(close(fd), 0);
}

static void larger_than_memory(void)
{
    struct vrep_hash_options o = {.block_size = VREP_HASH_BLOCK_MAX, .bits = 64, .threads = 2};
    const uint64_t size = (UINT64_C(1) << 40) - 5; /* 65536 blocks */
    int fd = file_of(0);
    uint64_t *wide;
    uint8_t *flags;

    if (!file_system_tells_holes(fd)) {
        printf("larger_than_memory: /tmp does not tell holes\n");
        CHECK_EQ(close(fd), 0);
        return;
    }
    wide = malloc(65536 * sizeof *wide);
    flags = malloc(65536);
    CHECK(wide != NULL && flags != NULL);
    CHECK_EQ(ftruncate(fd, (off_t)size), 0);
    CHECK_EQ(pwrite(fd, "x", 1, (off_t)(size - 1)), 1);
    CHECK_EQ(pwrite(fd, "y", 1, (off_t)(UINT64_C(700) << 30)), 1);
    CHECK_OK(vrep_hash_file(&o, fd, 0, size, wide, flags));
    for (uint32_t i = 0; i < 65536; i++) {
        bool written = i == 65535 || i == 700 * 64;
        CHECK_EQ(flags[i], !written);
        CHECK(written ? wide[i] != wide[0] : wide[i] == wide[0]);
    }
    uint8_t *block = calloc(1, VREP_HASH_BLOCK_MAX);
    CHECK(block != NULL);
    CHECK_EQ(wide[0], XXH3_64bits(block, VREP_HASH_BLOCK_MAX));
    block[0] = 'y';
    CHECK_EQ(wide[700 * 64], XXH3_64bits(block, VREP_HASH_BLOCK_MAX));
    block[0] = 0;
    block[VREP_HASH_BLOCK_MAX - 6] = 'x';
    CHECK_EQ(wide[65535], XXH3_64bits(block, VREP_HASH_BLOCK_MAX - 5));
    free(block);
    free(wide);
    free(flags);
    CHECK_EQ(close(fd), 0);
}

static void direct_io(void)
{
    struct vrep_hash_options o = {.block_size = 4096, .bits = 128, .threads = 2};
    const uint64_t size = (1 << 20) + 1234;
    char path[64];
    int fd, direct;

    reads_as_they_are();
    fill_random(data, size);
    fd = file_of(size);
    CHECK_EQ(fsync(fd), 0);
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    direct = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
    if (direct < 0) {
        CHECK_EQ(errno, EINVAL);
        printf("direct_io: /tmp has no O_DIRECT\n");
    } else {
        CHECK_OK(vrep_hash_file(&o, direct, 0, size, out, zeros));
        check_against_oracle(&o, data, size);
        CHECK_OK(vrep_hash_file(&o, direct, 8192, 10000, out, zeros));
        check_against_oracle(&o, data + 8192, 10000);
        CHECK_EQ(close(direct), 0);
    }
    CHECK_EQ(close(fd), 0);
}

static void ranges_past_the_end(void)
{
    struct vrep_hash_options o = {.block_size = 4096, .bits = 128, .threads = 2};
    int fd;

    reads_as_they_are();
    fd = file_of(1 << 20);
    CHECK_OK(vrep_hash_file(&o, fd, 1 << 20, 0, NULL, NULL));
    CHECK_STATUS(vrep_hash_file(&o, fd, 0, (1 << 20) + 1, out, zeros), VREP_E_RANGE);
    CHECK_STATUS(vrep_hash_file(&o, fd, (1 << 20) + 1, 0, out, zeros), VREP_E_RANGE);
    CHECK_STATUS(vrep_hash_file(&o, fd, UINT64_MAX, 1, out, zeros), VREP_E_RANGE);
    CHECK_STATUS(vrep_hash_file(&o, fd, 1, UINT64_MAX, out, zeros), VREP_E_RANGE);
    CHECK_STATUS(vrep_hash_file(&o, fd, INT64_MAX, INT64_MAX, out, zeros), VREP_E_RANGE);
    reads.end = 500000; /* cut off during the call */
    CHECK_STATUS(vrep_hash_file(&o, fd, 0, 1 << 20, out, zeros), VREP_E_RANGE);
    CHECK_EQ(close(fd), 0);
}

static void failed_reads(void)
{
    struct vrep_hash_options o = {.block_size = 4096, .bits = 128, .threads = 4};
    int fd, pipes[2];

    reads_as_they_are();
    fd = file_of(ROOM);
    for (o.threads = 1; o.threads <= 4; o.threads++) {
        reads.broken = 4096 + (off_t)check_random_below(ROOM - 4096);
        CHECK_STATUS(vrep_hash_file(&o, fd, 0, ROOM, out, zeros), VREP_E_IO);
    }
    o.threads = 2;
    reads_as_they_are();
    CHECK_EQ(close(fd), 0);
    CHECK(vrep_hash_file(&o, fd, 0, 4096, out, zeros) < 0);
    CHECK_EQ(pipe(pipes), 0);
    CHECK(vrep_hash_file(&o, pipes[0], 0, 4096, out, zeros) < 0);
    CHECK_EQ(close(pipes[0]), 0);
    CHECK_EQ(close(pipes[1]), 0);
}

int main(void)
{
    data = malloc(ROOM + 64);
    CHECK(data != NULL);
    fill_random(data, ROOM + 64);
    fill_random(secret, sizeof secret);
    RUN(counts);
    RUN(known_vector);
    RUN(one_block_alone);
    RUN(one_byte_makes_a_block_not_zero);
    RUN(buffer_is_like_the_oracle);
    RUN(zeros_are_optional);
    RUN(unlawful_options);
    RUN(file_is_like_the_oracle);
    RUN(holes_are_not_read);
    RUN(file_systems_that_cannot_tell_holes);
    RUN(larger_than_memory);
    RUN(direct_io);
    RUN(ranges_past_the_end);
    RUN(failed_reads);
    free(data);
    return check_report();
}
