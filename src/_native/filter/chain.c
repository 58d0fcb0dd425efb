#include "filter/chain.h"

#include "filter/fault.h"
#include "filter/internal.h"

void vrep_chain_build(struct vrep_group *group)
{
    const struct vrep_filter_ops *ops[FILTERS_MAX];
    uint32_t count = 0;
    bool overlay = false;
    for (uint32_t i = 0; i < group->disks_count; i++)
        overlay = overlay || group->disks[i].overlay;
    if (overlay)
        ops[count++] = &vrep_view_ops;
    ops[count++] = &vrep_tap_ops;
    ops[count++] = &vrep_backing_ops;
    for (uint32_t i = 0; i < count; i++)
        group->filters[i] = (struct vrep_filter){.ops = ops[i], .group = group};
    group->filters_count = count;
}

void vrep_chain_submit(struct command *command)
{
    struct vrep_filter *first = &command->base.group->filters[0];
    command->level = 0;
    first->ops->submit(first, command);
}

void vrep_chain_down(struct command *command)
{
    struct vrep_filter *below = &command->base.group->filters[++command->level];
    below->ops->submit(below, command);
}

void vrep_chain_answer(struct command *command)
{
    command->submitted = false;
    command->base.group->inflight--;
    command->base.done(&command->base);
}

void vrep_chain_up(struct command *command)
{
    struct vrep_group *group = command->base.group;
    if (command->level == 0) {
        if (!vrep_cut_keeps(group, command))
            vrep_chain_answer(command);
        return;
    }
    struct vrep_filter *above = &group->filters[--command->level];
    above->ops->completed(above, command);
}

/* ---- the backing store ---------------------------------------------------- */

static void io_done(struct vrep_io *io)
{
    struct command *command = io->owner;
    if (!command->base.group->abandoned)
        command->resume(command);
}

void vrep_backing_start(struct command *command, uint8_t op, uint8_t flags, uint64_t offset,
                        uint64_t length, struct iovec *iov, int iovcnt,
                        void (*resume)(struct command *command))
{
    struct vrep_io *io = &command->io;
    io->op = op;
    io->flags = flags;
    io->inline_done = false;
    io->offset = offset;
    io->length = length;
    io->iov = iov;
    io->iovcnt = iovcnt;
    io->status = VREP_OK;
    io->os_error = 0;
    io->sync_failed = false;
    io->done = io_done;
    io->owner = command;
    command->resume = resume;
    int injected = op == VREP_IO_WRITE   ? vrep_fault("backing.write")
                   : op == VREP_IO_FLUSH ? vrep_fault("backing.flush")
                   : op == VREP_IO_READ  ? vrep_fault("backing.read")
                                         : vrep_fault("backing.zero");
    if (injected != VREP_OK) {
        io->status = injected;
        resume(command);
        return;
    }
    vrep_disk_submit(disk_of(command->base.group, command)->disk, io);
    if (io->inline_done)
        resume(command);
}

static void finished(struct command *command)
{
    command->base.status = command->io.status;
    vrep_chain_up(command);
}

static void backing_submit(struct vrep_filter *filter, struct command *command)
{
    struct vrep_group *group = filter->group;
    uint8_t flags = 0;
    if ((command->base.flags & VREP_COMMAND_FUA) != 0)
        flags |= VREP_IO_FUA;
    if ((command->base.flags & VREP_COMMAND_NO_HOLE) != 0)
        flags |= VREP_IO_NO_HOLE;
    if ((command->base.flags & VREP_COMMAND_FAST) != 0)
        flags |= VREP_IO_FAST;

    switch (command->base.op) {
    case VREP_OP_READ:
        vrep_backing_start(command, VREP_IO_READ, 0, command->base.offset, command->base.length,
                           command->base.iov, command->base.iovcnt, finished);
        return;
    case VREP_OP_FLUSH:
        vrep_backing_start(command, VREP_IO_FLUSH, 0, 0, 0, NULL, 0, finished);
        return;
    case VREP_OP_WRITE: {
        /* The front-end may have consumed its iovecs while it received: build them anew. */
        int count = vrep_payload_iov(group, command);
        vrep_backing_start(command, VREP_IO_WRITE, flags, command->at, command->bytes,
                           command->room, count, finished);
        return;
    }
    case VREP_OP_DISCARD:
        flags = (uint8_t)((flags & VREP_IO_FUA) | VREP_IO_FAST);
        vrep_backing_start(command, VREP_IO_ZERO, flags, command->at, command->bytes, NULL, 0,
                           finished);
        return;
    default:
        vrep_backing_start(command, VREP_IO_ZERO, flags, command->at, command->bytes, NULL, 0,
                           finished);
        return;
    }
}

static void backing_completed(struct vrep_filter *filter, struct command *command)
{
    (void)filter;
    vrep_chain_up(command); /* nothing is below */
}

const struct vrep_filter_ops vrep_backing_ops = {
    .name = "backing", .submit = backing_submit, .completed = backing_completed};
