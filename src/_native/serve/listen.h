/* Listen: the sockets that front-ends accept on.
 *
 * A Unix socket is bound under a private name, given its mode and group, and
 * then renamed to its path: nobody can connect before its permissions stand,
 * and a stale socket is replaced at once.  TCP is for the loopback only, since
 * NBD without TLS authenticates nobody.
 *
 * Limits: a path of at most 100 bytes.  Threading: any, one handle at a time.
 */
#ifndef VREP_SERVE_LISTEN_H
#define VREP_SERVE_LISTEN_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#define VREP_LISTEN_PATH_MAX 100u

struct vrep_listener {
    int fd;
    char path[VREP_LISTEN_PATH_MAX + 1]; /* empty for TCP */
    dev_t device;
    ino_t inode;
    uint16_t port; /* TCP: the one bound */
};

/* group: -1 leaves it.  BUSY: somebody listens there.  INVALID: too long; EXISTS: no socket. */
int vrep_listen_unix(const char *path, uint32_t mode, int64_t group, struct vrep_listener *out);
/* host: a numeric loopback address, or "localhost"; port 0: any.  INVALID for any other host. */
int vrep_listen_tcp(const char *host, uint16_t port, struct vrep_listener *out);
/* The same for any numeric address: for protocols that know who connects. */
int vrep_listen_any(const char *host, uint16_t port, struct vrep_listener *out);
bool vrep_listen_is_loopback(const char *host);
/* Removes the path if it still is ours. */
void vrep_listen_close(struct vrep_listener *listener);

#endif
