#include <endian.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/status.h"
#include "serve/vhost_internal.h"

#define LOG_PAGE 4096u

int vhost_map(int fd, uint64_t offset, uint64_t bytes, void **mapped, size_t *mapped_bytes,
              uint8_t **at)
{
    struct stat is;
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), before = offset % page;
    if (fstat(fd, &is) != 0)
        return VREP_E_IO;
    /* Regular files and memory have a size; huge pages are of one, too. */
    if (S_ISREG(is.st_mode) &&
        ((uint64_t)is.st_size < offset || (uint64_t)is.st_size - offset < bytes))
        return VREP_E_RANGE;
    if (bytes > SIZE_MAX - before)
        return VREP_E_RANGE;
    void *memory = mmap(NULL, (size_t)(bytes + before), PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_NORESERVE, fd, (off_t)(offset - before));
    if (memory == MAP_FAILED)
        return VREP_E_NOMEM;
    *mapped = memory;
    *mapped_bytes = (size_t)(bytes + before);
    *at = (uint8_t *)memory + before;
    return VREP_OK;
}

/* ---- regions ---------------------------------------------------------------------- */

static void region_let(struct vhost_region *region)
{
    if (--region->users > 0)
        return;
    munmap(region->mapped, region->mapped_bytes);
    free(region);
}

struct vhost_memory *vhost_memory_create(void)
{
    struct vhost_memory *memory = calloc(1, sizeof *memory);
    if (memory != NULL)
        memory->users = 1;
    return memory;
}

void vhost_memory_hold(struct vhost_memory *memory)
{
    memory->users++;
}

void vhost_memory_let(struct vhost_memory *memory)
{
    if (memory == NULL || --memory->users > 0)
        return;
    for (uint32_t i = 0; i < memory->count; i++)
        region_let(memory->region[i]);
    free(memory);
}

static struct vhost_memory *copy_without(const struct vhost_memory *memory, uint32_t left_out)
{
    struct vhost_memory *copy = vhost_memory_create();
    if (copy == NULL)
        return NULL;
    for (uint32_t i = 0; i < memory->count; i++) {
        if (i == left_out)
            continue;
        copy->region[copy->count] = memory->region[i];
        copy->region[copy->count++]->users++;
    }
    return copy;
}

static bool overlaps(uint64_t a, uint64_t b, uint64_t a_bytes, uint64_t b_bytes)
{
    return a < b + b_bytes && b < a + a_bytes;
}

struct vhost_memory *vhost_memory_with(const struct vhost_memory *memory,
                                       const struct vrep_vhost_region *region, int fd, int *status)
{
    *status = VREP_E_FULL;
    if (memory->count == VREP_VHOST_REGIONS_MAX)
        return NULL;
    *status = VREP_E_EXISTS;
    for (uint32_t i = 0; i < memory->count; i++) {
        const struct vrep_vhost_region *is = &memory->region[i]->is;
        if (overlaps(is->guest, region->guest, is->bytes, region->bytes) ||
            overlaps(is->user, region->user, is->bytes, region->bytes))
            return NULL;
    }
    struct vhost_memory *copy = copy_without(memory, UINT32_MAX);
    struct vhost_region *made = calloc(1, sizeof *made);
    *status = VREP_E_NOMEM;
    if (copy == NULL || made == NULL)
        goto failed;
    *status =
        vhost_map(fd, region->offset, region->bytes, &made->mapped, &made->mapped_bytes, &made->at);
    if (*status != VREP_OK)
        goto failed;
    made->is = *region;
    made->users = 1;
    copy->region[copy->count++] = made;
    return copy;
failed:
    free(made);
    vhost_memory_let(copy);
    return NULL;
}

struct vhost_memory *vhost_memory_without(const struct vhost_memory *memory,
                                          const struct vrep_vhost_region *region)
{
    for (uint32_t i = 0; i < memory->count; i++) {
        const struct vrep_vhost_region *is = &memory->region[i]->is;
        if (is->guest == region->guest && is->user == region->user && is->bytes == region->bytes)
            return copy_without(memory, i);
    }
    return NULL;
}

uint8_t *vhost_guest_part(const struct vhost_memory *memory, uint64_t address, uint64_t *bytes)
{
    for (uint32_t i = 0; i < memory->count; i++) {
        const struct vhost_region *region = memory->region[i];
        uint64_t at = address - region->is.guest;
        if (address < region->is.guest || at >= region->is.bytes)
            continue;
        if (*bytes > region->is.bytes - at)
            *bytes = region->is.bytes - at;
        return region->at + at;
    }
    return NULL;
}

uint8_t *vhost_guest(const struct vhost_memory *memory, uint64_t address, uint64_t bytes)
{
    uint64_t here = bytes;
    uint8_t *at = vhost_guest_part(memory, address, &here);
    return here == bytes ? at : NULL;
}

uint8_t *vhost_user(const struct vhost_memory *memory, uint64_t address, uint64_t bytes)
{
    for (uint32_t i = 0; i < memory->count; i++) {
        const struct vhost_region *region = memory->region[i];
        uint64_t at = address - region->is.user;
        if (address >= region->is.user && at < region->is.bytes && bytes <= region->is.bytes - at)
            return region->at + at;
    }
    return NULL;
}

/* ---- the log of a live migration ---------------------------------------------------- */

int vhost_log_open(struct vhost_log *log, int fd, uint64_t offset, uint64_t bytes)
{
    struct vhost_log made = {.bytes = bytes};
    int status = vhost_map(fd, offset, bytes, &made.mapped, &made.mapped_bytes, &made.at);
    if (status != VREP_OK)
        return status;
    vhost_log_close(log);
    *log = made;
    return VREP_OK;
}

void vhost_log_close(struct vhost_log *log)
{
    if (log->at != NULL)
        munmap(log->mapped, log->mapped_bytes);
    *log = (struct vhost_log){0};
}

void vhost_log_write(struct vhost_log *log, uint64_t address, uint64_t bytes)
{
    if (log->at == NULL || bytes == 0)
        return;
    for (uint64_t page = address / LOG_PAGE; page <= (address + bytes - 1) / LOG_PAGE; page++) {
        if (page / 8 >= log->bytes)
            return;
        (void)vrep_fetch_or_u32((uint32_t *)(void *)(log->at + page / 32 * 4),
                                htole32(UINT32_C(1) << (page % 32)));
    }
}
