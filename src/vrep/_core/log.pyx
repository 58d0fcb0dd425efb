"""The native log: its level and its form. Lines go to standard error by themselves, so no native
thread ever waits for Python to log.
"""

cdef extern from "<stdbool.h>":
    ctypedef bint cbool "bool"

cdef extern from "base/log.h":
    enum vrep_log_level:
        VREP_LOG_DEBUG
        VREP_LOG_INFO
        VREP_LOG_WARNING
        VREP_LOG_ERROR
    void vrep_log_set_json(cbool json)
    void vrep_log_set_level(vrep_log_level level)

LEVELS = {
    "debug": VREP_LOG_DEBUG, "info": VREP_LOG_INFO,
    "warning": VREP_LOG_WARNING, "error": VREP_LOG_ERROR,
}


def setup(str level="info", *, json=False):
    """Drop lines below ``level`` (KeyError for no level) and write the rest as JSON or text."""
    vrep_log_set_level(LEVELS[level])
    vrep_log_set_json(bool(json))
