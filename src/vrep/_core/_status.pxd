# The one place where a native status becomes a Python exception.
#
# check() passes zero and positive values (counts) through and raises for the
# negative ones. Call it with the GIL, after the native call has returned.

cdef int check(int status) except -1
