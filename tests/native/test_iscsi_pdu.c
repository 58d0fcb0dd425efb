/* Bytes of iSCSI without a connection: digests, PDUs, values, and who is admitted. */
#include "iscsi_client.h"
#include "serve/iscsi_chap.h"
#include "serve/iscsi_internal.h"

static uint8_t data[16384];

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

int main(void)
{
    RUN(crc_is_that_of_the_standard);
    RUN(pdus_are_found_whole_or_not_at_all);
    RUN(values_are_read_as_written);
    RUN(rules_admit_by_name_and_address);
    return check_report();
}
