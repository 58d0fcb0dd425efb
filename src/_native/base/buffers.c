#include <stdlib.h>
#include <sys/mman.h>

#include "base/buffers.h"
#include "base/status.h"

struct stack {
    uint16_t *free;
    uint32_t count, total;
};

struct vrep_buffers {
    uint8_t *memory; /* smalls, then pages */
    size_t memory_bytes;
    uint8_t *pages_at;
    struct stack smalls, pages;
};

static int stack_fill(struct stack *stack, uint32_t total)
{
    stack->free = calloc(total, sizeof *stack->free);
    if (stack->free == NULL)
        return VREP_E_NOMEM;
    for (uint32_t i = 0; i < total; i++)
        stack->free[i] = (uint16_t)(total - 1 - i);
    stack->count = stack->total = total;
    return VREP_OK;
}

int vrep_buffers_create(uint32_t smalls, uint32_t pages, struct vrep_buffers **out)
{
    if (smalls == 0 || smalls > UINT16_MAX || pages < VREP_BUFFER_PAGES_MAX || pages > UINT16_MAX)
        return VREP_E_INVALID;
    struct vrep_buffers *buffers = calloc(1, sizeof *buffers);
    if (buffers == NULL)
        return VREP_E_NOMEM;
    size_t small_bytes = (size_t)smalls * VREP_BUFFER_SMALL_BYTES;
    buffers->memory_bytes = small_bytes + (size_t)pages * VREP_BUFFER_PAGE_BYTES;
    /* Untouched pages cost nothing: a guest that never reads much never pays for the bound. */
    void *memory = mmap(NULL, buffers->memory_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || stack_fill(&buffers->smalls, smalls) != VREP_OK ||
        stack_fill(&buffers->pages, pages) != VREP_OK) {
        buffers->memory = memory == MAP_FAILED ? NULL : memory;
        vrep_buffers_destroy(buffers);
        return VREP_E_NOMEM;
    }
    buffers->memory = memory;
    buffers->pages_at = buffers->memory + small_bytes;
    *out = buffers;
    return VREP_OK;
}

void vrep_buffers_destroy(struct vrep_buffers *buffers)
{
    if (buffers == NULL)
        return;
    if (buffers->memory != NULL)
        munmap(buffers->memory, buffers->memory_bytes);
    free(buffers->smalls.free);
    free(buffers->pages.free);
    free(buffers);
}

bool vrep_buffers_take(struct vrep_buffers *buffers, uint32_t bytes, struct vrep_buffer *out)
{
    out->small = bytes <= VREP_BUFFER_SMALL_BYTES;
    struct stack *stack = out->small ? &buffers->smalls : &buffers->pages;
    uint32_t unit = out->small ? VREP_BUFFER_SMALL_BYTES : VREP_BUFFER_PAGE_BYTES;
    uint32_t parts = bytes / unit + (bytes % unit != 0);
    out->parts = 0;
    if (parts > VREP_BUFFER_PAGES_MAX || stack->count < parts)
        return false;
    out->bytes = bytes;
    out->parts = (uint16_t)parts;
    for (uint32_t i = 0; i < parts; i++)
        out->part[i] = stack->free[--stack->count];
    return true;
}

void vrep_buffers_give(struct vrep_buffers *buffers, struct vrep_buffer *buffer)
{
    struct stack *stack = buffer->small ? &buffers->smalls : &buffers->pages;
    while (buffer->parts > 0)
        stack->free[stack->count++] = buffer->part[--buffer->parts];
}

int vrep_buffers_iov(const struct vrep_buffers *buffers, const struct vrep_buffer *buffer,
                     uint32_t from, struct iovec *iov, int max)
{
    uint32_t unit = buffer->small ? VREP_BUFFER_SMALL_BYTES : VREP_BUFFER_PAGE_BYTES;
    uint8_t *base = buffer->small ? buffers->memory : buffers->pages_at;
    int count = 0;
    while (from < buffer->bytes && count < max) {
        uint32_t within = from % unit, length = unit - within;
        if (length > buffer->bytes - from)
            length = buffer->bytes - from;
        iov[count++] =
            (struct iovec){base + (size_t)buffer->part[from / unit] * unit + within, length};
        from += length;
    }
    return count;
}
