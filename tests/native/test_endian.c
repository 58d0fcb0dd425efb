#include "base/endian.h"
#include "check.h"

static void bytes_stand_in_the_named_order(void)
{
    unsigned char got[8];
    vrep_le_store_u16(got, 0x0102);
    CHECK_MEM(got, "\x02\x01", 2);
    vrep_be_store_u16(got, 0x0102);
    CHECK_MEM(got, "\x01\x02", 2);
    vrep_le_store_u32(got, 0x01020304);
    CHECK_MEM(got, "\x04\x03\x02\x01", 4);
    vrep_be_store_u32(got, 0x01020304);
    CHECK_MEM(got, "\x01\x02\x03\x04", 4);
    vrep_le_store_u64(got, UINT64_C(0x0102030405060708));
    CHECK_MEM(got, "\x08\x07\x06\x05\x04\x03\x02\x01", 8);
    vrep_be_store_u64(got, UINT64_C(0x0102030405060708));
    CHECK_MEM(got, "\x01\x02\x03\x04\x05\x06\x07\x08", 8);
}

static void loads_return_what_was_stored_at_any_alignment(void)
{
    unsigned char memory[24];
    for (size_t shift = 0; shift < 8; shift++) {
        for (int i = 0; i < 1000; i++) {
            uint64_t value = check_random();
            unsigned char *at = memory + shift;
            vrep_le_store_u64(at, value);
            CHECK_EQ(vrep_le_load_u64(at), value);
            CHECK_EQ(vrep_le_load_u32(at), (uint32_t)value);
            CHECK_EQ(vrep_le_load_u16(at), (uint16_t)value);
            vrep_be_store_u64(at, value);
            CHECK_EQ(vrep_be_load_u64(at), value);
            CHECK_EQ(vrep_be_load_u32(at), (uint32_t)(value >> 32));
            CHECK_EQ(vrep_be_load_u16(at), (uint16_t)(value >> 48));
        }
    }
}

int main(void)
{
    RUN(bytes_stand_in_the_named_order);
    RUN(loads_return_what_was_stored_at_any_alignment);
    return check_report();
}
