/* vhost-user: the messages of a virtual machine monitor, as they stand on the socket, and what
 * virtio says of a block device.  Pure: bytes in, verdicts out.
 *
 * A message is a header of 12 bytes and at most VREP_VHOST_PAYLOAD_MAX bytes; descriptors come with
 * its first byte.  Integers have the host's byte order, those of virtio are little-endian.
 *
 * Sources: QEMU docs/interop/vhost-user.rst; virtio 1.2, sections 2.7 (split virtqueues) and 5.2
 * (block device).  Units: bytes; sectors are of 512.
 */
#ifndef VREP_SERVE_VHOST_PROTOCOL_H
#define VREP_SERVE_VHOST_PROTOCOL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define VREP_VHOST_HEADER_BYTES 12u
#define VREP_VHOST_PAYLOAD_MAX 512u
#define VREP_VHOST_REGIONS_MAX 32u    /* of guest memory */
#define VREP_VHOST_REGIONS_MESSAGE 8u /* in one SET_MEM_TABLE, and descriptors of any message */
#define VREP_VHOST_QUEUES_MAX 16u
#define VREP_VHOST_QUEUE_SIZE_MAX 1024u
#define VREP_VHOST_SECTOR 512u

enum vrep_vhost_request {
    VREP_VHOST_GET_FEATURES = 1,
    VREP_VHOST_SET_FEATURES = 2,
    VREP_VHOST_SET_OWNER = 3,
    VREP_VHOST_RESET_OWNER = 4,
    VREP_VHOST_SET_MEM_TABLE = 5,
    VREP_VHOST_SET_LOG_BASE = 6,
    VREP_VHOST_SET_LOG_FD = 7,
    VREP_VHOST_SET_VRING_NUM = 8,
    VREP_VHOST_SET_VRING_ADDR = 9,
    VREP_VHOST_SET_VRING_BASE = 10,
    VREP_VHOST_GET_VRING_BASE = 11,
    VREP_VHOST_SET_VRING_KICK = 12,
    VREP_VHOST_SET_VRING_CALL = 13,
    VREP_VHOST_SET_VRING_ERR = 14,
    VREP_VHOST_GET_PROTOCOL_FEATURES = 15,
    VREP_VHOST_SET_PROTOCOL_FEATURES = 16,
    VREP_VHOST_GET_QUEUE_NUM = 17,
    VREP_VHOST_SET_VRING_ENABLE = 18,
    VREP_VHOST_SET_BACKEND_REQ_FD = 21,
    VREP_VHOST_GET_CONFIG = 24,
    VREP_VHOST_SET_CONFIG = 25,
    VREP_VHOST_GET_INFLIGHT_FD = 31,
    VREP_VHOST_SET_INFLIGHT_FD = 32,
    VREP_VHOST_RESET_DEVICE = 34,
    VREP_VHOST_GET_MAX_MEM_SLOTS = 36,
    VREP_VHOST_ADD_MEM_REG = 37,
    VREP_VHOST_REM_MEM_REG = 38,
};
#define VREP_VHOST_BACKEND_CONFIG_CHANGE 2u /* on the socket of SET_BACKEND_REQ_FD */

#define VREP_VHOST_VERSION 1u
#define VREP_VHOST_REPLY 4u
#define VREP_VHOST_NEED_REPLY 8u
#define VREP_VHOST_NO_FD 0x100u /* in the number of a queue: it comes without a descriptor */

/* Features of the device, bit numbers. */
enum {
    VREP_VIRTIO_BLK_SEG_MAX = 2,
    VREP_VIRTIO_BLK_RO = 5,
    VREP_VIRTIO_BLK_BLK_SIZE = 6,
    VREP_VIRTIO_BLK_FLUSH = 9,
    VREP_VIRTIO_BLK_TOPOLOGY = 10,
    VREP_VIRTIO_BLK_MQ = 12,
    VREP_VIRTIO_BLK_DISCARD = 13,
    VREP_VIRTIO_BLK_WRITE_ZEROES = 14,
    VREP_VHOST_F_LOG_ALL = 26,
    VREP_VIRTIO_RING_INDIRECT = 28,
    VREP_VIRTIO_RING_EVENT_IDX = 29,
    VREP_VHOST_F_PROTOCOL_FEATURES = 30,
    VREP_VIRTIO_VERSION_1 = 32,
};
/* Features of the protocol, bit numbers. */
enum {
    VREP_VHOST_P_MQ = 0,
    VREP_VHOST_P_LOG_SHMFD = 1,
    VREP_VHOST_P_REPLY_ACK = 3,
    VREP_VHOST_P_BACKEND_REQ = 5,
    VREP_VHOST_P_CONFIG = 9,
    VREP_VHOST_P_INFLIGHT_SHMFD = 12,
    VREP_VHOST_P_RESET_DEVICE = 13,
    VREP_VHOST_P_CONFIGURE_MEM_SLOTS = 15,
};

struct vrep_vhost_header {
    uint32_t request, flags, bytes;
};
struct vrep_vhost_region {
    uint64_t guest, bytes, user, offset; /* addresses of the guest, of the monitor; in the file */
};
struct vrep_vhost_regions {
    uint32_t count, padding;
    struct vrep_vhost_region region[VREP_VHOST_REGIONS_MESSAGE];
};
struct vrep_vhost_one_region {
    uint64_t padding;
    struct vrep_vhost_region region;
};
struct vrep_vhost_state {
    uint32_t queue, number;
};
struct vrep_vhost_address {
    uint32_t queue, flags; /* bit 0: the used ring is logged, at log */
    uint64_t descriptors, used, available, log;
};
struct vrep_vhost_log {
    uint64_t bytes, offset;
};
struct vrep_vhost_config {
    uint32_t offset, bytes, flags;
    uint8_t data[256];
};
struct vrep_vhost_inflight {
    uint64_t bytes, offset;
    uint16_t queues, queue_size;
};

struct vrep_vhost_message {
    struct vrep_vhost_header header;
    union {
        uint8_t raw[VREP_VHOST_PAYLOAD_MAX];
        uint64_t number;
        struct vrep_vhost_regions regions;
        struct vrep_vhost_one_region one;
        struct vrep_vhost_state state;
        struct vrep_vhost_address address;
        struct vrep_vhost_log log;
        struct vrep_vhost_config config;
        struct vrep_vhost_inflight inflight;
    } body;
    int fds[VREP_VHOST_REGIONS_MESSAGE];
    uint32_t fds_count;
};

/* Whether a header may be read on: version, no reply, a length that its request can have.
 * PROTOCOL; UNSUPPORTED for a request that is not known. */
int vrep_vhost_check_header(const struct vrep_vhost_header *header);
/* Whether body and descriptors are what the request needs, and its numbers are in their bounds.
 * PROTOCOL. */
int vrep_vhost_check(const struct vrep_vhost_message *message);

/* ---- virtqueues --------------------------------------------------------------- */

#define VREP_VRING_NEXT 1u
#define VREP_VRING_WRITE 2u
#define VREP_VRING_INDIRECT 4u
#define VREP_VRING_NO_INTERRUPT 1u
struct vrep_vring_descriptor {
    uint64_t address;
    uint32_t bytes;
    uint16_t flags, next;
};
#define VREP_VRING_AVAILABLE_BYTES(size) (6u + 2u * (size)) /* flags, index, ring, used event */
#define VREP_VRING_USED_BYTES(size) (6u + 8u * (size)) /* flags, index, ring, available event */

/* What outlives the process: one of each queue, in memory that the monitor keeps. */
#define VREP_VHOST_INFLIGHT_VERSION 1u
struct vrep_vhost_inflight_entry {
    uint8_t inflight, padding[5];
    uint16_t next;
    uint64_t counter;
};
/* Of the region, in the first queue's part. vhost-user.rst leaves the feature flags to who made the
 * region; these say what became of the guest whose it is. */
#define VREP_VHOST_INFLIGHT_MOVED (UINT64_C(1) << 62) /* all its queues stopped under the log */
#define VREP_VHOST_INFLIGHT_LEFT (UINT64_C(1) << 63)  /* and it goes on elsewhere */
struct vrep_vhost_inflight_queue {
    uint64_t features;
    uint16_t version, size, last_batch_head, used_index;
    struct vrep_vhost_inflight_entry entry[];
};
/* Of one queue, in whole cache lines. */
#define VREP_VHOST_INFLIGHT_BYTES(size)                                                            \
    ((sizeof(struct vrep_vhost_inflight_queue) +                                                   \
      (size) * sizeof(struct vrep_vhost_inflight_entry) + 63u) &                                   \
     ~(size_t)63u)

/* ---- the block device ----------------------------------------------------------- */

enum { VREP_VIRTIO_IN = 0, VREP_VIRTIO_OUT = 1, VREP_VIRTIO_FLUSH = 4, VREP_VIRTIO_GET_ID = 8 };
enum { VREP_VIRTIO_DISCARD = 11, VREP_VIRTIO_WRITE_ZEROES = 13 };
enum { VREP_VIRTIO_OK = 0, VREP_VIRTIO_IOERR = 1, VREP_VIRTIO_UNSUPPORTED = 2 };
#define VREP_VIRTIO_HEADER_BYTES 16u
#define VREP_VIRTIO_ID_BYTES 20u
#define VREP_VIRTIO_SEGMENTS_MAX 254u
#define VREP_VIRTIO_ZERO_SECTORS_MAX 0x7fffffu /* 4 GiB less one sector */
#define VREP_VIRTIO_UNMAP 1u
struct vrep_virtio_range {
    uint64_t sector;
    uint32_t sectors, flags;
};
#define VREP_VIRTIO_CONFIG_BYTES 60u
struct vrep_virtio_disk {
    uint64_t bytes;
    uint32_t block_bytes;         /* logical */
    uint32_t discard_align_bytes; /* 0: of a block */
    uint16_t queues;
};
/* The configuration space of a disk. */
void vrep_virtio_config(const struct vrep_virtio_disk *disk, uint8_t out[VREP_VIRTIO_CONFIG_BYTES]);

#endif
