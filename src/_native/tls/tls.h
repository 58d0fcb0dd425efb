/*
 * TLS 1.3 over a non-blocking socket that its owner polls.
 *
 * OpenSSL works in memory; one call moves as many records as are there, with few
 * system calls, and answers of OpenSSL's own (alerts, new keys) leave as soon as
 * the socket takes them. Nothing here waits, but for GATHER_MS of a reader that
 * holds a part of what it asked for; SO_RCVLOWAT of the socket is this module's.
 *
 * Units: bytes. Memory of a connection: what the socket is asked for at once
 * (256 KiB), and what it did not take (at most 1 MiB, else the connection fails).
 * Threading: one thread reads while another writes; each holds a lock for at most
 * READ_TURN or WRITE_TURN bytes, in turns: who waits is next. A context may be
 * shared. Contexts are cheap and hold what they read at their making.
 */
#ifndef VREP_TLS_TLS_H
#define VREP_TLS_TLS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct vrep_tls_context;
struct vrep_tls;

struct vrep_tls_options {
    bool server;
    const char *certificate_path; /* PEM; NULL: none is shown, by clients only */
    const char *key_path;
    const char *trusted; /* certificates in PEM, one behind the other, or NULL */
};

/*
 * A server asks for a certificate, refuses one that is not trusted, whatever its
 * dates, and takes clients without one. A client verifies that the peer holds the
 * key of the certificate that it shows, and nothing else: its owner compares the
 * certificate. No session is ever resumed.
 *
 * INVALID for what is no certificate or key, IO for files that cannot be read,
 * NOMEM.
 */
int vrep_tls_context_new(const struct vrep_tls_options *options, struct vrep_tls_context **out);
void vrep_tls_context_free(struct vrep_tls_context *context);

/* The connection keeps what it needs of the context. NOMEM. */
int vrep_tls_new(const struct vrep_tls_context *context, bool server, struct vrep_tls **out);
void vrep_tls_free(struct vrep_tls *tls);

/*
 * The functions below return, beside what is said at each: PROTOCOL when the peer
 * broke TLS or TLS refused it, IO when the socket failed, CLOSED when the peer
 * ended. PROTOCOL and IO last, and vrep_tls_reason says why.
 */

/* OK when hands are shaken, AGAIN while the peer must say something. */
int vrep_tls_handshake(struct vrep_tls *tls);

/* Take what arrived: OK, also for the end; AGAIN when that is nothing. */
int vrep_tls_receive(struct vrep_tls *tls, int fd);

/* Send what is encrypted: OK when all has left, AGAIN when some of it waits. */
int vrep_tls_push(struct vrep_tls *tls, int fd);

/*
 * Read what is there, at most `len` bytes. OK with `got` > 0; CLOSED at the end;
 * AGAIN when there is no data and nothing arrives; TORN when something does that is
 * no data (yet).
 */
int vrep_tls_read(struct vrep_tls *tls, int fd, void *buffer, size_t len, size_t *got);

/*
 * Write what the socket takes: OK when all has left, else AGAIN. `gone` is how
 * many bytes left. Others may be encrypted already: the next write begins with
 * all that is left, and has no less than vrep_tls_owed bytes (else INVALID).
 */
int vrep_tls_write(struct vrep_tls *tls, int fd, const void *data, size_t len, size_t *gone);
size_t vrep_tls_owed(const struct vrep_tls *tls);

/* The peer's certificate in DER, to be freed with vrep_tls_release; NOT_FOUND when it showed
 * none. After the handshake. */
int vrep_tls_peer_certificate(struct vrep_tls *tls, uint8_t **der, size_t *len);
void vrep_tls_release(uint8_t *der);

/* Why PROTOCOL was returned, in OpenSSL's words; "" when it said nothing. */
const char *vrep_tls_reason(const struct vrep_tls *tls);

/* Why IO was returned, by receive and read or by push and write: errno of the socket. */
int vrep_tls_errno(const struct vrep_tls *tls, bool writing);

#endif
