#include "format/describe.h"

#include "format/layout.h"
#include "format/record.h"

/* An array decays to a pointer in a controlling expression, so each type is named twice. */
#define TYPE(type, name)                                                                           \
    type:                                                                                          \
    name, type * : name
#define TYPE_NAME(value)                                                                           \
    _Generic((value), TYPE(uint8_t, "u1"), TYPE(uint16_t, "u2"), TYPE(uint32_t, "u4"),             \
             TYPE(uint64_t, "u8"), TYPE(char, "char"),                                             \
             TYPE(struct vrep_position, "vrep_position"), TYPE(struct vrep_record, "vrep_record"), \
             TYPE(struct vrep_map_generation, "vrep_map_generation"),                              \
             TYPE(struct vrep_map_disk, "vrep_map_disk"),                                          \
             TYPE(struct vrep_state_disk, "vrep_state_disk"),                                      \
             TYPE(struct vrep_registration, "vrep_registration"))
#define TYPE_UNIT(value)                                                                           \
    _Generic((value), uint8_t *: 1, uint16_t *: 2, uint32_t *: 4, uint64_t *: 8, char *: 1,        \
             struct vrep_position *: sizeof(struct vrep_position),                                 \
             struct vrep_map_generation *: sizeof(struct vrep_map_generation),                     \
             struct vrep_map_disk *: sizeof(struct vrep_map_disk),                                 \
             struct vrep_state_disk *: sizeof(struct vrep_state_disk),                             \
             struct vrep_registration *: sizeof(struct vrep_registration), default: sizeof(value))
#define FIELD(type, field)                                                                         \
    {                                                                                              \
#field, TYPE_NAME(((struct type *)0)->field), offsetof(struct type, field),                \
            sizeof(((struct type *)0)->field), TYPE_UNIT(((struct type *)0)->field)                \
    }
#define FIELDS(type, ...)                                                                          \
    static const struct vrep_described_field fields_of_##type[] = {__VA_ARGS__, {0}}

FIELDS(vrep_position, FIELD(vrep_position, epoch), FIELD(vrep_position, lane),
       FIELD(vrep_position, reserved), FIELD(vrep_position, seq));
FIELDS(vrep_record, FIELD(vrep_record, magic), FIELD(vrep_record, version),
       FIELD(vrep_record, kind), FIELD(vrep_record, flags), FIELD(vrep_record, epoch),
       FIELD(vrep_record, lane), FIELD(vrep_record, disk), FIELD(vrep_record, seq),
       FIELD(vrep_record, offset), FIELD(vrep_record, length), FIELD(vrep_record, body_bytes),
       FIELD(vrep_record, wall_ns), FIELD(vrep_record, mono_ns), FIELD(vrep_record, pieces),
       FIELD(vrep_record, reserved), FIELD(vrep_record, checksum));
FIELDS(vrep_stream, FIELD(vrep_stream, stream_id), FIELD(vrep_stream, epoch_id),
       FIELD(vrep_stream, parent_epoch_id), FIELD(vrep_stream, parent),
       FIELD(vrep_stream, resume_seq), FIELD(vrep_stream, epoch),
       FIELD(vrep_stream, key_generation), FIELD(vrep_stream, wall_ns),
       FIELD(vrep_stream, reserved), FIELD(vrep_stream, checksum));
FIELDS(vrep_tally, FIELD(vrep_tally, running), FIELD(vrep_tally, stream_id),
       FIELD(vrep_tally, records), FIELD(vrep_tally, first_seq));
FIELDS(vrep_mark, FIELD(vrep_mark, wall_ns), FIELD(vrep_mark, version),
       FIELD(vrep_mark, label_bytes), FIELD(vrep_mark, flags));
FIELDS(vrep_cut, FIELD(vrep_cut, cut_id), FIELD(vrep_cut, lanes), FIELD(vrep_cut, reserved));
FIELDS(vrep_object, FIELD(vrep_object, wall_ns), FIELD(vrep_object, version),
       FIELD(vrep_object, name_bytes), FIELD(vrep_object, flags));
FIELDS(vrep_ring_slot, FIELD(vrep_ring_slot, state), FIELD(vrep_ring_slot, kind),
       FIELD(vrep_ring_slot, generation), FIELD(vrep_ring_slot, disk),
       FIELD(vrep_ring_slot, offset), FIELD(vrep_ring_slot, seq), FIELD(vrep_ring_slot, length),
       FIELD(vrep_ring_slot, chunk), FIELD(vrep_ring_slot, chunks), FIELD(vrep_ring_slot, flags),
       FIELD(vrep_ring_slot, lane), FIELD(vrep_ring_slot, granted_ns),
       FIELD(vrep_ring_slot, reserved));
FIELDS(vrep_ring_desc, FIELD(vrep_ring_desc, seq), FIELD(vrep_ring_desc, offset),
       FIELD(vrep_ring_desc, length), FIELD(vrep_ring_desc, chunk), FIELD(vrep_ring_desc, chunks),
       FIELD(vrep_ring_desc, kind), FIELD(vrep_ring_desc, generation), FIELD(vrep_ring_desc, flags),
       FIELD(vrep_ring_desc, disk), FIELD(vrep_ring_desc, lane), FIELD(vrep_ring_desc, epoch),
       FIELD(vrep_ring_desc, wall_ns), FIELD(vrep_ring_desc, mono_ns),
       FIELD(vrep_ring_desc, reserved));
FIELDS(vrep_ring_header, FIELD(vrep_ring_header, magic), FIELD(vrep_ring_header, version),
       FIELD(vrep_ring_header, header_bytes), FIELD(vrep_ring_header, file_bytes),
       FIELD(vrep_ring_header, group_id), FIELD(vrep_ring_header, boot_id),
       FIELD(vrep_ring_header, epoch_id), FIELD(vrep_ring_header, epoch),
       FIELD(vrep_ring_header, lane), FIELD(vrep_ring_header, reserved0),
       FIELD(vrep_ring_header, descriptors), FIELD(vrep_ring_header, slots),
       FIELD(vrep_ring_header, chunks), FIELD(vrep_ring_header, chunk_bytes),
       FIELD(vrep_ring_header, slots_at), FIELD(vrep_ring_header, descs_at),
       FIELD(vrep_ring_header, next_at), FIELD(vrep_ring_header, chunks_at),
       FIELD(vrep_ring_header, first_seq), FIELD(vrep_ring_header, reserved1),
       FIELD(vrep_ring_header, checksum), FIELD(vrep_ring_header, head),
       FIELD(vrep_ring_header, free_bytes_one), FIELD(vrep_ring_header, pad0),
       FIELD(vrep_ring_header, released), FIELD(vrep_ring_header, durable),
       FIELD(vrep_ring_header, spilled_ns), FIELD(vrep_ring_header, pad1),
       FIELD(vrep_ring_header, incarnation), FIELD(vrep_ring_header, producer_pid),
       FIELD(vrep_ring_header, clean), FIELD(vrep_ring_header, pad2),
       FIELD(vrep_ring_header, pad3));
FIELDS(vrep_ring_control, FIELD(vrep_ring_control, magic), FIELD(vrep_ring_control, version),
       FIELD(vrep_ring_control, role), FIELD(vrep_ring_control, target_id),
       FIELD(vrep_ring_control, pid), FIELD(vrep_ring_control, pad0),
       FIELD(vrep_ring_control, durable), FIELD(vrep_ring_control, received),
       FIELD(vrep_ring_control, read), FIELD(vrep_ring_control, spilled),
       FIELD(vrep_ring_control, pad1), FIELD(vrep_ring_control, waiting),
       FIELD(vrep_ring_control, pad2), FIELD(vrep_ring_control, pad3));
FIELDS(vrep_map_generation, FIELD(vrep_map_generation, state), FIELD(vrep_map_generation, inflight),
       FIELD(vrep_map_generation, last_seq), FIELD(vrep_map_generation, opened_seq),
       FIELD(vrep_map_generation, reserved));
FIELDS(vrep_map_disk, FIELD(vrep_map_disk, bytes), FIELD(vrep_map_disk, bits),
       FIELD(vrep_map_disk, words), FIELD(vrep_map_disk, bitmaps_at));
FIELDS(vrep_map_header, FIELD(vrep_map_header, magic), FIELD(vrep_map_header, version),
       FIELD(vrep_map_header, header_bytes), FIELD(vrep_map_header, file_bytes),
       FIELD(vrep_map_header, group_id), FIELD(vrep_map_header, target_id),
       FIELD(vrep_map_header, boot_id), FIELD(vrep_map_header, bit_bytes),
       FIELD(vrep_map_header, disks), FIELD(vrep_map_header, reserved0),
       FIELD(vrep_map_header, checksum), FIELD(vrep_map_header, gap),
       FIELD(vrep_map_header, gap_open), FIELD(vrep_map_header, gap_seq),
       FIELD(vrep_map_header, open_generation), FIELD(vrep_map_header, unverified),
       FIELD(vrep_map_header, merge), FIELD(vrep_map_header, reserved1),
       FIELD(vrep_map_header, gap_last), FIELD(vrep_map_header, reserved4),
       FIELD(vrep_map_header, generation), FIELD(vrep_map_header, reserved2),
       FIELD(vrep_map_header, disk), FIELD(vrep_map_header, reserved3));
FIELDS(vrep_checkpoint_header, FIELD(vrep_checkpoint_header, magic),
       FIELD(vrep_checkpoint_header, version), FIELD(vrep_checkpoint_header, disks),
       FIELD(vrep_checkpoint_header, counter), FIELD(vrep_checkpoint_header, group_id),
       FIELD(vrep_checkpoint_header, target_id), FIELD(vrep_checkpoint_header, bit_bytes),
       FIELD(vrep_checkpoint_header, clean), FIELD(vrep_checkpoint_header, head),
       FIELD(vrep_checkpoint_header, digest), FIELD(vrep_checkpoint_header, words),
       FIELD(vrep_checkpoint_header, bytes), FIELD(vrep_checkpoint_header, durable),
       FIELD(vrep_checkpoint_header, reserved), FIELD(vrep_checkpoint_header, checksum));
FIELDS(vrep_intent_header, FIELD(vrep_intent_header, magic), FIELD(vrep_intent_header, version),
       FIELD(vrep_intent_header, extent_bytes), FIELD(vrep_intent_header, counter),
       FIELD(vrep_intent_header, group_id), FIELD(vrep_intent_header, disks),
       FIELD(vrep_intent_header, slot_bytes), FIELD(vrep_intent_header, words),
       FIELD(vrep_intent_header, digest), FIELD(vrep_intent_header, reserved),
       FIELD(vrep_intent_header, checksum));
FIELDS(vrep_state_disk, FIELD(vrep_state_disk, bytes), FIELD(vrep_state_disk, device),
       FIELD(vrep_state_disk, inode), FIELD(vrep_state_disk, mtime_ns),
       FIELD(vrep_state_disk, ctime_ns), FIELD(vrep_state_disk, commands),
       FIELD(vrep_state_disk, sectors), FIELD(vrep_state_disk, reserved));
FIELDS(vrep_state, FIELD(vrep_state, magic), FIELD(vrep_state, version), FIELD(vrep_state, flags),
       FIELD(vrep_state, counter), FIELD(vrep_state, group_id), FIELD(vrep_state, epoch_id),
       FIELD(vrep_state, epoch), FIELD(vrep_state, lane), FIELD(vrep_state, disks),
       FIELD(vrep_state, seq_limit), FIELD(vrep_state, durable_seq), FIELD(vrep_state, unverified),
       FIELD(vrep_state, reserved0), FIELD(vrep_state, disk), FIELD(vrep_state, boot_id),
       FIELD(vrep_state, reserved1), FIELD(vrep_state, checksum));
FIELDS(vrep_registration, FIELD(vrep_registration, key), FIELD(vrep_registration, port),
       FIELD(vrep_registration, transport_id_bytes), FIELD(vrep_registration, reserved0),
       FIELD(vrep_registration, transport_id), FIELD(vrep_registration, reserved1));
FIELDS(vrep_reservations, FIELD(vrep_reservations, magic), FIELD(vrep_reservations, version),
       FIELD(vrep_reservations, flags), FIELD(vrep_reservations, counter),
       FIELD(vrep_reservations, unit), FIELD(vrep_reservations, count),
       FIELD(vrep_reservations, holder), FIELD(vrep_reservations, type),
       FIELD(vrep_reservations, reserved0), FIELD(vrep_reservations, list),
       FIELD(vrep_reservations, reserved1), FIELD(vrep_reservations, checksum));
FIELDS(vrep_segment_header, FIELD(vrep_segment_header, magic), FIELD(vrep_segment_header, version),
       FIELD(vrep_segment_header, header_bytes), FIELD(vrep_segment_header, group_id),
       FIELD(vrep_segment_header, store_id), FIELD(vrep_segment_header, segment),
       FIELD(vrep_segment_header, flags), FIELD(vrep_segment_header, lease),
       FIELD(vrep_segment_header, wall_ns), FIELD(vrep_segment_header, after),
       FIELD(vrep_segment_header, stream_id), FIELD(vrep_segment_header, reserved),
       FIELD(vrep_segment_header, checksum));
FIELDS(vrep_fold, FIELD(vrep_fold, magic), FIELD(vrep_fold, version), FIELD(vrep_fold, block_bytes),
       FIELD(vrep_fold, segment), FIELD(vrep_fold, generation), FIELD(vrep_fold, flags),
       FIELD(vrep_fold, reserved0), FIELD(vrep_fold, horizon), FIELD(vrep_fold, end),
       FIELD(vrep_fold, input_bytes), FIELD(vrep_fold, input_records), FIELD(vrep_fold, tally),
       FIELD(vrep_fold, reserved1), FIELD(vrep_fold, checksum));
FIELDS(vrep_commit, FIELD(vrep_commit, magic), FIELD(vrep_commit, version),
       FIELD(vrep_commit, block_bytes), FIELD(vrep_commit, segment), FIELD(vrep_commit, number),
       FIELD(vrep_commit, start), FIELD(vrep_commit, end), FIELD(vrep_commit, digest),
       FIELD(vrep_commit, last), FIELD(vrep_commit, durable), FIELD(vrep_commit, group_id),
       FIELD(vrep_commit, wall_ns), FIELD(vrep_commit, records), FIELD(vrep_commit, reserved),
       FIELD(vrep_commit, checksum));
FIELDS(vrep_index_entry, FIELD(vrep_index_entry, offset), FIELD(vrep_index_entry, seq),
       FIELD(vrep_index_entry, length), FIELD(vrep_index_entry, epoch),
       FIELD(vrep_index_entry, segment), FIELD(vrep_index_entry, position),
       FIELD(vrep_index_entry, disk), FIELD(vrep_index_entry, piece), FIELD(vrep_index_entry, kind),
       FIELD(vrep_index_entry, flags), FIELD(vrep_index_entry, stream));
FIELDS(vrep_index_stream, FIELD(vrep_index_stream, stream_id), FIELD(vrep_index_stream, epoch_id),
       FIELD(vrep_index_stream, epoch), FIELD(vrep_index_stream, key_generation),
       FIELD(vrep_index_stream, first_seq), FIELD(vrep_index_stream, reserved));
FIELDS(vrep_index_event, FIELD(vrep_index_event, at), FIELD(vrep_index_event, wall_ns),
       FIELD(vrep_index_event, segment), FIELD(vrep_index_event, position),
       FIELD(vrep_index_event, kind), FIELD(vrep_index_event, reserved0),
       FIELD(vrep_index_event, stream), FIELD(vrep_index_event, reserved1));
FIELDS(vrep_index_time, FIELD(vrep_index_time, wall_ns), FIELD(vrep_index_time, at));
FIELDS(vrep_index_node, FIELD(vrep_index_node, offset), FIELD(vrep_index_node, end),
       FIELD(vrep_index_node, seq_low), FIELD(vrep_index_node, seq_high),
       FIELD(vrep_index_node, epoch_low), FIELD(vrep_index_node, epoch_high),
       FIELD(vrep_index_node, disk_first), FIELD(vrep_index_node, disk_last),
       FIELD(vrep_index_node, checksum));
FIELDS(vrep_index_trailer, FIELD(vrep_index_trailer, magic), FIELD(vrep_index_trailer, version),
       FIELD(vrep_index_trailer, trailer_bytes), FIELD(vrep_index_trailer, segment),
       FIELD(vrep_index_trailer, level), FIELD(vrep_index_trailer, short_at),
       FIELD(vrep_index_trailer, short_count), FIELD(vrep_index_trailer, long_at),
       FIELD(vrep_index_trailer, long_count), FIELD(vrep_index_trailer, streams_at),
       FIELD(vrep_index_trailer, streams_count), FIELD(vrep_index_trailer, events_at),
       FIELD(vrep_index_trailer, events_count), FIELD(vrep_index_trailer, times_at),
       FIELD(vrep_index_trailer, times_count), FIELD(vrep_index_trailer, first),
       FIELD(vrep_index_trailer, last), FIELD(vrep_index_trailer, data_bytes),
       FIELD(vrep_index_trailer, segment_bytes), FIELD(vrep_index_trailer, wall_first_ns),
       FIELD(vrep_index_trailer, wall_last_ns), FIELD(vrep_index_trailer, group_id),
       FIELD(vrep_index_trailer, short_digest), FIELD(vrep_index_trailer, rest_digest),
       FIELD(vrep_index_trailer, nodes_at), FIELD(vrep_index_trailer, nodes_count),
       FIELD(vrep_index_trailer, long_root), FIELD(vrep_index_trailer, short_root),
       FIELD(vrep_index_trailer, streams_checksum), FIELD(vrep_index_trailer, events_checksum),
       FIELD(vrep_index_trailer, aged_ns), FIELD(vrep_index_trailer, reserved),
       FIELD(vrep_index_trailer, checksum));
FIELDS(vrep_manifest_header, FIELD(vrep_manifest_header, magic),
       FIELD(vrep_manifest_header, version), FIELD(vrep_manifest_header, header_bytes),
       FIELD(vrep_manifest_header, number), FIELD(vrep_manifest_header, lease),
       FIELD(vrep_manifest_header, group_id), FIELD(vrep_manifest_header, store_id),
       FIELD(vrep_manifest_header, wall_ns), FIELD(vrep_manifest_header, epochs),
       FIELD(vrep_manifest_header, segments), FIELD(vrep_manifest_header, runs),
       FIELD(vrep_manifest_header, disks), FIELD(vrep_manifest_header, key_bytes),
       FIELD(vrep_manifest_header, body_bytes), FIELD(vrep_manifest_header, next_segment),
       FIELD(vrep_manifest_header, flags), FIELD(vrep_manifest_header, active_segment),
       FIELD(vrep_manifest_header, reserved0), FIELD(vrep_manifest_header, group_name),
       FIELD(vrep_manifest_header, digest), FIELD(vrep_manifest_header, horizon),
       FIELD(vrep_manifest_header, window_s), FIELD(vrep_manifest_header, quota_bytes),
       FIELD(vrep_manifest_header, received_bytes), FIELD(vrep_manifest_header, folded_bytes),
       FIELD(vrep_manifest_header, aged_ns), FIELD(vrep_manifest_header, boot_ns),
       FIELD(vrep_manifest_header, boot), FIELD(vrep_manifest_header, checksum));
FIELDS(vrep_manifest_epoch, FIELD(vrep_manifest_epoch, epoch), FIELD(vrep_manifest_epoch, state),
       FIELD(vrep_manifest_epoch, epoch_id), FIELD(vrep_manifest_epoch, writer),
       FIELD(vrep_manifest_epoch, parent), FIELD(vrep_manifest_epoch, wall_ns));
FIELDS(vrep_manifest_segment, FIELD(vrep_manifest_segment, segment),
       FIELD(vrep_manifest_segment, generation), FIELD(vrep_manifest_segment, file_bytes),
       FIELD(vrep_manifest_segment, data_end), FIELD(vrep_manifest_segment, first),
       FIELD(vrep_manifest_segment, last), FIELD(vrep_manifest_segment, records),
       FIELD(vrep_manifest_segment, data_bytes), FIELD(vrep_manifest_segment, index_digest));
FIELDS(vrep_manifest_run, FIELD(vrep_manifest_run, run), FIELD(vrep_manifest_run, level),
       FIELD(vrep_manifest_run, first_segment), FIELD(vrep_manifest_run, last_segment),
       FIELD(vrep_manifest_run, file_bytes), FIELD(vrep_manifest_run, index_digest),
       FIELD(vrep_manifest_run, reserved));
FIELDS(vrep_manifest_disk, FIELD(vrep_manifest_disk, name), FIELD(vrep_manifest_disk, bytes),
       FIELD(vrep_manifest_disk, index), FIELD(vrep_manifest_disk, flags));
FIELDS(vrep_presence_header, FIELD(vrep_presence_header, magic),
       FIELD(vrep_presence_header, version), FIELD(vrep_presence_header, block_bytes),
       FIELD(vrep_presence_header, disk_bytes), FIELD(vrep_presence_header, words),
       FIELD(vrep_presence_header, view_id), FIELD(vrep_presence_header, boot_id),
       FIELD(vrep_presence_header, distrust), FIELD(vrep_presence_header, reserved0),
       FIELD(vrep_presence_header, checksum));
FIELDS(vrep_lost_header, FIELD(vrep_lost_header, magic), FIELD(vrep_lost_header, version),
       FIELD(vrep_lost_header, flags), FIELD(vrep_lost_header, group_id),
       FIELD(vrep_lost_header, store_id), FIELD(vrep_lost_header, at),
       FIELD(vrep_lost_header, ranges), FIELD(vrep_lost_header, reserved0),
       FIELD(vrep_lost_header, digest), FIELD(vrep_lost_header, reserved),
       FIELD(vrep_lost_header, checksum));
FIELDS(vrep_lost_range, FIELD(vrep_lost_range, offset), FIELD(vrep_lost_range, length),
       FIELD(vrep_lost_range, disk), FIELD(vrep_lost_range, reserved));
FIELDS(vrep_verdict_header, FIELD(vrep_verdict_header, magic), FIELD(vrep_verdict_header, version),
       FIELD(vrep_verdict_header, header_bytes), FIELD(vrep_verdict_header, group_id),
       FIELD(vrep_verdict_header, store_id), FIELD(vrep_verdict_header, at),
       FIELD(vrep_verdict_header, wall_ns), FIELD(vrep_verdict_header, body_bytes),
       FIELD(vrep_verdict_header, signature_bytes), FIELD(vrep_verdict_header, digest),
       FIELD(vrep_verdict_header, reserved), FIELD(vrep_verdict_header, checksum));
FIELDS(vrep_record_found, FIELD(vrep_record_found, header), FIELD(vrep_record_found, position));
FIELDS(vrep_piece, FIELD(vrep_piece, index), FIELD(vrep_piece, word), FIELD(vrep_piece, stored),
       FIELD(vrep_piece, plain), FIELD(vrep_piece, offset), FIELD(vrep_piece, at));

#define STRUCT(type)                                                                               \
    {                                                                                              \
#type, sizeof(struct type), fields_of_##type                                               \
    }
const struct vrep_described_struct vrep_described_structs[] = {
    STRUCT(vrep_position),
    STRUCT(vrep_record),
    STRUCT(vrep_stream),
    STRUCT(vrep_tally),
    STRUCT(vrep_mark),
    STRUCT(vrep_cut),
    STRUCT(vrep_object),
    STRUCT(vrep_ring_slot),
    STRUCT(vrep_ring_desc),
    STRUCT(vrep_ring_header),
    STRUCT(vrep_ring_control),
    STRUCT(vrep_map_generation),
    STRUCT(vrep_map_disk),
    STRUCT(vrep_map_header),
    STRUCT(vrep_checkpoint_header),
    STRUCT(vrep_intent_header),
    STRUCT(vrep_state_disk),
    STRUCT(vrep_state),
    STRUCT(vrep_registration),
    STRUCT(vrep_reservations),
    STRUCT(vrep_segment_header),
    STRUCT(vrep_fold),
    STRUCT(vrep_commit),
    STRUCT(vrep_index_entry),
    STRUCT(vrep_index_stream),
    STRUCT(vrep_index_event),
    STRUCT(vrep_index_time),
    STRUCT(vrep_index_node),
    STRUCT(vrep_index_trailer),
    STRUCT(vrep_manifest_header),
    STRUCT(vrep_manifest_epoch),
    STRUCT(vrep_manifest_segment),
    STRUCT(vrep_manifest_run),
    STRUCT(vrep_manifest_disk),
    STRUCT(vrep_presence_header),
    STRUCT(vrep_lost_header),
    STRUCT(vrep_lost_range),
    STRUCT(vrep_verdict_header),
    STRUCT(vrep_record_found),
    STRUCT(vrep_piece),
    {0},
};

#define CONSTANT(name)                                                                             \
    {                                                                                              \
#name, name                                                                                \
    }
const struct vrep_described_constant vrep_described_constants[] = {
    CONSTANT(VREP_DISKS_MAX),
    CONSTANT(VREP_MONO_REPAIRED),
    CONSTANT(VREP_LANES_MAX),
    CONSTANT(VREP_TARGETS_MAX),
    CONSTANT(VREP_GENERATIONS),
    CONSTANT(VREP_WRITE_BYTES_MAX),
    CONSTANT(VREP_PIECE_BYTES_MAX),
    CONSTANT(VREP_PIECES_MAX),
    CONSTANT(VREP_HASH_BLOCK_BYTES),
    CONSTANT(VREP_CHUNK_BYTES),
    CONSTANT(VREP_MAP_BIT_BYTES),
    CONSTANT(VREP_INTENT_BYTES),
    CONSTANT(VREP_SECTOR_BYTES),
    CONSTANT(VREP_NAME_BYTES),
    CONSTANT(VREP_OBJECT_BYTES_MAX),
    CONSTANT(VREP_MARK_VERSION),
    CONSTANT(VREP_MARK_CUT_VERSION),
    CONSTANT(VREP_MARK_BYTES_MAX),
    CONSTANT(VREP_LABEL_BYTES_MAX),
    CONSTANT(VREP_KIND_LAST),
    CONSTANT(VREP_RECORD_MAGIC),
    CONSTANT(VREP_RECORD_VERSION),
    CONSTANT(VREP_RECORD_FUA),
    CONSTANT(VREP_RECORD_REPLAY),
    CONSTANT(VREP_RECORD_HASHED),
    CONSTANT(VREP_RECORD_JUMP),
    CONSTANT(VREP_RECORD_FLAGS),
    CONSTANT(VREP_PIECE_LENGTH_MASK),
    CONSTANT(VREP_PIECE_ZSTD),
    CONSTANT(VREP_PIECE_HASH),
    CONSTANT(VREP_PIECE_TALLY),
    CONSTANT(VREP_TAG_BYTES),
    CONSTANT(VREP_STREAM_KEY_BYTES),
    CONSTANT(VREP_HASH_SECRET_BYTES),
    CONSTANT(VREP_RING_MAGIC),
    CONSTANT(VREP_RING_VERSION),
    CONSTANT(VREP_NO_CHUNK),
    CONSTANT(VREP_CONTROL_MAGIC),
    CONSTANT(VREP_CONTROL_VERSION),
    CONSTANT(VREP_CONTROL_OBSERVER),
    CONSTANT(VREP_CONTROL_TARGET),
    CONSTANT(VREP_MAP_MAGIC),
    CONSTANT(VREP_MAP_VERSION),
    CONSTANT(VREP_CHECKPOINT_MAGIC),
    CONSTANT(VREP_CHECKPOINT_VERSION),
    CONSTANT(VREP_INTENT_MAGIC),
    CONSTANT(VREP_INTENT_VERSION),
    CONSTANT(VREP_STATE_MAGIC),
    CONSTANT(VREP_STATE_VERSION),
    CONSTANT(VREP_STATE_OPEN),
    CONSTANT(VREP_STATE_GAP),
    CONSTANT(VREP_STATE_SYNCED),
    CONSTANT(VREP_STATE_FENCED),
    CONSTANT(VREP_STATE_UNVERIFIED),
    CONSTANT(VREP_STATE_BYPASS),
    CONSTANT(VREP_STATE_BLIND),
    CONSTANT(VREP_STATE_PAST),
    CONSTANT(VREP_RESERVATIONS_MAGIC),
    CONSTANT(VREP_RESERVATIONS_VERSION),
    CONSTANT(VREP_REGISTRATIONS_MAX),
    CONSTANT(VREP_STATE_MIRROR),
    CONSTANT(VREP_SEGMENT_MAGIC),
    CONSTANT(VREP_SEGMENT_VERSION),
    CONSTANT(VREP_SEGMENT_FOLDED),
    CONSTANT(VREP_FOLD_MAGIC),
    CONSTANT(VREP_FOLD_VERSION),
    CONSTANT(VREP_FOLD_TALLIED),
    CONSTANT(VREP_COMMIT_MAGIC),
    CONSTANT(VREP_COMMIT_VERSION),
    CONSTANT(VREP_INDEX_FANOUT),
    CONSTANT(VREP_INDEX_MAGIC),
    CONSTANT(VREP_INDEX_VERSION),
    CONSTANT(VREP_MANIFEST_MAGIC),
    CONSTANT(VREP_MANIFEST_VERSION),
    CONSTANT(VREP_MANIFEST_UNPROTECTED),
    CONSTANT(VREP_PRESENCE_MAGIC),
    CONSTANT(VREP_PRESENCE_LIVE_MAGIC),
    CONSTANT(VREP_PRESENCE_VERSION),
    CONSTANT(VREP_LOST_MAGIC),
    CONSTANT(VREP_LOST_VERSION),
    CONSTANT(VREP_LOST_RANGES_MAX),
    CONSTANT(VREP_LOST_UNKNOWN),
    CONSTANT(VREP_VERDICT_MAGIC),
    CONSTANT(VREP_VERDICT_VERSION),
    CONSTANT(VREP_VERDICT_BODY_BYTES_MAX),
    CONSTANT(VREP_KIND_WRITE),
    CONSTANT(VREP_KIND_ZEROES),
    CONSTANT(VREP_KIND_RESIZE),
    CONSTANT(VREP_KIND_SYNC),
    CONSTANT(VREP_KIND_SYNC_ZEROES),
    CONSTANT(VREP_KIND_MARK),
    CONSTANT(VREP_KIND_GAP_BEGIN),
    CONSTANT(VREP_KIND_GAP_END),
    CONSTANT(VREP_KIND_OBJECT),
    CONSTANT(VREP_KIND_STREAM),
    CONSTANT(VREP_KIND_TALLY),
    CONSTANT(VREP_SLOT_FREE),
    CONSTANT(VREP_SLOT_RESERVED),
    CONSTANT(VREP_SLOT_GRANTED),
    CONSTANT(VREP_SLOT_UNRECORDED),
    CONSTANT(VREP_GENERATION_FREE),
    CONSTANT(VREP_GENERATION_OPEN),
    CONSTANT(VREP_GENERATION_SEALED),
    {0},
};
