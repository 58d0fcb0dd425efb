/* Views that fill a disk which has most of it: only parts are written, blocks come as a whole. */
#include "filter/fault.h"
#include "filter_rig.h"

#define BLOCK 65536u
#define UNIT 4096u
#define UNITS (RIG_BYTES / UNIT)

static struct rig rig;
static char uri[128], onto[128];
static uint8_t before[RIG_BYTES], wanted[RIG_BYTES], got[RIG_BYTES];

static void arm(const char *fault)
{
    if (fault != NULL)
        setenv("VREP_FAULT", fault, 1);
    else
        unsetenv("VREP_FAULT");
    vrep_fault_prepare();
}

/* A disk with what it had before, of which some units, and half of one, are not what is wanted. */
static void open_onto(void)
{
    rig_init(&rig);
    snprintf(uri, sizeof uri, "view:%s/overlay", rig.root);
    snprintf(onto, sizeof onto, "file:%s/old.raw", rig.root);
    for (unsigned i = 0; i < RIG_BYTES; i++)
        before[i] = wanted[i] = (uint8_t)(i / UNIT + i % 251);
    memset(wanted + UNIT, 0xa1, 2 * UNIT);
    memset(wanted + BLOCK - UNIT, 0xa2, UNIT + 512); /* past the end of a block */
    memset(wanted + 3 * BLOCK, 0xa3, BLOCK);
    int fd = open(onto + 5, O_RDWR | O_CREAT, 0600);
    CHECK(fd >= 0 && pwrite(fd, before, RIG_BYTES, 0) == RIG_BYTES);
    close(fd);
    rig.disks[0].uri = uri;
    rig.disks[0].onto = onto;
    rig.disks[0].bytes = RIG_BYTES;
    rig.config.flags = 0;
    rig_open(&rig);
}

static const struct vrep_fill_part PARTS[] = {
    {UNIT, 2 * UNIT}, {BLOCK - UNIT, UNIT + 512}, {3 * BLOCK, BLOCK}};

static void check_disk(const uint8_t *content)
{
    int fd = open(onto + 5, O_RDONLY);
    CHECK(fd >= 0 && pread(fd, got, RIG_BYTES, 0) == RIG_BYTES);
    CHECK_MEM(got, content, RIG_BYTES);
    close(fd);
}

static struct vrep_miss take(uint64_t from, uint64_t length)
{
    struct vrep_miss miss;
    CHECK_OK(vrep_group_fill_next(rig.group, 0, from, length, &miss));
    CHECK_EQ(miss.offset, from);
    CHECK_EQ(miss.length, length);
    return miss;
}

static void only_parts_are_written(void)
{
    open_onto();
    static uint8_t data[4 * BLOCK];
    struct vrep_miss miss = take(0, 4 * BLOCK);
    memset(data, 0xee, sizeof data); /* what lies outside of the parts is never looked at */
    for (unsigned i = 0; i < 3; i++)
        memcpy(data + PARTS[i].offset, wanted + PARTS[i].offset, PARTS[i].length);
    CHECK_OK(vrep_group_fill_parts(rig.group, miss.ticket, data, PARTS, 3));
    CHECK_OK(rig_read(&rig, 0, 4 * BLOCK, got));
    CHECK_MEM(got, wanted, 4 * BLOCK);
    check_disk(wanted);
    /* Nothing of it is to be written: it is there. */
    miss = take(4 * BLOCK, 2 * BLOCK);
    CHECK_OK(vrep_group_fill_parts(rig.group, miss.ticket, NULL, NULL, 0));
    CHECK_OK(rig_read(&rig, 4 * BLOCK, 2 * BLOCK, got));
    CHECK_MEM(got, before + 4 * BLOCK, 2 * BLOCK);
    /* Zeroes. */
    static const struct vrep_fill_part zeroes = {6 * BLOCK + UNIT, UNIT};
    miss = take(6 * BLOCK, BLOCK);
    CHECK_OK(vrep_group_fill_parts(rig.group, miss.ticket, NULL, &zeroes, 1));
    CHECK_OK(rig_read(&rig, 6 * BLOCK, BLOCK, got));
    memset(wanted + zeroes.offset, 0, UNIT);
    CHECK_MEM(got, wanted + 6 * BLOCK, BLOCK);
    check_disk(wanted);
    take(7 * BLOCK, BLOCK); /* the next that is absent */
    rig_free(&rig);
}

static void newer_data_survive_late_parts(void)
{
    open_onto();
    static uint8_t data[4 * BLOCK];
    memcpy(data, wanted, sizeof data);
    struct vrep_miss miss = take(0, 4 * BLOCK);
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 3 * BLOCK, BLOCK, 0x77)); /* whole: needs no fill */
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, BLOCK, BLOCK, 0x78));
    CHECK_OK(vrep_group_fill_parts(rig.group, miss.ticket, data, PARTS, 3));
    memset(wanted + 3 * BLOCK, 0x77, BLOCK);
    memset(wanted + BLOCK, 0x78, BLOCK);
    CHECK_OK(rig_read(&rig, 0, 4 * BLOCK, got));
    CHECK_MEM(got, wanted, 4 * BLOCK);
    check_disk(wanted);
    rig_free(&rig);
}

static void parts_out_of_order_are_refused(void)
{
    static const struct vrep_fill_part wrong[][2] = {
        {{BLOCK + UNIT, UNIT}, {BLOCK, UNIT}},
        {{BLOCK, 2 * UNIT}, {BLOCK + UNIT, UNIT}},
        {{BLOCK - 512, UNIT}, {BLOCK + UNIT, UNIT}},
        {{BLOCK, UNIT}, {3 * BLOCK - 512, UNIT}},
        {{BLOCK, 0}, {BLOCK + UNIT, UNIT}},
        {{BLOCK, UNIT}, {4 * BLOCK, UNIT}},
        {{BLOCK, UNIT}, {BLOCK + UNIT, UINT64_MAX - 1}},
    };
    open_onto();
    static uint8_t data[2 * BLOCK];
    struct vrep_miss miss = take(BLOCK, 2 * BLOCK);
    for (unsigned i = 0; i < sizeof wrong / sizeof wrong[0]; i++)
        CHECK_STATUS(vrep_group_fill_parts(rig.group, miss.ticket, data, wrong[i], 2),
                     VREP_E_INVALID);
    check_disk(before);
    memcpy(data, wanted + BLOCK, sizeof data); /* it is still there to be filled */
    CHECK_OK(vrep_group_fill(rig.group, miss.ticket, data, VREP_OK));
    CHECK_OK(rig_read(&rig, BLOCK, 2 * BLOCK, got));
    CHECK_MEM(got, wanted + BLOCK, 2 * BLOCK);
    rig_free(&rig);
}

/* Whichever part fails, no block of which a part is lacking is believed. */
static void a_failed_part_leaves_its_blocks_absent(void)
{
    for (unsigned k = 1; k <= 4; k++) {
        char fault[64];
        open_onto();
        static uint8_t data[4 * BLOCK];
        memcpy(data, wanted, sizeof data);
        struct vrep_miss miss = take(0, 2 * BLOCK);
        snprintf(fault, sizeof fault, "backing.write:%u:io", k);
        arm(fault);
        int status = vrep_group_fill_parts(rig.group, miss.ticket, data, PARTS, 2);
        arm(NULL);
        if (k > 2) { /* both of them were written */
            CHECK_OK(status);
            rig_free(&rig);
            continue;
        }
        CHECK_STATUS(status, VREP_E_IO);
        miss = take(0, 2 * BLOCK);
        CHECK_OK(vrep_group_fill_parts(rig.group, miss.ticket, data, PARTS, 2));
        CHECK_OK(rig_read(&rig, 0, 2 * BLOCK, got));
        CHECK_MEM(got, wanted, 2 * BLOCK);
        rig_free(&rig);
    }
}

/* Random parts under random writes, each turn in another state of presence, against an oracle. */
static void parts_equal_their_oracle(void)
{
    check_seed(12);
    for (unsigned round = 0; round < 30; round++) {
        open_onto();
        for (unsigned unit = 0; unit < UNITS; unit++)
            if (check_random() % 3 == 0)
                memset(wanted + unit * UNIT, (int)(check_random() % 256), UNIT);
        for (;;) {
            struct vrep_miss miss;
            uint64_t most = BLOCK * (1 + check_random() % 16);
            int status = vrep_group_fill_next(rig.group, 0, 0, most, &miss);
            if (status == VREP_E_NOT_FOUND)
                break;
            CHECK_OK(status);
            if (check_random() % 2 == 0) { /* a guest writes some blocks meanwhile */
                uint64_t at = check_random() % (RIG_BYTES / BLOCK) * BLOCK;
                uint8_t byte = (uint8_t)check_random();
                CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, at, BLOCK, byte));
                memset(wanted + at, byte, BLOCK);
            }
            static uint8_t data[1 << 20];
            static struct vrep_fill_part parts[UNITS];
            uint32_t count = 0;
            memset(data, 0xee, sizeof data);
            for (uint64_t at = miss.offset; at < miss.offset + miss.length; at += UNIT) {
                bool same = memcmp(before + at, wanted + at, UNIT) == 0;
                if (same && check_random() % 8 != 0)
                    continue;
                memcpy(data + (at - miss.offset), wanted + at, UNIT);
                if (count > 0 && parts[count - 1].offset + parts[count - 1].length == at)
                    parts[count - 1].length += UNIT;
                else
                    parts[count++] = (struct vrep_fill_part){at, UNIT};
            }
            CHECK_OK(vrep_group_fill_parts(rig.group, miss.ticket, data, parts, count));
        }
        CHECK_OK(rig_read(&rig, 0, RIG_BYTES, got));
        CHECK_MEM(got, wanted, RIG_BYTES);
        check_disk(wanted);
        rig_free(&rig);
    }
}

int main(void)
{
    RUN(only_parts_are_written);
    RUN(newer_data_survive_late_parts);
    RUN(parts_out_of_order_are_refused);
    RUN(a_failed_part_leaves_its_blocks_absent);
    RUN(parts_equal_their_oracle);
    return check_report();
}
