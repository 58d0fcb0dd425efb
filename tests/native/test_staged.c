/* Staged writes: the bytes of any pieces through a room of any size, and where an error struck. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include "check.h"
#include "disk/staged.h"

enum { FILE_BYTES = 1 << 18, PIECES = 40 };

static char path[64];

static void any_pieces_through_any_room(void)
{
    static uint8_t data[FILE_BYTES], expected[FILE_BYTES], found[FILE_BYTES], room[1 << 16];
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(fd >= 0);
    memset(expected, 7, sizeof expected);
    CHECK_EQ(pwrite(fd, expected, sizeof expected, 0), FILE_BYTES);
    for (int turn = 0; turn < 300; turn++) {
        struct iovec iov[PIECES];
        size_t pieces = (size_t)check_random() % PIECES, total = 0;
        size_t room_bytes = 1 + (size_t)check_random() % sizeof room;
        uint64_t written = 1;
        int error = 1;
        for (size_t i = 0; i < pieces; i++) {
            size_t bytes =
                check_random() % 4 == 0 ? 0 : (size_t)check_random() % (FILE_BYTES / PIECES);
            for (size_t k = 0; k < bytes; k++)
                data[total + k] = (uint8_t)check_random();
            iov[i] = (struct iovec){.iov_base = data + total, .iov_len = bytes};
            total += bytes;
        }
        size_t at = (size_t)check_random() % (FILE_BYTES - total + 1);
        CHECK_OK(vrep_write_staged(fd, iov, pieces, at, room, room_bytes, &written, &error));
        CHECK_EQ(written, total);
        CHECK_EQ(error, 0);
        memcpy(expected + at, data, total);
        CHECK_EQ(pread(fd, found, sizeof found, 0), FILE_BYTES);
        CHECK(memcmp(found, expected, sizeof found) == 0);
    }
    close(fd);
}

static void an_error_says_what_was_written(void)
{
    uint8_t data[10000] = {1}, room[4096];
    struct iovec iov = {.iov_base = data, .iov_len = sizeof data};
    uint64_t written = 1;
    int error = 0, fd = open("/dev/full", O_WRONLY);
    CHECK(fd >= 0);
    CHECK_STATUS(vrep_write_staged(fd, &iov, 1, 0, room, sizeof room, &written, &error), VREP_E_IO);
    CHECK_EQ(error, ENOSPC);
    CHECK_EQ(written, 0);
    close(fd);

    /* A file that may not grow any more, in the middle of the second room. */
    struct rlimit before, limit;
    fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(fd >= 0);
    CHECK_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
    limit = before;
    limit.rlim_cur = 6000;
    signal(SIGXFSZ, SIG_IGN);
    CHECK_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
    CHECK_STATUS(vrep_write_staged(fd, &iov, 1, 0, room, sizeof room, &written, &error), VREP_E_IO);
    CHECK_EQ(error, EFBIG);
    CHECK_EQ(written, 6000);
    CHECK_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
    CHECK_EQ(lseek(fd, 0, SEEK_END), 6000);
    CHECK_STATUS(vrep_write_staged(fd, &iov, 1, 0, room, 0, &written, &error), VREP_E_INVALID);
    CHECK_OK(vrep_write_staged(fd, NULL, 0, 0, room, sizeof room, &written, &error));
    CHECK_EQ(written, 0);
    close(fd);
}

int main(void)
{
    (void)snprintf(path, sizeof path, "/tmp/vrep-staged-%d", (int)getpid());
    RUN(any_pieces_through_any_room);
    RUN(an_error_says_what_was_written);
    unlink(path);
    return check_report();
}
