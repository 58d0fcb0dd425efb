/* CRC32C (Castagnoli), as iSCSI's digests use it (RFC 7143 13.1).
 *
 * With SSE 4.2 where the processor has it, else from tables; both give the same.
 * Begin with 0 and add pieces in order.  Any thread.
 */
#ifndef VREP_BASE_CRC32C_H
#define VREP_BASE_CRC32C_H

#include <stddef.h>
#include <stdint.h>

uint32_t vrep_crc32c(uint32_t crc, const void *data, size_t bytes);
/* The one from tables, for tests. */
uint32_t vrep_crc32c_portable(uint32_t crc, const void *data, size_t bytes);

#endif
