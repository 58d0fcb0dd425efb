#include "seal/seal.h"

#include <stdlib.h>

#include "ring/ring.h"

enum {
    IOVECS_FEW = 66, /* 256 KiB in chunks that are all apart */
    IOVECS_MAX = VREP_WRITE_BYTES_MAX / VREP_CHUNK_BYTES + 2,
};

/* Room for the payload's iovecs: small ones on the caller's stack, since a batch at queue depth 1
 * is one record; *many is made once a batch when a large one comes. */
static struct iovec *room_for(const struct vrep_ring_desc *desc, struct iovec *few,
                              struct iovec **many, int *max)
{
    if (desc->length / VREP_CHUNK_BYTES + 2 <= IOVECS_FEW) {
        *max = IOVECS_FEW;
        return few;
    }
    if (*many == NULL)
        *many = malloc(sizeof **many * IOVECS_MAX);
    *max = IOVECS_MAX;
    return *many;
}

int vrep_sealer_seal_ring(struct vrep_sealer *sealer, const struct vrep_ring_reader *reader,
                          uint64_t from_seq, uint64_t to_seq, uint8_t *out, size_t cap,
                          size_t *written, size_t *n_done)
{
    struct iovec few[IOVECS_FEW], *many = NULL;
    size_t at = 0, done = 0, got = 0, one = 0;
    int status = VREP_OK;

    for (uint64_t seq = from_seq; status == VREP_OK && seq <= to_seq && seq >= from_seq; seq++) {
        struct vrep_seal_source source;
        struct vrep_ring_desc desc;
        struct iovec *iov = few;
        int iovecs = 0, max;

        status = vrep_ring_reader_desc(reader, seq, &desc);
        if (status == VREP_OK && vrep_record_is_sealed(desc.kind)) {
            iov = room_for(&desc, few, &many, &max);
            status =
                iov == NULL ? VREP_E_NOMEM : vrep_ring_reader_iov(reader, &desc, iov, max, &iovecs);
        }
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
    free(many);
    *written = at;
    *n_done = done;
    return status == VREP_E_FULL && done > 0 ? VREP_OK : status;
}
