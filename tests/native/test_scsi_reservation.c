/* SCSI reservations: who is stopped by which, and what survives a power loss. */
#include "scsi/scsi.h"
#include "scsi_rig.h"

static struct scsi_rig rig;
static struct answer answer;
static uint8_t data[4096];

#define CONFLICT VREP_SCSI_RESERVATION_CONFLICT
#define GOOD VREP_SCSI_GOOD
enum { REGISTER, RESERVE, RELEASE, CLEAR, PREEMPT, PREEMPT_ABORT, REGISTER_IGNORE };

static uint8_t out(int nexus, uint8_t action, uint8_t type, uint64_t key, uint64_t service_key,
                   uint8_t flags)
{
    uint8_t cdb[16] = {0x5f, action, type, [8] = 24}, list[24] = {0};
    vrep_be_store_u64(list, key);
    vrep_be_store_u64(list + 8, service_key);
    list[20] = flags;
    return scsi_run(&rig, &answer, nexus, cdb, list, sizeof list);
}

static uint32_t in(uint8_t action)
{
    uint8_t cdb[16] = {0x5e, action, [7] = 4};
    CHECK_EQ(scsi_run(&rig, &answer, 0, cdb, NULL, 0), GOOD);
    return answer.in_bytes;
}

static uint8_t read_as(int nexus)
{
    return scsi_run(&rig, &answer, nexus, CDB(0x28, 0, 0, 0, 0, 0, 0, 0, 1), NULL, 0);
}

static uint8_t write_as(int nexus)
{
    return scsi_run(&rig, &answer, nexus, CDB(0x2a, 0, 0, 0, 0, 0, 0, 0, 1), data, 512);
}

static void start(void)
{
    scsi_rig_init(&rig, 512);
    scsi_settle_in(&rig, &answer);
}

/* Holder is nexus 0, registered also 1, not registered 2. */
static const struct {
    uint8_t type;
    uint8_t registered_read, registered_write, other_read, other_write;
    bool all; /* every registrant holds it */
} types[] = {
    {1, GOOD, CONFLICT, GOOD, CONFLICT, false}, {3, CONFLICT, CONFLICT, CONFLICT, CONFLICT, false},
    {5, GOOD, GOOD, GOOD, CONFLICT, false},     {6, GOOD, GOOD, CONFLICT, CONFLICT, false},
    {7, GOOD, GOOD, GOOD, CONFLICT, true},      {8, GOOD, GOOD, CONFLICT, CONFLICT, true},
};

static void each_type_stops_whom_it_should(void)
{
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++) {
        start();
        CHECK_EQ(out(0, REGISTER, 0, 0, 0xa, 0), GOOD);
        CHECK_EQ(out(1, REGISTER_IGNORE, 0, 99, 0xb, 0), GOOD);
        CHECK_EQ(out(0, RESERVE, types[i].type, 0xa, 0, 0), GOOD);
        CHECK_EQ(read_as(0), GOOD);
        CHECK_EQ(write_as(0), GOOD);
        CHECK_EQ(read_as(1), types[i].registered_read);
        CHECK_EQ(write_as(1), types[i].registered_write);
        CHECK_EQ(read_as(2), types[i].other_read);
        CHECK_EQ(write_as(2), types[i].other_write);
        CHECK_EQ(scsi_run(&rig, &answer, 2, CDB(0x42), NULL, 0), CONFLICT);
        CHECK_EQ(scsi_run(&rig, &answer, 2, CDB(0x35), NULL, 0), CONFLICT);
        CHECK_EQ(scsi_run(&rig, &answer, 2, CDB(0x12, 0, 0, 0, 36), NULL, 0), GOOD);
        CHECK_EQ(scsi_run(&rig, &answer, 2, CDB(0x00), NULL, 0), GOOD);
        CHECK_EQ(scsi_run(&rig, &answer, 2, CDB(0x25), NULL, 0), GOOD);
        CHECK_EQ(scsi_run(&rig, &answer, 2, CDB(0x16), NULL, 0), CONFLICT); /* RESERVE(6) */
        CHECK_EQ(scsi_run(&rig, &answer, 2, CDB(0x1b), NULL, 0), CONFLICT);
        CHECK_EQ(scsi_run(&rig, &answer, 2, CDB(0x1b, 0, 0, 0, 1), NULL, 0), GOOD);
        CHECK_EQ(in(1), 24);
        CHECK_EQ(answer.in[21], types[i].type);
        CHECK_EQ(vrep_be_load_u64(answer.in + 8), types[i].all ? 0 : 0xa);
        /* Another type is refused to the holder; so is everything to who is not one. */
        CHECK_EQ(out(0, RESERVE, types[i].type == 1 ? 3 : 1, 0xa, 0, 0), CONFLICT);
        CHECK_EQ(out(0, RESERVE, types[i].type, 0xa, 0, 0), GOOD);
        CHECK_EQ(out(1, RESERVE, types[i].type, 0xb, 0, 0), types[i].all ? GOOD : CONFLICT);
        CHECK_EQ(out(0, RELEASE, types[i].type == 1 ? 3 : 1, 0xa, 0, 0), VREP_SCSI_CHECK_CONDITION);
        CHECK_EQ(answer.sense, 0x052604);
        if (!types[i].all) {
            CHECK_EQ(out(1, RELEASE, types[i].type, 0xb, 0, 0),
                     GOOD); /* not the holder: no effect */
            CHECK_EQ(in(1), 24);
        }
        CHECK_EQ(out(0, RELEASE, types[i].type, 0xa, 0, 0), GOOD);
        CHECK_EQ(in(1), 8);
        if (types[i].type >= 5) {
            CHECK_EQ(read_as(1), VREP_SCSI_CHECK_CONDITION);
            CHECK_EQ(answer.sense, 0x062a04);
        }
        CHECK_EQ(write_as(1), GOOD);
        CHECK_EQ(write_as(2), GOOD);
        scsi_rig_free(&rig);
    }
}

static void keys_are_registered_changed_and_removed(void)
{
    start();
    CHECK_EQ(out(0, REGISTER, 0, 5, 6, 0), CONFLICT); /* not registered: its key is 0 */
    CHECK_EQ(out(0, REGISTER, 0, 0, 0, 0), GOOD);     /* nothing to remove */
    CHECK_EQ(in(0), 8);
    CHECK_EQ(out(0, REGISTER, 0, 0, 6, 0), GOOD);
    CHECK_EQ(out(0, REGISTER, 0, 5, 7, 0), CONFLICT);
    CHECK_EQ(out(0, REGISTER, 0, 6, 7, 0), GOOD);
    CHECK_EQ(out(1, REGISTER, 0, 0, 8, 0), GOOD);
    CHECK_EQ(in(0), 24);
    CHECK_EQ(vrep_be_load_u64(answer.in + 8), 7);
    CHECK_EQ(vrep_be_load_u64(answer.in + 16), 8);
    CHECK_EQ(out(0, RESERVE, 1, 6, 0, 0), CONFLICT); /* the old key */
    CHECK_EQ(out(0, RESERVE, 5, 7, 0, 0), GOOD);
    CHECK_EQ(in(3), 8 + 2 * (24 + 64));
    CHECK_EQ(answer.in[8 + 12], 1);
    CHECK_EQ(answer.in[8 + 13], 5);
    CHECK_EQ(answer.in[8 + 88 + 12], 0);
    CHECK_EQ(answer.in[8 + 24], 0x45);            /* the TransportID as it was given */
    CHECK_EQ(out(0, REGISTER, 0, 7, 0, 0), GOOD); /* the holder goes, and its reservation */
    CHECK_EQ(in(1), 8);
    CHECK_EQ(read_as(1), VREP_SCSI_CHECK_CONDITION);
    CHECK_EQ(answer.sense, 0x062a04);
    CHECK_EQ(out(0, CLEAR, 0, 0, 0, 0), CONFLICT);
    CHECK_EQ(out(0, REGISTER, 0, 0, 9, 0), GOOD);
    CHECK_EQ(out(0, CLEAR, 0, 9, 0, 0), GOOD);
    CHECK_EQ(in(0), 8);
    CHECK_EQ(read_as(1), VREP_SCSI_CHECK_CONDITION);
    CHECK_EQ(answer.sense, 0x062a03);
    CHECK_EQ(out(0, REGISTER_IGNORE, 0, 0, 9, 0x04), VREP_SCSI_CHECK_CONDITION); /* ALL_TG_PT */
    CHECK_EQ(answer.sense, 0x052600);
    CHECK_EQ(out(0, REGISTER_IGNORE, 0, 0, 9, 0x08), VREP_SCSI_CHECK_CONDITION); /* SPEC_I_PT */
    CHECK_EQ(in(0), 8);
    scsi_rig_free(&rig);
}

static void preempting_takes_over(void)
{
    start();
    CHECK_EQ(out(0, REGISTER, 0, 0, 0xa, 0), GOOD);
    CHECK_EQ(out(1, REGISTER, 0, 0, 0xb, 0), GOOD);
    CHECK_EQ(out(2, REGISTER, 0, 0, 0xc, 0), GOOD);
    CHECK_EQ(out(0, RESERVE, 1, 0xa, 0, 0), GOOD);
    CHECK_EQ(out(1, PREEMPT, 3, 0xb, 0xdead, 0), CONFLICT); /* nobody has that key */
    CHECK_EQ(out(1, PREEMPT, 3, 0xb, 0, 0), VREP_SCSI_CHECK_CONDITION);
    CHECK_EQ(answer.sense, 0x052600);
    CHECK_EQ(out(1, PREEMPT, 3, 0xb, 0xa, 0), GOOD);
    CHECK_EQ(read_as(0), VREP_SCSI_CHECK_CONDITION);
    CHECK_EQ(answer.sense, 0x062a05);
    CHECK_EQ(read_as(0), CONFLICT);
    CHECK_EQ(read_as(1), GOOD);
    CHECK_EQ(in(0), 24);
    CHECK_EQ(out(1, PREEMPT, 3, 0xb, 0xc, 0), GOOD); /* a registrant without the reservation */
    CHECK_EQ(read_as(2), VREP_SCSI_CHECK_CONDITION);
    CHECK_EQ(answer.sense, 0x062a05);
    CHECK_EQ(in(1), 24);
    CHECK_EQ(vrep_be_load_u64(answer.in + 8), 0xb);
    /* All registrants: key 0 means everybody else. */
    CHECK_EQ(out(1, RELEASE, 3, 0xb, 0, 0), GOOD);
    CHECK_EQ(out(0, REGISTER, 0, 0, 0xa, 0), GOOD);
    CHECK_EQ(out(0, RESERVE, 7, 0xa, 0, 0), GOOD);
    CHECK_EQ(out(0, PREEMPT, 8, 0xa, 0, 0), GOOD);
    CHECK_EQ(in(0), 16);
    CHECK_EQ(in(1), 24);
    CHECK_EQ(answer.in[21], 8);
    scsi_rig_free(&rig);
}

/* PREEMPT AND ABORT is answered when no write of the preempted can land any more. */
static void preempt_and_abort_is_a_fence(void)
{
    static struct answer writing, preempting;
    static uint8_t big[1 << 19];
    start();
    CHECK_EQ(out(0, REGISTER, 0, 0, 0xa, 1), GOOD);
    bool seen = false;
    for (int round = 0; round < 20; round++) {
        CHECK_EQ(out(1, REGISTER_IGNORE, 0, 0, 0xb, 1), GOOD);
        scsi_prepare(&rig, &writing, 1, cdb16(0x8a, 8, 0, sizeof big / 512), big, sizeof big);
        vrep_scsi_submit(&writing.task);
        uint8_t cdb[16] = {0x5f, PREEMPT_ABORT, 1, [8] = 24}, list[24] = {0};
        vrep_be_store_u64(list, 0xa);
        vrep_be_store_u64(list + 8, 0xb);
        scsi_prepare(&rig, &preempting, 0, cdb, list, sizeof list);
        vrep_scsi_submit(&preempting.task);
        for (int i = 0; !preempting.done && i < 10000000; i++)
            scsi_poll(&rig);
        CHECK(preempting.done && writing.done);
        CHECK_EQ(preempting.status, GOOD);
        seen = seen || writing.aborted;
        CHECK_EQ(read_as(1), VREP_SCSI_CHECK_CONDITION);
        CHECK_EQ(answer.sense, 0x062a05);
    }
    CHECK(seen);
    scsi_rig_free(&rig);
}

static void power_loss(void)
{
    scsi_rig_shut(&rig, false);
    scsi_rig_open(&rig);
    scsi_settle_in(&rig, &answer);
}

static void with_aptpl_they_outlive_a_power_loss(void)
{
    start();
    CHECK_EQ(in(2), 8);
    CHECK_EQ(answer.in[2] & 1, 1); /* PTPL_C */
    CHECK_EQ(out(0, REGISTER, 0, 0, 0xa, 1), GOOD);
    CHECK_EQ(out(1, REGISTER, 0, 0, 0xb, 1), GOOD);
    CHECK_EQ(out(1, RESERVE, 1, 0xb, 0, 0), GOOD);
    power_loss();
    CHECK_EQ(in(2), 8);
    CHECK_EQ(answer.in[3] & 1, 1); /* PTPL_A */
    CHECK_EQ(in(0), 24);
    CHECK_EQ(vrep_be_load_u32(answer.in), 0); /* PRGENERATION begins anew */
    CHECK_EQ(write_as(0), CONFLICT);
    CHECK_EQ(write_as(1), GOOD);
    CHECK_EQ(write_as(2), CONFLICT);
    CHECK_EQ(out(1, RELEASE, 1, 0xb, 0, 0), GOOD);
    power_loss();
    CHECK_EQ(in(1), 8);
    CHECK_EQ(in(0), 24);
    CHECK_EQ(write_as(0), GOOD);
    CHECK_EQ(out(0, REGISTER, 0, 0xa, 0xaa, 0),
             GOOD); /* APTPL off: the last one that is kept goes */
    power_loss();
    CHECK_EQ(in(0), 8);
    CHECK_EQ(out(0, REGISTER, 0, 0, 0xa, 0), GOOD); /* and without it nothing is */
    CHECK_EQ(out(0, RESERVE, 3, 0xa, 0, 0), GOOD);
    power_loss();
    CHECK_EQ(in(0), 8);
    CHECK_EQ(write_as(1), GOOD);
    scsi_rig_free(&rig);
}

static void damage(off_t at)
{
    uint8_t byte;
    int fd = open(rig.reservations, O_RDWR);
    CHECK(fd >= 0 && pread(fd, &byte, 1, at) == 1);
    byte ^= 1;
    CHECK(pwrite(fd, &byte, 1, at) == 1);
    close(fd);
}

static int create(void)
{
    struct vrep_scsi_unit_config unit = {.block_bytes = 512, .reservations_path = rig.reservations};
    struct vrep_scsi_config config = {.group_id = {1}, .units = &unit, .units_count = 1};
    return vrep_scsi_create(rig.rig.group, &config, &rig.target);
}

/* A torn write leaves what was before; a file without any whole slot is an error, never "nobody".
 */
static void a_damaged_file_is_not_taken_for_an_empty_one(void)
{
    start();
    CHECK_EQ(out(0, REGISTER, 0, 0, 0xa, 1), GOOD); /* third write: slot 1 */
    CHECK_EQ(out(0, RESERVE, 1, 0xa, 0, 0), GOOD);  /* fourth: slot 0 */
    scsi_rig_shut(&rig, false);
    damage(100);
    scsi_rig_open(&rig);
    scsi_settle_in(&rig, &answer);
    CHECK_EQ(in(0), 16);
    CHECK_EQ(in(1), 8);
    scsi_rig_shut(&rig, false);
    damage(24576 + 100);
    rig_open(&rig.rig);
    CHECK_STATUS(create(), VREP_E_CORRUPT);
    CHECK_EQ(truncate(rig.reservations, 0), 0);
    CHECK_STATUS(create(), VREP_E_CORRUPT);
    CHECK_EQ(unlink(rig.reservations), 0);
    struct vrep_scsi_unit_config unit = {.block_bytes = 1024};
    struct vrep_scsi_config config = {.group_id = {1}, .units = &unit, .units_count = 1};
    CHECK_STATUS(vrep_scsi_create(rig.rig.group, &config, &rig.target), VREP_E_INVALID);
    unit = (struct vrep_scsi_unit_config){.disk = 1, .block_bytes = 512};
    CHECK_STATUS(vrep_scsi_create(rig.rig.group, &config, &rig.target), VREP_E_INVALID);
    rig_free(&rig.rig);
}

/* A change that cannot be stored does not happen. */
static void what_cannot_be_stored_is_refused(void)
{
    start();
    CHECK_EQ(out(0, REGISTER, 0, 0, 0xa, 1), GOOD);
    scsi_rig_shut(&rig, true);
    CHECK_EQ(unlink(rig.reservations), 0);
    CHECK_EQ(symlink("/dev/full", rig.reservations), 0);
    rig_open(&rig.rig);
    CHECK(create() != VREP_OK);
    CHECK_EQ(unlink(rig.reservations), 0);
    struct vrep_scsi_unit_config unit = {.block_bytes = 512};
    struct vrep_scsi_config config = {.group_id = {1}, .units = &unit, .units_count = 1};
    CHECK_OK(vrep_scsi_create(rig.rig.group, &config, &rig.target));
    for (int i = 0; i < SCSI_NEXUSES; i++)
        scsi_rig_nexus(&rig, i);
    scsi_settle_in(&rig, &answer);
    CHECK_EQ(in(2), 8);
    CHECK_EQ(answer.in[2] & 1, 0);
    CHECK_EQ(out(0, REGISTER, 0, 0, 0xa, 1), VREP_SCSI_CHECK_CONDITION);
    CHECK_EQ(answer.sense, 0x052600);
    CHECK_EQ(in(0), 8);
    scsi_rig_free(&rig);
}

static void registrations_are_bounded(void)
{
    struct vrep_scsi_nexus *first = NULL;
    start();
    first = rig.nexus[0];
    for (uint64_t i = 0; i < VREP_REGISTRATIONS_MAX + 1; i++) {
        uint8_t id[64] = {0x45, 0, 0, 60};
        vrep_be_store_u64(id + 8, i + 1);
        CHECK_OK(vrep_scsi_nexus_open(rig.target, id, sizeof id, 1, &rig.nexus[0]));
        (void)scsi_run(&rig, &answer, 0, CDB(0x00), NULL, 0);
        uint8_t status = out(0, REGISTER, 0, 0, i + 1, 1);
        CHECK_EQ(status, i < VREP_REGISTRATIONS_MAX ? GOOD : VREP_SCSI_CHECK_CONDITION);
        vrep_scsi_nexus_close(rig.nexus[0]);
    }
    CHECK_EQ(answer.sense, 0x055504);
    rig.nexus[0] = first;
    CHECK_EQ(in(0), 8 + 8 * VREP_REGISTRATIONS_MAX);
    scsi_rig_free(&rig);
}

int main(void)
{
    RUN(each_type_stops_whom_it_should);
    RUN(keys_are_registered_changed_and_removed);
    RUN(preempting_takes_over);
    RUN(preempt_and_abort_is_a_fence);
    RUN(with_aptpl_they_outlive_a_power_loss);
    RUN(a_damaged_file_is_not_taken_for_an_empty_one);
    RUN(what_cannot_be_stored_is_refused);
    RUN(registrations_are_bounded);
    return check_report();
}
