#include <string.h>

#include "base/endian.h"
#include "base/status.h"
#include "serve/nbd_protocol.h"

#define MAGIC_GREETING 0x4e42444d41474943ull /* NBDMAGIC */
#define MAGIC_OPTION 0x49484156454f5054ull   /* IHAVEOPT */
#define MAGIC_ANSWER 0x0003e889045565a9ull
#define MAGIC_REQUEST 0x25609513u
#define MAGIC_SIMPLE 0x67446698u
#define MAGIC_CHUNK 0x668e33efu

#define GREETING_FIXED 1u
#define GREETING_NO_ZEROES 2u

#define OPTION_BYTES 16u
#define OPTION_EXPORT_NAME 1u
#define OPTION_ABORT 2u
#define OPTION_LIST 3u
#define OPTION_STARTTLS 5u
#define OPTION_INFO 6u
#define OPTION_GO 7u
#define OPTION_STRUCTURED 8u
#define OPTION_LIST_CONTEXT 9u
#define OPTION_SET_CONTEXT 10u

#define ANSWER_BYTES 20u
#define ANSWER_ACK 1u
#define ANSWER_SERVER 2u
#define ANSWER_INFO 3u
#define ANSWER_CONTEXT 4u
#define REFUSED 0x80000000u
#define REFUSED_UNSUPPORTED (REFUSED + 1u)
#define REFUSED_POLICY (REFUSED + 2u)
#define REFUSED_INVALID (REFUSED + 3u)
#define REFUSED_UNKNOWN (REFUSED + 6u)
#define REFUSED_TOO_BIG (REFUSED + 9u)

#define INFO_EXPORT 0u
#define INFO_NAME 1u
#define INFO_BLOCK_SIZE 3u

#define EXPORT_HAS_FLAGS 0x001u
#define EXPORT_READ_ONLY 0x002u
#define EXPORT_FLUSH 0x004u
#define EXPORT_FUA 0x008u
#define EXPORT_TRIM 0x020u
#define EXPORT_WRITE_ZEROES 0x040u
#define EXPORT_DF 0x080u
#define EXPORT_MULTI_CONN 0x100u
#define EXPORT_CACHE 0x400u
#define EXPORT_FAST_ZERO 0x800u

static const char context_allocation[] = "base:allocation";

/* ---- bytes in and out ---------------------------------------------------------- */

struct reader {
    const uint8_t *at;
    size_t left;
};

static bool take(struct reader *reader, size_t bytes, const uint8_t **out)
{
    if (reader->left < bytes)
        return false;
    *out = reader->at;
    reader->at += bytes;
    reader->left -= bytes;
    return true;
}

static bool take_u16(struct reader *reader, uint16_t *out)
{
    const uint8_t *from;
    if (!take(reader, 2, &from))
        return false;
    *out = vrep_be_load_u16(from);
    return true;
}

static bool take_u32(struct reader *reader, uint32_t *out)
{
    const uint8_t *from;
    if (!take(reader, 4, &from))
        return false;
    *out = vrep_be_load_u32(from);
    return true;
}

struct writer {
    uint8_t *out;
    size_t bytes;
    uint32_t option;
};

static void put(struct writer *writer, const void *data, size_t bytes)
{
    memcpy(writer->out + writer->bytes, data, bytes);
    writer->bytes += bytes;
}

static void put_u16(struct writer *writer, uint16_t value)
{
    vrep_be_store_u16(writer->out + writer->bytes, value);
    writer->bytes += 2;
}

static void put_u32(struct writer *writer, uint32_t value)
{
    vrep_be_store_u32(writer->out + writer->bytes, value);
    writer->bytes += 4;
}

static void put_u64(struct writer *writer, uint64_t value)
{
    vrep_be_store_u64(writer->out + writer->bytes, value);
    writer->bytes += 8;
}

static void answer(struct writer *writer, uint32_t type, uint32_t bytes)
{
    put_u64(writer, MAGIC_ANSWER);
    put_u32(writer, writer->option);
    put_u32(writer, type);
    put_u32(writer, bytes);
}

static void refuse(struct writer *writer, uint32_t type, const char *text)
{
    uint32_t bytes = (uint32_t)strlen(text);
    answer(writer, type, bytes);
    put(writer, text, bytes);
}

/* ---- options --------------------------------------------------------------------- */

uint16_t vrep_nbd_export_flags(const struct vrep_nbd_export *export, bool structured)
{
    uint32_t flags =
        EXPORT_HAS_FLAGS | EXPORT_FLUSH | EXPORT_FUA | EXPORT_MULTI_CONN | EXPORT_CACHE;
    if (structured)
        flags |= EXPORT_DF;
    if (export->read_only)
        flags |= EXPORT_READ_ONLY;
    else
        flags |= EXPORT_TRIM | EXPORT_WRITE_ZEROES | EXPORT_FAST_ZERO;
    return (uint16_t)flags;
}

/* The export of that name, "" being the first; exports->count when there is none. */
static uint32_t find_export(const struct vrep_nbd_exports *exports, const uint8_t *name,
                            size_t bytes)
{
    for (uint32_t i = 0; i < exports->count; i++) {
        const struct vrep_nbd_export *export = &exports->list[i];
        bool named = strlen(export->name) == bytes && memcmp(export->name, name, bytes) == 0;
        if (!export->hidden && (bytes == 0 || named))
            return i;
    }
    return exports->count;
}

static void list_exports(struct writer *writer, const struct vrep_nbd_exports *exports)
{
    for (uint32_t i = 0; i < exports->count; i++) {
        if (exports->list[i].hidden)
            continue;
        uint32_t bytes = (uint32_t)strlen(exports->list[i].name);
        answer(writer, ANSWER_SERVER, bytes + 4);
        put_u32(writer, bytes);
        put(writer, exports->list[i].name, bytes);
    }
    answer(writer, ANSWER_ACK, 0);
}

static void choose(struct vrep_nbd_handshake *shake, uint32_t export)
{
    shake->export = export;
    if (shake->contexts_export != export)
        shake->contexts = 0;
}

/* INFO and GO; true when transmission starts. */
static bool describe(struct vrep_nbd_handshake *shake, const struct vrep_nbd_exports *exports,
                     struct reader data, struct writer *writer)
{
    uint32_t name_bytes;
    uint16_t wanted;
    const uint8_t *name, *list;
    if (!take_u32(&data, &name_bytes) || !take(&data, name_bytes, &name) ||
        !take_u16(&data, &wanted) || !take(&data, (size_t)wanted * 2, &list) || data.left != 0) {
        refuse(writer, REFUSED_INVALID, "the lengths inside the option do not fit it");
        return false;
    }
    uint32_t found = find_export(exports, name, name_bytes);
    if (found >= exports->count) {
        refuse(writer, REFUSED_UNKNOWN, "no disk of that name is served here");
        return false;
    }
    const struct vrep_nbd_export *export = &exports->list[found];
    bool wants_name = false;
    for (uint32_t i = 0; i < wanted; i++)
        wants_name |= vrep_be_load_u16(list + i * 2) == INFO_NAME;
    answer(writer, ANSWER_INFO, 12);
    put_u16(writer, INFO_EXPORT);
    put_u64(writer, export->bytes);
    put_u16(writer, vrep_nbd_export_flags(export, shake->structured));
    answer(writer, ANSWER_INFO, 14);
    put_u16(writer, INFO_BLOCK_SIZE);
    put_u32(writer, 1);
    put_u32(writer, VREP_NBD_BLOCK_PREFERRED);
    put_u32(writer, VREP_NBD_PAYLOAD_MAX);
    if (wants_name) {
        uint32_t bytes = (uint32_t)strlen(export->name);
        answer(writer, ANSWER_INFO, 2 + bytes);
        put_u16(writer, INFO_NAME);
        put(writer, export->name, bytes);
    }
    answer(writer, ANSWER_ACK, 0);
    if (writer->option != OPTION_GO)
        return false;
    choose(shake, found);
    return true;
}

/* Listing accepts a namespace ("base:", "qemu:dirty-bitmap:"); choosing needs the whole name. */
static bool names(const char *context, const uint8_t *query, size_t bytes, bool listing)
{
    size_t whole = strlen(context);
    if (bytes > whole || memcmp(context, query, bytes) != 0)
        return false;
    return bytes == whole || (listing && bytes > 0 && query[bytes - 1] == ':');
}

static void answer_context(struct writer *writer, uint32_t id, const char *name)
{
    uint32_t bytes = (uint32_t)strlen(name);
    answer(writer, ANSWER_CONTEXT, 4 + bytes);
    put_u32(writer, id);
    put(writer, name, bytes);
}

static void contexts(struct vrep_nbd_handshake *shake, const struct vrep_nbd_exports *exports,
                     struct reader data, struct writer *writer)
{
    bool listing = writer->option == OPTION_LIST_CONTEXT;
    uint32_t name_bytes, queries, chosen = 0;
    const uint8_t *name;
    if (!listing)
        shake->contexts = 0;
    if (!shake->structured) {
        refuse(writer, REFUSED_INVALID, "structured replies come first");
        return;
    }
    if (!take_u32(&data, &name_bytes) || !take(&data, name_bytes, &name) ||
        !take_u32(&data, &queries)) {
        refuse(writer, REFUSED_INVALID, "the lengths inside the option do not fit it");
        return;
    }
    uint32_t found = find_export(exports, name, name_bytes);
    if (found >= exports->count) {
        refuse(writer, REFUSED_UNKNOWN, "no disk of that name is served here");
        return;
    }
    const char *bitmap = exports->list[found].bitmap;
    if (listing && queries == 0)
        chosen = VREP_NBD_CONTEXT_ALLOCATION | (bitmap != NULL ? VREP_NBD_CONTEXT_DIRTY : 0);
    for (uint32_t i = 0; i < queries; i++) { /* each takes at least 4 bytes: bounded by the data */
        uint32_t bytes;
        const uint8_t *query;
        if (!take_u32(&data, &bytes) || !take(&data, bytes, &query)) {
            refuse(writer, REFUSED_INVALID, "the lengths inside the option do not fit it");
            return;
        }
        if (names(context_allocation, query, bytes, listing))
            chosen |= VREP_NBD_CONTEXT_ALLOCATION;
        if (bitmap != NULL && names(bitmap, query, bytes, listing))
            chosen |= VREP_NBD_CONTEXT_DIRTY;
    }
    if (data.left != 0) {
        refuse(writer, REFUSED_INVALID, "bytes are left after the last query");
        return;
    }
    if (chosen & VREP_NBD_CONTEXT_ALLOCATION)
        answer_context(writer, VREP_NBD_CONTEXT_ALLOCATION, context_allocation);
    if (chosen & VREP_NBD_CONTEXT_DIRTY)
        answer_context(writer, VREP_NBD_CONTEXT_DIRTY, bitmap);
    answer(writer, ANSWER_ACK, 0);
    if (!listing) {
        shake->contexts = chosen;
        shake->contexts_export = found;
    }
}

static enum vrep_nbd_step export_name(struct vrep_nbd_handshake *shake,
                                      const struct vrep_nbd_exports *exports, struct reader data,
                                      struct writer *writer)
{
    uint32_t found = find_export(exports, data.at, data.left);
    if (found >= exports->count)
        return VREP_NBD_CLOSE; /* this option knows no error reply */
    choose(shake, found);
    put_u64(writer, exports->list[found].bytes);
    put_u16(writer, vrep_nbd_export_flags(&exports->list[found], shake->structured));
    if (!shake->no_zeroes) {
        static const uint8_t zeroes[124];
        put(writer, zeroes, sizeof zeroes);
    }
    return VREP_NBD_SERVE;
}

static enum vrep_nbd_step option(struct vrep_nbd_handshake *shake,
                                 const struct vrep_nbd_exports *exports, struct reader data,
                                 struct writer *writer)
{
    if (writer->option == OPTION_EXPORT_NAME)
        return export_name(shake, exports, data, writer);
    if (!shake->fixed)
        return VREP_NBD_CLOSE; /* such a client understands no reply to an option */
    switch (writer->option) {
    case OPTION_ABORT:
        answer(writer, ANSWER_ACK, 0);
        return VREP_NBD_CLOSE;
    case OPTION_LIST:
        if (data.left != 0)
            refuse(writer, REFUSED_INVALID, "this option has no data");
        else
            list_exports(writer, exports);
        break;
    case OPTION_STARTTLS:
        refuse(writer, REFUSED_POLICY, "TLS is not offered on a local socket");
        break;
    case OPTION_INFO:
    case OPTION_GO:
        if (describe(shake, exports, data, writer))
            return VREP_NBD_SERVE;
        break;
    case OPTION_STRUCTURED:
        if (data.left != 0) {
            refuse(writer, REFUSED_INVALID, "this option has no data");
        } else {
            shake->structured = true;
            answer(writer, ANSWER_ACK, 0);
        }
        break;
    case OPTION_LIST_CONTEXT:
    case OPTION_SET_CONTEXT:
        contexts(shake, exports, data, writer);
        break;
    default:
        refuse(writer, REFUSED_UNSUPPORTED, "this option is not known here");
        break;
    }
    return VREP_NBD_NEXT;
}

void vrep_nbd_greeting(uint8_t out[VREP_NBD_GREETING_BYTES])
{
    vrep_be_store_u64(out, MAGIC_GREETING);
    vrep_be_store_u64(out + 8, MAGIC_OPTION);
    vrep_be_store_u16(out + 16, GREETING_FIXED | GREETING_NO_ZEROES);
}

enum vrep_nbd_step vrep_nbd_handshake_step(struct vrep_nbd_handshake *shake,
                                           const struct vrep_nbd_exports *exports,
                                           const uint8_t *in, size_t in_bytes, size_t *consumed,
                                           uint8_t *out, size_t *out_bytes)
{
    *consumed = 0;
    *out_bytes = 0;
    if (!shake->greeted) {
        if (in_bytes < 4)
            return VREP_NBD_MORE;
        uint32_t flags = vrep_be_load_u32(in);
        *consumed = 4;
        if (flags & ~(GREETING_FIXED | GREETING_NO_ZEROES))
            return VREP_NBD_CLOSE;
        shake->greeted = true;
        shake->fixed = (flags & GREETING_FIXED) != 0;
        shake->no_zeroes = (flags & GREETING_NO_ZEROES) != 0;
        return VREP_NBD_NEXT;
    }
    if (shake->skip > 0) {
        *consumed = shake->skip < in_bytes ? (size_t)shake->skip : in_bytes;
        shake->skip -= *consumed;
        return *consumed > 0 ? VREP_NBD_NEXT : VREP_NBD_MORE;
    }
    if (in_bytes < OPTION_BYTES)
        return VREP_NBD_MORE;
    if (vrep_be_load_u64(in) != MAGIC_OPTION)
        return VREP_NBD_CLOSE;
    struct writer writer = {.out = out, .option = vrep_be_load_u32(in + 8)};
    uint32_t bytes = vrep_be_load_u32(in + 12);
    if (bytes > VREP_NBD_OPTION_MAX) {
        *consumed = OPTION_BYTES;
        if (writer.option == OPTION_EXPORT_NAME || !shake->fixed)
            return VREP_NBD_CLOSE;
        shake->skip = bytes;
        refuse(&writer, REFUSED_TOO_BIG, "the option is too long");
        *out_bytes = writer.bytes;
        return VREP_NBD_NEXT;
    }
    if (in_bytes - OPTION_BYTES < bytes)
        return VREP_NBD_MORE;
    struct reader data = {in + OPTION_BYTES, bytes};
    *consumed = OPTION_BYTES + bytes;
    enum vrep_nbd_step step = option(shake, exports, data, &writer);
    *out_bytes = writer.bytes;
    return step;
}

/* ---- transmission ------------------------------------------------------------------ */

int vrep_nbd_request_decode(const uint8_t in[VREP_NBD_REQUEST_BYTES], struct vrep_nbd_request *out)
{
    if (vrep_be_load_u32(in) != MAGIC_REQUEST)
        return VREP_E_PROTOCOL;
    out->flags = vrep_be_load_u16(in + 4);
    out->type = vrep_be_load_u16(in + 6);
    memcpy(&out->cookie, in + 8, sizeof out->cookie);
    out->offset = vrep_be_load_u64(in + 16);
    out->length = vrep_be_load_u32(in + 24);
    return VREP_OK;
}

static uint32_t flags_allowed(uint16_t type, bool structured)
{
    switch (type) {
    case VREP_NBD_READ:
        return structured ? VREP_NBD_FLAG_FUA | VREP_NBD_FLAG_DF : VREP_NBD_FLAG_FUA;
    case VREP_NBD_WRITE_ZEROES:
        return VREP_NBD_FLAG_FUA | VREP_NBD_FLAG_NO_HOLE | VREP_NBD_FLAG_FAST_ZERO;
    case VREP_NBD_BLOCK_STATUS:
        return VREP_NBD_FLAG_FUA | VREP_NBD_FLAG_REQ_ONE;
    default:
        return VREP_NBD_FLAG_FUA;
    }
}

uint32_t vrep_nbd_request_check(const struct vrep_nbd_request *request,
                                const struct vrep_nbd_export *export, bool structured,
                                uint32_t contexts)
{
    if (request->type > VREP_NBD_BLOCK_STATUS ||
        (request->flags & ~flags_allowed(request->type, structured)) != 0)
        return VREP_NBD_EINVAL;
    if (request->type == VREP_NBD_FLUSH)
        return request->offset == 0 && request->length == 0 ? 0 : VREP_NBD_EINVAL;
    bool writes = request->type == VREP_NBD_WRITE || request->type == VREP_NBD_TRIM ||
                  request->type == VREP_NBD_WRITE_ZEROES;
    if (writes && export->read_only)
        return VREP_NBD_EPERM;
    bool data = request->type == VREP_NBD_READ || request->type == VREP_NBD_WRITE;
    if (data && request->length > VREP_NBD_PAYLOAD_MAX)
        return VREP_NBD_EINVAL;
    if (request->offset > export->bytes || request->length > export->bytes - request->offset)
        return vrep_nbd_error(VREP_E_RANGE, request->type);
    if (request->type == VREP_NBD_BLOCK_STATUS && (contexts == 0 || request->length == 0))
        return VREP_NBD_EINVAL;
    return 0;
}

void vrep_nbd_simple(uint8_t out[VREP_NBD_SIMPLE_BYTES], uint32_t error, uint64_t cookie)
{
    vrep_be_store_u32(out, MAGIC_SIMPLE);
    vrep_be_store_u32(out + 4, error);
    memcpy(out + 8, &cookie, sizeof cookie);
}

void vrep_nbd_chunk(uint8_t out[VREP_NBD_CHUNK_BYTES], uint16_t flags, uint16_t type,
                    uint64_t cookie, uint32_t length)
{
    vrep_be_store_u32(out, MAGIC_CHUNK);
    vrep_be_store_u16(out + 4, flags);
    vrep_be_store_u16(out + 6, type);
    memcpy(out + 8, &cookie, sizeof cookie);
    vrep_be_store_u32(out + 16, length);
}

size_t vrep_nbd_error_chunk(uint8_t out[VREP_NBD_ERROR_MAX], uint32_t error, uint64_t cookie,
                            const char *text)
{
    size_t bytes = strlen(text), room = VREP_NBD_ERROR_MAX - VREP_NBD_CHUNK_BYTES - 6;
    if (bytes > room)
        bytes = room;
    vrep_nbd_chunk(out, VREP_NBD_CHUNK_DONE, VREP_NBD_CHUNK_ERROR, cookie, (uint32_t)bytes + 6);
    vrep_be_store_u32(out + VREP_NBD_CHUNK_BYTES, error);
    vrep_be_store_u16(out + VREP_NBD_CHUNK_BYTES + 4, (uint16_t)bytes);
    memcpy(out + VREP_NBD_CHUNK_BYTES + 6, text, bytes);
    return VREP_NBD_CHUNK_BYTES + 6 + bytes;
}

uint32_t vrep_nbd_error(int status, uint16_t type)
{
    switch (status) {
    case VREP_OK:
        return 0;
    case VREP_E_RANGE:
        return type == VREP_NBD_WRITE || type == VREP_NBD_WRITE_ZEROES ? VREP_NBD_ENOSPC
                                                                       : VREP_NBD_EINVAL;
    case VREP_E_INVALID:
        return VREP_NBD_EINVAL;
    case VREP_E_UNSUPPORTED:
        return VREP_NBD_ENOTSUP;
    case VREP_E_NOSPACE:
        return VREP_NBD_ENOSPC;
    case VREP_E_READONLY:
    case VREP_E_PERMISSION:
        return VREP_NBD_EPERM;
    case VREP_E_NOMEM:
        return VREP_NBD_ENOMEM;
    case VREP_E_CLOSED:
        return VREP_NBD_ESHUTDOWN;
    default:
        return VREP_NBD_EIO;
    }
}
