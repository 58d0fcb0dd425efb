/* The iSCSI target against an initiator that says what it should, and what it should not. */
#include "iscsi_client.h"
#include "serve/iscsi_chap.h"
#include "serve/iscsi_internal.h"

static struct served served;
static struct client one, two;
static uint8_t data[1 << 20], in[1 << 20];

#define NAME "iqn.2026-01.test:a"
#define READ_ 0xc0u
#define WRITE_ 0xa0u
static const uint8_t write_8_blocks[16] = {0x2a, [8] = 8}, read_8_blocks[16] = {0x28, [8] = 8};

static void fill(uint8_t with)
{
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (uint8_t)(with + i * 7);
}

static void crc_is_that_of_the_standard(void)
{
    uint8_t bytes[32];
    for (uint8_t i = 0; i < 32; i++)
        bytes[i] = i;
    CHECK_EQ(vrep_crc32c(0, bytes, 32), 0x46dd794e); /* RFC 7143 13.1 */
    memset(bytes, 0, 32);
    CHECK_EQ(vrep_crc32c(0, bytes, 32), 0x8a9136aa);
    memset(bytes, 0xff, 32);
    CHECK_EQ(vrep_crc32c(0, bytes, 32), 0x62a8ab43);
    for (int i = 0; i < 2000; i++) {
        size_t from = check_random_below(64), size = check_random_below(4096);
        size_t cut = size > 0 ? check_random_below(size) : 0;
        data[check_random_below(8192)] = (uint8_t)check_random();
        uint32_t whole = vrep_crc32c(0, data + from, size);
        CHECK_EQ(whole, vrep_crc32c_portable(0, data + from, size));
        CHECK_EQ(whole,
                 vrep_crc32c(vrep_crc32c(0, data + from, cut), data + from + cut, size - cut));
    }
}

static void pdus_are_found_whole_or_not_at_all(void)
{
    uint8_t pdu[ISCSI_BHS + 4 + 8 + 4] = {ISCSI_NOP_OUT, [7] = 5};
    struct iscsi_pdu found;
    vrep_le_store_u32(pdu + 48, vrep_crc32c(0, pdu, 48));
    vrep_le_store_u32(pdu + 60, vrep_crc32c(0, pdu + 52, 8));
    for (size_t have = 0; have < sizeof pdu; have++)
        CHECK_EQ(iscsi_pdu_find(pdu, have, true, true, &found), ISCSI_MORE);
    CHECK_EQ(iscsi_pdu_find(pdu, sizeof pdu, true, true, &found), ISCSI_WHOLE);
    CHECK(found.bytes == sizeof pdu && found.data == pdu + 52 && found.data_bytes == 5);
    for (size_t i = 0; i < sizeof pdu; i++) {
        pdu[i] ^= 1;
        CHECK(iscsi_pdu_find(pdu, sizeof pdu, true, true, &found) != ISCSI_WHOLE);
        pdu[i] ^= 1;
    }
    pdu[5] = 5; /* longer than anything */
    CHECK_EQ(iscsi_pdu_find(pdu, sizeof pdu, false, false, &found), ISCSI_BROKEN);
}

static void values_are_read_as_written(void)
{
    uint32_t number, bytes;
    uint8_t out[8];
    char text[16];
    CHECK(iscsi_number("262144", &number) && number == 262144);
    CHECK(iscsi_number("0x1F", &number) && number == 31);
    CHECK(!iscsi_number("", &number) && !iscsi_number("-1", &number) &&
          !iscsi_number("1x", &number));
    CHECK(!iscsi_number("4294967296", &number) && !iscsi_number("99999999999", &number));
    CHECK(iscsi_listed("CHAP,None", "None") && !iscsi_listed("CHAP,Nones", "None"));
    CHECK(iscsi_binary_decode("0xabc", out, 8, &bytes) && bytes == 2 && out[0] == 0x0a);
    CHECK(iscsi_binary_decode("0bAQID", out, 8, &bytes) && bytes == 3 && out[2] == 3);
    CHECK(iscsi_binary_decode("0bAQ==", out, 8, &bytes) && bytes == 1 && out[0] == 1);
    CHECK(!iscsi_binary_decode("0x", out, 8, &bytes) &&
          !iscsi_binary_decode("0xgg", out, 8, &bytes));
    CHECK(!iscsi_binary_decode("0x112233445566778899", out, 8, &bytes));
    CHECK(!iscsi_binary_decode("0bAAAAAAAAAAAAAAAA", out, 8, &bytes));
    CHECK(!iscsi_binary_decode("1234", out, 8, &bytes) && !iscsi_binary_decode("", out, 8, &bytes));
    iscsi_binary_encode((const uint8_t *)"\x0f\xa0", 2, text);
    CHECK_STR(text, "0x0fa0");
}

static bool admitted(const struct vrep_iscsi_rule *rule, const char *name, const char *from)
{
    struct iscsi_rule parsed;
    struct sockaddr_storage peer = {0};
    CHECK_OK(iscsi_rule_parse(rule, &parsed));
    if (inet_pton(AF_INET, from, &((struct sockaddr_in *)&peer)->sin_addr) == 1)
        peer.ss_family = AF_INET;
    else if (inet_pton(AF_INET6, from, &((struct sockaddr_in6 *)&peer)->sin6_addr) == 1)
        peer.ss_family = AF_INET6;
    return iscsi_admitted(&parsed, 1, name, &peer);
}

static void rules_admit_by_name_and_address(void)
{
    struct vrep_iscsi_rule rule = {.initiator = NAME};
    struct iscsi_rule parsed;
    CHECK(admitted(&rule, NAME, "10.0.0.1") && !admitted(&rule, NAME "b", "10.0.0.1"));
    rule = (struct vrep_iscsi_rule){.address = "10.1.0.0/15"};
    CHECK(admitted(&rule, NAME, "10.1.2.3") && admitted(&rule, NAME, "::ffff:10.0.2.3"));
    CHECK(!admitted(&rule, NAME, "10.2.0.0") && !admitted(&rule, NAME, "fd00::1"));
    rule = (struct vrep_iscsi_rule){.initiator = NAME, .address = "fd00::/9"};
    CHECK(admitted(&rule, NAME, "fd7f::1") && !admitted(&rule, NAME, "fd80::1"));
    CHECK(!admitted(&rule, "iqn.x", "fd7f::1"));
    static const struct vrep_iscsi_rule wrong[] = {
        {.address = "10.0.0.0/33"}, {.address = "10.0.0/8"},
        {.address = "fd00::/129"},  {.address = ""},
        {.address = "1.1.1.1/"},    {.initiator = "disk"},
        {.initiator = "iqn."}};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++)
        CHECK_STATUS(iscsi_rule_parse(&wrong[i], &parsed), VREP_E_INVALID);
}

static void what_is_unsafe_is_not_served(void)
{
    serve_init(&served);
    rig_open(&served.rig);
    CHECK_OK(vrep_loop_create(served.rig.group, &served.loop));
    struct vrep_iscsi_config right = served.config;
#define REFUSED(...)                                                                               \
    do {                                                                                           \
        struct vrep_iscsi_config config = right;                                                   \
        __VA_ARGS__;                                                                               \
        CHECK_STATUS(vrep_iscsi_create(served.loop, &config, &served.server), VREP_E_INVALID);     \
    } while (0)
    REFUSED(config.host = "0.0.0.0"); /* anybody, without CHAP */
    REFUSED(config.host = "example");
    REFUSED(config.target_name = "disk");
    REFUSED(config.credentials.name = "u"; config.credentials.secret = "short");
    REFUSED(config.credentials.name = "u");
    REFUSED(config.credentials.mutual_name = "t");
    REFUSED(config.credentials =
                ((struct iscsi_credentials){"u", "secretsecret", "t", "secretsecret"}));
    REFUSED(config.scsi.units_count = 0);
    vrep_loop_destroy(served.loop);
    rig_free(&served.rig);
}

static void commands_move_data(const char *host, bool digests)
{
    uint32_t bytes;
    serve_init(&served);
    served.config.host = host;
    serve_start(&served);
    client_connect(&one, &served);
    if (digests)
        CHECK_EQ(LOG_IN(&one, NAME, "HeaderDigest=CRC32C,None\0DataDigest=CRC32C\0"), 0);
    else
        CHECK_EQ(LOG_IN(&one, NAME, "MaxRecvDataSegmentLength=1024\0"), 0);
    one.header_digest = one.data_digest = digests;
    CHECK_EQ(one.bhs[1], 0x87);
    CHECK(vrep_be_load_u16(one.bhs + 14) != 0); /* TSIH */
    client_settle(&one);
    fill(1);
    put_command(&one, WRITE_, write_8_blocks, 4096, data, 4096);
    CHECK_EQ(get_answer(&one, in, NULL), 0);
    put_command(&one, READ_, read_8_blocks, 4096, NULL, 0);
    CHECK_EQ(get_answer(&one, in, &bytes), 0);
    CHECK_EQ(bytes, 4096);
    CHECK_MEM(in, data, 4096);
    if (!digests)
        CHECK_EQ(vrep_be_load_u32(one.bhs + 36), 3); /* in four PDUs */
    /* More than the first burst: asked for, piece by piece. */
    static const uint8_t write_big[16] = {0x2a, [7] = 4}, read_big[16] = {0x28, [7] = 4};
    fill(9);
    put_command(&one, WRITE_, write_big, 1024 * 512, data, 0);
    for (uint32_t at = 0; at < 1024 * 512;) {
        CHECK(get_pdu(&one));
        CHECK_EQ(iscsi_opcode(one.bhs), ISCSI_R2T);
        uint32_t length = vrep_be_load_u32(one.bhs + 44), tag = vrep_be_load_u32(one.bhs + 20);
        CHECK_EQ(vrep_be_load_u32(one.bhs + 40), at);
        CHECK(length <= 262144);
        for (uint32_t sent = 0, sn = 0; sent < length; sent += 65536, sn++) {
            uint8_t bhs[ISCSI_BHS] = {ISCSI_DATA_OUT, sent + 65536 == length ? 0x80 : 0};
            vrep_be_store_u32(bhs + 16, one.tag);
            vrep_be_store_u32(bhs + 20, tag);
            vrep_be_store_u32(bhs + 36, sn);
            vrep_be_store_u32(bhs + 40, at + sent);
            put_pdu(&one, bhs, data + at + sent, 65536);
        }
        at += length;
    }
    CHECK_EQ(get_answer(&one, in, NULL), 0);
    put_command(&one, READ_, read_big, 1024 * 512, NULL, 0);
    CHECK_EQ(get_answer(&one, in, &bytes), 0);
    CHECK_EQ(bytes, 1024 * 512);
    CHECK_MEM(in, data, 1024 * 512);
    /* Sense comes along; what was expected and did not come is told. */
    static const uint8_t beyond[16] = {0x28, 0, 0xff, 0, 0, 0, [8] = 1};
    put_command(&one, READ_, beyond, 512, NULL, 0);
    CHECK_EQ(get_answer(&one, in, NULL), VREP_SCSI_CHECK_CONDITION);
    CHECK_EQ(one.data_bytes, 20);
    CHECK_EQ(one.data[2 + 12], 0x21);
    CHECK_EQ(one.bhs[1] & 0x06, ISCSI_UNDERFLOW);
    CHECK_EQ(vrep_be_load_u32(one.bhs + 44), 512);
    client_close(&one);
    serve_end(&served);
}

static void over_ipv4_with_small_segments(void)
{
    commands_move_data("127.0.0.1", false);
}

static void over_ipv6_with_digests(void)
{
    commands_move_data("::1", true);
}

static void a_damaged_digest_ends_the_connection(void)
{
    serve_init(&served);
    serve_start(&served);
    for (int which = 0; which < 2; which++) {
        client_connect(&one, &served);
        CHECK_EQ(LOG_IN(&one, NAME, "HeaderDigest=CRC32C\0DataDigest=CRC32C\0"), 0);
        one.header_digest = one.data_digest = true;
        client_settle(&one);
        uint8_t pdu[ISCSI_BHS + 4 + 8] = {ISCSI_NOP_OUT | ISCSI_IMMEDIATE, 0x80, [7] = 4};
        vrep_le_store_u32(pdu + 48, vrep_crc32c(0, pdu, 48) ^ (which == 0));
        vrep_le_store_u32(pdu + 56, vrep_crc32c(0, pdu + 52, 4) ^ (which == 1));
        put_bytes(&one, pdu, sizeof pdu);
        CHECK(is_closed(&one));
        client_close(&one);
    }
    serve_end(&served);
}

/* ---- login ----------------------------------------------------------------------------- */

static void logins_are_refused_for_a_reason(void)
{
    static const struct {
        const char *text;
        uint32_t bytes;
        uint8_t flags;
        int status;
    } cases[] = {
#define CASE(flags, text, status) {text, sizeof(text) - 1, flags, status}
        CASE(0x87, "SessionType=Normal\0TargetName=" TARGET_NAME "\0", ISCSI_LOGIN_MISSING),
        CASE(0x87, "InitiatorName=" NAME "\0", ISCSI_LOGIN_MISSING),
        CASE(0x87, "InitiatorName=" NAME "\0TargetName=iqn.other\0", ISCSI_LOGIN_NOT_FOUND),
        CASE(0x87, "InitiatorName=" NAME "\0SessionType=Odd\0", ISCSI_LOGIN_SESSION_TYPE),
        CASE(0x87, "InitiatorName=\0", ISCSI_LOGIN_INITIATOR_ERROR),
        CASE(0x87, "InitiatorName=" NAME "\0InitiatorName=" NAME "\0", ISCSI_LOGIN_INITIATOR_ERROR),
        CASE(0x87, "no key at all\0", ISCSI_LOGIN_INITIATOR_ERROR),
        CASE(0x87, "InitiatorName=unterminated", ISCSI_LOGIN_INITIATOR_ERROR),
        CASE(0x87, LOGIN_KEYS(NAME) "MaxBurstLength=many\0", ISCSI_LOGIN_INITIATOR_ERROR),
        CASE(0x87, LOGIN_KEYS(NAME) "HeaderDigest=MD5\0", ISCSI_LOGIN_INITIATOR_ERROR),
        CASE(0x87, LOGIN_KEYS(NAME) "ImmediateData=Maybe\0", ISCSI_LOGIN_INITIATOR_ERROR),
        CASE(0x81, LOGIN_KEYS(NAME) "AuthMethod=CHAP\0", ISCSI_LOGIN_AUTHENTICATION),
        CASE(0x8c, LOGIN_KEYS(NAME), ISCSI_LOGIN_INITIATOR_ERROR), /* stage 3 is no stage */
        CASE(0xc7, LOGIN_KEYS(NAME), ISCSI_LOGIN_INITIATOR_ERROR), /* goes on, and is done */
        CASE(0x85, LOGIN_KEYS(NAME), ISCSI_LOGIN_INITIATOR_ERROR), /* to where it is */
    };
    serve_init(&served);
    serve_start(&served);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        client_connect(&one, &served);
        CHECK_EQ(login_step(&one, cases[i].flags, cases[i].text, cases[i].bytes), cases[i].status);
        CHECK(is_closed(&one));
        client_close(&one);
    }
    uint8_t bhs[ISCSI_BHS] = {ISCSI_NOP_OUT};
    client_connect(&one, &served); /* not a login at all */
    put_pdu(&one, bhs, NULL, 0);
    CHECK(is_closed(&one));
    client_close(&one);
    struct vrep_iscsi_stats stats;
    vrep_iscsi_stats(served.server, &stats);
    CHECK_EQ(stats.refused, sizeof cases / sizeof cases[0]);
    serve_end(&served);
}

static void keys_are_negotiated(void)
{
    serve_init(&served);
    serve_start(&served);
    client_connect(&one, &served);
    CHECK_EQ(STEP(&one, 0x81, LOGIN_KEYS(NAME) "AuthMethod=None\0"), 0);
    CHECK_EQ(one.bhs[1], 0x81);
    CHECK_STR(client_value(&one, "AuthMethod"), "None");
    CHECK_STR(client_value(&one, "TargetPortalGroupTag"), "1");
    CHECK_EQ(STEP(&one, 0x44, "MaxBurstLength=1677"), 0); /* in two pieces */
    CHECK_EQ(STEP(&one, 0x87,
                  "7215\0FirstBurstLength=1000000\0MaxConnections=8\0ErrorRecoveryLevel=2\0"
                  "InitialR2T=No\0ImmediateData=No\0DataPDUInOrder=No\0MaxOutstandingR2T=16\0"
                  "HeaderDigest=None,CRC32C\0DefaultTime2Wait=2\0DefaultTime2Retain=20\0X-odd=1\0"),
             0);
    CHECK_STR(client_value(&one, "MaxBurstLength"), "1048576");
    CHECK_STR(client_value(&one, "FirstBurstLength"), "262144");
    CHECK_STR(client_value(&one, "MaxConnections"), "1");
    CHECK_STR(client_value(&one, "MaxOutstandingR2T"), "1");
    CHECK_STR(client_value(&one, "ErrorRecoveryLevel"), "0");
    CHECK_STR(client_value(&one, "InitialR2T"), "No");
    CHECK_STR(client_value(&one, "ImmediateData"), "No");
    CHECK_STR(client_value(&one, "DataPDUInOrder"), "Yes");
    CHECK_STR(client_value(&one, "HeaderDigest"), "None");
    CHECK_STR(client_value(&one, "DefaultTime2Retain"), "0");
    CHECK_STR(client_value(&one, "MaxRecvDataSegmentLength"), "262144");
    CHECK_STR(client_value(&one, "X-odd"), "NotUnderstood");
    client_settle(&one);
    /* Unsolicited data, as agreed. */
    fill(5);
    put_command(&one, 0x20, write_8_blocks, 4096, NULL, 0);
    for (uint32_t i = 0; i < 2; i++) {
        uint8_t bhs[ISCSI_BHS] = {ISCSI_DATA_OUT, i == 1 ? 0x80 : 0};
        vrep_be_store_u32(bhs + 16, one.tag);
        vrep_be_store_u32(bhs + 20, ISCSI_NO_TAG);
        vrep_be_store_u32(bhs + 36, i);
        vrep_be_store_u32(bhs + 40, i * 2048);
        put_pdu(&one, bhs, data + i * 2048, 2048);
    }
    CHECK_EQ(get_answer(&one, in, NULL), 0);
    put_command(&one, READ_, read_8_blocks, 4096, NULL, 0);
    CHECK_EQ(get_answer(&one, in, NULL), 0);
    CHECK_MEM(in, data, 4096);
    put_command(&one, WRITE_, write_8_blocks, 4096, data, 4096); /* immediate data were not */
    CHECK(is_closed(&one));
    client_close(&one);
    serve_end(&served);
}

/* Connections that never log in take no place away for ever. */
static void who_only_connects_keeps_nobody_out(void)
{
    int idle[4];
    serve_init(&served);
    served.config.sessions = 2;
    serve_start(&served);
    for (int i = 0; i < 4; i++) {
        client_connect(&one, &served);
        idle[i] = one.fd;
    }
    client_connect(&one, &served);
    CHECK_EQ(LOG_IN(&one, NAME, ""), 0);
    client_settle(&one);
    client_close(&one);
    for (int i = 0; i < 4; i++)
        close(idle[i]);
    serve_end(&served);
}

/* ---- CHAP ---------------------------------------------------------------------------------- */

#define SECRET "initiator-secret"
#define MUTUAL "target-secret-2"

/* Answers the challenge that lies in client with a secret; extra keys go along. */
static int respond(struct client *client, const char *name, const char *secret, const char *extra,
                   uint32_t extra_bytes)
{
    uint8_t challenge[64], response[CHAP_RESPONSE_MAX];
    char text[1024], hex[2 * CHAP_RESPONSE_MAX + 3];
    uint32_t bytes, id, algorithm;
    CHECK(iscsi_number(client_value(client, "CHAP_A"), &algorithm));
    CHECK(iscsi_number(client_value(client, "CHAP_I"), &id));
    CHECK(iscsi_binary_decode(client_value(client, "CHAP_C"), challenge, sizeof challenge, &bytes));
    uint32_t length =
        iscsi_chap_response((uint8_t)algorithm, (uint8_t)id, secret, challenge, bytes, response);
    CHECK(length > 0);
    iscsi_binary_encode(response, length, hex);
    int at = snprintf(text, sizeof text, "CHAP_N=%s%cCHAP_R=%s%c", name, 0, hex, 0);
    memcpy(text + at, extra, extra_bytes);
    return login_step(client, 0x81, text, (uint32_t)at + extra_bytes);
}

static void begin_chap(const char *algorithms)
{
    char text[64];
    client_connect(&one, &served);
    CHECK_EQ(STEP(&one, 0x81, LOGIN_KEYS(NAME) "AuthMethod=CHAP,None\0"), 0);
    CHECK_STR(client_value(&one, "AuthMethod"), "CHAP");
    CHECK_EQ(one.bhs[1], 0x00); /* not yet */
    int bytes = snprintf(text, sizeof text, "CHAP_A=%s%c", algorithms, 0);
    CHECK_EQ(login_step(&one, 0x00, text, (uint32_t)bytes), 0);
}

static void chap_in_both_directions(void)
{
    static const char challenge[] = "CHAP_I=7\0CHAP_C=0x000102030405060708090a0b0c0d0e0f\0";
    serve_init(&served);
    served.config.credentials = (struct iscsi_credentials){"user", SECRET, "target", MUTUAL};
    serve_start(&served);
    for (int md5 = 0; md5 < 2; md5++) {
        uint8_t expected[CHAP_RESPONSE_MAX], sent[16];
        char hex[2 * CHAP_RESPONSE_MAX + 3];
        begin_chap(md5 ? "5" : "5,7");
        CHECK_STR(client_value(&one, "CHAP_A"), md5 ? "5" : "7");
        CHECK_EQ(respond(&one, "user", SECRET, challenge, sizeof challenge - 1), 0);
        CHECK_EQ(one.bhs[1], 0x81);
        for (uint8_t i = 0; i < 16; i++)
            sent[i] = i;
        uint32_t bytes = iscsi_chap_response(md5 ? 5 : 7, 7, MUTUAL, sent, 16, expected);
        iscsi_binary_encode(expected, bytes, hex);
        CHECK_STR(client_value(&one, "CHAP_N"), "target");
        CHECK_STR(client_value(&one, "CHAP_R"), hex);
        CHECK_EQ(STEP(&one, 0x87, "HeaderDigest=None\0"), 0);
        client_settle(&one);
        client_close(&one);
    }
    begin_chap("7");
    CHECK_EQ(respond(&one, "user", "another-secret", "", 0), ISCSI_LOGIN_AUTHENTICATION);
    client_close(&one);
    begin_chap("7");
    CHECK_EQ(respond(&one, "nobody", SECRET, "", 0), ISCSI_LOGIN_AUTHENTICATION);
    client_close(&one);
    client_connect(&one, &served); /* past it */
    CHECK_EQ(LOG_IN(&one, NAME, ""), ISCSI_LOGIN_AUTHENTICATION);
    client_close(&one);
    client_connect(&one, &served);
    CHECK_EQ(STEP(&one, 0x81, LOGIN_KEYS(NAME) "AuthMethod=None\0"), ISCSI_LOGIN_AUTHENTICATION);
    client_close(&one);
    client_connect(&one, &served); /* to say nothing of it does not help either */
    CHECK_EQ(STEP(&one, 0x87 & ~0x04, LOGIN_KEYS(NAME)), 0);
    CHECK_EQ(one.bhs[1] & 0x80, 0);
    client_close(&one);
    client_connect(&one, &served); /* a response that nobody asked for */
    CHECK_EQ(STEP(&one, 0x81, LOGIN_KEYS(NAME) "AuthMethod=CHAP\0CHAP_N=user\0CHAP_R=0x00\0"),
             ISCSI_LOGIN_AUTHENTICATION);
    client_close(&one);
    /* Our own challenge back: whoever sends it has no secret. */
    begin_chap("7");
    char reflected[128];
    int bytes = snprintf(reflected, sizeof reflected, "CHAP_I=%s%cCHAP_C=%s%c",
                         client_value(&one, "CHAP_I"), 0, client_value(&one, "CHAP_C"), 0);
    CHECK_EQ(respond(&one, "user", SECRET, reflected, (uint32_t)bytes), ISCSI_LOGIN_AUTHENTICATION);
    client_close(&one);
    serve_end(&served);
}

/* ---- sessions -------------------------------------------------------------------------------- */

static void discovery_tells_the_target(void)
{
    char address[64];
    serve_init(&served);
    serve_start(&served);
    client_connect(&one, &served);
    CHECK_EQ(STEP(&one, 0x87, "InitiatorName=" NAME "\0SessionType=Discovery\0"), 0);
    uint8_t bhs[ISCSI_BHS] = {ISCSI_TEXT, 0x80};
    vrep_be_store_u32(bhs + 16, 77);
    vrep_be_store_u32(bhs + 20, ISCSI_NO_TAG);
    vrep_be_store_u32(bhs + 24, one.cmd_sn++);
    put_pdu(&one, bhs, "SendTargets=All", 16);
    CHECK(get_pdu(&one));
    CHECK_EQ(iscsi_opcode(one.bhs), ISCSI_TEXT_RESPONSE);
    snprintf(address, sizeof address, "127.0.0.1:%u,1", vrep_iscsi_port(served.server));
    CHECK_STR(client_value(&one, "TargetName"), TARGET_NAME);
    CHECK_STR(client_value(&one, "TargetAddress"), address);
    put_command(&one, READ_, read_8_blocks, 4096, NULL, 0); /* there is no disk here */
    CHECK(get_pdu(&one));
    CHECK_EQ(iscsi_opcode(one.bhs), ISCSI_REJECT);
    uint8_t logout[ISCSI_BHS] = {ISCSI_LOGOUT | ISCSI_IMMEDIATE, 0x80};
    vrep_be_store_u32(logout + 16, 78);
    vrep_be_store_u32(logout + 24, one.cmd_sn);
    put_pdu(&one, logout, NULL, 0);
    CHECK(get_pdu(&one));
    CHECK_EQ(iscsi_opcode(one.bhs), ISCSI_LOGOUT_RESPONSE);
    CHECK(is_closed(&one));
    client_close(&one);
    serve_end(&served);
}

static void rules_decide_who_logs_in(void)
{
    static const struct vrep_iscsi_rule rules[] = {{.initiator = NAME, .address = "127.0.0.0/8"},
                                                   {.address = "10.0.0.0/8"}};
    serve_init(&served);
    served.config.rules = rules;
    served.config.rules_count = 2;
    serve_start(&served);
    client_connect(&one, &served);
    CHECK_EQ(LOG_IN(&one, NAME, ""), 0);
    client_connect(&two, &served);
    CHECK_EQ(LOG_IN(&two, NAME "other", ""), ISCSI_LOGIN_FORBIDDEN);
    client_close(&one);
    client_close(&two);
    serve_end(&served);
}

/* The same initiator port again: the old session ends, and nothing of it lands any more. */
static void a_session_begun_anew_ends_the_old_one(void)
{
    serve_init(&served);
    serve_start(&served);
    client_connect(&one, &served);
    CHECK_EQ(LOG_IN(&one, NAME, ""), 0);
    client_settle(&one);
    put_command(&one, WRITE_, write_8_blocks, 4096, data, 0); /* its data never come */
    client_connect(&two, &served);
    CHECK_EQ(LOG_IN(&two, NAME, ""), 0);
    CHECK(is_closed(&one));
    client_settle(&two);
    struct vrep_iscsi_session sessions[4];
    CHECK_EQ(vrep_iscsi_sessions(served.server, sessions, 4), 1);
    CHECK_STR(sessions[0].initiator, NAME);
    client_close(&one);
    client_close(&two);
    serve_end(&served);
}

static int abort_task(struct client *client, uint8_t function, uint32_t tag, uint64_t lun)
{
    uint8_t bhs[ISCSI_BHS] = {ISCSI_TASK_MANAGEMENT | ISCSI_IMMEDIATE, (uint8_t)(0x80 | function)};
    vrep_be_store_u64(bhs + 8, lun);
    vrep_be_store_u32(bhs + 16, 9999);
    vrep_be_store_u32(bhs + 20, tag);
    vrep_be_store_u32(bhs + 24, client->cmd_sn);
    put_pdu(client, bhs, NULL, 0);
    do
        CHECK(get_pdu(client));
    while (iscsi_opcode(client->bhs) != ISCSI_TASK_MANAGEMENT_RESPONSE);
    return client->bhs[2];
}

static void tasks_are_managed(void)
{
    serve_init(&served);
    serve_start(&served);
    client_connect(&one, &served);
    CHECK_EQ(LOG_IN(&one, NAME, ""), 0);
    client_settle(&one);
    put_command(&one, WRITE_, write_8_blocks, 4096, data, 0);
    CHECK_EQ(abort_task(&one, 1, one.tag, 0), 0);
    CHECK_EQ(abort_task(&one, 1, one.tag, 0), 1); /* it is no more */
    CHECK_EQ(abort_task(&one, 2, 0, 0), 0);
    CHECK_EQ(abort_task(&one, 3, 0, 0), 5);
    CHECK_EQ(abort_task(&one, 8, 0, 0), 4);
    CHECK_EQ(abort_task(&one, 5, 0, UINT64_C(9) << 48), 2);
    CHECK_EQ(abort_task(&one, 5, 0, 0), 0);
    static const uint8_t ready[16];
    put_command(&one, 0x80, ready, 0, NULL, 0);
    CHECK_EQ(get_answer(&one, in, NULL), VREP_SCSI_CHECK_CONDITION);
    CHECK_EQ(one.data[2 + 12], 0x29);
    CHECK_EQ(abort_task(&one, 7, 0, 0), 0); /* a cold reset ends the session */
    CHECK(is_closed(&one));
    client_close(&one);
    serve_end(&served);
}

/* Either a write was aborted and has no answer, or it is done and there was nothing to abort. */
static void an_abort_says_what_became_of_the_write(void)
{
    static const uint8_t ready[16];
    uint32_t done = 0;
    serve_init(&served);
    serve_start(&served);
    client_connect(&one, &served);
    CHECK_EQ(LOG_IN(&one, NAME, ""), 0);
    client_settle(&one);
    for (int i = 0; i < 200; i++) {
        uint8_t cdb[16] = {0x2a, i % 2 ? 8 : 0, [8] = 8}; /* FUA: on a thread of the engine */
        uint8_t bhs[ISCSI_BHS] = {ISCSI_TASK_MANAGEMENT | ISCSI_IMMEDIATE, 0x81};
        uint8_t both[2 * ISCSI_BHS + 4096] = {ISCSI_COMMAND, WRITE_, [6] = 4096 >> 8};
        vrep_be_store_u32(both + 16, ++one.tag);
        vrep_be_store_u32(both + 20, 4096);
        vrep_be_store_u32(both + 24, one.cmd_sn++);
        memcpy(both + 32, cdb, 16);
        vrep_be_store_u32(bhs + 16, 9999);
        vrep_be_store_u32(bhs + 20, one.tag);
        vrep_be_store_u32(bhs + 24, one.cmd_sn);
        memcpy(both + ISCSI_BHS + 4096, bhs, ISCSI_BHS);
        put_bytes(&one, both, sizeof both);
        bool answered = false;
        CHECK(get_pdu(&one));
        if (iscsi_opcode(one.bhs) == ISCSI_RESPONSE) {
            CHECK_EQ(one.bhs[3], 0);
            answered = true;
            CHECK(get_pdu(&one));
        }
        CHECK_EQ(iscsi_opcode(one.bhs), ISCSI_TASK_MANAGEMENT_RESPONSE);
        CHECK_EQ(one.bhs[2], answered ? 1 : 0);
        done += answered;
        put_command(&one, 0x80, ready, 0, NULL, 0);
        CHECK_EQ(get_answer(&one, in, NULL), 0); /* and nothing comes behind */
    }
    CHECK(done > 0);
    client_close(&one);
    serve_end(&served);
}

/* Out of order data end the command, not the session; data that nobody asked for end the session.
 */
static void wrong_data_write_nothing(void)
{
    serve_init(&served);
    serve_start(&served);
    client_connect(&one, &served);
    CHECK_EQ(LOG_IN(&one, NAME, ""), 0);
    client_settle(&one);
    fill(3);
    put_command(&one, WRITE_, write_8_blocks, 4096, data, 0);
    CHECK(get_pdu(&one));
    CHECK_EQ(iscsi_opcode(one.bhs), ISCSI_R2T);
    uint8_t bhs[ISCSI_BHS] = {ISCSI_DATA_OUT, 0x80};
    memcpy(bhs + 16, one.bhs + 16, 8);
    vrep_be_store_u32(bhs + 36, 1); /* DataSN */
    put_pdu(&one, bhs, data, 4096);
    CHECK_EQ(get_answer(&one, in, NULL), VREP_SCSI_CHECK_CONDITION);
    CHECK_EQ(one.data[2 + 2] & 0xf, 0xb);
    put_command(&one, READ_, read_8_blocks, 4096, NULL, 0);
    CHECK_EQ(get_answer(&one, in, NULL), 0);
    for (int i = 0; i < 4096; i++)
        CHECK_EQ(in[i], 0);
    static const struct {
        uint8_t flags;
        uint32_t expected, bytes;
    } wrong[] = {{WRITE_, 4096, 8192},          /* more than was announced */
                 {READ_, 4096, 512},            /* a read with data */
                 {0xe0, 4096, 0},               /* both directions */
                 {0x20, 4096, 0},               /* more to come, where all is to be asked for */
                 {WRITE_, 1 << 20, 128 << 10}}; /* beyond the first burst */
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        client_connect(&two, &served);
        CHECK_EQ(LOG_IN(&two, NAME "b", ""), 0);
        client_settle(&two);
        put_command(&two, wrong[i].flags, write_8_blocks, wrong[i].expected, data, wrong[i].bytes);
        CHECK(is_closed(&two));
        client_close(&two);
    }
    client_close(&one);
    serve_end(&served);
}

static void numbers_out_of_the_window_are_dropped(void)
{
    static const uint8_t ready[16];
    serve_init(&served);
    serve_start(&served);
    client_connect(&one, &served);
    CHECK_EQ(LOG_IN(&one, NAME, ""), 0);
    client_settle(&one);
    uint32_t sn = one.cmd_sn;
    one.cmd_sn = sn - 1;
    put_command(&one, 0x80, ready, 0, NULL, 0);
    one.cmd_sn = sn + 1000;
    put_command(&one, 0x80, ready, 0, NULL, 0);
    one.cmd_sn = sn;
    put_command(&one, 0x80, ready, 0, NULL, 0);
    CHECK_EQ(get_answer(&one, in, NULL), 0); /* of the last: the two before have none */
    uint8_t nop[ISCSI_BHS] = {ISCSI_NOP_OUT | ISCSI_IMMEDIATE, 0x80};
    vrep_be_store_u32(nop + 16, 5);
    vrep_be_store_u32(nop + 20, ISCSI_NO_TAG);
    put_pdu(&one, nop, "ping", 4);
    CHECK(get_pdu(&one));
    CHECK_EQ(iscsi_opcode(one.bhs), ISCSI_NOP_IN);
    CHECK_EQ(one.data_bytes, 4);
    CHECK_MEM(one.data, "ping", 4);
    uint8_t snack[ISCSI_BHS] = {ISCSI_SNACK | ISCSI_IMMEDIATE, 0x80};
    put_pdu(&one, snack, NULL, 0);
    CHECK(get_pdu(&one));
    CHECK_EQ(iscsi_opcode(one.bhs), ISCSI_REJECT);
    CHECK_MEM(one.data, snack, ISCSI_BHS);
    one.cmd_sn = one.cmd_sn + 1;
    put_command(&one, 0x80, ready, 0, NULL, 0); /* one is missing, and will never come */
    CHECK(is_closed(&one));
    client_close(&one);
    serve_end(&served);
}

/* More writes than there is memory for, whose data all come behind them: who waited for room there
 * would wait for ever. */
static void writes_without_room_are_told_so(void)
{
    serve_init(&served);
    served.rig.config.slots = 24;
    serve_start(&served);
    client_connect(&one, &served);
    CHECK_EQ(LOG_IN(&one, NAME, "ImmediateData=No\0"), 0);
    client_settle(&one);
    uint32_t first = one.tag + 1, full = 0, asked = 0, done = 0;
    struct {
        uint32_t transfer, asked;
    } tasks[60] = {0};
    for (uint32_t i = 0; i < 60; i++)
        put_command(&one, WRITE_, write_8_blocks, 4096, data, 0);
    while (asked + full < 60) {
        CHECK(get_pdu(&one));
        uint32_t i = vrep_be_load_u32(one.bhs + 16) - first;
        CHECK(i < 60);
        if (iscsi_opcode(one.bhs) == ISCSI_R2T) {
            tasks[i].transfer = vrep_be_load_u32(one.bhs + 20);
            tasks[i].asked = 1;
            asked++;
        } else {
            CHECK_EQ(iscsi_opcode(one.bhs), ISCSI_RESPONSE);
            CHECK_EQ(one.bhs[3], VREP_SCSI_TASK_SET_FULL);
            full++;
        }
    }
    CHECK(asked >= 8 && full > 0);
    for (uint32_t i = 0; i < 60; i++) {
        uint8_t bhs[ISCSI_BHS] = {ISCSI_DATA_OUT, 0x80};
        if (!tasks[i].asked)
            continue;
        vrep_be_store_u32(bhs + 16, first + i);
        vrep_be_store_u32(bhs + 20, tasks[i].transfer);
        put_pdu(&one, bhs, data, 4096);
    }
    for (; done < asked; done++) {
        CHECK(get_pdu(&one));
        CHECK_EQ(iscsi_opcode(one.bhs), ISCSI_RESPONSE);
        CHECK_EQ(one.bhs[3], 0);
    }
    client_close(&one);
    serve_end(&served);
}

/* Two paths of two initiators: what one reserves stops the other. */
static void several_sessions_are_several_nexuses(void)
{
    uint8_t key[24] = {[15] = 9}, held[24] = {[7] = 9};
    static const uint8_t registering[16] = {0x5f, 0, 0, [8] = 24},
                         reserving[16] = {0x5f, 1, 3, [8] = 24};
    serve_init(&served);
    serve_start(&served);
    client_connect(&one, &served);
    CHECK_EQ(LOG_IN(&one, NAME, ""), 0);
    client_connect(&two, &served);
    CHECK_EQ(LOG_IN(&two, NAME "b", ""), 0);
    client_settle(&one);
    client_settle(&two);
    put_command(&one, WRITE_, registering, 24, key, 24);
    CHECK_EQ(get_answer(&one, in, NULL), 0);
    put_command(&one, WRITE_, reserving, 24, held, 24);
    CHECK_EQ(get_answer(&one, in, NULL), 0);
    put_command(&two, READ_, read_8_blocks, 4096, NULL, 0);
    CHECK_EQ(get_answer(&two, in, NULL), VREP_SCSI_RESERVATION_CONFLICT);
    client_close(&one);
    client_close(&two);
    serve_end(&served);
}

int main(void)
{
    RUN(crc_is_that_of_the_standard);
    RUN(pdus_are_found_whole_or_not_at_all);
    RUN(values_are_read_as_written);
    RUN(rules_admit_by_name_and_address);
    RUN(what_is_unsafe_is_not_served);
    RUN(over_ipv4_with_small_segments);
    RUN(over_ipv6_with_digests);
    RUN(a_damaged_digest_ends_the_connection);
    RUN(logins_are_refused_for_a_reason);
    RUN(keys_are_negotiated);
    RUN(who_only_connects_keeps_nobody_out);
    RUN(chap_in_both_directions);
    RUN(discovery_tells_the_target);
    RUN(rules_decide_who_logs_in);
    RUN(a_session_begun_anew_ends_the_old_one);
    RUN(tasks_are_managed);
    RUN(an_abort_says_what_became_of_the_write);
    RUN(wrong_data_write_nothing);
    RUN(numbers_out_of_the_window_are_dropped);
    RUN(writes_without_room_are_told_so);
    RUN(several_sessions_are_several_nexuses);
    return check_report();
}
