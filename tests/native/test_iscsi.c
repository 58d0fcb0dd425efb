/* Sessions of the iSCSI target with an initiator that sends what it should, and what it should not.
 */
#include "iscsi_client.h"

static struct served served;
static struct client one, two;
static uint8_t data[1 << 20], in[1 << 20];

static void fill(uint8_t with)
{
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (uint8_t)(with + i * 7);
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

/* ---- sessions ------------------------------------------------------------ */

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

/* The group is opened with another size, so its sessions end; who comes back is told. */
static void a_resize_is_told_to_who_comes_back(void)
{
    static const uint8_t ready[16], capacity[16] = {0x9e, 0x10, [13] = 32};
    static const uint8_t last[16] = {0x28, 0, 0, 0, (1 << 20) / 512 / 256 - 1, 0xff, 0, 0, 1};
    uint32_t bytes;
    serve_init(&served);
    serve_start(&served);
    client_connect(&one, &served);
    CHECK_EQ(LOG_IN(&one, NAME, ""), 0);
    client_settle(&one);
    fill(11);
    put_command(&one, WRITE_, write_8_blocks, 4096, data, 4096);
    CHECK_EQ(get_answer(&one, in, NULL), 0);
    serve_stop(&served);
    CHECK(is_closed(&one));
    client_close(&one);
    rig_close(&served.rig, false);
    served.rig.disks[0].was = RIG_BYTES;
    served.rig.disks[0].bytes = 1 << 20;
    serve_start(&served);
    for (int i = 0; i < 2; i++) { /* two paths of one initiator */
        client_connect(&two, &served);
        CHECK_EQ(LOG_IN(&two, NAME, ""), 0);
        put_command(&two, 0x80, ready, 0, NULL, 0);
        CHECK_EQ(get_answer(&two, in, NULL), VREP_SCSI_CHECK_CONDITION);
        CHECK_EQ(vrep_be_load_u16(two.data + 2 + 12), 0x2900);
        put_command(&two, READ_, read_8_blocks, 4096, NULL, 0);
        CHECK_EQ(get_answer(&two, in, NULL), VREP_SCSI_CHECK_CONDITION);
        CHECK_EQ(two.data[2 + 2] & 0xf, 6);
        CHECK_EQ(vrep_be_load_u16(two.data + 2 + 12), 0x2a09);
        put_command(&two, READ_, capacity, 32, NULL, 0);
        CHECK_EQ(get_answer(&two, in, &bytes), 0);
        CHECK_EQ(vrep_be_load_u64(in), (1 << 20) / 512 - 1);
        put_command(&two, READ_, read_8_blocks, 4096, NULL, 0);
        CHECK_EQ(get_answer(&two, in, NULL), 0);
        CHECK_MEM(in, data, 4096);
        put_command(&two, READ_, last, 512, NULL, 0);
        CHECK_EQ(get_answer(&two, in, NULL), 0);
        client_close(&two);
    }
    serve_end(&served);
}

int main(void)
{
    RUN(over_ipv4_with_small_segments);
    RUN(over_ipv6_with_digests);
    RUN(a_damaged_digest_ends_the_connection);
    RUN(a_session_begun_anew_ends_the_old_one);
    RUN(tasks_are_managed);
    RUN(an_abort_says_what_became_of_the_write);
    RUN(wrong_data_write_nothing);
    RUN(numbers_out_of_the_window_are_dropped);
    RUN(writes_without_room_are_told_so);
    RUN(several_sessions_are_several_nexuses);
    RUN(a_resize_is_told_to_who_comes_back);
    return check_report();
}
