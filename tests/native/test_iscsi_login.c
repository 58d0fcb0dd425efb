/* Who may log in to the iSCSI target, how, and what is agreed. */
#include "iscsi_client.h"
#include "serve/iscsi_chap.h"

static struct served served;
static struct client one, two;
static uint8_t data[4096], in[4096];

static void fill(uint8_t with)
{
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (uint8_t)(with + i * 7);
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

int main(void)
{
    RUN(what_is_unsafe_is_not_served);
    RUN(logins_are_refused_for_a_reason);
    RUN(keys_are_negotiated);
    RUN(who_only_connects_keeps_nobody_out);
    RUN(chap_in_both_directions);
    RUN(discovery_tells_the_target);
    RUN(rules_decide_who_logs_in);
    return check_report();
}
