#include "base/crc32c.h"

#include <pthread.h>
#include <string.h>

#define POLYNOMIAL 0x82f63b78u /* reflected */

static uint32_t table[256];
static pthread_once_t filled = PTHREAD_ONCE_INIT;

static void fill(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t value = i;
        for (int bit = 0; bit < 8; bit++)
            value = value >> 1 ^ ((value & 1u) != 0 ? POLYNOMIAL : 0);
        table[i] = value;
    }
}

uint32_t vrep_crc32c_portable(uint32_t crc, const void *data, size_t bytes)
{
    const uint8_t *at = data;
    pthread_once(&filled, fill);
    crc = ~crc;
    for (; bytes > 0; bytes--)
        crc = crc >> 8 ^ table[(crc ^ *at++) & 0xffu];
    return ~crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) static uint32_t with_sse(uint32_t crc, const void *data,
                                                           size_t bytes)
{
    const uint8_t *at = data;
    uint64_t value = ~crc;
    for (; bytes >= 8; bytes -= 8, at += 8) {
        uint64_t word;
        memcpy(&word, at, 8);
        value = __builtin_ia32_crc32di(value, word);
    }
    uint32_t low = (uint32_t)value;
    for (; bytes > 0; bytes--)
        low = __builtin_ia32_crc32qi(low, *at++);
    return ~low;
}

uint32_t vrep_crc32c(uint32_t crc, const void *data, size_t bytes)
{
    if (__builtin_cpu_supports("sse4.2"))
        return with_sse(crc, data, bytes);
    return vrep_crc32c_portable(crc, data, bytes);
}
#else
uint32_t vrep_crc32c(uint32_t crc, const void *data, size_t bytes)
{
    return vrep_crc32c_portable(crc, data, bytes);
}
#endif
