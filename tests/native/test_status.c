#include <errno.h>

#include "base/status.h"
#include "check.h"

static void names_and_texts_are_complete(void)
{
    CHECK_STR(vrep_status_name(VREP_OK), "OK");
    CHECK_STR(vrep_status_name(17), "OK");
    CHECK_STR(vrep_status_name(VREP_E_TORN), "E_TORN");
    CHECK_STR(vrep_status_name(-12345), "E_?");
    CHECK_STR(vrep_status_text(-12345), "unknown status");
#define X(name, value, text)                                                                       \
    CHECK_EQ(VREP_##name, value);                                                                  \
    CHECK_STR(vrep_status_name(value), #name);                                                     \
    CHECK_STR(vrep_status_text(value), text);
    VREP_STATUS_LIST(X)
#undef X
}

static void errno_values_keep_their_meaning(void)
{
    CHECK_STATUS(vrep_status_from_errno(0), VREP_OK);
    CHECK_STATUS(vrep_status_from_errno(ENOSPC), VREP_E_NOSPACE);
    CHECK_STATUS(vrep_status_from_errno(EDQUOT), VREP_E_NOSPACE);
    CHECK_STATUS(vrep_status_from_errno(EINTR), VREP_E_AGAIN);
    CHECK_STATUS(vrep_status_from_errno(ECONNRESET), VREP_E_CLOSED);
    CHECK_STATUS(vrep_status_from_errno(EROFS), VREP_E_READONLY);
    CHECK_STATUS(vrep_status_from_errno(EIO), VREP_E_IO);
    CHECK_STATUS(vrep_status_from_errno(9999), VREP_E_IO);
}

int main(void)
{
    RUN(names_and_texts_are_complete);
    RUN(errno_values_keep_their_meaning);
    return check_report();
}
