/*
 * The vhost-user server over a group that a test controls, with a monitor and a guest of ours.
 */
#ifndef VREP_TESTS_VHOST_RIG_H
#define VREP_TESTS_VHOST_RIG_H

#include "nbd_double.h"
#include "serve/vhost.h"
#include "vhost_monitor.h"

static struct vrep_group *group;
static struct vrep_loop *loop;
static struct vrep_vhost_server *server;
static struct monitor m;
static char path[128];

CHECK_UNUSED static void serve(void)
{
    struct vrep_vhost_config_server config = {
        .unix_path = path, .unix_mode = 0600, .unix_group = -1};
    CHECK_OK(vrep_loop_create(group, &loop));
    CHECK_OK(vrep_vhost_create(loop, &config, &server));
    CHECK_OK(vrep_loop_start(loop));
}

CHECK_UNUSED static void serve_no_more(void)
{
    CHECK_OK(vrep_loop_stop(loop, true, 10000));
    vrep_vhost_destroy(server);
    vrep_loop_destroy(loop);
    CHECK_EQ(access(path, F_OK), -1);
}

CHECK_UNUSED static void begin(void)
{
    group = double_open();
    snprintf(path, sizeof path, "%s/vhost.sock", group->directory);
    serve();
    monitor_create(&m);
}

CHECK_UNUSED static void connect_and_start(uint64_t features, int inflight_fd)
{
    monitor_connect(&m, path);
    monitor_greet(&m, features);
    if (inflight_fd >= 0) {
        struct vrep_vhost_inflight inflight = {
            .bytes = VREP_VHOST_INFLIGHT_BYTES(64), .queues = 1, .queue_size = 64};
        CHECK_EQ(
            monitor_do(&m, VREP_VHOST_SET_INFLIGHT_FD, &inflight, sizeof inflight, inflight_fd), 0);
    }
    monitor_give_memory(&m);
    monitor_start(&m, 0, 64, m.queue[0].seen);
}

CHECK_UNUSED static void end(void)
{
    monitor_destroy(&m);
    serve_no_more();
    CHECK_EQ(vrep_load_acquire_u32(&group->used), 0);
    double_close(group);
}

CHECK_UNUSED static struct vrep_vhost_stats stats(void)
{
    struct vrep_vhost_stats found;
    vrep_vhost_stats(server, &found);
    return found;
}

#endif
