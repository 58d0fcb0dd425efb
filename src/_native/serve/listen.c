#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/status.h"
#include "serve/listen.h"

#define BACKLOG 64

static void address_of(const char *path, struct sockaddr_un *out)
{
    memset(out, 0, sizeof *out);
    out->sun_family = AF_UNIX;
    snprintf(out->sun_path, sizeof out->sun_path, "%s", path);
}

/* OK: nothing there, or a socket that nobody listens on. */
static int may_replace(const char *path)
{
    struct stat found;
    if (lstat(path, &found) != 0)
        return errno == ENOENT ? VREP_OK : vrep_status_from_errno(errno);
    if (!S_ISSOCK(found.st_mode))
        return VREP_E_EXISTS;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return vrep_status_from_errno(errno);
    struct sockaddr_un address;
    address_of(path, &address);
    int result = connect(fd, (struct sockaddr *)&address, sizeof address);
    int error = result == 0 ? 0 : errno;
    close(fd);
    return error == ECONNREFUSED || error == ENOENT ? VREP_OK : VREP_E_BUSY;
}

int vrep_listen_unix(const char *path, uint32_t mode, int64_t group, struct vrep_listener *out)
{
    *out = (struct vrep_listener){.fd = -1};
    char aside[sizeof((struct sockaddr_un *)0)->sun_path];
    if (path[0] == '\0' || strlen(path) > VREP_LISTEN_PATH_MAX)
        return VREP_E_INVALID;
    int status = may_replace(path);
    if (status != VREP_OK)
        return status;
    snprintf(aside, sizeof aside, "%s.new", path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return vrep_status_from_errno(errno);
    struct sockaddr_un address;
    address_of(aside, &address);
    struct stat made;
    if ((unlink(aside) != 0 && errno != ENOENT) ||
        bind(fd, (struct sockaddr *)&address, sizeof address) != 0)
        status = vrep_status_from_errno(errno);
    else if (chmod(aside, mode & 0777u) != 0 ||
             (group >= 0 && chown(aside, (uid_t)-1, (gid_t)group) != 0) ||
             listen(fd, BACKLOG) != 0 || stat(aside, &made) != 0 || rename(aside, path) != 0) {
        status = vrep_status_from_errno(errno);
        unlink(aside);
    }
    if (status != VREP_OK) {
        close(fd);
        return status;
    }
    out->fd = fd;
    out->device = made.st_dev;
    out->inode = made.st_ino;
    snprintf(out->path, sizeof out->path, "%s", path);
    return VREP_OK;
}

union address {
    struct sockaddr any;
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
};

/* Its length; 0: it is no numeric address. */
static socklen_t inet_address(const char *host, uint16_t port, union address *out, bool *loopback)
{
    memset(out, 0, sizeof *out);
    if (strcmp(host, "localhost") == 0)
        host = "127.0.0.1";
    if (inet_pton(AF_INET, host, &out->v4.sin_addr) == 1) {
        *loopback = ntohl(out->v4.sin_addr.s_addr) >> 24 == 127;
        out->v4.sin_family = AF_INET;
        out->v4.sin_port = htons(port);
        return sizeof out->v4;
    }
    if (inet_pton(AF_INET6, host, &out->v6.sin6_addr) == 1) {
        *loopback = IN6_IS_ADDR_LOOPBACK(&out->v6.sin6_addr);
        out->v6.sin6_family = AF_INET6;
        out->v6.sin6_port = htons(port);
        return sizeof out->v6;
    }
    return 0;
}

bool vrep_listen_is_loopback(const char *host)
{
    union address address;
    bool loopback = false;
    return inet_address(host, 0, &address, &loopback) > 0 && loopback;
}

int vrep_listen_tcp(const char *host, uint16_t port, struct vrep_listener *out)
{
    *out = (struct vrep_listener){.fd = -1};
    return vrep_listen_is_loopback(host) ? vrep_listen_any(host, port, out) : VREP_E_INVALID;
}

int vrep_listen_any(const char *host, uint16_t port, struct vrep_listener *out)
{
    *out = (struct vrep_listener){.fd = -1};
    union address address;
    bool loopback;
    socklen_t bytes = inet_address(host, port, &address, &loopback);
    if (bytes == 0)
        return VREP_E_INVALID;
    int fd = socket(address.any.sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return vrep_status_from_errno(errno);
    int one = 1;
    if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) != 0 ||
        bind(fd, &address.any, bytes) != 0 || listen(fd, BACKLOG) != 0 ||
        getsockname(fd, &address.any, &bytes) != 0) {
        int status = errno == EADDRINUSE ? VREP_E_BUSY : vrep_status_from_errno(errno);
        close(fd);
        return status;
    }
    out->fd = fd;
    out->port =
        ntohs(address.any.sa_family == AF_INET ? address.v4.sin_port : address.v6.sin6_port);
    return VREP_OK;
}

void vrep_listen_close(struct vrep_listener *listener)
{
    if (listener->fd < 0)
        return;
    struct stat found;
    if (listener->path[0] != '\0' && stat(listener->path, &found) == 0 &&
        found.st_dev == listener->device && found.st_ino == listener->inode)
        unlink(listener->path);
    close(listener->fd);
    listener->fd = -1;
}
