/* Chain: the filters that a command passes, the replication tap among them,
 * down to the backing store and back up.
 *
 * A filter's submit passes a command on with vrep_chain_down, now or later, or
 * ends it with vrep_chain_up; its completed is called on the way back and
 * passes on with vrep_chain_up.  Above the first filter stands the command's
 * done().  Threading: the group's thread; nothing here blocks or allocates.
 */
#ifndef VREP_FILTER_CHAIN_H
#define VREP_FILTER_CHAIN_H

#include <stdint.h>
#include <sys/uio.h>

struct command;
struct vrep_group;
struct vrep_filter;

struct vrep_filter_ops {
    const char *name;
    void (*submit)(struct vrep_filter *filter, struct command *command);
    void (*completed)(struct vrep_filter *filter, struct command *command);
};
struct vrep_filter {
    const struct vrep_filter_ops *ops;
    struct vrep_group *group;
};

/* The terminal filter: the backing store. */
extern const struct vrep_filter_ops vrep_backing_ops;

/* Builds the chain of a group: view (if it has an overlay), tap, backing. */
void vrep_chain_build(struct vrep_group *group);
/* From the top. */
void vrep_chain_submit(struct command *command);
void vrep_chain_down(struct command *command);
void vrep_chain_up(struct command *command);
/* Hands a command that went all the way up back to its front-end. */
void vrep_chain_answer(struct command *command);

/* Starts command->io on the command's disk; resume(command) is called when it ended, possibly
 * before this returns. */
void vrep_backing_start(struct command *command, uint8_t op, uint8_t flags, uint64_t offset,
                        uint64_t length, struct iovec *iov, int iovcnt,
                        void (*resume)(struct command *command));

#endif
