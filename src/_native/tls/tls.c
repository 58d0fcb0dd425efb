#include "tls/tls.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>

#include "base/status.h"
#include "crypto/gcm.h"

enum {
    ARRIVED_BYTES = 256 << 10,
    READ_TURN = 256 << 10,
    WRITE_TURN = 128 << 10, /* more would not stay in a processor's cache until it is sent */
    UNSENT_FIRST = WRITE_TURN + (4 << 10),
    UNSENT_MAX = 1 << 20,
    GATHER_BYTES = 256 << 10, /* arrive before a reader that lacks as much is woken */
    GATHER_MS = 2,            /* a pause within what was asked for that is not worth a return */
    GATHER_MOST_MS = 20,      /* and how long a call may last for that */
};

struct vrep_tls {
    SSL *ssl;
    /* Who waits for `lock` holds `turn`, so that nobody passes it. */
    pthread_mutex_t turn, lock;
    /* What the socket gave and OpenSSL has not taken: from `at` up to `end`. */
    uint8_t *arrived;
    size_t arrived_at, arrived_end;
    bool ended; /* the socket did */
    /* What OpenSSL wrote and the socket has not taken. */
    uint8_t *unsent;
    size_t unsent_at, unsent_end, unsent_room;
    size_t owed; /* bytes of the write at hand that `unsent` was made of */
    bool failed; /* OpenSSL did, for `reason` */
    char reason[128];
    int read_error, write_error; /* errno of the socket; a failure lasts */
};

struct vrep_tls_context {
    SSL_CTX *ctx;
};

/* ---- the two ends of OpenSSL's memory ----------------------------------------------------- */

static int bio_read(BIO *bio, char *out, size_t len, size_t *got)
{
    struct vrep_tls *tls = BIO_get_data(bio);
    size_t here = tls->arrived_end - tls->arrived_at;

    BIO_clear_retry_flags(bio);
    *got = 0;
    if (here == 0) {
        if (!tls->ended)
            BIO_set_retry_read(bio);
        return 0;
    }
    *got = here < len ? here : len;
    memcpy(out, tls->arrived + tls->arrived_at, *got);
    tls->arrived_at += *got;
    return 1;
}

static bool make_room(struct vrep_tls *tls, size_t len)
{
    size_t used = tls->unsent_end - tls->unsent_at, room = tls->unsent_room;
    uint8_t *made;

    if (tls->unsent_room - tls->unsent_end >= len)
        return true;
    if (used > 0 && tls->unsent_at > 0)
        memmove(tls->unsent, tls->unsent + tls->unsent_at, used);
    tls->unsent_at = 0;
    tls->unsent_end = used;
    if (room - used >= len)
        return true;
    if (len > UNSENT_MAX - used)
        return false;
    room = room > 0 ? room : UNSENT_FIRST;
    while (room - used < len)
        room *= 2;
    made = realloc(tls->unsent, room);
    if (made == NULL)
        return false;
    tls->unsent = made;
    tls->unsent_room = room;
    return true;
}

static int bio_write(BIO *bio, const char *in, size_t len, size_t *put)
{
    struct vrep_tls *tls = BIO_get_data(bio);

    BIO_clear_retry_flags(bio);
    *put = 0;
    if (!make_room(tls, len)) {
        strcpy(tls->reason, "the peer takes no answers");
        return 0;
    }
    memcpy(tls->unsent + tls->unsent_end, in, len);
    tls->unsent_end += len;
    *put = len;
    return 1;
}

static long bio_ctrl(BIO *bio, int what, long number, void *pointer)
{
    const struct vrep_tls *tls = BIO_get_data(bio);

    (void)number, (void)pointer;
    if (what == BIO_CTRL_EOF)
        return tls->ended && tls->arrived_at == tls->arrived_end;
    return what == BIO_CTRL_FLUSH;
}

/* Of the process: OpenSSL has few numbers for kinds of BIO, and each BIO needs its method. */
static BIO_METHOD *method;
static pthread_once_t method_made = PTHREAD_ONCE_INIT;

static void make_method(void)
{
    BIO_METHOD *made = BIO_meth_new(BIO_TYPE_SOURCE_SINK | BIO_get_new_index(), "vrep");

    if (made != NULL && BIO_meth_set_read_ex(made, bio_read) == 1 &&
        BIO_meth_set_write_ex(made, bio_write) == 1 && BIO_meth_set_ctrl(made, bio_ctrl) == 1)
        method = made;
    else
        BIO_meth_free(made);
}

/* ---- contexts ----------------------------------------------------------------------------- */

static int trust(SSL_CTX *ctx, const char *pem)
{
    X509_STORE *store = SSL_CTX_get_cert_store(ctx);
    BIO *bio = BIO_new_mem_buf(pem, -1);
    int status = bio == NULL ? VREP_E_NOMEM : VREP_OK, read = 0;
    unsigned long error;

    while (status == VREP_OK) {
        X509 *certificate = PEM_read_bio_X509(bio, NULL, NULL, NULL);

        if (certificate == NULL)
            break;
        read++;
        if (X509_STORE_add_cert(store, certificate) != 1)
            status = VREP_E_NOMEM;
        X509_free(certificate);
    }
    /* Where the text ends OpenSSL finds no further beginning. */
    error = ERR_peek_last_error();
    if (status == VREP_OK && (read == 0 || ERR_GET_LIB(error) != ERR_LIB_PEM ||
                              ERR_GET_REASON(error) != PEM_R_NO_START_LINE))
        status = VREP_E_INVALID;
    ERR_clear_error();
    BIO_free(bio);
    return status;
}

static int show(SSL_CTX *ctx, const char *certificate, const char *key)
{
    int status = VREP_OK;

    ERR_clear_error();
    if (SSL_CTX_use_certificate_chain_file(ctx, certificate) != 1 ||
        SSL_CTX_use_PrivateKey_file(ctx, key, SSL_FILETYPE_PEM) != 1 ||
        SSL_CTX_check_private_key(ctx) != 1)
        status = ERR_GET_LIB(ERR_peek_error()) == ERR_LIB_SYS ? VREP_E_IO : VREP_E_INVALID;
    ERR_clear_error();
    return status;
}

static int set_up(SSL_CTX *ctx, const struct vrep_tls_options *options)
{
    int status = VREP_OK;

    if (SSL_CTX_set_min_proto_version(ctx, TLS1_3_VERSION) != 1 ||
        SSL_CTX_set_max_proto_version(ctx, TLS1_3_VERSION) != 1)
        return VREP_E_UNSUPPORTED;
    /* The end of a stream without a word is an end: frames say what is whole. */
    SSL_CTX_set_options(ctx, SSL_OP_IGNORE_UNEXPECTED_EOF | SSL_OP_NO_COMPRESSION);
    SSL_CTX_set_mode(ctx, SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER | SSL_MODE_AUTO_RETRY);
    SSL_CTX_set_session_cache_mode(ctx, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_verify(ctx, options->server ? SSL_VERIFY_PEER : SSL_VERIFY_NONE, NULL);
    if (options->server) {
        X509_VERIFY_PARAM_set_flags(SSL_CTX_get0_param(ctx), X509_V_FLAG_NO_CHECK_TIME);
        if (SSL_CTX_set_num_tickets(ctx, 0) != 1)
            return VREP_E_NOMEM;
    }
    if (options->certificate_path != NULL)
        status = show(ctx, options->certificate_path, options->key_path);
    if (status == VREP_OK && options->trusted != NULL)
        status = trust(ctx, options->trusted);
    return status;
}

int vrep_tls_context_new(const struct vrep_tls_options *options, struct vrep_tls_context **out)
{
    struct vrep_tls_context *context = calloc(1, sizeof *context);
    int status = VREP_E_NOMEM;

    if (context == NULL)
        return VREP_E_NOMEM;
    pthread_once(&method_made, make_method);
    context->ctx = SSL_CTX_new_ex(vrep_gcm_context(), VREP_GCM_PROPERTIES,
                                  options->server ? TLS_server_method() : TLS_client_method());
    if (context->ctx != NULL && method != NULL)
        status = set_up(context->ctx, options);
    if (status != VREP_OK) {
        vrep_tls_context_free(context);
        return status;
    }
    *out = context;
    return VREP_OK;
}

void vrep_tls_context_free(struct vrep_tls_context *context)
{
    if (context == NULL)
        return;
    SSL_CTX_free(context->ctx);
    free(context);
}

/* ---- connections -------------------------------------------------------------------------- */

int vrep_tls_new(const struct vrep_tls_context *context, bool server, struct vrep_tls **out)
{
    struct vrep_tls *tls = calloc(1, sizeof *tls);
    BIO *bio = NULL;

    if (tls == NULL)
        return VREP_E_NOMEM;
    pthread_mutex_init(&tls->turn, NULL);
    pthread_mutex_init(&tls->lock, NULL);
    tls->arrived = malloc(ARRIVED_BYTES);
    tls->ssl = SSL_new(context->ctx);
    if (tls->arrived != NULL && tls->ssl != NULL)
        bio = BIO_new(method);
    if (bio == NULL) {
        vrep_tls_free(tls);
        return VREP_E_NOMEM;
    }
    BIO_set_data(bio, tls);
    BIO_set_init(bio, 1);
    SSL_set_bio(tls->ssl, bio, bio);
    if (server)
        SSL_set_accept_state(tls->ssl);
    else
        SSL_set_connect_state(tls->ssl);
    *out = tls;
    return VREP_OK;
}

void vrep_tls_free(struct vrep_tls *tls)
{
    if (tls == NULL)
        return;
    SSL_free(tls->ssl);
    free(tls->arrived);
    free(tls->unsent);
    pthread_mutex_destroy(&tls->lock);
    pthread_mutex_destroy(&tls->turn);
    free(tls);
}

static void take_turn(struct vrep_tls *tls)
{
    pthread_mutex_lock(&tls->turn);
    pthread_mutex_lock(&tls->lock);
    pthread_mutex_unlock(&tls->turn);
}

static void end_turn(struct vrep_tls *tls)
{
    pthread_mutex_unlock(&tls->lock);
}

/* What a call into OpenSSL said; the failures are kept, for OpenSSL says them once. */
static int judge(struct vrep_tls *tls, int returned)
{
    unsigned long error;
    const char *text;

    switch (SSL_get_error(tls->ssl, returned)) {
    case SSL_ERROR_NONE:
        return VREP_OK;
    case SSL_ERROR_WANT_READ:
        return VREP_E_AGAIN;
    case SSL_ERROR_ZERO_RETURN:
        return VREP_E_CLOSED;
    default:
        break;
    }
    error = ERR_peek_error();
    text = error != 0 ? ERR_reason_error_string(error) : NULL;
    ERR_clear_error();
    if (text == NULL && tls->ended && tls->arrived_at == tls->arrived_end)
        return VREP_E_CLOSED;
    if (text != NULL)
        strncpy(tls->reason, text, sizeof tls->reason - 1);
    tls->failed = true;
    return VREP_E_PROTOCOL;
}

static int socket_said(int *kept)
{
    if (errno == EAGAIN || errno == EWOULDBLOCK)
        return VREP_E_AGAIN;
    *kept = errno;
    return VREP_E_IO;
}

static int receive_locked(struct vrep_tls *tls, int fd)
{
    size_t here = tls->arrived_end - tls->arrived_at;
    ssize_t count;

    if (tls->read_error != 0)
        return VREP_E_IO;
    if (tls->ended)
        return VREP_OK;
    if (here == 0)
        tls->arrived_at = tls->arrived_end = 0;
    if (tls->arrived_end == ARRIVED_BYTES) {
        memmove(tls->arrived, tls->arrived + tls->arrived_at, here);
        tls->arrived_at = 0;
        tls->arrived_end = here;
    }
    if (tls->arrived_end == ARRIVED_BYTES)
        return VREP_OK; /* OpenSSL takes a record of it first */
    do
        count = recv(fd, tls->arrived + tls->arrived_end, ARRIVED_BYTES - tls->arrived_end,
                     MSG_DONTWAIT);
    while (count < 0 && errno == EINTR);
    if (count < 0)
        return socket_said(&tls->read_error);
    if (count == 0)
        tls->ended = true;
    tls->arrived_end += (size_t)count;
    return VREP_OK;
}

static int push_locked(struct vrep_tls *tls, int fd)
{
    if (tls->write_error != 0)
        return VREP_E_IO;
    while (tls->unsent_at < tls->unsent_end) {
        ssize_t count = send(fd, tls->unsent + tls->unsent_at, tls->unsent_end - tls->unsent_at,
                             MSG_NOSIGNAL | MSG_DONTWAIT);

        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0)
            return socket_said(&tls->write_error);
        tls->unsent_at += (size_t)count;
    }
    tls->unsent_at = tls->unsent_end = 0;
    return VREP_OK;
}

int vrep_tls_handshake(struct vrep_tls *tls)
{
    int status;

    take_turn(tls);
    status = tls->failed ? VREP_E_PROTOCOL : VREP_OK;
    if (status == VREP_OK) {
        ERR_clear_error();
        status = judge(tls, SSL_do_handshake(tls->ssl));
    }
    end_turn(tls);
    return status;
}

int vrep_tls_receive(struct vrep_tls *tls, int fd)
{
    int status;

    take_turn(tls);
    status = receive_locked(tls, fd);
    end_turn(tls);
    return status;
}

int vrep_tls_push(struct vrep_tls *tls, int fd)
{
    int status;

    take_turn(tls);
    status = push_locked(tls, fd);
    end_turn(tls);
    return status;
}

static uint64_t now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

/* One turn: what OpenSSL has, and then what the socket has. AGAIN: neither has anything now;
 * TORN: something arrived. */
static int read_turn(struct vrep_tls *tls, int fd, uint8_t *out, size_t len, size_t *got)
{
    int status = tls->failed ? VREP_E_PROTOCOL : VREP_OK;

    *got = 0;
    ERR_clear_error();
    while (status == VREP_OK && *got < len) {
        size_t count = 0;

        status = judge(tls, SSL_read_ex(tls->ssl, out + *got, len - *got, &count));
        *got += count;
    }
    if (status == VREP_E_AGAIN) {
        status = receive_locked(tls, fd);
        if (status == VREP_OK)
            status = VREP_E_TORN;
    }
    /* An alert, or the name of a new key. What does not leave now does with the next write, which
     * is told as well when the socket failed: the reader reads on. */
    if (tls->unsent_at < tls->unsent_end)
        (void)push_locked(tls, fd);
    return status;
}

/* Waits a little for the rest of what was asked for: each time that a reader is woken costs the
 * sender as well, so a large rest is not announced packet by packet (SO_RCVLOWAT, socket(7)). */
static bool gather(int fd, size_t wanted)
{
    struct pollfd wait = {.fd = fd, .events = POLLIN};
    int low = GATHER_BYTES, one = 1;
    bool large =
        wanted >= GATHER_BYTES && setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &low, sizeof low) == 0;
    bool came = poll(&wait, 1, GATHER_MS) > 0;

    if (!large)
        return came;
    (void)setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &one, sizeof one);
    return came || poll(&wait, 1, 0) > 0; /* less than that, but not nothing */
}

int vrep_tls_read(struct vrep_tls *tls, int fd, void *buffer, size_t len, size_t *got)
{
    uint64_t until_ms = 0;
    int rounds = 0;

    *got = 0;
    while (*got < len) {
        size_t here = 0, room = len - *got;
        int status;

        take_turn(tls);
        status = read_turn(tls, fd, (uint8_t *)buffer + *got, room < READ_TURN ? room : READ_TURN,
                           &here);
        end_turn(tls);
        *got += here;
        if (*got == 0) {
            if (status != VREP_E_TORN || rounds++ > 0)
                return status;
            continue;
        }
        if (status != VREP_OK && status != VREP_E_AGAIN && status != VREP_E_TORN)
            break; /* it is said again when it is asked for the rest */
        if (until_ms == 0)
            until_ms = now_ms() + GATHER_MOST_MS;
        else if (now_ms() >= until_ms)
            break;
        if (status == VREP_E_AGAIN && !gather(fd, len - *got))
            break;
    }
    return VREP_OK;
}

int vrep_tls_write(struct vrep_tls *tls, int fd, const void *data, size_t len, size_t *gone)
{
    const uint8_t *from = data;
    int status = VREP_OK;

    *gone = 0;
    if (len < tls->owed)
        return VREP_E_INVALID;
    while (status == VREP_OK) {
        size_t part, count = 0;

        take_turn(tls);
        status = tls->failed ? VREP_E_PROTOCOL : VREP_OK;
        if (status == VREP_OK)
            status = push_locked(tls, fd);
        if (status == VREP_OK) {
            *gone += tls->owed;
            tls->owed = 0;
            part = len - *gone < WRITE_TURN ? len - *gone : WRITE_TURN;
            if (part > 0) {
                ERR_clear_error();
                status = judge(tls, SSL_write_ex(tls->ssl, from + *gone, part, &count));
                tls->owed = count;
                if (status == VREP_E_AGAIN) { /* hands are shaken: no write waits for the peer */
                    tls->failed = true;
                    status = VREP_E_PROTOCOL;
                }
            }
        }
        end_turn(tls);
        if (status == VREP_OK && tls->owed == 0)
            break;
    }
    return status;
}

size_t vrep_tls_owed(const struct vrep_tls *tls)
{
    return tls->owed;
}

int vrep_tls_peer_certificate(struct vrep_tls *tls, uint8_t **der, size_t *len)
{
    X509 *certificate = SSL_get1_peer_certificate(tls->ssl);
    int size;

    if (certificate == NULL)
        return VREP_E_NOT_FOUND;
    *der = NULL;
    size = i2d_X509(certificate, der);
    X509_free(certificate);
    if (size <= 0)
        return VREP_E_NOMEM;
    *len = (size_t)size;
    return VREP_OK;
}

void vrep_tls_release(uint8_t *der)
{
    OPENSSL_free(der);
}

const char *vrep_tls_reason(const struct vrep_tls *tls)
{
    return tls->reason;
}

int vrep_tls_errno(const struct vrep_tls *tls, bool writing)
{
    return writing ? tls->write_error : tls->read_error;
}
