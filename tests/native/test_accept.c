/* Whoever connects is accepted, named, or turned away; and seen to be gone. */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "filter_rig.h"
#include "serve/accept.h"

static struct rig rig;
static struct vrep_loop *loop;
static struct vrep_accept entry;
static char path[160];
static int accepted[2]; /* a pipe: descriptors, from the loop's thread */

static void connected(struct vrep_accept *accept, int fd)
{
    CHECK(accept == &entry && accept->owner == &rig);
    CHECK_EQ(write(accepted[1], &fd, sizeof fd), sizeof fd);
}

static void begin(void)
{
    rig_init(&rig);
    rig_open(&rig);
    snprintf(path, sizeof path, "%s/socket", rig.root);
    CHECK_EQ(pipe(accepted), 0);
    CHECK_OK(vrep_loop_create(rig.group, &loop));
    vrep_accept_init(&entry, loop, "test", connected, &rig);
}

static void listen_here(void)
{
    CHECK_OK(vrep_accept_start(&entry));
    CHECK_OK(vrep_loop_start(loop));
}

static void end(void)
{
    CHECK_OK(vrep_loop_stop(loop, true, 10000));
    vrep_accept_stop(&entry);
    vrep_accept_stop(&entry);
    vrep_loop_destroy(loop);
    close(accepted[0]);
    close(accepted[1]);
    rig_free(&rig);
}

static int next_accepted(void)
{
    struct pollfd ready = {.fd = accepted[0], .events = POLLIN};
    int fd;
    CHECK_EQ(poll(&ready, 1, 10000), 1);
    CHECK_EQ(read(accepted[0], &fd, sizeof fd), sizeof fd);
    return fd;
}

static int connect_unix(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK_EQ(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
    return fd;
}

static void expect_end(int fd)
{
    struct pollfd ready = {.fd = fd, .events = POLLIN};
    char byte;
    CHECK_EQ(poll(&ready, 1, 10000), 1);
    CHECK(recv(fd, &byte, 1, 0) <= 0);
    close(fd);
}

static void peers_are_named(void)
{
    static const struct {
        const char *host, *format;
    } cases[] = {{"127.0.0.1", "127.0.0.1:%u"}, {"::1", "[::1]:%u"}};
    char name[VREP_PEER_NAME_MAX], expected[VREP_PEER_NAME_MAX];
    for (size_t i = 0; i < 2; i++) {
        struct sockaddr_in6 own = {0};
        struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
        struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        socklen_t bytes = sizeof own;
        begin();
        CHECK_OK(vrep_listen_any(cases[i].host, 0, &entry.listener));
        listen_here();
        v4.sin_port = v6.sin6_port = htons(entry.listener.port);
        int fd = socket(i == 0 ? AF_INET : AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
        CHECK_EQ(i == 0 ? connect(fd, (struct sockaddr *)&v4, sizeof v4)
                        : connect(fd, (struct sockaddr *)&v6, sizeof v6),
                 0);
        CHECK_EQ(getsockname(fd, (struct sockaddr *)&own, &bytes), 0);
        snprintf(expected, sizeof expected, cases[i].format, ntohs(own.sin6_port)); /* as of v4 */
        int server = next_accepted();
        vrep_peer_name(server, name);
        CHECK_STR(name, expected);
        close(fd);
        close(server);
        end();
    }
    begin();
    CHECK_OK(vrep_listen_unix(path, 0600, -1, &entry.listener));
    listen_here();
    int fd = connect_unix(), server = next_accepted();
    vrep_peer_name(server, name);
    snprintf(expected, sizeof expected, "unix pid %d uid %u", (int)getpid(), (unsigned)getuid());
    CHECK_STR(name, expected);
    vrep_peer_name(accepted[0], name); /* no socket at all */
    CHECK_STR(name, "?");
    close(fd);
    close(server);
    end();
}

static void who_is_gone_is_seen(void)
{
    begin();
    CHECK_OK(vrep_listen_unix(path, 0600, -1, &entry.listener));
    listen_here();
    int one = connect_unix(), first = next_accepted();
    int two = connect_unix(), second = next_accepted();
    CHECK_EQ(send(one, "x", 1, 0), 1); /* what it sent is no reason */
    CHECK(!vrep_peer_is_gone(first) && !vrep_peer_is_gone(second));
    CHECK_EQ(shutdown(one, SHUT_WR), 0);
    CHECK(vrep_peer_is_gone(first) && !vrep_peer_is_gone(second));
    close(two);
    CHECK(vrep_peer_is_gone(second));
    close(one);
    close(first);
    close(second);
    end();
}

/* More than one turn takes, there before the loop runs. */
static void a_crowd_is_let_in(void)
{
    int fds[40];
    begin();
    CHECK_OK(vrep_listen_unix(path, 0600, -1, &entry.listener));
    for (int i = 0; i < 40; i++)
        fds[i] = connect_unix();
    listen_here();
    for (int i = 0; i < 40; i++)
        close(next_accepted());
    for (int i = 0; i < 40; i++)
        expect_end(fds[i]);
    CHECK_EQ(entry.turned_away, 0);
    end();
    CHECK(access(path, F_OK) != 0);
}

/* Without descriptors a client is turned away, and the loop does not spin on it. */
static void clients_are_turned_away_without_descriptors(void)
{
    struct rlimit before, none;
    begin();
    CHECK_OK(vrep_listen_unix(path, 0600, -1, &entry.listener));
    listen_here();
    CHECK_EQ(getrlimit(RLIMIT_NOFILE, &before), 0);
    for (int round = 0; round < 2; round++) {
        struct sockaddr_un address = {.sun_family = AF_UNIX};
        strcpy(address.sun_path, path);
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), low = dup(fd);
        close(low); /* the lowest free descriptor: what accept would get */
        none = before;
        none.rlim_cur = (rlim_t)low;
        CHECK_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
        CHECK_EQ(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
        expect_end(fd);
        CHECK_EQ(vrep_load_relaxed_u64(&entry.turned_away), (uint64_t)round + 1);
        CHECK_EQ(setrlimit(RLIMIT_NOFILE, &before), 0);
        int next = connect_unix();
        close(next_accepted());
        expect_end(next);
    }
    end();
}

static void traffic_adds_up(void)
{
    struct vrep_traffic sum = {1, 2, 3, 4};
    const struct vrep_traffic more = {10, 20, 30, 40};
    vrep_traffic_add(&sum, &more);
    struct vrep_traffic seen = vrep_traffic_read(&sum);
    CHECK(seen.requests == 11 && seen.read_bytes == 22);
    CHECK(seen.written_bytes == 33 && seen.errors == 44);
}

int main(void)
{
    RUN(peers_are_named);
    RUN(who_is_gone_is_seen);
    RUN(a_crowd_is_let_in);
    RUN(clients_are_turned_away_without_descriptors);
    RUN(traffic_adds_up);
    return check_report();
}
