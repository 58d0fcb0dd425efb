"""Every struct and constant of format/layout.h, from the C compiler itself.

A struct ``vrep_ring_desc`` is the dtype ``RING_DESC``, a constant
``VREP_KIND_WRITE`` the integer ``KIND_WRITE``.
"""

import numpy as np

from libc.stdint cimport uint64_t

cdef extern from "format/describe.h":
    struct vrep_described_field:
        const char *name
        const char *type
        size_t offset
        size_t bytes
        size_t unit
    struct vrep_described_struct:
        const char *name
        size_t bytes
        const vrep_described_field *fields
    struct vrep_described_constant:
        const char *name
        uint64_t value
    const vrep_described_struct vrep_described_structs[]
    const vrep_described_constant vrep_described_constants[]


cdef object field_format(const vrep_described_field *field, dict known):
    cdef str kind = field.type.decode("ascii")
    if kind == "char":
        return f"S{field.bytes}"
    base = known[kind] if kind in known else np.dtype("<" + kind)
    if field.bytes == field.unit:
        return base
    return (base, (field.bytes // field.unit,))


cdef dict read_structs():
    cdef dict known = {}
    cdef const vrep_described_struct *described = vrep_described_structs
    cdef const vrep_described_field *field
    cdef list names, formats, offsets
    while described.name != NULL:
        names, formats, offsets = [], [], []
        field = described.fields
        while field.name != NULL:
            names.append(field.name.decode("ascii"))
            formats.append(field_format(field, known))
            offsets.append(field.offset)
            field += 1
        known[described.name.decode("ascii")] = np.dtype({
            "names": names, "formats": formats, "offsets": offsets, "itemsize": described.bytes,
        })
        described += 1
    return known


cdef dict read_constants():
    cdef dict known = {}
    cdef const vrep_described_constant *constant = vrep_described_constants
    while constant.name != NULL:
        known[constant.name.decode("ascii")] = constant.value
        constant += 1
    return known


STRUCTS = {name.removeprefix("vrep_").upper(): dtype for name, dtype in read_structs().items()}
CONSTANTS = {name.removeprefix("VREP_"): value for name, value in read_constants().items()}
globals().update(STRUCTS)
globals().update(CONSTANTS)
