#include "map/index.h"

#include <fcntl.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "format/checksum.h"
#include "format/record.h"

static const uint8_t group[16] = {7};

static size_t put_stream(uint8_t *out, uint32_t epoch, uint8_t id, uint64_t resume)
{
    struct vrep_stream stream = {.epoch = epoch, .resume_seq = resume, .key_generation = 4};

    memset(stream.stream_id, id, sizeof stream.stream_id);
    vrep_stream_write(&stream, 0, out);
    return 192;
}

static size_t put(uint8_t *out, uint8_t kind, uint32_t epoch, uint64_t seq, uint64_t offset,
                  uint32_t length)
{
    struct vrep_record record;
    uint32_t words[VREP_PIECES_MAX];

    vrep_record_init(&record, kind, epoch, 0);
    record.seq = seq;
    record.offset = offset;
    record.length = length;
    record.wall_ns = 1000 + seq;
    if (vrep_record_is_data(kind)) {
        record.pieces = (uint16_t)vrep_record_data_pieces(length);
        for (uint32_t i = 0; i < record.pieces; i++)
            words[i] = VREP_PIECE_ZSTD | 17;
        record.body_bytes = record.pieces * 21u;
        memcpy(out + 64, words, record.pieces * 4u);
        memset(out + 64 + record.pieces * 4u, 0, record.pieces * 17u);
    }
    vrep_record_finish(&record);
    memcpy(out, &record, sizeof record);
    return 64 + record.body_bytes;
}

static struct vrep_index *freeze(struct vrep_index_builder *builder)
{
    struct vrep_index *index;
    uint8_t *bytes;
    size_t len;

    CHECK_OK(vrep_index_builder_finish(builder, 0, &bytes, &len));
    CHECK_OK(vrep_index_open_bytes(bytes, len, &index));
    CHECK_OK(vrep_index_verify(index));
    free(bytes);
    return index;
}

static void a_builder_makes_one_entry_of_each_piece(void)
{
    uint8_t room[2048];
    size_t len = 0, wide;
    uint64_t records;
    struct vrep_index_builder *builder;
    struct vrep_index_summary summary;
    struct vrep_index *index;

    CHECK_OK(vrep_index_builder_new(9, group, NULL, &builder));
    len += put_stream(room, 2, 1, 40);
    wide = len;
    len += put(room + len, VREP_KIND_WRITE, 2, 41, 512, 2 * VREP_PIECE_BYTES_MAX + 7);
    len += put(room + len, VREP_KIND_ZEROES, 2, 42, 0, VREP_PIECE_BYTES_MAX);
    len += put(room + len, VREP_KIND_SYNC_ZEROES, 2, 43, 0, VREP_PIECE_BYTES_MAX + 1);
    len += put(room + len, VREP_KIND_GAP_BEGIN, 2, 44, 0, 0);
    len += put(room + len, VREP_KIND_RESIZE, 2, 45, 1 << 20, 0);
    CHECK_OK(vrep_index_builder_add(builder, room, len, 128, &records));
    CHECK_EQ(records, 6);
    CHECK_OK(vrep_index_builder_time(builder, 5, (struct vrep_position){.epoch = 2, .seq = 45}));
    vrep_index_builder_summary(builder, &summary);
    CHECK(summary.records == 5 && summary.entries == 5 && summary.has_stream);
    CHECK(summary.first.seq == 41 && summary.last.seq == 45 && summary.last.epoch == 2);
    CHECK_EQ(summary.stream.first_seq, 41);
    index = freeze(builder);
    CHECK_EQ(index->trailer.short_count, 4);
    CHECK_EQ(index->trailer.long_count, 1);
    CHECK_EQ(index->trailer.events_count, 2);
    CHECK_EQ(index->trailer.times_count, 1);
    CHECK_EQ(index->trailer.segment, 9);
    CHECK_EQ(index->shorts.entries[0].seq, 42);
    for (uint16_t piece = 0; piece < 3; piece++) {
        const struct vrep_index_entry *entry = &index->shorts.entries[1 + piece];
        CHECK(entry->piece == piece && entry->seq == 41 && entry->position == 128 + wide);
        CHECK_EQ(entry->offset, 512u + piece * VREP_PIECE_BYTES_MAX);
        CHECK_EQ(entry->length, piece < 2 ? VREP_PIECE_BYTES_MAX : 7u);
    }
    CHECK(index->events[0].kind == VREP_KIND_GAP_BEGIN && index->events[0].at.seq == 44);
    CHECK_EQ(index->streams[0].key_generation, 4);
    vrep_index_free(index);
    vrep_index_builder_free(builder);
}

static void a_builder_refuses_what_it_cannot_place(void)
{
    uint8_t room[512];
    size_t len;
    uint64_t records;
    struct vrep_index_builder *builder;
    uint8_t *bytes;

    CHECK_STATUS(vrep_index_builder_new(0, group, NULL, &builder), VREP_E_INVALID);
    CHECK_OK(vrep_index_builder_new(1, group, NULL, &builder));
    len = put(room, VREP_KIND_WRITE, 1, 1, 0, 512);
    CHECK_STATUS(vrep_index_builder_add(builder, room, len, 0, &records), VREP_E_CORRUPT);
    len = put_stream(room, 1, 1, 0);
    len += put(room + len, VREP_KIND_WRITE, 1, 1, 0, 512);
    CHECK_STATUS(vrep_index_builder_add(builder, room, len - 1, 0, &records), VREP_E_TORN);
    CHECK_EQ(records, 1);
    CHECK_STATUS(vrep_index_builder_add(builder, room, len, UINT32_MAX - len + 1, &records),
                 VREP_E_RANGE);
    len = put(room, VREP_KIND_WRITE, 2, 2, 0, 512); /* the stream is of epoch 1 */
    CHECK_STATUS(vrep_index_builder_add(builder, room, len, 0, &records), VREP_E_CORRUPT);
    room[20] ^= 1;
    CHECK_STATUS(vrep_index_builder_add(builder, room, len, 0, &records), VREP_E_CORRUPT);
    CHECK_STATUS(vrep_index_builder_finish(builder, 100, &bytes, &len), VREP_E_INVALID);
    vrep_index_builder_free(builder);
}

/* An index with `count` random entries, a tenth of them long. */
static struct vrep_index_builder *random_builder(uint32_t segment, uint64_t first_seq,
                                                 uint32_t count)
{
    uint8_t room[256];
    struct vrep_index_builder *builder;
    uint64_t records, position = 128;

    CHECK_OK(vrep_index_builder_new(segment, group, NULL, &builder));
    CHECK_OK(vrep_index_builder_add(builder, room,
                                    put_stream(room, 1, (uint8_t)(1 + segment % 3), first_seq - 1),
                                    position, &records));
    position += 192;
    for (uint32_t i = 0; i < count; i++) {
        bool zeroes = check_random_below(10) == 0;
        size_t len =
            put(room, zeroes ? VREP_KIND_ZEROES : VREP_KIND_WRITE, 1, first_seq + i,
                check_random_below(1 << 20) * 512, zeroes ? VREP_PIECE_BYTES_MAX + 512 : 4096);
        CHECK_OK(vrep_index_builder_add(builder, room, len, position, &records));
        position += len;
    }
    return builder;
}

static int scratch_file(void)
{
    int fd = memfd_create("index", MFD_CLOEXEC);

    CHECK(fd >= 0);
    return fd;
}

static void a_footer_stands_at_the_end_of_a_file(void)
{
    struct vrep_index_builder *builder = random_builder(3, 1, 5000);
    const size_t data = 64 * 1000;
    struct vrep_index *index;
    uint8_t *bytes;
    size_t len;
    int fd = scratch_file();

    CHECK_OK(vrep_index_builder_finish(builder, data, &bytes, &len));
    CHECK_EQ(pwrite(fd, bytes, len, (off_t)data), (ssize_t)len);
    CHECK_OK(vrep_index_open(fd, &index));
    CHECK_OK(vrep_index_verify(index));
    CHECK_OK(vrep_index_check_events(index));
    CHECK_EQ(index->trailer.segment_bytes, data);
    CHECK_EQ(index->trailer.short_at, data);
    CHECK_EQ(index->trailer.short_count + index->trailer.long_count, 5000);
    CHECK_EQ(index->shorts.levels, 3);
    CHECK_EQ(index->shorts.nodes_count[2], 1);
    vrep_index_prefetch(index, 1 << 20);
    vrep_index_free(index);
    CHECK_EQ(ftruncate(fd, 100), 0);
    CHECK_STATUS(vrep_index_open(fd, &index), VREP_E_TORN);
    close(fd);
    free(bytes);
    vrep_index_builder_free(builder);
}

static void every_flipped_byte_is_noticed(void)
{
    struct vrep_index_builder *builder = random_builder(3, 1, 300);
    struct vrep_index *index;
    uint8_t *bytes;
    size_t len;

    CHECK_OK(vrep_index_builder_time(builder, 1, (struct vrep_position){.epoch = 1, .seq = 1}));
    CHECK_OK(vrep_index_builder_finish(builder, 0, &bytes, &len));
    CHECK_OK(vrep_index_open_bytes(bytes, len, &index));
    for (size_t i = 0; i < len; i++) {
        struct vrep_index *bad;
        const struct vrep_index_trailer *t = &index->trailer;
        bool padding =
            !(i < t->short_count * 40 || (i >= t->long_at && i < t->long_at + t->long_count * 40) ||
              (i >= t->streams_at && i < t->streams_at + t->streams_count * 64) ||
              (i >= t->times_at && i < t->times_at + t->times_count * 24) ||
              (i >= t->nodes_at && i < t->nodes_at + t->nodes_count * 48) || i >= len - sizeof *t);
        int status;
        bytes[i] ^= 0x10;
        status = vrep_index_open_bytes(bytes, len, &bad);
        if (status == VREP_OK) {
            status = vrep_index_verify(bad);
            vrep_index_free(bad);
        }
        bytes[i] ^= 0x10;
        CHECK(padding ? status == VREP_OK : status < 0);
    }
    vrep_index_free(index);
    free(bytes);
    vrep_index_builder_free(builder);
}

/* A trailer that lies, with a checksum that fits: what a hostile store could write. */
static void lying_trailers_are_refused(void)
{
    struct vrep_index_builder *builder = random_builder(3, 1, 300);
    struct vrep_index *index;
    uint8_t *bytes;
    size_t len;

    CHECK_OK(vrep_index_builder_finish(builder, 0, &bytes, &len));
    for (int i = 0; i < 20000; i++) {
        struct vrep_index_trailer trailer, good;
        uint64_t word = check_random() >> check_random_below(64);
        size_t at = 8 * (2 + check_random_below(10));
        memcpy(&good, bytes + len - sizeof good, sizeof good);
        trailer = good;
        memcpy((uint8_t *)&trailer + at, &word, sizeof word);
        trailer.checksum = vrep_checksum32(&trailer, offsetof(struct vrep_index_trailer, checksum));
        memcpy(bytes + len - sizeof trailer, &trailer, sizeof trailer);
        if (vrep_index_open_bytes(bytes, len, &index) == VREP_OK) {
            (void)vrep_index_verify(index); /* must stay inside the bytes: sanitizers look */
            vrep_index_free(index);
        }
        memcpy(bytes + len - sizeof good, &good, sizeof good);
    }
    struct vrep_index_trailer trailer;
    memcpy(&trailer, bytes + len - sizeof trailer, sizeof trailer);
    trailer.version++;
    trailer.checksum = vrep_checksum32(&trailer, offsetof(struct vrep_index_trailer, checksum));
    memcpy(bytes + len - sizeof trailer, &trailer, sizeof trailer);
    CHECK_STATUS(vrep_index_open_bytes(bytes, len, &index), VREP_E_VERSION);
    free(bytes);
    vrep_index_builder_free(builder);
}

static void a_merge_keeps_every_entry_in_order(void)
{
    enum { INPUTS = 9 };
    const struct vrep_index *inputs[INPUTS];
    struct vrep_index_trailer trailer;
    struct vrep_index *run;
    uint64_t sum = 0, seen = 0;
    int fd = scratch_file();

    for (uint32_t i = 0; i < INPUTS; i++) {
        struct vrep_index_builder *builder = random_builder(i + 1, 1 + i * 4000, 3000 + i);
        inputs[i] = freeze(builder);
        vrep_index_builder_free(builder);
    }
    CHECK_OK(vrep_index_merge(inputs, INPUTS, 1, fd, &trailer));
    CHECK_OK(vrep_index_open(fd, &run));
    CHECK_OK(vrep_index_verify(run));
    CHECK_MEM(&run->trailer, &trailer, sizeof trailer);
    CHECK_EQ(trailer.streams_count, 3);
    CHECK(trailer.first.seq == 1 && trailer.last.seq == 8 * 4000 + 3008);
    for (uint32_t i = 0; i < INPUTS; i++) {
        sum += inputs[i]->shorts.count + inputs[i]->longs.count;
        vrep_index_free((struct vrep_index *)(uintptr_t)inputs[i]);
    }
    CHECK_EQ(run->shorts.count + run->longs.count, sum);
    for (uint64_t i = 0; i < run->shorts.count; i++) {
        const struct vrep_index_entry *entry = &run->shorts.entries[i];
        seen += run->streams[entry->stream].stream_id[0] == 1 + entry->segment % 3;
    }
    CHECK_EQ(seen, run->shorts.count);
    vrep_index_free(run);
    close(fd);
}

static void a_merge_passes_no_damage_on(void)
{
    struct vrep_index_builder *builder = random_builder(1, 1, 500);
    struct vrep_index *index = freeze(builder);
    const struct vrep_index *inputs[1] = {index};
    struct vrep_index_trailer trailer;
    uint8_t *inside = (uint8_t *)(uintptr_t)&index->shorts.entries[100].position;
    int fd = scratch_file();

    inside[0] ^= 1; /* still a lawful entry: only its digest tells */
    CHECK_STATUS(vrep_index_merge(inputs, 1, 1, fd, &trailer), VREP_E_CORRUPT);
    CHECK_STATUS(vrep_index_merge(inputs, 0, 1, fd, &trailer), VREP_E_INVALID);
    vrep_index_free(index);
    vrep_index_builder_free(builder);
    close(fd);
}

int main(void)
{
    RUN(a_builder_makes_one_entry_of_each_piece);
    RUN(a_builder_refuses_what_it_cannot_place);
    RUN(a_footer_stands_at_the_end_of_a_file);
    RUN(every_flipped_byte_is_noticed);
    RUN(lying_trailers_are_refused);
    RUN(a_merge_keeps_every_entry_in_order);
    RUN(a_merge_passes_no_damage_on);
    return check_report();
}
