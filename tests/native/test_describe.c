#include "check.h"
#include "format/describe.h"
#include "format/layout.h"

static const struct vrep_described_struct *find(const char *name)
{
    const struct vrep_described_struct *at = vrep_described_structs;

    while (at->name != NULL && strcmp(at->name, name) != 0)
        at++;
    CHECK(at->name != NULL);
    return at;
}

static void fields_follow_each_other_without_a_hole(void)
{
    unsigned structs = 0;

    for (const struct vrep_described_struct *at = vrep_described_structs; at->name; at++) {
        size_t end = 0;
        for (const struct vrep_described_field *field = at->fields; field->name; field++) {
            CHECK_EQ(field->offset, end);
            CHECK(field->unit > 0 && field->bytes % field->unit == 0);
            if (strncmp(field->type, "vrep_", 5) == 0)
                CHECK_EQ(find(field->type)->bytes, field->unit);
            end += field->bytes;
        }
        CHECK_EQ(end, at->bytes);
        structs++;
    }
    CHECK(structs > 25);
}

static void types_are_told_apart(void)
{
    const struct vrep_described_field *fields = find("vrep_manifest_disk")->fields;

    CHECK_STR(fields[0].type, "char");
    CHECK(fields[0].bytes == VREP_NAME_BYTES && fields[0].unit == 1);
    CHECK_STR(fields[1].type, "u8");
    CHECK_STR(fields[2].type, "u4");
    fields = find("vrep_stream")->fields;
    CHECK_STR(fields[0].type, "u1");
    CHECK(fields[0].bytes == 16 && fields[0].unit == 1);
    CHECK_STR(fields[3].type, "vrep_position");
}

static void constants_have_their_values(void)
{
    unsigned seen = 0;

    for (const struct vrep_described_constant *at = vrep_described_constants; at->name; at++) {
        if (strcmp(at->name, "VREP_RING_MAGIC") == 0)
            seen += at->value == VREP_RING_MAGIC;
        if (strcmp(at->name, "VREP_KIND_TALLY") == 0)
            seen += at->value == VREP_KIND_TALLY;
    }
    CHECK_EQ(seen, 2);
}

int main(void)
{
    RUN(fields_follow_each_other_without_a_hole);
    RUN(types_are_told_apart);
    RUN(constants_have_their_values);
    return check_report();
}
