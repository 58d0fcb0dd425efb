/* The NBD server over a group that a test controls: a raw client on a Unix socket. */
#include <errno.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "base/endian.h"
#include "nbd_double.h"
#include "serve/nbd.h"
#include "serve/nbd_protocol.h"

static struct vrep_group *group;
static struct vrep_loop *loop;
static struct vrep_nbd_server *server;
static char socket_path[128];

static void begin(void)
{
    group = double_open();
    snprintf(socket_path, sizeof socket_path, "%s/nbd.sock", group->directory);
    struct vrep_nbd_config config = {.unix_path = socket_path, .unix_mode = 0600, .unix_group = -1};
    CHECK_OK(vrep_loop_create(group, &loop));
    CHECK_OK(vrep_nbd_create(loop, &config, &server));
    CHECK_OK(vrep_loop_start(loop));
}

static void end(void)
{
    CHECK_OK(vrep_loop_stop(loop, true, 10000));
    CHECK_EQ(vrep_load_acquire_u32(&group->used), 0);
    CHECK_EQ(vrep_load_acquire_u32(&group->disowned), 1);
    vrep_nbd_destroy(server);
    vrep_loop_destroy(loop);
    CHECK_EQ(access(socket_path, F_OK), -1);
    double_close(group);
}

/* ---- a client ------------------------------------------------------------------------- */

static int dial(void)
{
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    CHECK(fd >= 0);
    strcpy(address.sun_path, socket_path);
    CHECK_EQ(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
    return fd;
}

static void give(int fd, const void *data, size_t bytes)
{
    const uint8_t *from = data;
    while (bytes > 0) {
        ssize_t n = send(fd, from, bytes, MSG_NOSIGNAL);
        CHECK(n > 0);
        from += n;
        bytes -= (size_t)n;
    }
}

static void get(int fd, void *data, size_t bytes)
{
    uint8_t *to = data;
    while (bytes > 0) {
        ssize_t n = recv(fd, to, bytes, 0);
        CHECK(n > 0);
        to += n;
        bytes -= (size_t)n;
    }
}

/* The other side closed, with nothing unread before. */
static void expect_end(int fd)
{
    uint8_t byte;
    ssize_t n = recv(fd, &byte, 1, 0);
    CHECK(n == 0 || (n < 0 && errno == ECONNRESET));
    close(fd);
}

static bool silent(int fd)
{
    struct pollfd look = {.fd = fd, .events = POLLIN};
    return poll(&look, 1, 50) == 0;
}

static void option(int fd, uint32_t number, const void *data, uint32_t bytes)
{
    uint8_t head[16];
    vrep_be_store_u64(head, 0x49484156454f5054ull);
    vrep_be_store_u32(head + 8, number);
    vrep_be_store_u32(head + 12, bytes);
    give(fd, head, sizeof head);
    give(fd, data, bytes);
}

static uint32_t answer(int fd, uint32_t number, void *data, uint32_t *bytes)
{
    uint8_t head[20];
    get(fd, head, sizeof head);
    CHECK_EQ(vrep_be_load_u64(head), 0x3e889045565a9);
    CHECK_EQ(vrep_be_load_u32(head + 8), number);
    *bytes = vrep_be_load_u32(head + 16);
    CHECK(*bytes <= 4096);
    get(fd, data, *bytes);
    return vrep_be_load_u32(head + 12);
}

static int greet(void)
{
    int fd = dial();
    uint8_t greeting[18], flags[4];
    get(fd, greeting, sizeof greeting);
    CHECK_MEM(greeting, "NBDMAGICIHAVEOPT", 16);
    CHECK_EQ(vrep_be_load_u16(greeting + 16), 3);
    vrep_be_store_u32(flags, 3);
    give(fd, flags, 4);
    return fd;
}

static uint32_t put_name(uint8_t *out, const char *name)
{
    uint32_t bytes = (uint32_t)strlen(name);
    vrep_be_store_u32(out, bytes);
    memcpy(out + 4, name, bytes);
    return bytes + 4;
}

static uint64_t go(int fd, const char *name)
{
    uint8_t data[4096];
    uint32_t bytes = put_name(data, name), type;
    uint64_t size = 0;
    vrep_be_store_u16(data + bytes, 0);
    option(fd, 7, data, bytes + 2);
    while ((type = answer(fd, 7, data, &bytes)) == 3)
        if (vrep_be_load_u16(data) == 0)
            size = vrep_be_load_u64(data + 2);
    CHECK_EQ(type, 1);
    return size;
}

static int serve(bool structured, bool contexts, const char *name)
{
    uint8_t data[4096];
    uint32_t bytes;
    int fd = greet();
    if (structured) {
        option(fd, 8, NULL, 0);
        CHECK_EQ(answer(fd, 8, data, &bytes), 1);
    }
    if (contexts) {
        uint32_t at = put_name(data, name);
        vrep_be_store_u32(data + at, 2);
        at += 4;
        at += put_name(data + at, "base:allocation");
        at += put_name(data + at, "qemu:dirty-bitmap:vrep");
        option(fd, 10, data, at);
        CHECK_EQ(answer(fd, 10, data, &bytes), 4);
        CHECK_EQ(answer(fd, 10, data, &bytes), 4);
        CHECK_EQ(answer(fd, 10, data, &bytes), 1);
    }
    CHECK(go(fd, name) > 0);
    return fd;
}

static void ask(int fd, uint16_t flags, uint16_t type, uint64_t cookie, uint64_t offset,
                uint32_t length)
{
    uint8_t head[28];
    vrep_be_store_u32(head, 0x25609513);
    vrep_be_store_u16(head + 4, flags);
    vrep_be_store_u16(head + 6, type);
    vrep_be_store_u64(head + 8, cookie);
    vrep_be_store_u64(head + 16, offset);
    vrep_be_store_u32(head + 24, length);
    give(fd, head, sizeof head);
}

static uint32_t simple(int fd, uint64_t cookie)
{
    uint8_t head[16];
    get(fd, head, sizeof head);
    CHECK_EQ(vrep_be_load_u32(head), 0x67446698);
    CHECK_EQ(vrep_be_load_u64(head + 8), cookie);
    return vrep_be_load_u32(head + 4);
}

static uint16_t chunk(int fd, uint64_t cookie, uint16_t *flags, uint32_t *length)
{
    uint8_t head[20];
    get(fd, head, sizeof head);
    CHECK_EQ(vrep_be_load_u32(head), 0x668e33ef);
    CHECK_EQ(vrep_be_load_u64(head + 8), cookie);
    *flags = vrep_be_load_u16(head + 4);
    *length = vrep_be_load_u32(head + 16);
    return vrep_be_load_u16(head + 6);
}

static void write_pattern(int fd, uint64_t cookie, uint64_t offset, uint32_t length, uint8_t value)
{
    uint8_t *data = malloc(length);
    memset(data, value, length);
    ask(fd, 0, VREP_NBD_WRITE, cookie, offset, length);
    give(fd, data, length);
    free(data);
}

static void wait_for(uint32_t *counter, uint32_t value)
{
    for (int i = 0; i < 10000 && vrep_load_acquire_u32(counter) != value; i++)
        usleep(1000);
    CHECK_EQ(vrep_load_acquire_u32(counter), value);
}

static uint8_t byte_at(uint32_t disk, uint64_t offset)
{
    uint8_t byte;
    CHECK_EQ(pread(group->fd[disk], &byte, 1, (off_t)offset), 1);
    return byte;
}

/* ---- tests ------------------------------------------------------------------------------ */

static void options_are_answered(void)
{
    begin();
    uint8_t data[4096];
    uint32_t bytes;
    int fd = greet();
    option(fd, 3, NULL, 0);
    CHECK_EQ(answer(fd, 3, data, &bytes), 2);
    CHECK_MEM(data, "\0\0\0\4root", 8);
    CHECK_EQ(answer(fd, 3, data, &bytes), 2);
    CHECK_MEM(data, "\0\0\0\4data", 8);
    CHECK_EQ(answer(fd, 3, data, &bytes), 1);
    option(fd, 5, NULL, 0); /* TLS */
    CHECK_EQ(answer(fd, 5, data, &bytes), 0x80000002);
    option(fd, 4711, "what", 4);
    CHECK_EQ(answer(fd, 4711, data, &bytes), 0x80000001);
    option(fd, 6, "\0\0\0\4none\0\0", 10);
    CHECK_EQ(answer(fd, 6, data, &bytes), 0x80000006);
    option(fd, 6, "\377\377\377\377none\0\0", 10);
    CHECK_EQ(answer(fd, 6, data, &bytes), 0x80000003);
    option(fd, 10, "\0\0\0\0\0\0\0\0", 8); /* without structured replies */
    CHECK_EQ(answer(fd, 10, data, &bytes), 0x80000003);
    static uint8_t huge[100000];
    option(fd, 7, huge, sizeof huge);
    CHECK_EQ(answer(fd, 7, data, &bytes), 0x80000009);
    CHECK_EQ(go(fd, "data"), DOUBLE_BYTES >> 1);
    ask(fd, 0, VREP_NBD_DISCONNECT, 0, 0, 0);
    expect_end(fd);

    fd = greet();
    option(fd, 1, "root", 4); /* EXPORT_NAME, no zeroes */
    get(fd, data, 10);
    CHECK_EQ(vrep_be_load_u64(data), DOUBLE_BYTES);
    ask(fd, 0, VREP_NBD_FLUSH, 5, 0, 0);
    CHECK_EQ(simple(fd, 5), 0);
    close(fd);

    fd = greet();
    option(fd, 1, "none", 4);
    expect_end(fd);
    fd = greet();
    option(fd, 2, NULL, 0);
    CHECK_EQ(answer(fd, 2, data, &bytes), 1);
    expect_end(fd);
    fd = dial();
    get(fd, data, 18);
    give(fd, "\377\377\377\377", 4); /* flags that nobody knows */
    expect_end(fd);
    end();
}

static void data_come_back(void)
{
    begin();
    static uint8_t back[VREP_WRITE_BYTES_MAX];
    uint32_t sizes[] = {1, 511, 4096, 8192, 8193, 256 << 10, (256 << 10) + 1, 32 << 20};
    for (int structured = 0; structured < 2; structured++) {
        int fd = serve(structured, false, "");
        for (uint32_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            uint64_t offset = 1 + i * 3;
            uint8_t value = (uint8_t)(1 + i + 100u * (uint32_t)structured);
            write_pattern(fd, i, offset, sizes[i], value);
            CHECK_EQ(simple(fd, i), 0);
            CHECK_EQ(byte_at(0, offset + sizes[i] - 1), value);
            ask(fd, 0, VREP_NBD_READ, 99, offset, sizes[i]);
            if (structured) {
                uint16_t flags;
                uint32_t length;
                uint8_t at[8];
                CHECK_EQ(chunk(fd, 99, &flags, &length), VREP_NBD_CHUNK_DATA);
                CHECK_EQ(flags, VREP_NBD_CHUNK_DONE);
                CHECK_EQ(length, sizes[i] + 8);
                get(fd, at, 8);
                CHECK_EQ(vrep_be_load_u64(at), offset);
            } else {
                CHECK_EQ(simple(fd, 99), 0);
            }
            memset(back, 0, sizes[i]);
            get(fd, back, sizes[i]);
            for (uint32_t b = 0; b < sizes[i]; b++)
                CHECK(back[b] == value);
        }
        close(fd);
    }
    end();
}

static void commands_carry_their_flags(void)
{
    begin();
    int fd = serve(false, false, "root");
    write_pattern(fd, 1, 0, 65536, 7);
    CHECK_EQ(simple(fd, 1), 0);
    CHECK_EQ(vrep_load_acquire_u32(&group->flags_seen), 0);
    ask(fd, VREP_NBD_FLAG_FUA, VREP_NBD_WRITE, 2, 0, 1);
    give(fd, "x", 1);
    CHECK_EQ(simple(fd, 2), 0);
    CHECK_EQ(vrep_load_acquire_u32(&group->flags_seen), VREP_COMMAND_FUA);
    ask(fd, VREP_NBD_FLAG_NO_HOLE | VREP_NBD_FLAG_FAST_ZERO, VREP_NBD_WRITE_ZEROES, 3, 0, 4096);
    CHECK_EQ(simple(fd, 3), 0);
    CHECK_EQ(vrep_load_acquire_u32(&group->flags_seen),
             VREP_COMMAND_FUA | VREP_COMMAND_NO_HOLE | VREP_COMMAND_FAST);
    CHECK_EQ(byte_at(0, 0), 0);
    CHECK_EQ(byte_at(0, 4096), 7);
    ask(fd, 0, VREP_NBD_TRIM, 4, 4096, 4096);
    CHECK_EQ(simple(fd, 4), 0);
    CHECK_EQ(byte_at(0, 4096), 0);
    ask(fd, 0, VREP_NBD_CACHE, 5, 0, 65536);
    CHECK_EQ(simple(fd, 5), 0);
    close(fd);
    end();
}

static void what_is_not_allowed_is_refused(void)
{
    begin();
    int fd = serve(true, false, "root");
    uint16_t flags;
    uint32_t length;
    uint8_t data[256];
    write_pattern(fd, 1, DOUBLE_BYTES - 100, 200, 1); /* over the end; its payload is dropped */
    CHECK_EQ(simple(fd, 1), VREP_NBD_ENOSPC);
    write_pattern(fd, 2, 0, VREP_WRITE_BYTES_MAX + 1, 1);
    CHECK_EQ(simple(fd, 2), VREP_NBD_EINVAL);
    ask(fd, 0, VREP_NBD_TRIM, 3, UINT64_MAX, 2);
    CHECK_EQ(simple(fd, 3), VREP_NBD_EINVAL);
    ask(fd, 0, 77, 4, 0, 0);
    CHECK_EQ(simple(fd, 4), VREP_NBD_EINVAL);
    ask(fd, 0x8000, VREP_NBD_FLUSH, 5, 0, 0);
    CHECK_EQ(simple(fd, 5), VREP_NBD_EINVAL);
    ask(fd, 0, VREP_NBD_READ, 6, DOUBLE_BYTES, 1);
    CHECK_EQ(chunk(fd, 6, &flags, &length), VREP_NBD_CHUNK_ERROR);
    CHECK(length >= 6 && length < sizeof data);
    get(fd, data, length);
    CHECK_EQ(vrep_be_load_u32(data), VREP_NBD_EINVAL);
    ask(fd, 0, VREP_NBD_BLOCK_STATUS, 7, 0, 512); /* no context was chosen */
    CHECK_EQ(chunk(fd, 7, &flags, &length), VREP_NBD_CHUNK_ERROR);
    get(fd, data, length);
    CHECK_EQ(vrep_load_acquire_u32(&group->submitted), 0);

    vrep_store_release_u32(&group->refuse, (uint32_t)-VREP_E_READONLY);
    write_pattern(fd, 8, 0, 1 << 20, 1);
    CHECK_EQ(simple(fd, 8), VREP_NBD_EPERM);
    vrep_store_release_u32(&group->refuse, 0);
    vrep_store_release_u32(&group->fail, (uint32_t)-VREP_E_NOSPACE);
    write_pattern(fd, 9, 0, 4096, 1);
    CHECK_EQ(simple(fd, 9), VREP_NBD_ENOSPC);
    vrep_store_release_u32(&group->fail, (uint32_t)-VREP_E_IO);
    ask(fd, 0, VREP_NBD_FLUSH, 10, 0, 0);
    CHECK_EQ(simple(fd, 10), VREP_NBD_EIO);
    vrep_store_release_u32(&group->fail, 0);
    write_pattern(fd, 11, 0, 4096, 1);
    CHECK_EQ(simple(fd, 11), 0);
    give(fd, "this is no request, whatever else", 28);
    expect_end(fd);
    end();
}

static void block_status_tells_holes_and_changes(void)
{
    begin();
    int fd = serve(true, true, "data");
    write_pattern(fd, 1, 1 << 20, 1 << 20, 9);
    CHECK_EQ(simple(fd, 1), 0);
    (void)vrep_map_mark(group->map, 1, 4 << 20, 65536);
    uint16_t flags;
    uint32_t length;
    uint8_t data[4096];
    ask(fd, 0, VREP_NBD_BLOCK_STATUS, 2, 0, 8 << 20);
    CHECK_EQ(chunk(fd, 2, &flags, &length), VREP_NBD_CHUNK_STATUS);
    CHECK_EQ(flags, 0);
    CHECK_EQ(length, 4 + 3 * 8);
    get(fd, data, length);
    uint32_t want[] = {1, 1 << 20, 3, 1 << 20, 0, 6 << 20, 3};
    for (int i = 0; i < 7; i++)
        CHECK_EQ(vrep_be_load_u32(data + i * 4), want[i]);
    CHECK_EQ(chunk(fd, 2, &flags, &length), VREP_NBD_CHUNK_STATUS);
    CHECK_EQ(flags, VREP_NBD_CHUNK_DONE);
    get(fd, data, length);
    uint32_t dirty[] = {2, 4 << 20, 0, 65536, 1, (4 << 20) - 65536, 0};
    for (int i = 0; i < 7; i++)
        CHECK_EQ(vrep_be_load_u32(data + i * 4), dirty[i]);
    ask(fd, VREP_NBD_FLAG_REQ_ONE, VREP_NBD_BLOCK_STATUS, 3, (1 << 20) + 512, 4096);
    CHECK_EQ(chunk(fd, 3, &flags, &length), VREP_NBD_CHUNK_STATUS);
    CHECK_EQ(length, 12);
    get(fd, data, length);
    CHECK_EQ(vrep_be_load_u32(data + 4), 4096);
    CHECK_EQ(chunk(fd, 3, &flags, &length), VREP_NBD_CHUNK_STATUS);
    get(fd, data, length);
    close(fd);
    end();
}

static void replies_wait_and_reading_stops_without_room(void)
{
    begin();
    int fd = serve(false, false, "root");
    double_hold(group, true);
    /* More writes than there is payload memory, then more reads than there are commands. */
    for (uint64_t i = 0; i < 12; i++)
        write_pattern(fd, i, i << 16, 4096, (uint8_t)(i + 1));
    wait_for(&group->held, DOUBLE_PAYLOADS);
    CHECK(silent(fd));
    double_hold(group, false);
    for (uint64_t i = 0; i < 12; i++)
        CHECK_EQ(simple(fd, i), 0);
    for (uint64_t i = 0; i < 12; i++)
        CHECK_EQ(byte_at(0, i << 16), i + 1);
    double_hold(group, true);
    for (uint64_t i = 0; i < 3 * DOUBLE_COMMANDS; i++)
        ask(fd, 0, VREP_NBD_READ, i, i * 512, 512);
    wait_for(&group->held, DOUBLE_COMMANDS);
    double_hold(group, false);
    for (uint64_t i = 0; i < 3 * DOUBLE_COMMANDS; i++) {
        uint8_t data[512];
        CHECK_EQ(simple(fd, i), 0);
        get(fd, data, sizeof data);
    }
    close(fd);
    end();
}

static void long_reads_of_two_take_turns(void)
{
    begin();
    /* 4 x 32 MiB asked by two clients, of which one fits: nobody starves, nothing is mixed up. */
    int fds[2] = {serve(false, false, "root"), serve(false, false, "root")};
    write_pattern(fds[0], 1, 0, 32 << 20, 3);
    CHECK_EQ(simple(fds[0], 1), 0);
    for (int i = 0; i < 4; i++)
        ask(fds[i % 2], 0, VREP_NBD_READ, (uint64_t)i, 0, 32 << 20);
    uint8_t *back = malloc(32 << 20);
    for (int i = 0; i < 4; i++) {
        CHECK_EQ(simple(fds[i % 2], (uint64_t)i), 0);
        get(fds[i % 2], back, 32 << 20);
        CHECK(back[0] == 3 && back[(32 << 20) - 1] == 3);
    }
    free(back);
    close(fds[0]);
    close(fds[1]);
    end();
}

static void a_newcomer_waits_for_what_the_dead_left(void)
{
    begin();
    int old = serve(false, false, "root");
    double_hold(group, true);
    write_pattern(old, 1, 0, 4096, 1);
    wait_for(&group->held, 1);
    ask(old, 0, VREP_NBD_WRITE, 2, 0, 1 << 20); /* its payload never comes */
    wait_for(&group->used, 2);
    close(old);

    int fresh = serve(false, false, "root");
    wait_for(&group->used, 1); /* the unsubmitted one is gone */
    write_pattern(fresh, 3, 0, 4096, 2);
    CHECK(silent(fresh));
    CHECK_EQ(vrep_load_acquire_u32(&group->submitted), 1);
    double_hold(group, false);
    CHECK_EQ(simple(fresh, 3), 0);
    CHECK_EQ(byte_at(0, 0), 2);
    close(fresh);
    end();
}

static void what_a_dead_client_left_in_its_socket_is_dropped(void)
{
    begin();
    int old = serve(false, false, "root");
    double_hold(group, true);
    for (uint64_t i = 0; i < DOUBLE_PAYLOADS + 2; i++) /* the last ones stay unread */
        write_pattern(old, i, 0, 4096, 1);
    wait_for(&group->held, DOUBLE_PAYLOADS);
    close(old);
    int fresh = serve(false, false, "root");
    double_hold(group, false);
    write_pattern(fresh, 9, 0, 4096, 2);
    CHECK_EQ(simple(fresh, 9), 0);
    CHECK_EQ(byte_at(0, 0), 2);
    CHECK_EQ(vrep_load_acquire_u32(&group->submitted), DOUBLE_PAYLOADS + 1);
    close(fresh);
    end();
}

static void a_drain_answers_what_was_submitted(void)
{
    begin();
    int fd = serve(false, false, "root");
    double_hold(group, true);
    write_pattern(fd, 1, 0, 4096, 1);
    wait_for(&group->held, 1);
    CHECK_STATUS(vrep_loop_stop(loop, true, 20), VREP_E_TIMEOUT);
    expect_end(fd);
    double_hold(group, false);
    vrep_group_poll(group); /* the group's own close would do it */
    vrep_nbd_destroy(server);
    vrep_loop_destroy(loop);
    double_close(group);

    begin();
    fd = serve(false, false, "root");
    for (uint64_t i = 0; i < 20; i++)
        write_pattern(fd, i, i * 4096, 4096, 1);
    wait_for(&group->submitted, 20);
    end();
    for (uint64_t i = 0; i < 20; i++)
        CHECK_EQ(simple(fd, i), 0);
    expect_end(fd);
}

static void connections_are_bounded(void)
{
    begin();
    int fds[VREP_NBD_CONNECTIONS_MAX];
    for (uint32_t i = 0; i < VREP_NBD_CONNECTIONS_MAX; i++)
        fds[i] = serve(false, false, "root");
    int extra = dial();
    expect_end(extra);
    struct vrep_nbd_client clients[VREP_NBD_CONNECTIONS_MAX];
    CHECK_EQ(vrep_nbd_clients(server, clients, VREP_NBD_CONNECTIONS_MAX), VREP_NBD_CONNECTIONS_MAX);
    CHECK_STR(clients[5].export, "root");
    close(fds[0]);
    int next = serve(false, false, "data");
    struct vrep_nbd_stats stats;
    vrep_nbd_stats(server, &stats);
    CHECK_EQ(stats.refused, 1);
    CHECK_EQ(stats.connections, VREP_NBD_CONNECTIONS_MAX);
    close(next);
    for (uint32_t i = 1; i < VREP_NBD_CONNECTIONS_MAX; i++)
        close(fds[i]);
    /* Those that only haggle make room for one that comes to the point. */
    for (uint32_t i = 0; i < VREP_NBD_CONNECTIONS_MAX; i++)
        fds[i] = greet();
    next = serve(false, false, "root");
    close(next);
    for (uint32_t i = 0; i < VREP_NBD_CONNECTIONS_MAX; i++)
        close(fds[i]);
    end();
}

/* A client that cannot be accepted is turned away, and the loop does not spin on it. */
static void clients_are_turned_away_without_descriptors(void)
{
    begin();
    int first = serve(false, false, "root");
    struct rlimit before, none;
    CHECK_EQ(getrlimit(RLIMIT_NOFILE, &before), 0);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), low = dup(fd);
    close(low); /* the lowest free descriptor: what accept would get */
    none = before;
    none.rlim_cur = (rlim_t)low;
    CHECK_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, socket_path);
    CHECK_EQ(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
    expect_end(fd);
    struct vrep_nbd_stats stats;
    vrep_nbd_stats(server, &stats);
    CHECK_EQ(stats.refused, 1);
    CHECK_EQ(setrlimit(RLIMIT_NOFILE, &before), 0);
    int next = serve(false, false, "root");
    close(next);
    close(first);
    end();
}

int main(void)
{
    RUN(options_are_answered);
    RUN(data_come_back);
    RUN(commands_carry_their_flags);
    RUN(what_is_not_allowed_is_refused);
    RUN(block_status_tells_holes_and_changes);
    RUN(replies_wait_and_reading_stops_without_room);
    RUN(long_reads_of_two_take_turns);
    RUN(a_newcomer_waits_for_what_the_dead_left);
    RUN(what_a_dead_client_left_in_its_socket_is_dropped);
    RUN(a_drain_answers_what_was_submitted);
    RUN(connections_are_bounded);
    RUN(clients_are_turned_away_without_descriptors);
    return check_report();
}
