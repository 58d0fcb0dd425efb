#include <errno.h>

#include "base/log.h"
#include "check.h"

struct seen {
    unsigned lines;
    enum vrep_log_level level;
    char area[32];
    char line[VREP_LOG_LINE_MAX + 1];
    size_t length;
};

static void remember(void *context, enum vrep_log_level level, const char *area, const char *line,
                     size_t length)
{
    struct seen *seen = context;
    seen->lines++;
    seen->level = level;
    seen->length = length;
    snprintf(seen->area, sizeof seen->area, "%s", area);
    snprintf(seen->line, sizeof seen->line, "%s", line);
    errno = EDOM;
}

static struct seen seen;
static const struct vrep_log_sink sink = {.write = remember, .context = &seen};

static void start(void)
{
    memset(&seen, 0, sizeof seen);
    vrep_log_set_sink(&sink);
    vrep_log_set_level(VREP_LOG_INFO);
}

static void lines_reach_the_sink_and_errno_stays(void)
{
    start();
    errno = ENOENT;
    VREP_WARN("ring", "head %d of %s", 7, "x");
    CHECK_EQ(errno, ENOENT);
    CHECK_EQ(seen.lines, 1);
    CHECK_EQ(seen.level, VREP_LOG_WARNING);
    CHECK_STR(seen.area, "ring");
    CHECK_STR(seen.line, "head 7 of x");
    CHECK_EQ(seen.length, strlen("head 7 of x"));
}

static void the_threshold_drops_lines(void)
{
    start();
    VREP_DEBUG("ring", "quiet");
    CHECK_EQ(seen.lines, 0);
    vrep_log_set_level(VREP_LOG_ERROR);
    VREP_WARN("ring", "quiet");
    CHECK_EQ(seen.lines, 0);
    VREP_ERROR("ring", "loud");
    CHECK_EQ(seen.lines, 1);
    vrep_log_set_level(VREP_LOG_DEBUG);
    VREP_DEBUG("ring", "chatty");
    CHECK_EQ(seen.lines, 2);
}

static void control_bytes_cannot_forge_a_line(void)
{
    start();
    VREP_INFO("nbd", "%s", "name\nvrep error: forged\x1b[2J\x7f");
    CHECK_STR(seen.line, "name?vrep error: forged?[2J?");
}

static void long_lines_are_cut_visibly(void)
{
    char text[2000];
    start();
    memset(text, 'a', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    VREP_INFO("nbd", "%s", text);
    CHECK_EQ(seen.length, VREP_LOG_LINE_MAX);
    CHECK_EQ(strlen(seen.line), VREP_LOG_LINE_MAX);
    CHECK_STR(seen.line + VREP_LOG_LINE_MAX - 4, "a...");
    text[VREP_LOG_LINE_MAX] = '\0';
    VREP_INFO("nbd", "%s", text);
    CHECK_STR(seen.line, text);
}

static void levels_have_names(void)
{
    CHECK_STR(vrep_log_level_name(VREP_LOG_DEBUG), "debug");
    CHECK_STR(vrep_log_level_name(VREP_LOG_INFO), "info");
    CHECK_STR(vrep_log_level_name(VREP_LOG_WARNING), "warning");
    CHECK_STR(vrep_log_level_name(VREP_LOG_ERROR), "error");
}

int main(void)
{
    RUN(lines_reach_the_sink_and_errno_stays);
    RUN(the_threshold_drops_lines);
    RUN(control_bytes_cannot_forge_a_line);
    RUN(long_lines_are_cut_visibly);
    RUN(levels_have_names);
    return check_report();
}
