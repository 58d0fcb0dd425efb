/* The iSCSI target over a group of filter_rig.h, and how the initiator of a test gets to it. */
#ifndef VREP_TESTS_ISCSI_CLIENT_H
#define VREP_TESTS_ISCSI_CLIENT_H

#include "filter_rig.h"
#include "iscsi_initiator.h"
#include "serve/iscsi.h"

#define TARGET_NAME "iqn.2026-01.test:disk"
#define NAME "iqn.2026-01.test:a" /* of an initiator */
#define READ_ 0xc0u               /* byte 1 of a command */
#define WRITE_ 0xa0u
CHECK_UNUSED static const uint8_t write_8_blocks[16] = {0x2a, [8] = 8};
CHECK_UNUSED static const uint8_t read_8_blocks[16] = {0x28, [8] = 8};

struct served {
    struct rig rig;
    struct vrep_loop *loop;
    struct vrep_iscsi_server *server;
    char reservations[160];
    struct vrep_scsi_unit_config unit;
    struct vrep_iscsi_config config;
};

CHECK_UNUSED static void serve_init(struct served *served)
{
    rig_init(&served->rig);
    snprintf(served->reservations, sizeof served->reservations, "%s/reservations.0",
             served->rig.state);
    served->unit = (struct vrep_scsi_unit_config){
        .disk = 0, .block_bytes = 512, .reservations_path = served->reservations};
    served->config = (struct vrep_iscsi_config){
        .host = "127.0.0.1",
        .target_name = TARGET_NAME,
        .scsi = {.group_id = {1}, .units = &served->unit, .units_count = 1},
    };
}

CHECK_UNUSED static void serve_start(struct served *served)
{
    rig_open(&served->rig);
    CHECK_OK(vrep_loop_create(served->rig.group, &served->loop));
    CHECK_OK(vrep_iscsi_create(served->loop, &served->config, &served->server));
    CHECK_OK(vrep_loop_start(served->loop));
}

/* The group stays open. */
CHECK_UNUSED static void serve_stop(struct served *served)
{
    CHECK_OK(vrep_loop_stop(served->loop, true, 10000));
    vrep_iscsi_destroy(served->server);
    vrep_loop_destroy(served->loop);
}

CHECK_UNUSED static void serve_end(struct served *served)
{
    serve_stop(served);
    rig_free(&served->rig);
}

CHECK_UNUSED static void client_connect(struct client *client, const struct served *served)
{
    client_open(client, served->config.host, vrep_iscsi_port(served->server));
}

#define LOGIN_KEYS(name) "InitiatorName=" name "\0SessionType=Normal\0TargetName=" TARGET_NAME "\0"
#define STEP(client, flags, text) login_step(client, flags, text, sizeof(text) - 1)

/* Logs in with what is agreed by `extra`, straight to full feature phase. */
#define LOG_IN(client, name, extra) STEP(client, 0x87, LOGIN_KEYS(name) extra)

#endif
