#include "base/log.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/atomic.h"

static void write_stderr(void *context, enum vrep_log_level level, const char *area,
                         const char *line, size_t length)
{
    char text[VREP_LOG_LINE_MAX + 64];
    (void)context;
    int size = snprintf(text, sizeof text, "vrep %s %.24s: %.*s\n", vrep_log_level_name(level),
                        area, (int)length, line);
    /* One write keeps lines of several threads apart; a lost line is no error. */
    if (size > 0 && write(STDERR_FILENO, text, (size_t)size) < 0)
        return;
}

static struct vrep_log_sink stderr_sink = {.write = write_stderr};
static vrep_atomic_ptr current_sink = &stderr_sink;
static uint32_t threshold = VREP_LOG_INFO;

void vrep_log_set_sink(const struct vrep_log_sink *sink)
{
    /* The pointer is only ever read back as const. */
    union {
        const struct vrep_log_sink *given;
        vrep_atomic_ptr stored;
    } pointer = {.given = sink ? sink : &stderr_sink};
    vrep_store_release_ptr(&current_sink, pointer.stored);
}

void vrep_log_set_level(enum vrep_log_level level)
{
    vrep_store_relaxed_u32(&threshold, (uint32_t)level);
}

const char *vrep_log_level_name(enum vrep_log_level level)
{
    switch (level) {
    case VREP_LOG_DEBUG:
        return "debug";
    case VREP_LOG_INFO:
        return "info";
    case VREP_LOG_WARNING:
        return "warning";
    case VREP_LOG_ERROR:
        return "error";
    }
    return "unknown";
}

void vrep_log_write(enum vrep_log_level level, const char *area, const char *format, ...)
{
    if ((uint32_t)level < vrep_load_relaxed_u32(&threshold))
        return;

    int saved_errno = errno;
    char line[VREP_LOG_LINE_MAX + 1];
    va_list arguments;
    va_start(arguments, format);
    int wanted = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);

    size_t length = wanted < 0 ? 0 : (size_t)wanted;
    if (length > VREP_LOG_LINE_MAX) {
        length = VREP_LOG_LINE_MAX;
        memcpy(line + length - 3, "...", 3);
    }
    line[length] = '\0';
    for (size_t i = 0; i < length; i++)
        if ((unsigned char)line[i] < ' ' || line[i] == 0x7f)
            line[i] = '?';

    const struct vrep_log_sink *sink = vrep_load_acquire_ptr(&current_sink);
    sink->write(sink->context, level, area, line, length);
    errno = saved_errno;
}
