/* SCSI commands that move data against a plain array; what is recorded is what was done. */
#include "scsi_rig.h"

static struct scsi_rig rig;
static struct answer answer, many[32];
static uint8_t oracle[RIG_BYTES], data[1 << 20], disk[RIG_BYTES];

/* CHECK_MEM looks at each byte: only where there is something to say. */
#define CHECK_SAME(got, want, size)                                                                \
    do {                                                                                           \
        if (memcmp(got, want, size) != 0)                                                          \
            CHECK_MEM(got, want, size);                                                            \
    } while (0)

static void compare_disk(void)
{
    int fd = open(rig.rig.disk, O_RDONLY);
    CHECK(fd >= 0);
    CHECK_EQ(pread(fd, disk, RIG_BYTES, 0), RIG_BYTES);
    close(fd);
    CHECK_SAME(disk, oracle, RIG_BYTES);
}

static uint32_t records(void)
{
    uint32_t all = 0;
    for (int i = 0; i < 16; i++)
        all += rig.rig.kinds[i];
    return all;
}

static void random_bytes(uint8_t *to, uint32_t bytes)
{
    for (uint32_t i = 0; i < bytes; i += 8) {
        uint64_t value = check_random();
        memcpy(to + i, &value, 8);
    }
}

static uint32_t random_blocks(uint32_t lba, uint32_t most)
{
    uint32_t all = RIG_BYTES / rig.block;
    uint32_t blocks = 1 + (uint32_t)check_random_below(most);
    return blocks < all - lba ? blocks : all - lba;
}

/* A READ or WRITE of any length of CDB that can say it. */
static const uint8_t *short_cdb(uint8_t code6, uint8_t code10, uint8_t code12, uint8_t code16,
                                uint8_t flags, uint32_t lba, uint32_t blocks)
{
    static uint8_t cdb[16];
    memset(cdb, 0, sizeof cdb);
    uint64_t which = check_random_below(4);
    if (which == 0 && code6 != 0 && blocks <= 256 && flags == 0) {
        vrep_be_store_u32(cdb, lba);
        cdb[0] = code6;
        cdb[4] = (uint8_t)blocks;
        return cdb;
    }
    if (which == 3)
        return cdb16(code16, flags, lba, blocks);
    cdb[0] = which == 2 && code12 != 0 ? code12 : code10;
    cdb[1] = flags;
    vrep_be_store_u32(cdb + 2, lba);
    if (cdb[0] == code12)
        vrep_be_store_u32(cdb + 6, blocks);
    else
        vrep_be_store_u16(cdb + 7, (uint16_t)blocks);
    return cdb;
}

/* One random command, on the device and on the array.  Returns how many records it must make. */
static uint32_t step(void)
{
    uint32_t block = rig.block, lba = (uint32_t)check_random_below(RIG_BYTES / block);
    uint32_t most = check_random_below(8) == 0 ? (1u << 20) / block : 16;
    uint32_t blocks = random_blocks(lba, most), bytes = blocks * block;
    int nexus = (int)check_random_below(SCSI_NEXUSES);
    uint8_t *at = oracle + (size_t)lba * block;
    switch (check_random_below(11)) {
    case 0:
    case 1:
        CHECK_EQ(
            scsi_run(&rig, &answer, nexus,
                     short_cdb(0x08, 0x28, 0xa8, 0x88, check_random_below(8) ? 0 : 8, lba, blocks),
                     NULL, 0),
            VREP_SCSI_GOOD);
        CHECK_EQ(answer.in_bytes, bytes);
        CHECK_SAME(answer.in, at, bytes);
        return 0;
    case 2:
    case 3:
        random_bytes(data, bytes);
        CHECK_EQ(
            scsi_run(&rig, &answer, nexus,
                     short_cdb(0x0a, 0x2a, 0xaa, 0x8a, check_random_below(8) ? 0 : 8, lba, blocks),
                     data, bytes),
            VREP_SCSI_GOOD);
        memcpy(at, data, bytes);
        return 1;
    case 4: /* the initiator sends less than it said, or more */
        random_bytes(data, bytes);
        if (check_random_below(2) == 0) {
            CHECK_EQ(
                scsi_run(&rig, &answer, nexus, cdb16(0x8a, 0, lba, blocks), data, bytes - block),
                VREP_SCSI_GOOD);
            CHECK_EQ(answer.out_asked, bytes);
            memcpy(at, data, bytes - block);
            return blocks > 1;
        }
        CHECK_EQ(scsi_run(&rig, &answer, nexus, cdb16(0x8a, 0, lba, blocks), data, sizeof data),
                 VREP_SCSI_GOOD);
        memcpy(at, data, bytes);
        return 1;
    case 5:
        random_bytes(data, bytes);
        CHECK_EQ(
            scsi_run(&rig, &answer, nexus,
                     short_cdb(0, 0x2e, 0xae, 0x8e, check_random_below(2) ? 2 : 0, lba, blocks),
                     data, bytes),
            VREP_SCSI_GOOD);
        memcpy(at, data, bytes);
        return 1;
    case 6: { /* VERIFY, of which one byte may be wrong */
        memcpy(data, at, bytes);
        uint32_t wrong = (uint32_t)check_random_below(bytes);
        bool differs = check_random_below(2) == 0;
        data[wrong] ^= differs ? 0x10 : 0;
        (void)scsi_run(&rig, &answer, nexus, short_cdb(0, 0x2f, 0xaf, 0x8f, 2, lba, blocks), data,
                       bytes);
        CHECK_EQ(answer.status, differs ? VREP_SCSI_CHECK_CONDITION : VREP_SCSI_GOOD);
        if (differs) {
            CHECK_EQ(answer.sense, 0x0e1d00);
            CHECK_EQ(answer.task.sense[0], 0xf0);
            CHECK_EQ(vrep_be_load_u32(answer.task.sense + 3), wrong);
        }
        return 0;
    }
    case 7: { /* COMPARE AND WRITE */
        uint32_t few = 128u * 1024 / block < 255 ? 128u * 1024 / block : 255;
        blocks = random_blocks(lba, check_random_below(4) ? 2 : few);
        bytes = blocks * block;
        memcpy(data, at, bytes);
        random_bytes(data + bytes, bytes);
        uint32_t wrong = (uint32_t)check_random_below(bytes);
        bool differs = check_random_below(2) == 0;
        data[wrong] ^= differs ? 0x80 : 0;
        (void)scsi_run(&rig, &answer, nexus, cdb16(0x89, 0, lba, blocks), data, 2 * bytes);
        CHECK_EQ(answer.status, differs ? VREP_SCSI_CHECK_CONDITION : VREP_SCSI_GOOD);
        if (differs) {
            CHECK_EQ(answer.sense, 0x0e1d00);
            CHECK_EQ(vrep_be_load_u32(answer.task.sense + 3), wrong);
            return 0;
        }
        memcpy(at, data + bytes, bytes);
        return 1;
    }
    case 8: { /* WRITE SAME */
        bool zero = check_random_below(2) == 0, ndob = zero && check_random_below(2) == 0;
        memset(data, 0, block);
        if (!zero)
            random_bytes(data, block);
        uint8_t flags = (uint8_t)((check_random_below(2) ? 8u : 0u) | (ndob ? 1u : 0u));
        CHECK_EQ(
            scsi_run(&rig, &answer, nexus, cdb16(0x93, flags, lba, blocks), data, ndob ? 0 : block),
            VREP_SCSI_GOOD);
        for (uint32_t i = 0; i < blocks; i++)
            memcpy(at + (size_t)i * block, data, block);
        return 1;
    }
    case 9: { /* UNMAP of up to three ranges, which then read zero to the byte */
        uint32_t count = 1 + (uint32_t)check_random_below(3), made = 0;
        memset(data, 0, 64);
        vrep_be_store_u16(data, (uint16_t)(6 + count * 16));
        vrep_be_store_u16(data + 2, (uint16_t)(count * 16));
        for (uint32_t i = 0; i < count; i++) {
            uint32_t from = (uint32_t)check_random_below(RIG_BYTES / block);
            uint32_t n = check_random_below(4) ? random_blocks(from, 64) : 0;
            vrep_be_store_u64(data + 8 + i * 16, from);
            vrep_be_store_u32(data + 16 + i * 16, n);
            memset(oracle + (size_t)from * block, 0, (size_t)n * block);
            made += n > 0;
        }
        uint8_t cdb[16] = {0x42, 0, 0, 0, 0, 0, 0, 0, (uint8_t)(8 + count * 16)};
        CHECK_EQ(scsi_run(&rig, &answer, nexus, cdb, data, 8 + count * 16), VREP_SCSI_GOOD);
        return made;
    }
    default:
        CHECK_EQ(scsi_run(&rig, &answer, nexus, CDB(0x35), NULL, 0), VREP_SCSI_GOOD);
        return 0;
    }
}

static void histories(uint32_t block)
{
    check_random(); /* takes the seed */
    memset(oracle, 0, sizeof oracle);
    scsi_rig_init(&rig, block);
    scsi_settle_in(&rig, &answer);
    rig_sync(&rig.rig); /* the first gap ends: from here every change is a record */
    uint32_t made = records();
    for (int i = 0; i < 1500; i++) {
        made += step();
        rig_apply(&rig.rig, true);
        CHECK_EQ(records(), made);
        if (i % 500 == 499) {
            compare_disk();
            CHECK_SAME(rig.rig.shadow, oracle, RIG_BYTES);
        }
    }
    CHECK(!rig.rig.in_gap);
    scsi_rig_free(&rig);
}

static void any_history_of_512_byte_blocks(void)
{
    histories(512);
}

static void any_history_of_4096_byte_blocks(void)
{
    histories(4096);
}

/* Of many that expect the same, one wins; the others say where they differ, and only the winner is
 * recorded.  Lesson of tcmu-runner 641. */
static void compare_and_write_is_atomic(void)
{
    scsi_rig_init(&rig, 512);
    scsi_settle_in(&rig, &answer);
    rig_sync(&rig.rig);
    uint32_t made = records();
    for (uint32_t round = 0; round < 100; round++) {
        for (int i = 0; i < 32; i++) {
            memset(data, 0, 1024);
            vrep_be_store_u32(data, round); /* expected: what the last round left */
            vrep_be_store_u32(data + 512, round + 1);
            vrep_be_store_u32(data + 516, 0);
            scsi_prepare(&rig, &many[i], i % SCSI_NEXUSES, cdb16(0x89, 8, 100, 1), data, 1024);
        }
        for (int i = 0; i < 32; i++)
            vrep_scsi_submit(&many[i].task);
        uint32_t won = 0;
        for (int i = 0; i < 32; i++) {
            scsi_wait(&rig, &many[i]);
            won += many[i].status == VREP_SCSI_GOOD;
            CHECK(many[i].status == VREP_SCSI_GOOD || many[i].sense == 0x0e1d00);
        }
        CHECK_EQ(won, 1);
        rig_apply(&rig.rig, true);
        CHECK_EQ(records(), ++made);
    }
    rig_compare(&rig.rig);
    scsi_rig_free(&rig);
}

/* Holes are told, and what a view does not hold yet is not. */
static void lba_status_tells_holes(void)
{
    scsi_rig_init(&rig, 512);
    scsi_settle_in(&rig, &answer);
    random_bytes(data, 65536);
    CHECK_EQ(scsi_run(&rig, &answer, 0, cdb16(0x8a, 0, 0, 128), data, 65536), VREP_SCSI_GOOD);
    CHECK_EQ(scsi_run(&rig, &answer, 0, cdb16(0x93, 9, 32, 64), NULL, 0), VREP_SCSI_GOOD);
    uint8_t cdb[16] = {0x9e, 0x12, [12] = 1};
    CHECK_EQ(scsi_run(&rig, &answer, 0, cdb, NULL, 0), VREP_SCSI_GOOD);
    static const uint64_t expected[][3] = {{0, 32, 0}, {32, 64, 1}, {96, 32, 0}, {128, 8064, 1}};
    CHECK_EQ(answer.in_bytes, 8 + 4 * 16);
    for (int i = 0; i < 4; i++) {
        const uint8_t *at = answer.in + 8 + i * 16;
        CHECK_EQ(vrep_be_load_u64(at), expected[i][0]);
        CHECK_EQ(vrep_be_load_u32(at + 8), expected[i][1]);
        CHECK_EQ(at[12], expected[i][2]);
    }
    cdb[9] = 33; /* from the middle of the hole, */
    cdb[12] = 0;
    cdb[13] = 24; /* with room for one */
    CHECK_EQ(scsi_run(&rig, &answer, 0, cdb, NULL, 0), VREP_SCSI_GOOD);
    CHECK_EQ(answer.in_bytes, 24);
    CHECK_EQ(vrep_be_load_u32(answer.in + 16), 63);
    scsi_rig_free(&rig);
}

/* An UNMAP is checked whole before any of it is done. */
static void a_wrong_unmap_does_nothing(void)
{
    scsi_rig_init(&rig, 512);
    scsi_settle_in(&rig, &answer);
    memset(data, 0xee, 512);
    CHECK_EQ(scsi_run(&rig, &answer, 0, cdb16(0x8a, 0, 0, 1), data, 512), VREP_SCSI_GOOD);
    uint64_t head = rig_status(&rig.rig).head;
    memset(data, 0, 64);
    vrep_be_store_u16(data, 38);
    vrep_be_store_u16(data + 2, 32);
    vrep_be_store_u32(data + 16, 1);               /* LBA 0, fine */
    vrep_be_store_u64(data + 24, RIG_BYTES / 512); /* the end */
    vrep_be_store_u32(data + 32, 1);
    uint8_t cdb[16] = {0x42, [8] = 40};
    CHECK_EQ(scsi_run(&rig, &answer, 0, cdb, data, 40), VREP_SCSI_CHECK_CONDITION);
    CHECK_EQ(answer.sense, 0x052100);
    vrep_be_store_u64(data + 24, UINT64_MAX);
    vrep_be_store_u32(data + 32, 2);
    CHECK_EQ(scsi_run(&rig, &answer, 0, cdb, data, 40), VREP_SCSI_CHECK_CONDITION);
    CHECK_EQ(answer.sense, 0x052100);
    CHECK_EQ(rig_status(&rig.rig).head, head);
    static uint8_t list[8 + 257 * 16];
    vrep_be_store_u16(list, sizeof list - 2);
    vrep_be_store_u16(list + 2, 257 * 16);
    vrep_be_store_u16(cdb + 7, sizeof list);
    CHECK_EQ(scsi_run(&rig, &answer, 0, cdb, list, sizeof list), VREP_SCSI_CHECK_CONDITION);
    CHECK_EQ(answer.sense, 0x052600);
    scsi_rig_free(&rig);
}

/* More at once than there are commands, or memory: they wait and all end. */
static void a_crowd_waits_for_room(void)
{
    static struct answer crowd[32];
    scsi_rig_init(&rig, 512);
    scsi_rig_shut(&rig, true);
    rig.rig.config.slots = 20;
    scsi_rig_open(&rig);
    scsi_settle_in(&rig, &answer);
    memset(oracle, 0, sizeof oracle);
    for (int round = 0; round < 20; round++) {
        for (uint32_t i = 0; i < 32; i++) { /* they take no command before they run */
            memset(data, (int)(1 + i), 512);
            scsi_prepare(&rig, &crowd[i], 0, cdb16(0x93, 0, i * 64, 64), data, 512);
            memset(oracle + (size_t)i * 64 * 512, (int)(1 + i), 64 * 512);
        }
        for (int i = 0; i < 32; i++)
            vrep_scsi_submit(&crowd[i].task);
        for (int i = 0; i < 32; i++) {
            scsi_wait(&rig, &crowd[i]);
            CHECK_EQ(crowd[i].status, VREP_SCSI_GOOD);
        }
    }
    compare_disk();
    scsi_rig_free(&rig);
}

int main(void)
{
    RUN(any_history_of_512_byte_blocks);
    RUN(any_history_of_4096_byte_blocks);
    RUN(compare_and_write_is_atomic);
    RUN(lba_status_tells_holes);
    RUN(a_wrong_unmap_does_nothing);
    RUN(a_crowd_waits_for_room);
    return check_report();
}
