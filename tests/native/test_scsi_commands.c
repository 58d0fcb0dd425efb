/* SCSI commands one by one: for each what it answers, and each way in which it is refused. */
#include "scsi_rig.h"

static struct scsi_rig rig;
static struct answer answer;
static uint8_t data[1 << 20];

#define GOOD VREP_SCSI_GOOD
#define CHECK_C VREP_SCSI_CHECK_CONDITION
#define BLOCKS512 (RIG_BYTES / 512)

/* A command of a disk of 8192 blocks of 512 bytes (0x2000), what it sends, what it comes to. */
static const struct row {
    const char *name;
    uint8_t cdb[16];
    uint32_t out;
    uint8_t status;
    uint32_t sense;
    int32_t in; /* bytes, -1: any */
} rows[] = {
    {"test unit ready", {0x00}, 0, GOOD, 0, 0},
    {"naca", {0x00, 0, 0, 0, 0, 4}, 0, CHECK_C, 0x052400, 0},
    {"request sense", {0x03, 0, 0, 0, 18}, 0, GOOD, 0, 18},
    {"request sense, descriptor", {0x03, 1, 0, 0, 255}, 0, GOOD, 0, 8},
    {"request sense, short", {0x03, 0, 0, 0, 4}, 0, GOOD, 0, 4},
    {"read 6", {0x08, 0, 0, 0, 1}, 0, GOOD, 0, 512},
    {"read 6 of 256", {0x08, 0, 0, 0, 0}, 0, GOOD, 0, 131072},
    {"read 6 beyond", {0x08, 0, 0x20, 0, 1}, 0, CHECK_C, 0x052100, 0},
    {"write 6", {0x0a, 0, 0, 0, 1}, 512, GOOD, 0, 0},
    {"write 6 beyond", {0x0a, 0, 0x1f, 0xff, 2}, 1024, CHECK_C, 0x052100, 0},
    {"inquiry", {0x12, 0, 0, 0, 255}, 0, GOOD, 0, 96},
    {"inquiry, short", {0x12, 0, 0, 0, 36}, 0, GOOD, 0, 36},
    {"inquiry of nothing", {0x12, 0, 0, 0, 0}, 0, GOOD, 0, 0},
    {"inquiry, page without EVPD", {0x12, 0, 0x80, 0, 255}, 0, CHECK_C, 0x052400, 0},
    {"inquiry, CMDDT", {0x12, 2, 0, 0, 255}, 0, CHECK_C, 0x052400, 0},
    {"inquiry, pages", {0x12, 1, 0x00, 0, 255}, 0, GOOD, 0, 10},
    {"inquiry, serial", {0x12, 1, 0x80, 0, 255}, 0, GOOD, 0, 36},
    {"inquiry, identification", {0x12, 1, 0x83, 0, 255}, 0, GOOD, 0, 68},
    {"inquiry, limits", {0x12, 1, 0xb0, 0, 255}, 0, GOOD, 0, 64},
    {"inquiry, characteristics", {0x12, 1, 0xb1, 0, 255}, 0, GOOD, 0, 64},
    {"inquiry, provisioning", {0x12, 1, 0xb2, 0, 255}, 0, GOOD, 0, 8},
    {"inquiry, unknown page", {0x12, 1, 0x99, 0, 255}, 0, CHECK_C, 0x052400, 0},
    {"mode select 6 of nothing", {0x15, 0x10, 0, 0, 0}, 0, GOOD, 0, 0},
    {"mode select 6, no page format", {0x15, 0, 0, 0, 0}, 0, CHECK_C, 0x052400, 0},
    {"mode select 6, to be saved", {0x15, 0x11, 0, 0, 0}, 0, CHECK_C, 0x052400, 0},
    {"mode select 6, cut off", {0x15, 0x10, 0, 0, 3}, 3, CHECK_C, 0x051a00, 0},
    {"mode select 10, too long",
     {0x55, 0x10, 0, 0, 0, 0, 0, 0xff, 0xff},
     65535,
     CHECK_C,
     0x051a00,
     0},
    {"mode sense 6", {0x1a, 0, 0x3f, 0, 255}, 0, GOOD, 0, 68},
    {"mode sense 6, no descriptor", {0x1a, 8, 0x08, 0, 255}, 0, GOOD, 0, 24},
    {"mode sense 6, changeable", {0x1a, 8, 0x4a, 0, 255}, 0, GOOD, 0, 16},
    {"mode sense 6, saved", {0x1a, 0, 0xc8, 0, 255}, 0, CHECK_C, 0x053900, 0},
    {"mode sense 6, no page", {0x1a, 0, 0x19, 0, 255}, 0, CHECK_C, 0x052400, 0},
    {"mode sense 6, no subpage", {0x1a, 0, 0x08, 7, 255}, 0, CHECK_C, 0x052400, 0},
    {"mode sense 10", {0x5a, 0, 0x3f, 0, 0, 0, 0, 1, 0}, 0, GOOD, 0, 72},
    {"mode sense 10, long LBA", {0x5a, 0x10, 0x3f, 0, 0, 0, 0, 1, 0}, 0, GOOD, 0, 80},
    {"start", {0x1b, 0, 0, 0, 1}, 0, GOOD, 0, 0},
    {"eject", {0x1b, 0, 0, 0, 2}, 0, CHECK_C, 0x052400, 0},
    {"active", {0x1b, 0, 0, 0, 0x10}, 0, GOOD, 0, 0},
    {"unknown power condition", {0x1b, 0, 0, 0, 0xf0}, 0, CHECK_C, 0x052400, 0},
    {"prevent", {0x1e, 0, 0, 0, 1}, 0, GOOD, 0, 0},
    {"allow", {0x1e, 0, 0, 0, 0}, 0, GOOD, 0, 0},
    {"read capacity 10", {0x25}, 0, GOOD, 0, 8},
    {"read capacity 10, LBA", {0x25, 0, 0, 0, 0, 1}, 0, CHECK_C, 0x052400, 0},
    {"read 10", {0x28, 0, 0, 0, 0, 0, 0, 0, 2}, 0, GOOD, 0, 1024},
    {"read 10 of nothing", {0x28}, 0, GOOD, 0, 0},
    {"read 10 of nothing at the end", {0x28, 0, 0, 0, 0x20, 0}, 0, GOOD, 0, 0},
    {"read 10 of nothing beyond", {0x28, 0, 0, 0, 0x20, 1}, 0, CHECK_C, 0x052100, 0},
    {"read 10 beyond", {0x28, 0, 0, 0, 0x1f, 0xff, 0, 0, 2}, 0, CHECK_C, 0x052100, 0},
    {"read 10, protected", {0x28, 0x20, 0, 0, 0, 0, 0, 0, 1}, 0, CHECK_C, 0x052400, 0},
    {"read 10, DPO FUA", {0x28, 0x18, 0, 0, 0, 0, 0, 0, 1}, 0, GOOD, 0, 512},
    {"write 10", {0x2a, 0, 0, 0, 0, 0, 0, 0, 2}, 1024, GOOD, 0, 0},
    {"write 10, FUA", {0x2a, 8, 0, 0, 0, 0, 0, 0, 1}, 512, GOOD, 0, 0},
    {"write 10 of nothing", {0x2a}, 0, GOOD, 0, 0},
    {"write 10, protected", {0x2a, 0x40, 0, 0, 0, 0, 0, 0, 1}, 512, CHECK_C, 0x052400, 0},
    {"write 10 beyond", {0x2a, 0, 0, 0, 0x20, 0, 0, 0, 1}, 512, CHECK_C, 0x052100, 0},
    {"write 10 of part of a block", {0x2a, 0, 0, 0, 0, 0, 0, 0, 1}, 200, CHECK_C, 0x050e03, 0},
    {"write and verify 10", {0x2e, 0, 0, 0, 0, 0, 0, 0, 2}, 1024, GOOD, 0, 0},
    {"write and verify 10, compared", {0x2e, 2, 0, 0, 0, 0, 0, 0, 2}, 1024, GOOD, 0, 0},
    {"write and verify 10, BYTCHK 3", {0x2e, 6, 0, 0, 0, 0, 0, 0, 1}, 512, CHECK_C, 0x052400, 0},
    {"write and verify 10, protected",
     {0x2e, 0x20, 0, 0, 0, 0, 0, 0, 1},
     512,
     CHECK_C,
     0x052400,
     0},
    {"write and verify 10 beyond", {0x2e, 0, 0, 0, 0x20, 0, 0, 0, 1}, 512, CHECK_C, 0x052100, 0},
    {"verify 10", {0x2f, 0, 0, 0, 0, 0, 0, 0x20, 0}, 0, GOOD, 0, 0},
    {"verify 10, compared", {0x2f, 2, 0, 0, 0, 0x10, 0, 0, 2}, 1024, CHECK_C, 0x0e1d00, 0},
    {"verify 10, too little", {0x2f, 2, 0, 0, 0, 0, 0, 0, 2}, 512, CHECK_C, 0x050e03, 0},
    {"verify 10, BYTCHK 2", {0x2f, 4, 0, 0, 0, 0, 0, 0, 1}, 512, CHECK_C, 0x052400, 0},
    {"verify 10, protected", {0x2f, 0x20, 0, 0, 0, 0, 0, 0, 1}, 0, CHECK_C, 0x052400, 0},
    {"verify 10 beyond", {0x2f, 0, 0, 0, 0x20, 0, 0, 0, 1}, 0, CHECK_C, 0x052100, 0},
    {"pre-fetch 10", {0x34, 0, 0, 0, 0, 0, 0, 0, 1}, 0, GOOD, 0, 0},
    {"pre-fetch 10 beyond", {0x34, 0, 0, 0, 0x20, 0, 0, 0, 1}, 0, CHECK_C, 0x052100, 0},
    {"synchronize cache 10", {0x35}, 0, GOOD, 0, 0},
    {"synchronize cache 10 beyond", {0x35, 0, 0, 0, 0x20, 1}, 0, CHECK_C, 0x052100, 0},
    {"write same 10", {0x41, 0, 0, 0, 1, 0, 0, 0, 8}, 512, GOOD, 0, 0},
    {"write same 10 to the end", {0x41, 0, 0, 0, 1, 0, 0, 0, 0}, 512, CHECK_C, 0x052400, 0},
    {"write same 10, anchor", {0x41, 0x10, 0, 0, 1, 0, 0, 0, 1}, 512, CHECK_C, 0x052400, 0},
    {"write same 10, two blocks", {0x41, 0, 0, 0, 1, 0, 0, 0, 1}, 1024, CHECK_C, 0x050e03, 0},
    {"write same 10, no block", {0x41, 0, 0, 0, 1, 0, 0, 0, 1}, 0, CHECK_C, 0x050e03, 0},
    {"write same 10, protected", {0x41, 0x20, 0, 0, 1, 0, 0, 0, 1}, 512, CHECK_C, 0x052400, 0},
    {"write same 10 beyond", {0x41, 0, 0, 0, 0x20, 0, 0, 0, 1}, 512, CHECK_C, 0x052100, 0},
    {"unmap of nothing", {0x42}, 0, GOOD, 0, 0},
    {"unmap, anchor", {0x42, 1, 0, 0, 0, 0, 0, 0, 24}, 24, CHECK_C, 0x052400, 0},
    {"unmap, cut off", {0x42, 0, 0, 0, 0, 0, 0, 0, 7}, 7, CHECK_C, 0x051a00, 0},
    {"read keys", {0x5e, 0, 0, 0, 0, 0, 0, 1, 0}, 0, GOOD, 0, 8},
    {"read reservation", {0x5e, 1, 0, 0, 0, 0, 0, 1, 0}, 0, GOOD, 0, 8},
    {"report capabilities", {0x5e, 2, 0, 0, 0, 0, 0, 1, 0}, 0, GOOD, 0, 8},
    {"read full status", {0x5e, 3, 0, 0, 0, 0, 0, 1, 0}, 0, GOOD, 0, 8},
    {"unknown reserve in", {0x5e, 9, 0, 0, 0, 0, 0, 1, 0}, 0, CHECK_C, 0x052400, 0},
    {"reserve unregistered",
     {0x5f, 1, 1, 0, 0, 0, 0, 0, 24},
     24,
     VREP_SCSI_RESERVATION_CONFLICT,
     0,
     0},
    {"release unregistered",
     {0x5f, 2, 1, 0, 0, 0, 0, 0, 24},
     24,
     VREP_SCSI_RESERVATION_CONFLICT,
     0,
     0},
    {"clear unregistered",
     {0x5f, 3, 1, 0, 0, 0, 0, 0, 24},
     24,
     VREP_SCSI_RESERVATION_CONFLICT,
     0,
     0},
    {"preempt unregistered",
     {0x5f, 4, 1, 0, 0, 0, 0, 0, 24},
     24,
     VREP_SCSI_RESERVATION_CONFLICT,
     0,
     0},
    {"preempt and abort unregistered",
     {0x5f, 5, 1, 0, 0, 0, 0, 0, 24},
     24,
     VREP_SCSI_RESERVATION_CONFLICT,
     0,
     0},
    {"register, key not mine",
     {0x5f, 0, 0, 0, 0, 0, 0, 0, 24},
     24,
     VREP_SCSI_RESERVATION_CONFLICT,
     0,
     0},
    {"register, ignoring, ALL_TG_PT", {0x5f, 6, 0, 0, 0, 0, 0, 0, 24}, 24, CHECK_C, 0x052600, 0},
    {"register and move", {0x5f, 7, 0, 0, 0, 0, 0, 0, 24}, 24, CHECK_C, 0x052400, 0},
    {"reserve, unknown type", {0x5f, 1, 2, 0, 0, 0, 0, 0, 24}, 24, CHECK_C, 0x052400, 0},
    {"reserve, a scope", {0x5f, 1, 0x11, 0, 0, 0, 0, 0, 24}, 24, CHECK_C, 0x052400, 0},
    {"reserve, short list", {0x5f, 1, 1, 0, 0, 0, 0, 0, 23}, 23, CHECK_C, 0x051a00, 0},
    {"reserve 6", {0x16}, 0, GOOD, 0, 0},
    {"release 6", {0x17}, 0, GOOD, 0, 0},
    {"read 16", {0x88, 0, 0, 0, 0, 0, 0, 0, 0x1f, 0xff, 0, 0, 0, 1}, 0, GOOD, 0, 512},
    {"read 16 beyond", {0x88, 0, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 1}, 0, CHECK_C, 0x052100, 0},
    {"read 16, LBA wraps",
     {0x88, 0, 255, 255, 255, 255, 255, 255, 255, 255, 0, 0, 0, 2},
     0,
     CHECK_C,
     0x052100,
     0},
    {"compare and write of nothing", {0x89}, 0, GOOD, 0, 0},
    {"compare and write, too little",
     {0x89, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1},
     512,
     CHECK_C,
     0x052400,
     0},
    {"compare and write, too much",
     {0x89, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1},
     1536,
     CHECK_C,
     0x052400,
     0},
    {"compare and write beyond",
     {0x89, 0, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 1},
     1024,
     CHECK_C,
     0x052100,
     0},
    {"compare and write, protected",
     {0x89, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1},
     1024,
     CHECK_C,
     0x052400,
     0},
    {"write 16", {0x8a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4}, 2048, GOOD, 0, 0},
    {"write 16, much too long",
     {0x8a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff},
     0,
     CHECK_C,
     0x052100,
     0},
    {"write and verify 16", {0x8e, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4}, 2048, GOOD, 0, 0},
    {"verify 16", {0x8f, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x20, 0}, 0, GOOD, 0, 0},
    {"verify 16, one block for all",
     {0x8f, 6, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 4},
     512,
     CHECK_C,
     0x0e1d00,
     0},
    {"pre-fetch 16", {0x90}, 0, GOOD, 0, 0},
    {"synchronize cache 16", {0x91}, 0, GOOD, 0, 0},
    {"synchronize cache 16, immediately", {0x91, 2}, 0, GOOD, 0, 0},
    {"write same 16", {0x93, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 8}, 512, GOOD, 0, 0},
    {"write same 16, NDOB", {0x93, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 8}, 0, GOOD, 0, 0},
    {"write same 16, NDOB with data",
     {0x93, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 8},
     512,
     CHECK_C,
     0x050e03,
     0},
    {"write same 16, unmap", {0x93, 8, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 8}, 512, GOOD, 0, 0},
    {"write same 16 of nothing", {0x93, 0, 0, 0, 0, 0, 0, 0, 1, 0}, 512, CHECK_C, 0x052400, 0},
    {"write atomic 16", {0x9c, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}, 512, GOOD, 0, 0},
    {"write atomic 16 of two",
     {0x9c, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 2},
     1024,
     CHECK_C,
     0x052400,
     0},
    {"write atomic 16, a boundary",
     {0x9c, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 1},
     512,
     CHECK_C,
     0x052400,
     0},
    {"write atomic 16 beyond",
     {0x9c, 0, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 1},
     512,
     CHECK_C,
     0x052100,
     0},
    {"read capacity 16", {0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 64}, 0, GOOD, 0, 32},
    {"get LBA status", {0x9e, 0x12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0}, 0, GOOD, 0, -1},
    {"get LBA status beyond",
     {0x9e, 0x12, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 1, 0},
     0,
     CHECK_C,
     0x052100,
     0},
    {"get LBA status, no room",
     {0x9e, 0x12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 23},
     0,
     CHECK_C,
     0x052400,
     0},
    {"unknown service action in", {0x9e, 0x1f}, 0, CHECK_C, 0x052400, 0},
    {"report luns", {0xa0, 0, 0, 0, 0, 0, 0, 0, 1, 0}, 0, GOOD, 0, 16},
    {"report luns, no room", {0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 15}, 0, CHECK_C, 0x052400, 0},
    {"report luns, unknown", {0xa0, 0, 9, 0, 0, 0, 0, 0, 1, 0}, 0, CHECK_C, 0x052400, 0},
    {"report opcodes", {0xa3, 0x0c, 0, 0, 0, 0, 0, 0, 0x20, 0}, 0, GOOD, 0, -1},
    {"report one opcode", {0xa3, 0x0c, 1, 0x28, 0, 0, 0, 0, 1, 0}, 0, GOOD, 0, 14},
    {"report one opcode, timeouts", {0xa3, 0x0c, 0x81, 0x28, 0, 0, 0, 0, 1, 0}, 0, GOOD, 0, 26},
    {"report one opcode that is none", {0xa3, 0x0c, 1, 0xff, 0, 0, 0, 0, 1, 0}, 0, GOOD, 0, 4},
    {"report one opcode with actions",
     {0xa3, 0x0c, 1, 0x9e, 0, 0, 0, 0, 1, 0},
     0,
     CHECK_C,
     0x052400,
     0},
    {"report one action", {0xa3, 0x0c, 2, 0x9e, 0, 0x10, 0, 0, 1, 0}, 0, GOOD, 0, 20},
    {"report one action of none", {0xa3, 0x0c, 2, 0x28, 0, 0, 0, 0, 1, 0}, 0, CHECK_C, 0x052400, 0},
    {"report one, either", {0xa3, 0x0c, 3, 0x28, 0, 0, 0, 0, 1, 0}, 0, GOOD, 0, 14},
    {"report opcodes, unknown option",
     {0xa3, 0x0c, 7, 0, 0, 0, 0, 0, 1, 0},
     0,
     CHECK_C,
     0x052400,
     0},
    {"unknown maintenance in", {0xa3, 0x0a}, 0, CHECK_C, 0x052400, 0},
    {"read 12", {0xa8, 0, 0, 0, 0, 0, 0, 0, 0, 2}, 0, GOOD, 0, 1024},
    {"read 12 beyond", {0xa8, 0, 0, 0, 0x20, 0, 0, 0, 0, 1}, 0, CHECK_C, 0x052100, 0},
    {"write 12", {0xaa, 0, 0, 0, 0, 0, 0, 0, 0, 2}, 1024, GOOD, 0, 0},
    {"write and verify 12", {0xae, 0, 0, 0, 0, 0, 0, 0, 0, 2}, 1024, GOOD, 0, 0},
    {"verify 12", {0xaf, 0, 0, 0, 0, 0, 0, 0, 0, 2}, 0, GOOD, 0, 0},
    {"sanitize is refused", {0x48, 2}, 0, CHECK_C, 0x052000, 0},
    {"format unit is refused", {0x04}, 0, CHECK_C, 0x052000, 0},
    {"an opcode of none", {0xff}, 0, CHECK_C, 0x052000, 0},
};
#define ROWS (sizeof rows / sizeof rows[0])

static void every_command_answers_as_specified(void)
{
    scsi_rig_init(&rig, 512);
    scsi_settle_in(&rig, &answer);
    memset(data, 0x5a, sizeof data);
    for (size_t i = 0; i < ROWS; i++) {
        const struct row *row = &rows[i];
        (void)scsi_run(&rig, &answer, 0, row->cdb, data, row->out);
        if (answer.status != row->status || answer.sense != row->sense ||
            (row->in >= 0 && answer.in_bytes != (uint32_t)row->in))
            fprintf(stderr, "%s: status %02x sense %06x, %u bytes\n", row->name, answer.status,
                    answer.sense, answer.in_bytes);
        CHECK_EQ(answer.status, row->status);
        CHECK_EQ(answer.sense, row->sense);
        CHECK(row->in < 0 || answer.in_bytes == (uint32_t)row->in);
    }
    scsi_rig_free(&rig);
}

/* What the device lists as supported is exactly what the table above has seen to work or to be
 * refused for another reason than that it is unknown. */
static void every_listed_command_is_tested(void)
{
    scsi_rig_init(&rig, 512);
    scsi_settle_in(&rig, &answer);
    CHECK_EQ(scsi_run(&rig, &answer, 0, CDB(0xa3, 0x0c, 0, 0, 0, 0, 0, 0, 0x20, 0), NULL, 0), GOOD);
    uint32_t bytes = vrep_be_load_u32(answer.in);
    CHECK_EQ(bytes + 4, answer.in_bytes);
    CHECK(bytes > 0 && bytes % 8 == 0);
    for (uint32_t at = 4; at < bytes + 4; at += 8) {
        const uint8_t *listed = answer.in + at;
        bool tested = false;
        for (size_t i = 0; i < ROWS; i++)
            tested =
                tested ||
                (rows[i].cdb[0] == listed[0] && rows[i].sense != 0x052000 &&
                 ((listed[5] & 1) == 0 || (rows[i].cdb[1] & 0x1f) == vrep_be_load_u16(listed + 2)));
        if (!tested)
            fprintf(stderr, "opcode %02x action %u is listed, not tested\n", listed[0],
                    vrep_be_load_u16(listed + 2));
        CHECK(tested);
    }
    scsi_rig_free(&rig);
}

static void a_logical_unit_that_is_not_there(void)
{
    scsi_rig_init(&rig, 512);
    scsi_settle_in(&rig, &answer);
    answer.task.lun = UINT64_C(5) << 48;
    CHECK_EQ(scsi_run(&rig, &answer, 0, CDB(0x00), NULL, 0), CHECK_C);
    CHECK_EQ(answer.sense, 0x052500);
    CHECK_EQ(scsi_run(&rig, &answer, 0, CDB(0x12, 0, 0, 0, 255), NULL, 0), GOOD);
    CHECK_EQ(answer.in[0], 0x7f);
    CHECK_EQ(scsi_run(&rig, &answer, 0, CDB(0xa0, 0, 0, 0, 0, 0, 0, 0, 1, 0), NULL, 0), GOOD);
    CHECK_EQ(vrep_be_load_u32(answer.in), 8);
    CHECK_EQ(scsi_run(&rig, &answer, 0, CDB(0x03, 0, 0, 0, 18), NULL, 0), GOOD);
    CHECK_EQ(sense_of(answer.in, answer.in_bytes), 0x052500);
    CHECK_EQ(scsi_run(&rig, &answer, 0, CDB(0x2a, 0, 0, 0, 0, 0, 0, 0, 1), data, 512), CHECK_C);
    CHECK_EQ(answer.sense, 0x052500);
    answer.task.lun = UINT64_C(0x4000) << 48; /* flat space addressing */
    CHECK_EQ(scsi_run(&rig, &answer, 0, CDB(0x00), NULL, 0), GOOD);
    answer.task.lun = 1; /* a second level */
    CHECK_EQ(scsi_run(&rig, &answer, 0, CDB(0x00), NULL, 0), CHECK_C);
    answer.task.lun = 0;
    scsi_rig_free(&rig);
}

/* The same disk of the same group has the same name for ever; another has another. */
static void identity_is_stable(void)
{
    uint8_t page[68], serial[36];
    scsi_rig_init(&rig, 512);
    scsi_settle_in(&rig, &answer);
    CHECK_EQ(scsi_run(&rig, &answer, 0, CDB(0x12, 1, 0x83, 0, 255), NULL, 0), GOOD);
    memcpy(page, answer.in, sizeof page);
    CHECK_EQ(page[4] & 0xf, 1);
    CHECK_EQ(page[8] >> 4, 3); /* NAA: locally assigned */
    CHECK_EQ(scsi_run(&rig, &answer, 1, CDB(0x12, 1, 0x80, 0, 255), NULL, 0), GOOD);
    memcpy(serial, answer.in, sizeof serial);
    CHECK_MEM(page + 28, serial + 4, 32); /* the T10 name holds the serial number */
    scsi_rig_shut(&rig, true);
    rig.block = 4096;
    scsi_rig_open(&rig);
    scsi_settle_in(&rig, &answer);
    CHECK_EQ(scsi_run(&rig, &answer, 2, CDB(0x12, 1, 0x83, 0, 255), NULL, 0), GOOD);
    CHECK_MEM(answer.in, page, sizeof page);
    scsi_rig_shut(&rig, true);
    struct vrep_scsi_unit_config unit = {.block_bytes = 512};
    struct vrep_scsi_config config = {.group_id = {9}, .units = &unit, .units_count = 1};
    rig_open(&rig.rig);
    CHECK_OK(vrep_scsi_create(rig.rig.group, &config, &rig.target));
    for (int i = 0; i < SCSI_NEXUSES; i++)
        scsi_rig_nexus(&rig, i);
    CHECK_EQ(scsi_run(&rig, &answer, 0, CDB(0x12, 1, 0x83, 0, 255), NULL, 0), GOOD);
    CHECK(memcmp(answer.in + 8, page + 8, 8) != 0);
    scsi_rig_free(&rig);
}

static void capacity_and_provisioning(uint32_t block)
{
    scsi_rig_init(&rig, block);
    scsi_settle_in(&rig, &answer);
    CHECK_EQ(scsi_run(&rig, &answer, 0, CDB(0x25), NULL, 0), GOOD);
    CHECK_EQ(vrep_be_load_u32(answer.in), RIG_BYTES / block - 1);
    CHECK_EQ(vrep_be_load_u32(answer.in + 4), block);
    CHECK_EQ(
        scsi_run(&rig, &answer, 0, CDB(0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32), NULL, 0),
        GOOD);
    CHECK_EQ(vrep_be_load_u64(answer.in), RIG_BYTES / block - 1);
    CHECK_EQ(vrep_be_load_u32(answer.in + 8), block);
    CHECK_EQ(answer.in[14], 0xc0);
    CHECK_EQ(scsi_run(&rig, &answer, 0, CDB(0x12, 1, 0xb0, 0, 255), NULL, 0), GOOD);
    CHECK_EQ(answer.in[5], block == 512 ? 255 : 32);
    CHECK_EQ(vrep_be_load_u32(answer.in + 8), VREP_SCSI_DATA_MAX / block);
    CHECK_EQ(vrep_be_load_u32(answer.in + 24), 256);
    CHECK_EQ(vrep_be_load_u32(answer.in + 28), 4096 / block);
    CHECK_EQ(vrep_be_load_u32(answer.in + 44), 1);
    CHECK_EQ(scsi_run(&rig, &answer, 0, CDB(0x12, 1, 0xb2, 0, 255), NULL, 0), GOOD);
    CHECK_EQ(answer.in[5], 0xe4);
    CHECK_EQ(answer.in[6] & 7, 2);
    scsi_rig_free(&rig);
}

static void blocks_of_512(void)
{
    capacity_and_provisioning(512);
}

static void blocks_of_4096(void)
{
    capacity_and_provisioning(4096);
}

static void select_mode(int nexus, uint8_t page, uint8_t at, uint8_t value)
{
    CHECK_EQ(scsi_run(&rig, &answer, nexus, (const uint8_t[16]){0x1a, 8, page, 0, 255}, NULL, 0),
             GOOD);
    uint8_t list[64];
    uint32_t bytes = answer.in_bytes;
    memcpy(list, answer.in, bytes);
    list[0] = list[2] = 0;
    list[4 + at] = value;
    (void)scsi_run(&rig, &answer, nexus, (const uint8_t[16]){0x15, 0x10, 0, 0, (uint8_t)bytes},
                   list, bytes);
}

static void modes_change_and_others_are_told(void)
{
    scsi_rig_init(&rig, 512);
    scsi_settle_in(&rig, &answer);
    select_mode(0, 0x0a, 2, 0x06); /* D_SENSE */
    CHECK_EQ(answer.status, GOOD);
    CHECK_EQ(scsi_run(&rig, &answer, 0, CDB(0xff), NULL, 0), CHECK_C);
    CHECK_EQ(answer.task.sense[0], 0x72);
    CHECK_EQ(scsi_run(&rig, &answer, 1, CDB(0x00), NULL, 0), CHECK_C);
    CHECK_EQ(answer.sense, 0x062a01);
    CHECK_EQ(scsi_run(&rig, &answer, 1, CDB(0x00), NULL, 0), GOOD);
    CHECK_EQ(scsi_run(&rig, &answer, 0, CDB(0x08, 0, 0x3f, 0xff, 1), NULL, 0), CHECK_C);
    CHECK_EQ(answer.sense, 0x052100);
    CHECK_EQ(answer.task.sense_bytes, 20); /* the LBA, in a descriptor */
    CHECK_EQ(vrep_be_load_u64(answer.task.sense + 12), 0x3fff);
    select_mode(0, 0x0a, 2, 0x02);
    select_mode(0, 0x0a, 4, 0x08); /* SWP */
    CHECK_EQ(answer.status, GOOD);
    CHECK_EQ(scsi_run(&rig, &answer, 0, CDB(0x2a, 0, 0, 0, 0, 0, 0, 0, 1), data, 512), CHECK_C);
    CHECK_EQ(answer.sense, 0x072702);
    CHECK_EQ(scsi_run(&rig, &answer, 0, CDB(0x42), NULL, 0), CHECK_C);
    CHECK_EQ(answer.sense, 0x072702);
    CHECK_EQ(scsi_run(&rig, &answer, 0, CDB(0x1a, 0, 0x3f, 0, 255), NULL, 0), GOOD);
    CHECK_EQ(answer.in[2], 0x90);
    select_mode(0, 0x0a, 4, 0);
    CHECK_EQ(scsi_run(&rig, &answer, 0, CDB(0x2a, 0, 0, 0, 0, 0, 0, 0, 1), data, 512), GOOD);
    select_mode(0, 0x08, 2, 0x01); /* RCD cannot be set */
    CHECK_EQ(answer.status, CHECK_C);
    CHECK_EQ(answer.sense, 0x052600);
    CHECK_EQ(vrep_be_load_u16(answer.task.sense + 16), 6);
    uint64_t flushes = rig_status(&rig.rig).flushes;
    select_mode(0, 0x08, 2, 0x00); /* WCE off: what is cached is flushed, and writes are FUA */
    CHECK_EQ(answer.status, GOOD);
    CHECK_EQ(rig_status(&rig.rig).flushes, flushes + 1);
    rig_attach(&rig.rig);
    CHECK_EQ(scsi_run(&rig, &answer, 0, CDB(0x2a, 0, 0, 0, 0, 0, 0, 0, 1), data, 512), GOOD);
    rig_apply(&rig.rig, true);
    CHECK(rig.rig.last_flags & VREP_RECORD_FUA);
    scsi_rig_free(&rig);
}

static void stopped_units_are_not_ready(void)
{
    scsi_rig_init(&rig, 512);
    scsi_settle_in(&rig, &answer);
    uint64_t flushes = rig_status(&rig.rig).flushes;
    CHECK_EQ(scsi_run(&rig, &answer, 0, CDB(0x1b), NULL, 0), GOOD);
    CHECK_EQ(rig_status(&rig.rig).flushes, flushes + 1);
    CHECK_EQ(scsi_run(&rig, &answer, 1, CDB(0x28, 0, 0, 0, 0, 0, 0, 0, 1), NULL, 0), CHECK_C);
    CHECK_EQ(answer.sense, 0x020402);
    CHECK_EQ(scsi_run(&rig, &answer, 0, CDB(0x03, 0, 0, 0, 18), NULL, 0), GOOD);
    CHECK_EQ(sense_of(answer.in, 18), 0x020402);
    CHECK_EQ(scsi_run(&rig, &answer, 0, CDB(0x12, 0, 0, 0, 36), NULL, 0), GOOD);
    CHECK_EQ(scsi_run(&rig, &answer, 0, CDB(0x1b, 0, 0, 0, 1), NULL, 0), GOOD);
    CHECK_EQ(scsi_run(&rig, &answer, 1, CDB(0x28, 0, 0, 0, 0, 0, 0, 0, 1), NULL, 0), GOOD);
    scsi_rig_free(&rig);
}

static void a_new_nexus_is_told_of_the_power_on(void)
{
    scsi_rig_init(&rig, 512);
    CHECK_EQ(scsi_run(&rig, &answer, 0, CDB(0x12, 0, 0, 0, 36), NULL, 0), GOOD); /* not here */
    CHECK_EQ(scsi_run(&rig, &answer, 0, CDB(0x28, 0, 0, 0, 0, 0, 0, 0, 1), NULL, 0), CHECK_C);
    CHECK_EQ(answer.sense, 0x062900);
    CHECK_EQ(scsi_run(&rig, &answer, 0, CDB(0x28, 0, 0, 0, 0, 0, 0, 0, 1), NULL, 0), GOOD);
    CHECK_EQ(scsi_run(&rig, &answer, 1, CDB(0x03, 0, 0, 0, 18), NULL, 0), GOOD); /* takes it */
    CHECK_EQ(sense_of(answer.in, 18), 0x062900);
    CHECK_EQ(scsi_run(&rig, &answer, 1, CDB(0x00), NULL, 0), GOOD);
    CHECK_EQ(scsi_run(&rig, &answer, 2, CDB(0xff), NULL, 0), CHECK_C); /* before all else */
    CHECK_EQ(answer.sense, 0x062900);
    scsi_rig_free(&rig);
}

static void a_read_only_group_says_so(void)
{
    scsi_rig_init(&rig, 512);
    scsi_rig_shut(&rig, true);
    rig.rig.config.flags = VREP_GROUP_READ_ONLY;
    scsi_rig_open(&rig);
    scsi_settle_in(&rig, &answer);
    CHECK_EQ(scsi_run(&rig, &answer, 0, CDB(0x2a, 0, 0, 0, 0, 0, 0, 0, 1), data, 512), CHECK_C);
    CHECK_EQ(answer.sense, 0x072700);
    CHECK_EQ(scsi_run(&rig, &answer, 0, CDB(0x1a, 0, 0x3f, 0, 255), NULL, 0), GOOD);
    CHECK_EQ(answer.in[2] & 0x80, 0x80);
    CHECK_EQ(
        scsi_run(&rig, &answer, 0, CDB(0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32), NULL, 0),
        GOOD);
    CHECK_EQ(answer.in[14], 0); /* nothing can be unmapped */
    CHECK_EQ(scsi_run(&rig, &answer, 0, CDB(0x42), NULL, 0), CHECK_C);
    CHECK_EQ(answer.sense, 0x052000);
    CHECK_EQ(
        scsi_run(&rig, &answer, 0, CDB(0x93, 8, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 8), data, 512),
        CHECK_C);
    CHECK_EQ(answer.sense, 0x072700); /* before what else is wrong with it */
    scsi_rig_free(&rig);
}

int main(void)
{
    RUN(every_command_answers_as_specified);
    RUN(every_listed_command_is_tested);
    RUN(a_logical_unit_that_is_not_there);
    RUN(identity_is_stable);
    RUN(blocks_of_512);
    RUN(blocks_of_4096);
    RUN(modes_change_and_others_are_told);
    RUN(stopped_units_are_not_ready);
    RUN(a_new_nexus_is_told_of_the_power_on);
    RUN(a_read_only_group_says_so);
    return check_report();
}
