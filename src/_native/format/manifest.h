/*
 * Manifest: the numbered file that names what a store consists of (layout.h).
 *
 * The check bounds every count before use, verifies checksum and digest, and
 * judges each entry: epochs and segments rise, runs do not overlap, names end,
 * the wrapped keys (each a 32-bit length, then that many bytes) fill their room.
 *
 * Units: bytes from the start of the file. Limits: 1 Mi epochs, 16 Mi segments
 * and runs, 256 wrapped keys of 512 bytes. Buffers may have any alignment.
 * Threading: no state; every function may be called from any thread.
 */
#ifndef VREP_FORMAT_MANIFEST_H
#define VREP_FORMAT_MANIFEST_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "format/layout.h"

#define VREP_MANIFEST_EPOCHS_MAX (1u << 20)
#define VREP_MANIFEST_SEGMENTS_MAX (1u << 24)
#define VREP_MANIFEST_KEYS_MAX 256u
#define VREP_MANIFEST_KEY_BYTES_MAX 512u

#define VREP_EPOCH_ACCEPTED 1u
#define VREP_EPOCH_PROVISIONAL 2u
#define VREP_EPOCH_ABANDONED 3u

/* Where the parts of a checked manifest stand. */
struct vrep_manifest_view {
    struct vrep_manifest_header header;
    uint64_t epochs_at;
    uint64_t segments_at;
    uint64_t runs_at;
    uint64_t disks_at;
    uint64_t keys_at;
};

/* VREP_E_TORN: the buffer ends before the manifest does; VREP_E_CORRUPT: a byte
 * is wrong; VREP_E_VERSION: a newer format. */
int vrep_manifest_check(const void *buffer, size_t len, struct vrep_manifest_view *view);

/* Completes a manifest whose header counts and body are filled in: sizes, digest,
 * checksum. VREP_E_INVALID: the counts do not fit `len`. */
int vrep_manifest_finish(void *buffer, size_t len);

#endif
