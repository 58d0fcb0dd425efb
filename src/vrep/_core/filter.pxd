# The filter room for other extension modules: serve polls a group and submits to it.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from "filter/command.h" nogil:
    enum:
        VREP_OP_READ
        VREP_OP_WRITE
        VREP_OP_FLUSH
        VREP_OP_DISCARD
        VREP_OP_ZERO
        VREP_COMMAND_FUA
        VREP_COMMAND_NO_HOLE
        VREP_COMMAND_FAST
    struct vrep_command:
        uint8_t op
        uint8_t flags
        uint16_t disk
        uint64_t offset
        uint64_t length
        iovec *iov
        int iovcnt
        int status
        void (*done)(vrep_command *command) noexcept nogil
        void *owner
        uint64_t tag
        vrep_command *next
    vrep_command *vrep_command_get(vrep_group *group)
    void vrep_command_put(vrep_command *command)
    int vrep_command_prepare(vrep_command *command)
    void vrep_command_submit(vrep_command *command)

cdef extern from "filter/group.h" nogil:
    enum:
        VREP_GROUP_TAP
        VREP_GROUP_READ_ONLY
        VREP_GROUP_DIRECT
        VREP_GROUP_BYPASS
        VREP_GROUP_HANDOVER
        VREP_GROUP_STEPPED
        VREP_STEP_DISK
        VREP_STEP_QUICK
        VREP_STEP_SLOW
        VREP_STEP_PROBER
        VREP_GROUP_MIRROR
        VREP_LANES_MAX
    struct vrep_position:
        uint32_t epoch
        uint16_t lane
        uint16_t reserved
        uint64_t seq
    struct vrep_group:
        pass
    struct vrep_map:
        pass
    struct vrep_group_disk:
        const char *name
        const char *uri
        uint64_t bytes
        uint64_t was
        const char *onto
    struct vrep_group_config:
        uint8_t group_id[16]
        uint8_t target_id[16]
        uint8_t epoch_id[16]
        uint32_t epoch
        uint16_t lane
        uint32_t flags
        uint64_t first_seq
        const vrep_group_disk *disks
        uint32_t disks_count
        const char *shm_dir
        const char *state_dir
        uint64_t ring_bytes
        uint32_t ring_descriptors
        uint32_t slots
        uint32_t bit_bytes
        uint32_t threads
        uint64_t private_bytes
        uint64_t resync_bytes_per_s
        uint64_t checkpoint_ns
        uint64_t mono_ns
        uint64_t wall_ns
    struct vrep_group_step:
        uint8_t kind
        uint8_t op
        uint8_t flags
        uint16_t disk
        uint64_t offset
        uint64_t length
    struct vrep_group_status:
        uint64_t head
        uint64_t released
        uint64_t durable
        uint64_t received
        uint64_t read
        uint64_t ring_free_bytes
        uint64_t ring_bytes
        uint64_t unshipped_bytes
        uint64_t total_bytes
        uint64_t gap_seq
        uint64_t gap_last
        uint32_t gap
        uint32_t unverified
        uint32_t opened_as
        uint32_t replayed
        uint32_t inflight
        uint32_t consumers
        uint64_t oldest_ns
        uint64_t writes
        uint64_t write_bytes
        uint64_t reads
        uint64_t read_bytes
        uint64_t flushes
        uint64_t zeroes
        uint64_t zero_bytes
        uint64_t unrecorded
        uint64_t gaps
        uint64_t resync_bytes
        uint64_t compared_bytes
        uint64_t equal_bytes
        uint64_t errors
        uint32_t flush_failed
        uint32_t resync_allowed
        uint64_t acknowledged
        uint64_t cuts
        uint64_t cuts_void
        uint64_t cut_hold_ns_max
        uint32_t handover
        uint32_t handover_waiting
        uint32_t sizes_due
        uint32_t mirror
        uint32_t mirror_waits
        uint64_t mirror_copies
        uint64_t mirror_losses
        uint64_t mirror_yields
        uint32_t mirror_rests
        uint32_t marks_unstored
        uint64_t mirror_looks
    struct vrep_miss:
        uint64_t ticket
        uint64_t offset
        uint64_t length
        uint16_t disk
    struct vrep_since_range:
        uint64_t offset
        uint64_t length
    int vrep_group_open(const vrep_group_config *config, vrep_group **out)
    int vrep_group_note_past(const uint8_t group_id[16], const char *shm_dir, const char *state_dir)
    void vrep_group_close(vrep_group *group, bint clean)
    void vrep_group_abandon(vrep_group *group)
    bint vrep_group_waiting(const vrep_group *group, uint32_t index, vrep_group_step *out)
    void vrep_group_step_at "vrep_group_step"(vrep_group *group, uint32_t index)
    void vrep_group_step_failing(vrep_group *group, uint32_t index, int os_error)
    void vrep_group_set_time(vrep_group *group, uint64_t mono_ns, uint64_t wall_ns)
    void vrep_group_disown(vrep_group *group)
    int vrep_group_fd(const vrep_group *group)
    void vrep_group_poll(vrep_group *group)
    int vrep_group_timeout_ms(const vrep_group *group)
    void vrep_group_flush_wakeups(vrep_group *group)
    uint32_t vrep_group_disks(const vrep_group *group)
    const char *vrep_group_disk_name(const vrep_group *group, uint32_t disk)
    uint64_t vrep_group_disk_bytes(const vrep_group *group, uint32_t disk)
    vrep_map *vrep_group_map(vrep_group *group)
    int vrep_group_call(vrep_group *group,
                        int (*fn)(vrep_group *group, void *argument) noexcept nogil,
                        void *argument)
    int vrep_group_consumer_attach(vrep_group *group, uint32_t role, const uint8_t *target_id,
                                   uint64_t durable, int *fds)
    int vrep_group_consumer_detach(vrep_group *group, uint32_t role)
    int vrep_group_mark(vrep_group *group, const char *label, uint16_t label_bytes, uint64_t *seq)
    int vrep_group_object(vrep_group *group, uint64_t tag, const void *data, uint32_t length,
                          uint64_t *seq)
    int vrep_group_cut_hold(vrep_group *group, const uint8_t *cut_id, uint64_t limit_ns)
    int vrep_group_cut_mark(vrep_group *group, const uint8_t *cut_id, uint64_t *seq)
    int vrep_group_cut_release(vrep_group *group, const uint8_t *cut_id)
    int vrep_group_cut_complete(vrep_group *group, const uint8_t *cut_id,
                                const vrep_position *lanes, uint16_t count, const char *label,
                                uint16_t label_bytes, uint64_t *seq)
    int vrep_group_resync(vrep_group *group, bint allowed, uint64_t bytes_per_s, bint all)
    int vrep_group_lose_ring(vrep_group *group)
    void vrep_group_attend(vrep_group *group)
    int vrep_group_let_go(vrep_group *group)
    int vrep_group_take_back(vrep_group *group)
    int vrep_group_mirror_live(vrep_group *group)
    int vrep_group_mirror_mark(vrep_group *group, uint32_t disk, const vrep_since_range *ranges,
                               size_t count)
    int vrep_group_mirror_distrust(vrep_group *group)
    int vrep_group_mirror_barrier(vrep_group *group, uint64_t copies)
    cdef struct vrep_rest_image:
        uint32_t disk
        const char *path
    int vrep_group_mirror_rest(vrep_group *group, const vrep_rest_image *images, size_t count,
                               bint begin)
    int vrep_group_mirror_looked(vrep_group *group)
    int vrep_group_status_of "vrep_group_status"(vrep_group *group, vrep_group_status *out)
    uint64_t vrep_group_dirty_bytes(const vrep_group *group)
    int vrep_group_compare(vrep_group *group, uint32_t disk, const vrep_since_range *ranges,
                           size_t count)
    int vrep_group_since_begin(vrep_group *group, const char *name)
    int vrep_group_since_mark(vrep_group *group, uint32_t disk, const vrep_since_range *ranges,
                              size_t count)
    uint32_t vrep_group_misses(vrep_group *group, vrep_miss *out, uint32_t max, int timeout_ms)
    void vrep_group_stop_misses(vrep_group *group)
    struct vrep_fill_part:
        uint64_t offset, length
    int vrep_group_fill(vrep_group *group, uint64_t ticket, const void *data, int status)
    int vrep_group_fill_parts(vrep_group *group, uint64_t ticket, const void *data,
                              const vrep_fill_part *parts, uint32_t count)
    int vrep_group_fill_next(vrep_group *group, uint16_t disk, uint64_t start, uint64_t most,
                             vrep_miss *out)
    int vrep_group_sync_disk(vrep_group *group, uint16_t disk)


cdef extern from "filter/delta.h" nogil:
    enum:
        VREP_DELTA_WINDOWS
        VREP_DELTA_WINDOW_BYTES
        VREP_DELTA_KEYS_MAX
        VREP_HASH_SECRET_BYTES
    struct vrep_delta_window:
        uint64_t id
        uint64_t offset
        uint64_t length
        uint16_t disk
    struct vrep_delta_hash:
        uint64_t low
        uint64_t high
    int vrep_group_delta_begin(vrep_group *group, const uint8_t (*secrets)[192], uint32_t count)
    void vrep_group_delta_end(vrep_group *group)
    int vrep_group_delta_take(vrep_group *group, vrep_delta_window *out, uint32_t max,
                              uint32_t *count, uint64_t *at_least)
    int vrep_group_delta_answer(vrep_group *group, uint64_t id, const uint8_t *keys,
                                const vrep_delta_hash *hashes, uint32_t units)


cdef class Group:
    # NULL after close. A module that runs the group's loop counts itself in `users`:
    # close() is refused while it is there.
    cdef vrep_group *handle
    cdef int users
    cdef int calls
    cdef bint closing
    cdef vrep_group *enter(self) except NULL
    cdef void leave(self) noexcept
    cdef call(self, int (*fn)(vrep_group *group, void *argument) noexcept nogil, void *argument)
    cdef end_miss(self, uint64_t ticket, const void *data, object parts, int outcome)
