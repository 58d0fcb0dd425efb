#include "base/log.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
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

/* The line has no control characters; quotes and backslashes are escaped, bytes above 0x7f (only
 * names that users chose have them) become '?', so that the line is JSON whatever it says. */
static void write_json(void *context, enum vrep_log_level level, const char *area, const char *line,
                       size_t length)
{
    char text[2 * VREP_LOG_LINE_MAX + 160], event[2 * VREP_LOG_LINE_MAX + 1];
    size_t at = 0;
    (void)context;
    for (size_t i = 0; i < length; i++) {
        if (line[i] == '"' || line[i] == '\\')
            event[at++] = '\\';
        event[at++] = (unsigned char)line[i] < 0x80 ? line[i] : '?';
    }
    event[at] = '\0';
    struct timespec now;
    struct tm utc;
    char stamp[32] = "";
    clock_gettime(CLOCK_REALTIME, &now);
    if (gmtime_r(&now.tv_sec, &utc) != NULL)
        strftime(stamp, sizeof stamp, "%Y-%m-%dT%H:%M:%S", &utc);
    int size = snprintf(text, sizeof text,
                        "{\"event\":\"%s\",\"logger\":\"vrep.native.%.24s\",\"level\":\"%s\","
                        "\"timestamp\":\"%s.%06ldZ\"}\n",
                        event, area, vrep_log_level_name(level), stamp, now.tv_nsec / 1000);
    if (size > 0 && write(STDERR_FILENO, text, (size_t)size) < 0)
        return;
}

static struct vrep_log_sink stderr_sink = {.write = write_stderr};
static struct vrep_log_sink json_sink = {.write = write_json};
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

void vrep_log_set_json(bool json)
{
    vrep_log_set_sink(json ? &json_sink : NULL);
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
