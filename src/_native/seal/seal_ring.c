#include "seal/seal.h"

#include <stdlib.h>

#include "ring/ring.h"

enum { IOVECS_MAX = VREP_WRITE_BYTES_MAX / VREP_CHUNK_BYTES + 2 };

int vrep_sealer_seal_ring(struct vrep_sealer *sealer, const struct vrep_ring_reader *reader,
                          uint64_t from_seq, uint64_t to_seq, uint8_t *out, size_t cap,
                          size_t *written, size_t *n_done)
{
    struct iovec *iov = malloc(sizeof *iov * IOVECS_MAX); /* once per batch: 128 KiB, no stack */
    size_t at = 0, done = 0, got = 0, one = 0;
    int status = iov == NULL ? VREP_E_NOMEM : VREP_OK;

    for (uint64_t seq = from_seq; status == VREP_OK && seq <= to_seq; seq++) {
        struct vrep_seal_source source;
        struct vrep_ring_desc desc;
        int iovecs = 0;

        status = vrep_ring_reader_desc(reader, seq, &desc);
        if (status == VREP_OK && desc.chunks > 0)
            status = vrep_ring_reader_iov(reader, &desc, iov, IOVECS_MAX, &iovecs);
        if (status != VREP_OK)
            break;
        source = (struct vrep_seal_source){
            .kind = desc.kind,
            .flags = desc.flags,
            .disk = desc.disk,
            .seq = desc.seq,
            .offset = desc.offset,
            .length = desc.length,
            .iovecs = (uint32_t)iovecs,
            .iov = iov,
            .wall_ns = desc.wall_ns,
            .mono_ns = desc.mono_ns,
        };
        status = vrep_sealer_seal(sealer, &source, 1, out + at, cap - at, &got, &one);
        at += got;
        done += one;
    }
    free(iov);
    *written = at;
    *n_done = done;
    return status == VREP_E_FULL && done > 0 ? VREP_OK : status;
}
