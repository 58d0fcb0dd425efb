#include "serve/iscsi_login.h"

#include <openssl/crypto.h>
#include <stdio.h>
#include <string.h>

#include "serve/iscsi_chap.h"

#define SECURITY 0u
#define OPERATIONAL 1u
#define FULL_FEATURE 3u
#define TRANSIT 0x80u

void iscsi_login_init(struct iscsi_login *login, const struct iscsi_credentials *credentials,
                      const char *target_name)
{
    memset(login, 0, sizeof *login);
    login->credentials = credentials;
    login->target_name = target_name;
    login->authenticated = credentials->name == NULL;
    login->initial_r2t = login->immediate_data = true; /* what holds when nothing is said */
    login->send_max = 8192;
    login->max_burst = 262144;
    login->first_burst = 65536;
}

/* ---- CHAP ----------------------------------------------------------------------- */

/* The CHAP keys of one request; they come in any order. */
struct chap {
    const char *algorithms, *name, *response, *id, *challenge;
};

static int choose_algorithm(struct iscsi_login *login, const struct chap *chap,
                            struct iscsi_made *made)
{
    char text[2 * ISCSI_CHALLENGE + 3];
    login->chap_algorithm = iscsi_listed(chap->algorithms, "7")   ? CHAP_SHA256
                            : iscsi_listed(chap->algorithms, "5") ? CHAP_MD5
                                                                  : 0;
    if (login->chap_algorithm == 0)
        return ISCSI_LOGIN_AUTHENTICATION;
    if (!iscsi_chap_random(login->challenge, sizeof login->challenge) ||
        !iscsi_chap_random(&login->chap_id, 1))
        return ISCSI_LOGIN_TARGET_ERROR;
    snprintf(text, sizeof text, "%u", login->chap_algorithm);
    iscsi_made_add(made, "CHAP_A", text);
    snprintf(text, sizeof text, "%u", login->chap_id);
    iscsi_made_add(made, "CHAP_I", text);
    iscsi_binary_encode(login->challenge, sizeof login->challenge, text);
    iscsi_made_add(made, "CHAP_C", text);
    login->chap_step = 2;
    return ISCSI_LOGIN_OK;
}

/* The initiator wants the target to prove itself. */
static int answer_challenge(const struct iscsi_login *login, const struct chap *chap,
                            struct iscsi_made *made)
{
    uint8_t challenge[CHAP_BINARY_MAX], response[CHAP_RESPONSE_MAX];
    char text[2 * CHAP_RESPONSE_MAX + 3];
    uint32_t bytes, id;
    if (login->credentials->mutual_name == NULL || chap->id == NULL)
        return ISCSI_LOGIN_AUTHENTICATION;
    if (!iscsi_number(chap->id, &id) || id > 255 ||
        !iscsi_binary_decode(chap->challenge, challenge, sizeof challenge, &bytes))
        return ISCSI_LOGIN_AUTHENTICATION;
    /* Our own challenge back at us: whoever sends it has no secret, and wants ours to answer. */
    if (bytes == sizeof login->challenge && memcmp(challenge, login->challenge, bytes) == 0)
        return ISCSI_LOGIN_AUTHENTICATION;
    uint32_t length =
        iscsi_chap_response(login->chap_algorithm, (uint8_t)id, login->credentials->mutual_secret,
                            challenge, bytes, response);
    if (length == 0)
        return ISCSI_LOGIN_TARGET_ERROR;
    iscsi_made_add(made, "CHAP_N", login->credentials->mutual_name);
    iscsi_binary_encode(response, length, text);
    iscsi_made_add(made, "CHAP_R", text);
    return ISCSI_LOGIN_OK;
}

static int check_response(struct iscsi_login *login, const struct chap *chap,
                          struct iscsi_made *made)
{
    uint8_t given[CHAP_BINARY_MAX], expected[CHAP_RESPONSE_MAX];
    uint32_t bytes;
    uint32_t length =
        iscsi_chap_response(login->chap_algorithm, login->chap_id, login->credentials->secret,
                            login->challenge, sizeof login->challenge, expected);
    if (length == 0)
        return ISCSI_LOGIN_TARGET_ERROR;
    login->chap_step = 0; /* one answer to a challenge */
    if (chap->name == NULL || strcmp(chap->name, login->credentials->name) != 0 ||
        !iscsi_binary_decode(chap->response, given, sizeof given, &bytes) || bytes != length ||
        CRYPTO_memcmp(given, expected, length) != 0)
        return ISCSI_LOGIN_AUTHENTICATION;
    if (chap->challenge != NULL) {
        int status = answer_challenge(login, chap, made);
        if (status != ISCSI_LOGIN_OK)
            return status;
    }
    login->authenticated = true;
    return ISCSI_LOGIN_OK;
}

static int authenticate(struct iscsi_login *login, const char *methods, const struct chap *chap,
                        struct iscsi_made *made)
{
    if (methods != NULL) {
        bool asked = login->credentials->name != NULL;
        if (!iscsi_listed(methods, asked ? "CHAP" : "None"))
            return ISCSI_LOGIN_AUTHENTICATION;
        iscsi_made_add(made, "AuthMethod", asked ? "CHAP" : "None");
        login->chap_step = asked ? 1 : 0;
    }
    if (login->credentials->name == NULL)
        return ISCSI_LOGIN_OK;
    if (chap->algorithms != NULL && login->chap_step >= 1)
        return choose_algorithm(login, chap, made);
    if (chap->response != NULL && login->chap_step == 2)
        return check_response(login, chap, made);
    return chap->response != NULL ? ISCSI_LOGIN_AUTHENTICATION : ISCSI_LOGIN_OK;
}

/* ---- operational keys -------------------------------------------------------------- */

static void add_number(struct iscsi_made *made, const char *key, uint32_t value)
{
    char text[12];
    snprintf(text, sizeof text, "%u", value);
    iscsi_made_add(made, key, text);
}

static bool is_yes(const char *value)
{
    return strcmp(value, "Yes") == 0;
}

/* The smaller of both is what holds; false: it is no number in its range. */
static bool smaller(struct iscsi_made *made, const char *key, const char *value, uint32_t least,
                    uint32_t ours, uint32_t *out)
{
    uint32_t theirs;
    if (!iscsi_number(value, &theirs) || theirs < least || theirs > 0xffffffu)
        return false;
    *out = theirs < ours ? theirs : ours;
    add_number(made, key, *out);
    return true;
}

static bool digest(struct iscsi_made *made, const char *key, const char *value, bool *out)
{
    const char *crc = strstr(value, "CRC32C"), *none = strstr(value, "None");
    if (!iscsi_listed(value, "CRC32C"))
        crc = NULL;
    if (!iscsi_listed(value, "None"))
        none = NULL;
    if (crc == NULL && none == NULL)
        return false;
    *out = crc != NULL && (none == NULL || crc < none); /* the initiator's first choice */
    iscsi_made_add(made, key, *out ? "CRC32C" : "None");
    return true;
}

static bool operational(struct iscsi_login *login, const char *key, const char *value,
                        struct iscsi_made *made)
{
    uint32_t number;
    if (strcmp(key, "HeaderDigest") == 0)
        return digest(made, key, value, &login->header_digest);
    if (strcmp(key, "DataDigest") == 0)
        return digest(made, key, value, &login->data_digest);
    if (strcmp(key, "MaxRecvDataSegmentLength") == 0) { /* declared, not negotiated */
        if (!iscsi_number(value, &number) || number < 512 || number > 0xffffffu)
            return false;
        login->send_max = number < ISCSI_SEGMENT_MAX ? number : ISCSI_SEGMENT_MAX;
        return true;
    }
    if (strcmp(key, "MaxBurstLength") == 0)
        return smaller(made, key, value, 512, ISCSI_MAX_BURST, &login->max_burst);
    if (strcmp(key, "FirstBurstLength") == 0)
        return smaller(made, key, value, 512, ISCSI_FIRST_BURST, &login->first_burst);
    if (strcmp(key, "MaxConnections") == 0)
        return smaller(made, key, value, 1, 1, &number);
    if (strcmp(key, "MaxOutstandingR2T") == 0)
        return smaller(made, key, value, 1, 1, &number);
    if (strcmp(key, "ErrorRecoveryLevel") == 0)
        return smaller(made, key, value, 0, 0, &number);
    if (strcmp(key, "DefaultTime2Retain") == 0)
        return smaller(made, key, value, 0, 0, &number);
    if (strcmp(key, "DefaultTime2Wait") == 0) { /* the larger holds: theirs */
        if (!iscsi_number(value, &number) || number > 3600)
            return false;
        add_number(made, key, number);
        return true;
    }
    if (strcmp(key, "InitialR2T") == 0 || strcmp(key, "ImmediateData") == 0) {
        if (!is_yes(value) && strcmp(value, "No") != 0)
            return false;
        if (key[1] == 'n') /* OR with No; AND with Yes: both are as the initiator says */
            login->initial_r2t = is_yes(value);
        else
            login->immediate_data = is_yes(value);
        iscsi_made_add(made, key, value);
        return true;
    }
    if (strcmp(key, "DataPDUInOrder") == 0 || strcmp(key, "DataSequenceInOrder") == 0) {
        iscsi_made_add(made, key, "Yes");
        return is_yes(value) || strcmp(value, "No") == 0;
    }
    iscsi_made_add(made, key, "NotUnderstood");
    return true;
}

/* ---- a request ------------------------------------------------------------------------ */

static bool declares(const char *key)
{
    static const char *const silent[] = {"InitiatorAlias", "TargetAlias", "TargetAddress",
                                         "TargetPortalGroupTag"};
    for (size_t i = 0; i < sizeof silent / sizeof silent[0]; i++)
        if (strcmp(key, silent[i]) == 0)
            return true;
    return false;
}

static int who(struct iscsi_login *login, const char *key, const char *value, bool *handled)
{
    *handled = true;
    if (strcmp(key, "InitiatorName") == 0) {
        size_t bytes = strlen(value);
        if (login->named || bytes == 0 || bytes > ISCSI_NAME_MAX)
            return ISCSI_LOGIN_INITIATOR_ERROR;
        memcpy(login->initiator, value, bytes + 1);
        login->named = true;
    } else if (strcmp(key, "SessionType") == 0) {
        login->discovery = strcmp(value, "Discovery") == 0;
        if (!login->discovery && strcmp(value, "Normal") != 0)
            return ISCSI_LOGIN_SESSION_TYPE;
    } else if (strcmp(key, "TargetName") == 0) {
        login->target_given = true;
        login->target_right = strcmp(value, login->target_name) == 0;
    } else {
        *handled = declares(key);
    }
    return ISCSI_LOGIN_OK;
}

static int read_keys(struct iscsi_login *login, uint8_t stage, struct iscsi_made *made)
{
    struct iscsi_text text = {login->kept, login->kept + login->kept_bytes};
    struct chap chap = {0};
    const char *start, *value, *methods = NULL;
    uint32_t key_bytes;
    bool bad;
    while (iscsi_text_next(&text, &start, &key_bytes, &value, &bad)) {
        char key[64];
        bool handled;
        memcpy(key, start, key_bytes);
        key[key_bytes] = '\0';
        int status = who(login, key, value, &handled);
        if (status != ISCSI_LOGIN_OK)
            return status;
        if (handled)
            continue;
        if (strcmp(key, "AuthMethod") == 0)
            methods = value;
        else if (strcmp(key, "CHAP_A") == 0)
            chap.algorithms = value;
        else if (strcmp(key, "CHAP_N") == 0)
            chap.name = value;
        else if (strcmp(key, "CHAP_R") == 0)
            chap.response = value;
        else if (strcmp(key, "CHAP_I") == 0)
            chap.id = value;
        else if (strcmp(key, "CHAP_C") == 0)
            chap.challenge = value;
        else if (stage != OPERATIONAL)
            iscsi_made_add(made, key, "NotUnderstood");
        else if (!operational(login, key, value, made))
            return ISCSI_LOGIN_INITIATOR_ERROR;
    }
    if (bad)
        return ISCSI_LOGIN_INITIATOR_ERROR;
    return stage == SECURITY ? authenticate(login, methods, &chap, made) : ISCSI_LOGIN_OK;
}

/* Who it is must be said in the first request. */
static int check_names(const struct iscsi_login *login)
{
    if (!login->named)
        return ISCSI_LOGIN_MISSING;
    if (login->discovery)
        return ISCSI_LOGIN_OK;
    if (!login->target_given)
        return ISCSI_LOGIN_MISSING;
    return login->target_right ? ISCSI_LOGIN_OK : ISCSI_LOGIN_NOT_FOUND;
}

static int take_text(struct iscsi_login *login, const struct iscsi_pdu *pdu)
{
    if (pdu->data_bytes > sizeof login->kept - login->kept_bytes)
        return ISCSI_LOGIN_INITIATOR_ERROR;
    memcpy(login->kept + login->kept_bytes, pdu->data, pdu->data_bytes);
    login->kept_bytes += pdu->data_bytes;
    return ISCSI_LOGIN_OK;
}

static int step(struct iscsi_login *login, const struct iscsi_pdu *pdu, uint8_t *flags,
                struct iscsi_made *made)
{
    const uint8_t *bhs = pdu->bhs;
    uint8_t stage = bhs[1] >> 2 & 3u, next = bhs[1] & 3u;
    bool transit = (bhs[1] & TRANSIT) != 0, more = (bhs[1] & ISCSI_CONTINUE) != 0;
    *flags = (uint8_t)((unsigned)stage << 2);
    if (bhs[3] > 0) /* version-min */
        return ISCSI_LOGIN_VERSION;
    if (stage > OPERATIONAL || (login->begun && stage < login->stage) || (transit && more))
        return ISCSI_LOGIN_INITIATOR_ERROR;
    if (login->begun && stage != login->stage)
        return ISCSI_LOGIN_INITIATOR_ERROR;
    if (vrep_be_load_u16(bhs + 14) != 0) /* TSIH: a second connection of a session */
        return ISCSI_LOGIN_TOO_MANY;
    login->stage = stage;
    int status = take_text(login, pdu);
    if (status != ISCSI_LOGIN_OK || more)
        return status;
    bool first = !login->begun;
    login->begun = true;
    status = read_keys(login, stage, made);
    login->kept_bytes = 0;
    if (status == ISCSI_LOGIN_OK && first)
        status = check_names(login);
    if (status != ISCSI_LOGIN_OK)
        return status;
    if (stage == OPERATIONAL && !login->authenticated)
        return ISCSI_LOGIN_AUTHENTICATION;
    if (!login->discovery && !login->tagged) {
        iscsi_made_add(made, "TargetPortalGroupTag", "1");
        login->tagged = true;
    }
    if (stage == OPERATIONAL && !login->declared) {
        add_number(made, "MaxRecvDataSegmentLength", ISCSI_SEGMENT_MAX);
        login->declared = true;
    }
    if (login->first_burst > login->max_burst)
        login->first_burst = login->max_burst;
    if (!transit || !login->authenticated)
        return made->full ? ISCSI_LOGIN_INITIATOR_ERROR : ISCSI_LOGIN_OK;
    if (next <= stage || next == 2)
        return ISCSI_LOGIN_INITIATOR_ERROR;
    *flags = (uint8_t)(TRANSIT | (unsigned)stage << 2 | next);
    login->stage = next;
    login->done = next == FULL_FEATURE;
    return made->full ? ISCSI_LOGIN_INITIATOR_ERROR : ISCSI_LOGIN_OK;
}

int iscsi_login_step(struct iscsi_login *login, const struct iscsi_pdu *pdu, uint8_t *bhs,
                     struct iscsi_made *made)
{
    uint8_t flags;
    int status = step(login, pdu, &flags, made);
    if (status != ISCSI_LOGIN_OK) {
        made->bytes = 0;
        login->done = false;
    }
    memset(bhs, 0, ISCSI_BHS);
    bhs[0] = ISCSI_LOGIN_RESPONSE;
    bhs[1] = status == ISCSI_LOGIN_OK ? flags : 0;
    memcpy(bhs + 8, pdu->bhs + 8, 8); /* ISID; TSIH is the session's */
    memcpy(bhs + 16, pdu->bhs + 16, 4);
    vrep_be_store_u16(bhs + 36, (uint16_t)status);
    memcpy(login->isid, pdu->bhs + 8, sizeof login->isid);
    return status;
}
