/*
 * Status codes shared by every native room.
 *
 * A native function that can fail returns an int: zero or a positive count on
 * success, one of the negative codes below on failure. The codes are process
 * local: they are never written to disk, wire or shared memory, so they may be
 * renumbered. All functions here are pure and safe from any thread.
 */
#ifndef VREP_BASE_STATUS_H
#define VREP_BASE_STATUS_H

/* name, value, one sentence for people: the only list of the codes */
#define VREP_STATUS_LIST(X)                                                                        \
    X(OK, 0, "done")                                                                               \
    X(E_INVALID, -1, "an argument is outside what the call allows")                                \
    X(E_NOMEM, -2, "memory could not be allocated")                                                \
    X(E_IO, -3, "the operating system reported an input/output error")                             \
    X(E_FULL, -4, "no room is left in a structure of fixed size")                                  \
    X(E_AGAIN, -5, "nothing can be done now, try again later")                                     \
    X(E_CORRUPT, -6, "stored or received bytes fail their checks")                                 \
    X(E_TORN, -7, "the bytes end in the middle of a record")                                       \
    X(E_AUTH, -8, "sealed bytes fail authentication")                                              \
    X(E_VERSION, -9, "the format or protocol version is not supported")                            \
    X(E_RANGE, -10, "an offset or length lies outside the disk or buffer")                         \
    X(E_BUSY, -11, "the object is in use")                                                         \
    X(E_GONE, -12, "the object existed and was released or overwritten")                           \
    X(E_UNSUPPORTED, -13, "the operation is not supported here")                                   \
    X(E_EXISTS, -14, "an object of that name exists")                                              \
    X(E_NOT_FOUND, -15, "no object of that name exists")                                           \
    X(E_FENCED, -16, "a newer epoch exists, this writer is refused")                               \
    X(E_LOCKED, -17, "another process holds the lock")                                             \
    X(E_NOSPACE, -18, "the filesystem or device has no space left")                                \
    X(E_PERMISSION, -19, "the operating system denied access")                                     \
    X(E_CLOSED, -20, "the other side closed the connection")                                       \
    X(E_TIMEOUT, -21, "the time limit passed")                                                     \
    X(E_READONLY, -22, "the object may only be read")                                              \
    X(E_PROTOCOL, -23, "the peer broke the protocol")

enum vrep_status {
#define X(name, value, text) VREP_##name = (value),
    VREP_STATUS_LIST(X)
#undef X
};

/* "E_TORN" for VREP_E_TORN; "OK" for every success; "E_?" for a foreign value. */
const char *vrep_status_name(int status);

/* One sentence without a full stop; never NULL. */
const char *vrep_status_text(int status);

/* The status for a positive errno value; VREP_E_IO where none fits better. */
int vrep_status_from_errno(int error);

#endif
