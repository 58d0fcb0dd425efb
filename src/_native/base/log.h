/*
 * Levelled log of the native rooms: one call, one line, no allocation.
 *
 * A line holds at most VREP_LOG_LINE_MAX bytes, longer text ends in "..."; bytes
 * below space become '?', so foreign input cannot forge a second line. Lines
 * under the threshold cost one load. The sink may be called from any thread at
 * once and must not log itself; without one, lines go to standard error. Not for
 * the I/O path: log transitions, count the rest.
 */
#ifndef VREP_BASE_LOG_H
#define VREP_BASE_LOG_H

#include <stdbool.h>
#include <stddef.h>

#define VREP_LOG_LINE_MAX 480

enum vrep_log_level {
    VREP_LOG_DEBUG = 0,
    VREP_LOG_INFO = 1,
    VREP_LOG_WARNING = 2,
    VREP_LOG_ERROR = 3,
};

/* line is NUL-terminated, holds no newline, and is valid only during the call. */
struct vrep_log_sink {
    void (*write)(void *context, enum vrep_log_level level, const char *area, const char *line,
                  size_t length);
    void *context;
};

/* sink must outlive every thread that logs; NULL restores standard error. */
void vrep_log_set_sink(const struct vrep_log_sink *sink);

/* Standard error, as JSON lines (event, logger, level, timestamp) or as text. */
void vrep_log_set_json(bool json);

/* Lines below the level are dropped; INFO at start. */
void vrep_log_set_level(enum vrep_log_level level);

/* "debug", "info", "warning" or "error". */
const char *vrep_log_level_name(enum vrep_log_level level);

/* area is the room or concept that speaks: "ring", "nbd". Keeps errno. */
__attribute__((format(printf, 3, 4))) void
vrep_log_write(enum vrep_log_level level, const char *area, const char *format, ...);

#define VREP_DEBUG(area, ...) vrep_log_write(VREP_LOG_DEBUG, area, __VA_ARGS__)
#define VREP_INFO(area, ...) vrep_log_write(VREP_LOG_INFO, area, __VA_ARGS__)
#define VREP_WARN(area, ...) vrep_log_write(VREP_LOG_WARNING, area, __VA_ARGS__)
#define VREP_ERROR(area, ...) vrep_log_write(VREP_LOG_ERROR, area, __VA_ARGS__)

#endif
