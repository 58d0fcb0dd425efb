/* Bytes of an NBD client: haggling, then requests, as they would come in pieces.
 *
 * The first byte says how long the pieces are: an answer must not depend on how
 * the bytes were cut. After the handshake every 28 bytes are a request. */
#include <string.h>

#include "base/status.h"
#include "fuzz.h"
#include "serve/nbd_protocol.h"

#define OUT_MAX (1u << 20)

static struct vrep_nbd_exports exports = {
    .count = 2,
    .list = {{.name = "root", .bytes = 1 << 20, .bitmap = "qemu:dirty-bitmap:vrep"},
             {.name = "data", .bytes = 3u << 30, .read_only = true}},
};

static uint8_t *answer;

struct outcome {
    enum vrep_nbd_step step;
    struct vrep_nbd_handshake shake;
    size_t used;
    size_t out_bytes;
};

/* Haggles over all of data, given in pieces. */
static struct outcome haggle(const uint8_t *data, size_t size, size_t piece, uint8_t *out)
{
    struct outcome result = {.step = VREP_NBD_MORE};
    size_t seen = 0;
    for (;;) {
        size_t consumed, bytes;
        result.step = vrep_nbd_handshake_step(&result.shake, &exports, data + result.used,
                                              seen - result.used, &consumed, answer, &bytes);
        FUZZ_MUST(consumed <= seen - result.used);
        FUZZ_MUST(bytes <= VREP_NBD_ANSWER_MAX);
        FUZZ_MUST(result.step != VREP_NBD_MORE || (consumed == 0 && bytes == 0));
        FUZZ_MUST(result.step != VREP_NBD_NEXT || consumed > 0);
        result.used += consumed;
        if (result.out_bytes + bytes <= OUT_MAX)
            memcpy(out + result.out_bytes, answer, bytes);
        result.out_bytes += bytes;
        if (result.step == VREP_NBD_SERVE || result.step == VREP_NBD_CLOSE)
            return result;
        if (result.step == VREP_NBD_MORE) {
            if (seen == size)
                return result;
            seen = size - seen < piece ? size : seen + piece;
        }
    }
}

static void serve(const struct vrep_nbd_handshake *shake, const uint8_t *data, size_t size)
{
    const struct vrep_nbd_export *export = &exports.list[shake->export];
    for (; size >= VREP_NBD_REQUEST_BYTES; data += 28, size -= 28) {
        struct vrep_nbd_request request;
        if (vrep_nbd_request_decode(data, &request) != VREP_OK)
            return;
        uint32_t error =
            vrep_nbd_request_check(&request, export, shake->structured, shake->contexts);
        if (error != 0 || request.type == VREP_NBD_DISCONNECT)
            continue;
        FUZZ_MUST(request.type <= VREP_NBD_BLOCK_STATUS);
        FUZZ_MUST(request.offset <= export->bytes);
        FUZZ_MUST(request.length <= export->bytes - request.offset);
        bool data_moves = request.type == VREP_NBD_READ || request.type == VREP_NBD_WRITE;
        FUZZ_MUST(!data_moves || request.length <= VREP_NBD_PAYLOAD_MAX);
        bool writes = request.type == VREP_NBD_WRITE || request.type == VREP_NBD_TRIM ||
                      request.type == VREP_NBD_WRITE_ZEROES;
        FUZZ_MUST(!writes || !export->read_only);
        FUZZ_MUST(request.type != VREP_NBD_BLOCK_STATUS || shake->contexts != 0);
        FUZZ_CANARY(request.type == VREP_NBD_CACHE);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static uint8_t whole[OUT_MAX], cut[OUT_MAX];
    if (size < 1)
        return 0;
    if (answer == NULL) /* its own block: a byte too many is seen */
        answer = malloc(VREP_NBD_ANSWER_MAX);
    FUZZ_MUST(answer != NULL);
    size_t piece = 1u + data[0];
    struct outcome a = haggle(data + 1, size - 1, size, whole);
    struct outcome b = haggle(data + 1, size - 1, piece, cut);
    FUZZ_MUST(a.step == b.step && a.used == b.used && a.out_bytes == b.out_bytes);
    FUZZ_MUST(memcmp(whole, cut, a.out_bytes < OUT_MAX ? a.out_bytes : OUT_MAX) == 0);
    FUZZ_MUST(a.shake.contexts == b.shake.contexts && a.shake.export == b.shake.export);
    if (a.step == VREP_NBD_SERVE) {
        FUZZ_MUST(a.shake.export < exports.count);
        FUZZ_MUST(a.shake.contexts == 0 || a.shake.structured);
        FUZZ_MUST(!exports.list[a.shake.export].read_only || !(a.shake.contexts & 2));
        serve(&a.shake, data + 1 + a.used, size - 1 - a.used);
    }
    return 0;
}
