#include "tls/tls.h"

#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>
#include <unistd.h>

#include <openssl/pem.h>
#include <openssl/x509.h>

#include "check.h"

enum { TOTAL = 8 << 20 };

static char certificate_path[] = "/tmp/vrep-test-tls-XXXXXX";
static char other_path[] = "/tmp/vrep-test-tls-XXXXXX";
static char pem[8192];

/* Key and certificate in one file, valid from `first` days after now. */
static void make_certificate(char *path, long first, char *text)
{
    EVP_PKEY *key = EVP_EC_gen("P-256");
    X509 *certificate = X509_new();
    X509_NAME *name = X509_get_subject_name(certificate);
    FILE *file;
    BIO *memory = BIO_new(BIO_s_mem());
    int fd = mkstemp(path), size;

    CHECK(key != NULL && fd >= 0 && memory != NULL);
    file = fdopen(fd, "w");
    CHECK(file != NULL);
    X509_set_version(certificate, X509_VERSION_3);
    ASN1_INTEGER_set(X509_get_serialNumber(certificate), 1);
    X509_gmtime_adj(X509_getm_notBefore(certificate), first * 86400);
    X509_gmtime_adj(X509_getm_notAfter(certificate), (first + 1) * 86400);
    X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, (const unsigned char *)path, -1, -1, 0);
    X509_set_issuer_name(certificate, name);
    X509_set_pubkey(certificate, key);
    CHECK(X509_sign(certificate, key, EVP_sha256()) > 0);
    CHECK(PEM_write_PrivateKey(file, key, NULL, NULL, 0, NULL, NULL) == 1);
    CHECK(PEM_write_X509(file, certificate) == 1);
    CHECK(fclose(file) == 0);
    if (text != NULL) {
        CHECK(PEM_write_bio_X509(memory, certificate) == 1);
        size = BIO_read(memory, text, sizeof pem - 1);
        CHECK(size > 0);
        text[size] = '\0';
    }
    BIO_free(memory);
    X509_free(certificate);
    EVP_PKEY_free(key);
}

static struct vrep_tls_context *context_of(bool server, const char *path, const char *trusted)
{
    struct vrep_tls_options options = {
        .server = server, .certificate_path = path, .key_path = path, .trusted = trusted};
    struct vrep_tls_context *context = NULL;

    CHECK_OK(vrep_tls_context_new(&options, &context));
    return context;
}

struct pair {
    int fd[2];
    struct vrep_tls *tls[2]; /* client, server */
};

static struct pair open_pair(const char *client_path, const char *trusted)
{
    struct vrep_tls_context *client = context_of(false, client_path, NULL);
    struct vrep_tls_context *server = context_of(true, certificate_path, trusted);
    struct pair pair;

    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair.fd) == 0);
    CHECK_OK(vrep_tls_new(client, false, &pair.tls[0]));
    CHECK_OK(vrep_tls_new(server, true, &pair.tls[1]));
    vrep_tls_context_free(client); /* a connection needs it no more */
    vrep_tls_context_free(server);
    return pair;
}

/* Both ends in turn; what the server says in the end. */
static int shake(struct pair *pair)
{
    int said[2] = {VREP_E_AGAIN, VREP_E_AGAIN};

    for (int round = 0; round < 20; round++)
        for (int end = 0; end < 2; end++) {
            if (said[end] == VREP_E_AGAIN)
                said[end] = vrep_tls_handshake(pair->tls[end]);
            vrep_tls_push(pair->tls[end], pair->fd[end]);
            if (said[end] == VREP_E_AGAIN) /* what the other end sent may be on its way */
                (void)poll(&(struct pollfd){.fd = pair->fd[end], .events = POLLIN}, 1, 10);
            vrep_tls_receive(pair->tls[end], pair->fd[end]);
        }
    return said[1];
}

static struct pair shaken(void)
{
    struct pair pair = open_pair(certificate_path, pem);

    CHECK_OK(shake(&pair));
    return pair;
}

static void close_pair(struct pair *pair)
{
    for (int end = 0; end < 2; end++) {
        vrep_tls_free(pair->tls[end]);
        if (pair->fd[end] >= 0)
            close(pair->fd[end]);
    }
}

static uint8_t byte_at(int end, size_t at)
{
    return (uint8_t)((at * 2654435761u >> 11) + (unsigned)end);
}

struct side {
    struct pair *pair;
    int end;
};

static void *send_all(void *argument)
{
    struct side *side = argument;
    struct vrep_tls *tls = side->pair->tls[side->end];
    uint8_t *data = malloc(TOTAL);
    size_t at = 0, part = 100000;

    CHECK(data != NULL);
    for (size_t i = 0; i < TOTAL; i++)
        data[i] = byte_at(side->end, i);
    while (at < TOTAL) {
        size_t size = TOTAL - at < part ? TOTAL - at : part, gone;
        int status = vrep_tls_write(tls, side->pair->fd[side->end], data + at, size, &gone);

        CHECK(status == VREP_OK || status == VREP_E_AGAIN);
        CHECK(gone <= size && (status == VREP_E_AGAIN || gone == size));
        CHECK(size - gone >= vrep_tls_owed(tls));
        at += gone;
        /* The next write may be longer, and never shorter than what is owed. */
        part = vrep_tls_owed(tls) + 1 + (part * 7) % 300000;
    }
    free(data);
    return NULL;
}

static void *receive_all(void *argument)
{
    struct side *side = argument;
    struct vrep_tls *tls = side->pair->tls[side->end];
    uint8_t *room = malloc(1 << 20);
    size_t at = 0, size = 1;

    CHECK(room != NULL);
    while (at < TOTAL) {
        size_t got;
        int status = vrep_tls_read(tls, side->pair->fd[side->end], room, size, &got);

        CHECK(status == VREP_OK || status == VREP_E_AGAIN || status == VREP_E_TORN);
        CHECK(got <= size && (got > 0) == (status == VREP_OK));
        for (size_t i = 0; i < got; i++)
            CHECK(room[i] == byte_at(1 - side->end, at + i));
        at += got;
        size = 1 + (size * 31) % (1 << 20);
    }
    free(room);
    return NULL;
}

static void both_directions_at_once(void)
{
    struct pair pair = shaken();
    struct side sides[2] = {{&pair, 0}, {&pair, 1}};
    pthread_t threads[4];

    for (int end = 0; end < 2; end++) {
        CHECK(pthread_create(&threads[2 * end], NULL, send_all, &sides[end]) == 0);
        CHECK(pthread_create(&threads[2 * end + 1], NULL, receive_all, &sides[end]) == 0);
    }
    for (int i = 0; i < 4; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    close_pair(&pair);
}

static void a_full_socket_takes_no_more(void)
{
    static uint8_t data[4 << 20], room[4 << 20];
    struct pair pair = shaken();
    size_t gone, more, got = 0, here;

    for (size_t i = 0; i < sizeof data; i++)
        data[i] = byte_at(0, i);
    CHECK(vrep_tls_write(pair.tls[0], pair.fd[0], data, sizeof data, &gone) == VREP_E_AGAIN);
    CHECK(gone < sizeof data && vrep_tls_owed(pair.tls[0]) > 0);
    CHECK(vrep_tls_write(pair.tls[0], pair.fd[0], data + gone, vrep_tls_owed(pair.tls[0]) - 1,
                         &more) == VREP_E_INVALID);
    while (got < sizeof data) {
        int status = vrep_tls_read(pair.tls[1], pair.fd[1], room + got, sizeof room - got, &here);

        CHECK(status == VREP_OK || status == VREP_E_AGAIN || status == VREP_E_TORN);
        got += here;
        if (gone < sizeof data) {
            status =
                vrep_tls_write(pair.tls[0], pair.fd[0], data + gone, sizeof data - gone, &more);
            CHECK(status == VREP_OK || status == VREP_E_AGAIN);
            gone += more;
        }
    }
    CHECK(memcmp(data, room, sizeof data) == 0);
    close_pair(&pair);
}

/* A connection over loopback: of socket pairs the kernel keeps no mark of how much is to arrive. */
static void connect_tcp(int fd[2])
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof at;
    int listening = socket(AF_INET, SOCK_STREAM, 0);

    CHECK(listening >= 0 && bind(listening, (struct sockaddr *)&at, sizeof at) == 0);
    CHECK(listen(listening, 1) == 0 && getsockname(listening, (struct sockaddr *)&at, &size) == 0);
    fd[0] = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(connect(fd[0], (struct sockaddr *)&at, sizeof at) == 0);
    fd[1] = accept(listening, NULL, NULL);
    CHECK(fd[1] >= 0);
    close(listening);
}

static void a_reader_of_much_gets_what_there_is(void)
{
    enum { ASKED = 1 << 20 };
    struct pair pair = open_pair(certificate_path, pem);
    uint8_t *data = calloc(1, ASKED), *found = malloc(ASKED);
    size_t sizes[] = {1, 5000, 100000, 300000, ASKED};

    CHECK(data != NULL && found != NULL);
    for (size_t i = 0; i < ASKED; i++)
        data[i] = byte_at(0, i);
    close(pair.fd[0]);
    close(pair.fd[1]);
    connect_tcp(pair.fd);
    CHECK_OK(shake(&pair));
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        size_t sent = 0, got = 0, count;
        int low = 0, tries = 0;
        socklen_t size = sizeof low;

        /* It asks for far more than will come, and is not kept waiting for the rest. */
        while (got < sizes[i]) {
            int status;

            if (sent < sizes[i]) {
                status =
                    vrep_tls_write(pair.tls[0], pair.fd[0], data + sent, sizes[i] - sent, &count);
                CHECK(status == VREP_OK || status == VREP_E_AGAIN);
                sent += count;
            }
            status = vrep_tls_read(pair.tls[1], pair.fd[1], found + got, ASKED - got, &count);
            CHECK(status == VREP_OK || status == VREP_E_AGAIN || status == VREP_E_TORN);
            got += status == VREP_OK ? count : 0;
            if (status != VREP_OK) /* it is on its way, or waits for room */
                (void)poll(&(struct pollfd){.fd = pair.fd[1], .events = POLLIN}, 1,
                           sent == sizes[i] ? 1000 : 10);
            CHECK(tries++ < 1000);
        }
        CHECK_EQ(got, sizes[i]);
        CHECK(memcmp(found, data, got) == 0);
        /* Whoever polls next hears of a single byte. */
        CHECK(getsockopt(pair.fd[1], SOL_SOCKET, SO_RCVLOWAT, &low, &size) == 0);
        CHECK_EQ(low, 1);
    }
    free(data);
    free(found);
    close_pair(&pair);
}

static void the_end_comes_behind_all_bytes(void)
{
    struct pair pair = shaken();
    uint8_t room[100];
    size_t count;

    CHECK(vrep_tls_read(pair.tls[1], pair.fd[1], room, sizeof room, &count) == VREP_E_AGAIN);
    CHECK_OK(vrep_tls_write(pair.tls[0], pair.fd[0], "last words", 10, &count));
    close(pair.fd[0]);
    pair.fd[0] = -1;
    CHECK_OK(vrep_tls_read(pair.tls[1], pair.fd[1], room, sizeof room, &count));
    CHECK(count == 10 && memcmp(room, "last words", 10) == 0);
    for (int again = 0; again < 2; again++)
        CHECK(vrep_tls_read(pair.tls[1], pair.fd[1], room, sizeof room, &count) == VREP_E_CLOSED);
    CHECK(vrep_tls_write(pair.tls[1], pair.fd[1], room, sizeof room, &count) == VREP_E_IO);
    CHECK(vrep_tls_errno(pair.tls[1], true) != 0);
    close_pair(&pair);
}

static void what_is_no_tls_ends_it_for_good(void)
{
    struct pair pair = shaken();
    uint8_t room[100];
    size_t count;

    /* A record that begins, then the rest of it, which no key opens. */
    CHECK(write(pair.fd[0], "\x17\x03\x03\x00\x20", 5) == 5);
    CHECK(vrep_tls_read(pair.tls[1], pair.fd[1], room, sizeof room, &count) == VREP_E_AGAIN);
    CHECK(write(pair.fd[0], room, 32) == 32);
    for (int again = 0; again < 2; again++) {
        CHECK(vrep_tls_read(pair.tls[1], pair.fd[1], room, sizeof room, &count) == VREP_E_PROTOCOL);
        CHECK(strstr(vrep_tls_reason(pair.tls[1]), "bad record mac") != NULL);
    }
    CHECK(vrep_tls_write(pair.tls[1], pair.fd[1], room, sizeof room, &count) == VREP_E_PROTOCOL);
    /* The alert that says so has left. */
    CHECK(vrep_tls_read(pair.tls[0], pair.fd[0], room, sizeof room, &count) == VREP_E_PROTOCOL);
    CHECK(strstr(vrep_tls_reason(pair.tls[0]), "alert bad record mac") != NULL);
    close_pair(&pair);
}

static void a_server_takes_whom_it_trusts_and_strangers(void)
{
    char future_path[] = "/tmp/vrep-test-tls-XXXXXX";
    static char future[8192];
    struct pair pair = open_pair(certificate_path, pem);
    uint8_t *der;
    size_t size;

    CHECK_OK(shake(&pair));
    CHECK_OK(vrep_tls_peer_certificate(pair.tls[1], &der, &size));
    CHECK(size > 100);
    vrep_tls_release(der);
    close_pair(&pair);

    pair = open_pair(NULL, pem);
    CHECK_OK(shake(&pair));
    CHECK(vrep_tls_peer_certificate(pair.tls[1], &der, &size) == VREP_E_NOT_FOUND);
    close_pair(&pair);

    pair = open_pair(other_path, pem);
    CHECK(shake(&pair) == VREP_E_PROTOCOL);
    CHECK(strstr(vrep_tls_reason(pair.tls[1]), "certificate verify failed") != NULL);
    close_pair(&pair);

    pair = open_pair(certificate_path, NULL);
    CHECK(shake(&pair) == VREP_E_PROTOCOL);
    close_pair(&pair);

    make_certificate(future_path, 1000, future);
    pair = open_pair(future_path, future);
    CHECK_OK(shake(&pair)); /* whatever its dates */
    close_pair(&pair);
    unlink(future_path);
}

static void answers_without_end_are_bounded(void)
{
    static uint8_t data[1 << 16];
    struct pair pair = shaken();
    size_t gone;
    int status = VREP_OK;

    /* Nothing leaves, and nothing more is taken than one turn. */
    for (int i = 0; i < 1000 && status == VREP_OK; i++)
        status = vrep_tls_write(pair.tls[0], pair.fd[0], data, sizeof data, &gone);
    CHECK(status == VREP_E_AGAIN);
    for (int i = 0; i < 1000; i++) {
        CHECK(vrep_tls_write(pair.tls[0], pair.fd[0], data, sizeof data, &gone) == VREP_E_AGAIN);
        CHECK(gone == 0 && vrep_tls_owed(pair.tls[0]) <= sizeof data);
    }
    close_pair(&pair);
}

static void a_context_says_what_it_cannot_use(void)
{
    struct vrep_tls_options options = {
        .server = true, .certificate_path = "/tmp/none", .key_path = "/tmp/none"};
    struct vrep_tls_context *context;

    CHECK(vrep_tls_context_new(&options, &context) == VREP_E_IO);
    options.certificate_path = options.key_path = NULL;
    options.trusted = "no certificate";
    CHECK(vrep_tls_context_new(&options, &context) == VREP_E_INVALID);
}

int main(void)
{
    make_certificate(certificate_path, 0, pem);
    make_certificate(other_path, 0, NULL);
    RUN(both_directions_at_once);
    RUN(a_full_socket_takes_no_more);
    RUN(a_reader_of_much_gets_what_there_is);
    RUN(the_end_comes_behind_all_bytes);
    RUN(what_is_no_tls_ends_it_for_good);
    RUN(a_server_takes_whom_it_trusts_and_strangers);
    RUN(answers_without_end_are_bounded);
    RUN(a_context_says_what_it_cannot_use);
    unlink(certificate_path);
    unlink(other_path);
    return check_report();
}
