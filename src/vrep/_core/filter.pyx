"""Filter: a protection group as its host serves it, for the process that holds it.

A ``Group`` opens disks, ring, change map and durable state. The event loop that
polls it runs elsewhere; every method here may be called from any thread and lets
the interpreter run meanwhile.
"""

import os
import time
from typing import NamedTuple

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stddef cimport size_t
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from vrep._core._status cimport check
from vrep.errors import AgainError, BusyError, GoneError, InvalidError

cdef extern from "base/status.h":
    enum:
        VREP_OK
        VREP_E_IO
        VREP_E_NOT_FOUND

cdef extern from "format/layout.h":
    enum:
        VREP_CONTROL_OBSERVER
        VREP_CONTROL_TARGET

OPENED = {1: "new", 2: "clean", 3: "killed", 4: "power-loss", 5: "unexplained"}
UNVERIFIED = {0: "", 1: "stamps", 2: "size", 3: "state", 4: "intent", 5: "flush",
              6: "bypass", 7: "past"}
HANDOVER = {0: "", 1: "in", 2: "letting-go", 3: "out", 4: "past", 5: "mirror"}
ROLES = {"observer": VREP_CONTROL_OBSERVER, "target": VREP_CONTROL_TARGET}
MISSES_MAX = 64
DELTA_WINDOWS = VREP_DELTA_WINDOWS
DELTA_WINDOW_BYTES = VREP_DELTA_WINDOW_BYTES
DELTA_KEYS_MAX = VREP_DELTA_KEYS_MAX


class Disk(NamedTuple):
    """A disk to open: ``uri`` is ``file:``, ``block:`` or ``view:``.

    ``size`` is that of a view, and ``onto`` the URI of the disk that takes its data instead of a
    file of its own. With ``was`` a disk that had that size is to get ``size``: if its backing
    cannot, it is served as it was.
    """

    name: str
    uri: str
    size: int = 0
    was: int = 0
    onto: str = ""


class Miss(NamedTuple):
    """Absent blocks of a view that a command waits for."""

    ticket: int
    disk: int
    offset: int
    length: int


class Window(NamedTuple):
    """A range that is to be compared with what the target holds; sizes are bytes."""

    id: int
    disk: int
    offset: int
    length: int


cdef struct mark_request:
    const char *label
    uint16_t label_bytes
    uint64_t seq

cdef struct object_request:
    uint64_t tag
    const void *data
    uint32_t length
    uint64_t seq

cdef struct cut_request:
    const uint8_t *cut_id
    uint64_t limit_ns
    uint64_t seq
    const vrep_position *lanes
    uint16_t count
    const char *label
    uint16_t label_bytes

cdef struct resync_request:
    bint allowed
    bint everything
    uint64_t bytes_per_s

cdef struct since_request:
    const char *name
    uint32_t disk
    const vrep_since_range *ranges
    size_t count

cdef struct compare_request:
    uint32_t disk
    const vrep_since_range *ranges
    size_t count

cdef struct delta_request:
    const uint8_t *secrets
    uint32_t count

cdef struct take_request:
    vrep_delta_window windows[64]
    uint32_t most
    uint32_t count
    uint64_t at_least

cdef struct answer_request:
    uint64_t id
    const uint8_t *keys
    const vrep_delta_hash *hashes
    uint32_t units

cdef struct attach_request:
    uint32_t role
    const uint8_t *target_id
    uint64_t durable
    int fds[3]


cdef int run_status(vrep_group *group, void *argument) noexcept nogil:
    return vrep_group_status_of(group, <vrep_group_status *>argument)


cdef int run_mark(vrep_group *group, void *argument) noexcept nogil:
    cdef mark_request *request = <mark_request *>argument
    return vrep_group_mark(group, request.label, request.label_bytes, &request.seq)


cdef int run_object(vrep_group *group, void *argument) noexcept nogil:
    cdef object_request *request = <object_request *>argument
    return vrep_group_object(group, request.tag, request.data, request.length, &request.seq)


cdef int run_cut_hold(vrep_group *group, void *argument) noexcept nogil:
    cdef cut_request *request = <cut_request *>argument
    cdef int status = vrep_group_cut_hold(group, request.cut_id, request.limit_ns)
    if status != VREP_OK:
        return status
    return vrep_group_cut_mark(group, request.cut_id, &request.seq)


cdef int run_cut_release(vrep_group *group, void *argument) noexcept nogil:
    cdef cut_request *request = <cut_request *>argument
    return vrep_group_cut_release(group, request.cut_id)


cdef int run_cut_complete(vrep_group *group, void *argument) noexcept nogil:
    cdef cut_request *request = <cut_request *>argument
    return vrep_group_cut_complete(group, request.cut_id, request.lanes, request.count,
                                   request.label, request.label_bytes, &request.seq)


cdef int run_resync(vrep_group *group, void *argument) noexcept nogil:
    cdef resync_request *request = <resync_request *>argument
    return vrep_group_resync(group, request.allowed, request.bytes_per_s, request.everything)


cdef int run_since(vrep_group *group, void *argument) noexcept nogil:
    cdef since_request *request = <since_request *>argument
    if request.name != NULL:
        return vrep_group_since_begin(group, request.name)
    return vrep_group_since_mark(group, request.disk, request.ranges, request.count)


cdef int run_compare(vrep_group *group, void *argument) noexcept nogil:
    cdef compare_request *request = <compare_request *>argument
    return vrep_group_compare(group, request.disk, request.ranges, request.count)


cdef int run_delta_begin(vrep_group *group, void *argument) noexcept nogil:
    cdef delta_request *request = <delta_request *>argument
    return vrep_group_delta_begin(group, <const uint8_t (*)[192]>request.secrets, request.count)


cdef int run_delta_end(vrep_group *group, void *argument) noexcept nogil:
    vrep_group_delta_end(group)
    return VREP_OK


cdef int run_delta_take(vrep_group *group, void *argument) noexcept nogil:
    cdef take_request *request = <take_request *>argument
    return vrep_group_delta_take(group, request.windows, request.most, &request.count,
                                 &request.at_least)


cdef int run_delta_answer(vrep_group *group, void *argument) noexcept nogil:
    cdef answer_request *request = <answer_request *>argument
    return vrep_group_delta_answer(group, request.id, request.keys, request.hashes, request.units)


cdef int run_attach(vrep_group *group, void *argument) noexcept nogil:
    cdef attach_request *request = <attach_request *>argument
    return vrep_group_consumer_attach(group, request.role, request.target_id, request.durable,
                                      request.fds)


cdef int run_detach(vrep_group *group, void *argument) noexcept nogil:
    return vrep_group_consumer_detach(group, (<uint32_t *>argument)[0])


cdef int run_lose(vrep_group *group, void *argument) noexcept nogil:
    return vrep_group_lose_ring(group)


cdef int run_let_go(vrep_group *group, void *argument) noexcept nogil:
    return vrep_group_let_go(group)


cdef int run_take_back(vrep_group *group, void *argument) noexcept nogil:
    return vrep_group_take_back(group)


cdef int run_mirror_live(vrep_group *group, void *argument) noexcept nogil:
    return vrep_group_mirror_live(group)


cdef int run_mirror_mark(vrep_group *group, void *argument) noexcept nogil:
    cdef since_request *request = <since_request *>argument
    return vrep_group_mirror_mark(group, request.disk, request.ranges, request.count)


cdef int run_mirror_distrust(vrep_group *group, void *argument) noexcept nogil:
    return vrep_group_mirror_distrust(group)


cdef struct rest_request:
    const vrep_rest_image *images
    size_t count
    bint begin


cdef int run_mirror_rest(vrep_group *group, void *argument) noexcept nogil:
    cdef rest_request *request = <rest_request *>argument
    return vrep_group_mirror_rest(group, request.images, request.count, request.begin)


cdef int run_mirror_looked(vrep_group *group, void *argument) noexcept nogil:
    return vrep_group_mirror_looked(group)


cdef int run_mirror_barrier(vrep_group *group, void *argument) noexcept nogil:
    return vrep_group_mirror_barrier(group, (<uint64_t *>argument)[0])


cdef const uint8_t *id_of(bytes cut_id) except NULL:
    if len(cut_id) != 16:
        raise InvalidError("a cut's id has 16 bytes")
    return <const uint8_t *><const char *>cut_id


cdef uint32_t role_of(object role) except 0:
    try:
        return ROLES[role]
    except KeyError:
        raise InvalidError(f"role {role!r}: use 'target' or 'observer'") from None


cdef class Group:
    """A protection group: its disks, and when it is tapped its ring, map and state.

    With ``bypass`` instead of ``tap`` nothing is recorded: a pass-through for a filter that
    cannot start. It needs ``state_dir``; without ``shm_dir`` every block is copied again later.
    ``stepped`` (monotonic and wall time, ns) leaves threads and clocks to a ``GroupDriver``.
    """

    def __cinit__(self, disks, *, bytes group_id, bytes target_id=bytes(16),
                  bytes epoch_id=bytes(16), uint32_t epoch=1, uint64_t first_seq=0,
                  uint16_t lane=0,
                  shm_dir=None, state_dir=None,
                  bint tap=True, bint bypass=False, bint read_only=False, bint direct=False,
                  bint handover=False, bint mirror=False,
                  uint64_t ring_bytes=256 << 20, uint32_t ring_descriptors=65536,
                  uint32_t slots=256, uint32_t bit_bytes=65536, uint32_t threads=4,
                  uint64_t private_bytes=64 << 20, uint64_t resync_bytes_per_s=0,
                  uint32_t checkpoint_ms=5000, stepped=None):
        cdef vrep_group_config config
        cdef vrep_group_disk *array
        cdef int status
        disks = [Disk(*disk) for disk in disks]
        if not disks:
            raise InvalidError("a group needs a disk")
        for name, value in (("group_id", group_id), ("target_id", target_id),
                            ("epoch_id", epoch_id)):
            if len(value) != 16:
                raise InvalidError(f"{name} is not 16 bytes")
        kept = [(disk.name.encode(), disk.uri.encode(), disk.onto.encode()) for disk in disks]
        shm = None if shm_dir is None else str(shm_dir).encode()
        state = None if state_dir is None else str(state_dir).encode()
        array = <vrep_group_disk *>calloc(len(disks), sizeof(vrep_group_disk))
        if array == NULL:
            raise MemoryError
        try:
            for i, (name, uri, onto) in enumerate(kept):
                array[i].name = <const char *>name
                array[i].uri = <const char *>uri
                array[i].bytes = disks[i].size
                array[i].was = disks[i].was
                array[i].onto = <const char *>onto if onto else NULL
            memcpy(config.group_id, <const char *>group_id, 16)
            memcpy(config.target_id, <const char *>target_id, 16)
            memcpy(config.epoch_id, <const char *>epoch_id, 16)
            config.epoch = epoch
            config.first_seq = first_seq
            config.lane = lane
            config.flags = ((VREP_GROUP_TAP if tap else 0) | (VREP_GROUP_DIRECT if direct else 0)
                            | (VREP_GROUP_READ_ONLY if read_only else 0)
                            | (VREP_GROUP_BYPASS if bypass else 0)
                            | (VREP_GROUP_HANDOVER if handover else 0)
                            | (VREP_GROUP_MIRROR if mirror else 0)
                            | (VREP_GROUP_STEPPED if stepped is not None else 0))
            config.mono_ns, config.wall_ns = stepped or (0, 0)
            config.disks = array
            config.disks_count = <uint32_t>len(disks)
            config.shm_dir = NULL if shm is None else <const char *>shm
            config.state_dir = NULL if state is None else <const char *>state
            config.ring_bytes = ring_bytes
            config.ring_descriptors = ring_descriptors
            config.slots = slots
            config.bit_bytes = bit_bytes
            config.threads = threads
            config.private_bytes = private_bytes
            config.resync_bytes_per_s = resync_bytes_per_s
            config.checkpoint_ns = checkpoint_ms * <uint64_t>1000000
            with nogil:
                status = vrep_group_open(&config, &self.handle)
            check(status)
        finally:
            free(array)

    def __dealloc__(self):
        # Whoever forgets to close leaves what a killed process leaves.
        if self.handle != NULL:
            vrep_group_abandon(self.handle)

    cdef vrep_group *enter(self) except NULL:
        if self.handle == NULL or self.closing:
            raise GoneError("the group is closed")
        self.calls += 1
        return self.handle

    cdef void leave(self) noexcept:
        self.calls -= 1

    cdef call(self, int (*fn)(vrep_group *group, void *argument) noexcept nogil, void *argument):
        cdef int status
        cdef vrep_group *group = self.enter()
        try:
            with nogil:
                status = vrep_group_call(group, fn, argument)
        finally:
            self.leave()
        check(status)

    @property
    def disks(self):
        """Names and sizes, in order of their numbers."""
        cdef vrep_group *group = self.enter()
        try:
            return [(vrep_group_disk_name(group, i).decode(), vrep_group_disk_bytes(group, i))
                    for i in range(vrep_group_disks(group))]
        finally:
            self.leave()

    def status(self):
        """What the group counts and knows, by name."""
        cdef vrep_group_status status
        cdef uint64_t dirty
        cdef vrep_group *group
        self.call(run_status, &status)
        group = self.enter()
        try:
            with nogil:
                dirty = vrep_group_dirty_bytes(group)
        finally:
            self.leave()
        result = dict(status)
        result["dirty_bytes"] = dirty
        for flag in ("gap", "flush_failed", "resync_allowed", "handover_waiting", "mirror",
                     "mirror_waits", "mirror_rests", "marks_unstored"):
            result[flag] = bool(result[flag])
        result["opened_as"] = OPENED.get(status.opened_as, "")
        result["unverified"] = UNVERIFIED[status.unverified]
        result["handover"] = HANDOVER[status.handover]
        return result

    def mark(self, str label=""):
        """Put a mark behind everything acknowledged so far; return its seq."""
        cdef mark_request request
        text = label.encode()
        if len(text) > 255:
            raise InvalidError("a label has at most 255 bytes")
        request.label = <const char *>text
        request.label_bytes = <uint16_t>len(text)
        self.call(run_mark, &request)
        return request.seq

    def put_object(self, data, uint64_t tag=0):
        """Put an object (its plaintext: struct, name, blob) into the order; return its seq.

        ``tag`` is the same for all its versions, and says no more; 0: none.

        FullError when the ring has no room for it now.
        """
        cdef object_request request
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            if view.len > 0xffffffff:
                raise InvalidError(f"an object of {view.len} bytes")
            request.tag = tag
            request.data = view.buf
            request.length = <uint32_t>view.len
            self.call(run_object, &request)
        finally:
            PyBuffer_Release(&view)
        return request.seq

    def cut_complete(self, bytes cut_id, lanes, str label=""):
        """Put the record that completes a cut; return its seq. ``lanes`` are the positions of
        its marks, ``(epoch, lane, seq)``, rising by lane; seq 0 for a lane without a part."""
        cdef cut_request request
        cdef vrep_position at[VREP_LANES_MAX]
        cdef int i
        lanes, text = list(lanes), label.encode()
        if not 0 < len(lanes) <= VREP_LANES_MAX:
            raise InvalidError(f"a cut has 1 to {VREP_LANES_MAX} lanes, not {len(lanes)}")
        if len(text) > 255:
            raise InvalidError("a label has at most 255 bytes")
        for i, (epoch, lane, seq) in enumerate(lanes):
            at[i].epoch, at[i].lane, at[i].reserved, at[i].seq = epoch, lane, 0, seq
        request.cut_id = id_of(cut_id)
        request.lanes, request.count = at, <uint16_t>len(lanes)
        request.label, request.label_bytes = <const char *>text, <uint16_t>len(text)
        self.call(run_cut_complete, &request)
        return request.seq

    def resync(self, bint allowed=True, *, uint64_t bytes_per_s=0, bint everything=False):
        """Let sync copies run, or stop them; ``everything`` makes all blocks unshipped first."""
        cdef resync_request request
        request.allowed = allowed
        request.bytes_per_s = bytes_per_s
        request.everything = everything
        self.call(run_resync, &request)

    def consumer_attach(self, role, bytes target_id=bytes(16), uint64_t durable=0):
        """Admit a consumer; return its control file, a socket (data) and an eventfd (space).

        GoneError: the ring no longer holds what follows ``durable``.
        """
        cdef attach_request request
        if len(target_id) != 16:
            raise InvalidError("target_id is not 16 bytes")
        request.role = role_of(role)
        request.target_id = <const uint8_t *><const char *>target_id
        request.durable = durable
        self.call(run_attach, &request)
        return request.fds[0], request.fds[1], request.fds[2]

    def consumer_detach(self, role):
        """Forget a consumer of this role; NotFoundError when there is none."""
        cdef uint32_t number = role_of(role)
        self.call(run_detach, &number)

    def lose_ring(self):
        """Give up what the ring holds: it becomes unshipped, and a gap that may jump begins."""
        while True:
            try:
                self.call(run_lose, NULL)
            except AgainError:
                time.sleep(0.001)  # a sync copy in flight ends first
            else:
                return

    def compare(self, uint32_t disk, ranges):
        """Blocks of a disk may differ from the target's: they become unshipped, and a gap begins.

        :param ranges: (offset, length) rows, each a uint64. RangeError: one is not of the disk.
        """
        cdef compare_request request
        cdef Py_buffer view
        PyObject_GetBuffer(ranges, &view, PyBUF_SIMPLE)
        try:
            if view.len % sizeof(vrep_since_range):
                raise InvalidError(f"{view.len} bytes are no (offset, length) rows")
            request.disk = disk
            request.ranges = <const vrep_since_range *>view.buf
            request.count = <size_t>view.len // sizeof(vrep_since_range)
            self.call(run_compare, &request)
        finally:
            PyBuffer_Release(&view)

    def delta_begin(self, secrets):
        """Compare unshipped blocks from now on, instead of sending all of them; see
        filter/delta.h. `secrets` are those that hashes may have been made with, each 192 bytes."""
        cdef delta_request request
        cdef bytes joined = b"".join(secrets)
        if not joined or len(joined) % VREP_HASH_SECRET_BYTES:
            raise InvalidError(f"a hash secret has {VREP_HASH_SECRET_BYTES} bytes")
        request.secrets = <const uint8_t *>joined
        request.count = <uint32_t>(len(joined) // VREP_HASH_SECRET_BYTES)
        self.call(run_delta_begin, &request)

    def delta_end(self):
        """Send whole blocks again."""
        self.call(run_delta_end, NULL)

    def delta_take(self, uint32_t most=DELTA_WINDOWS):
        """Windows to ask the target for, and the seq up to which it must be durable before it
        is asked. GoneError: nothing is compared."""
        cdef take_request request
        request.most = min(most, VREP_DELTA_WINDOWS, 64)
        self.call(run_delta_take, &request)
        found = [Window(request.windows[i].id, request.windows[i].disk,
                        request.windows[i].offset, request.windows[i].length)
                 for i in range(request.count)]
        return found, request.at_least

    def delta_answer(self, uint64_t id, keys, hashes):
        """What the target holds of a window: for each 4 KiB a byte, 0 or 1 + the number of the
        secret, and 16 bytes of hash. NotFoundError: the window is gone, which does no harm."""
        cdef answer_request request
        cdef Py_buffer numbers, values
        request.id = id
        PyObject_GetBuffer(keys, &numbers, PyBUF_SIMPLE)
        try:
            PyObject_GetBuffer(hashes, &values, PyBUF_SIMPLE)
            try:
                if numbers.len > VREP_DELTA_WINDOW_BYTES or values.len != 16 * numbers.len:
                    raise InvalidError(f"{values.len} bytes of hashes for {numbers.len} blocks")
                request.keys = <const uint8_t *>numbers.buf
                request.hashes = <const vrep_delta_hash *>values.buf
                request.units = <uint32_t>numbers.len
                self.call(run_delta_answer, &request)
            finally:
                PyBuffer_Release(&values)
        finally:
            PyBuffer_Release(&numbers)

    def since(self, str name, changes):
        """Let front-ends offer, as the dirty bitmap ``name``, which blocks of a view may differ
        from a base point: what is in ``changes``, what is present already, and what is written
        from now on. To be called before the group is served.

        :param changes: for each disk, in order of their numbers, a buffer of (offset, length),
            each a uint64, such as ``Changes.list`` gives.
        """
        cdef since_request request
        cdef Py_buffer view
        if self.users:
            raise BusyError("the group is being served")
        text = name.encode()
        request.name = <const char *>text
        self.call(run_since, &request)
        request.name = NULL
        for number, ranges in enumerate(changes):
            PyObject_GetBuffer(ranges, &view, PyBUF_SIMPLE)
            try:
                if view.len % sizeof(vrep_since_range):
                    raise InvalidError(f"{view.len} bytes are no (offset, length) rows")
                request.disk = <uint32_t>number
                request.ranges = <const vrep_since_range *>view.buf
                request.count = <size_t>view.len // sizeof(vrep_since_range)
                self.call(run_since, &request)
            finally:
                PyBuffer_Release(&view)

    def attend(self):
        """What a server's thread does, once, for a group that none serves: acknowledgements are
        taken, timers run. Nothing while one does; none may start or stop meanwhile."""
        cdef vrep_group *group = self.enter()
        try:
            with nogil:
                vrep_group_attend(group)
        finally:
            self.leave()

    def let_go(self):
        """Begin to let go of the disks' locks, for a VM that switches back to its images; the
        status' ``handover`` becomes ``out``. BusyError in a hand-over."""
        self.call(run_let_go, NULL)

    def take_back(self):
        """Take the locks back. LockedError: another has a disk; its ``handover`` is ``past``."""
        self.call(run_take_back, NULL)

    def mirror_live(self):
        """Every write of the VM is sent from now on, and those that were not have been marked.
        GoneError: a disk has no connection."""
        self.call(run_mirror_live, NULL)

    def mirror_mark(self, uint32_t disk, ranges):
        """These ranges, (offset, length) each, may hold what the VM wrote and did not send."""
        cdef since_request request
        cdef vrep_since_range *array
        cdef size_t count = len(ranges)
        array = <vrep_since_range *>calloc(count + 1, sizeof(vrep_since_range))
        if array == NULL:
            raise MemoryError
        try:
            for i, (offset, length) in enumerate(ranges):
                array[i].offset = offset
                array[i].length = length
            request.disk = disk
            request.ranges = array
            request.count = count
            self.call(run_mirror_mark, &request)
        finally:
            free(array)

    def mirror_distrust(self):
        """Anything may have been written: all is unshipped, and unverified."""
        self.call(run_mirror_distrust, NULL)

    def mirror_barrier(self, uint64_t copies):
        """The VM's writes were drained after the status' ``mirror_copies`` was read."""
        self.call(run_mirror_barrier, &copies)

    def mirror_rest(self, images, bint begin=True):
        """The VM is off: have its images looked at and, with ``begin``, compared as long as nobody
        has one open or writes it; ``mirror_looked`` tells what came of it. ``images``: (index of
        a disk, path), of all that each consists of. BusyError: the mirror is live, or a look is
        under way."""
        cdef rest_request request
        cdef vrep_rest_image *array
        cdef size_t count = len(images)
        paths = [os.fsencode(path) for _, path in images]
        array = <vrep_rest_image *>calloc(count + 1, sizeof(vrep_rest_image))
        if array == NULL:
            raise MemoryError
        try:
            for i, (disk, _) in enumerate(images):
                array[i].disk = disk
                array[i].path = <const char *>paths[i]
            request.images = array
            request.count = count
            request.begin = begin
            self.call(run_mirror_rest, &request)
        finally:
            free(array)

    def mirror_looked(self):
        """What the last look found, if not that the images are at rest. LockedError: somebody has
        one open; AgainError: it was written in the last seconds; GoneError: it was replaced, or has
        another size; UnsupportedError: it cannot be told whether it is written; BusyError: the look
        is under way."""
        self.call(run_mirror_looked, NULL)

    def misses(self, uint32_t most=MISSES_MAX, timeout=None):
        """Wait for absent blocks that commands need; empty after ``timeout`` seconds."""
        cdef vrep_miss found[64]
        cdef uint32_t count
        cdef int timeout_ms = -1 if timeout is None else int(timeout * 1000)
        cdef vrep_group *group = self.enter()
        most = min(most, MISSES_MAX)
        try:
            with nogil:
                count = vrep_group_misses(group, found, most, timeout_ms)
        finally:
            self.leave()
        return [Miss(found[i].ticket, found[i].disk, found[i].offset, found[i].length)
                for i in range(count)]

    def fill(self, miss, data=None, parts=None):
        """End a miss with its bytes, or with zeroes; newer data of the guest stay. With ``parts``,
        rising (offset, length) of the disk, only those are written: the rest is there."""
        cdef Py_buffer view
        if data is None:
            self.end_miss(miss.ticket, NULL, parts, VREP_OK)
            return
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            if <uint64_t>view.len != <uint64_t>miss.length:
                raise InvalidError(f"a fill of {view.len} bytes for a miss of {miss.length}")
            self.end_miss(miss.ticket, view.buf, parts, VREP_OK)
        finally:
            PyBuffer_Release(&view)

    def fail(self, miss):
        """End a miss that could not be fetched: what waits for it fails with an I/O error."""
        self.end_miss(miss.ticket, NULL, None, VREP_E_IO)

    cdef end_miss(self, uint64_t ticket, const void *data, object parts, int outcome):
        cdef int status
        cdef uint32_t count = 0
        cdef vrep_fill_part *rows = NULL
        cdef vrep_group *group = self.enter()
        try:
            if parts is not None:
                rows = <vrep_fill_part *>calloc(len(parts) + 1, sizeof(vrep_fill_part))
                if rows == NULL:
                    raise MemoryError()
                for offset, length in parts:
                    rows[count].offset, rows[count].length = offset, length
                    count += 1
            with nogil:
                if rows == NULL:
                    status = vrep_group_fill(group, ticket, data, outcome)
                else:
                    status = vrep_group_fill_parts(group, ticket, data, rows, count)
        finally:
            free(rows)
            self.leave()
        check(status)

    def fill_next(self, uint16_t disk, uint64_t start=0, uint64_t most=1 << 20):
        """The next absent range of a view as a miss to fill; None when the disk is whole."""
        cdef vrep_miss miss
        cdef int status
        cdef vrep_group *group = self.enter()
        try:
            with nogil:
                status = vrep_group_fill_next(group, disk, start, most, &miss)
        finally:
            self.leave()
        if status == VREP_E_NOT_FOUND:
            return None
        check(status)
        return Miss(miss.ticket, miss.disk, miss.offset, miss.length)

    def sync_disk(self, uint16_t disk):
        """Make stable what a view's disk holds, and which blocks of it are there."""
        cdef int status
        cdef vrep_group *group = self.enter()
        try:
            with nogil:
                status = vrep_group_sync_disk(group, disk)
        finally:
            self.leave()
        check(status)

    def close(self, bint clean=True):
        """Drain and close; ``clean`` stores what lets the next open go on without a resync."""
        cdef vrep_group *group = self.handle
        if group == NULL:
            return
        if self.users:
            raise BusyError("the group is being served")
        self.closing = True
        vrep_group_stop_misses(group)
        while self.calls:
            time.sleep(0.001)
        self.handle = NULL
        with nogil:
            vrep_group_close(group, clean)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


cdef list cut_lanes(groups, bytes cut_id, double limit_ms, bint hold, bint release):
    """Have lanes that are served in this process hold and mark, or go on, or both in turn; return
    the seqs of their marks. Each marks as soon as it holds. What fails is raised with ``lane``, the
    number of the group that failed; nothing holds then. The interpreter runs meanwhile."""
    cdef vrep_group *handles[VREP_LANES_MAX]
    cdef cut_request requests[VREP_LANES_MAX]
    cdef int i = 0, count, failed = -1, status = VREP_OK, other
    cdef Group group
    groups = list(groups)
    count = len(groups)
    if not 0 < count <= VREP_LANES_MAX:
        raise InvalidError(f"a cut has 1 to {VREP_LANES_MAX} lanes, not {count}")
    entered = []
    try:
        for i, group in enumerate(groups):
            handles[i] = group.enter()
            entered.append(group)
            requests[i].cut_id = id_of(cut_id)
            requests[i].limit_ns = <uint64_t>(limit_ms * 1000000)
            requests[i].seq = 0
        with nogil:
            if hold:
                for i in range(count):
                    status = vrep_group_call(handles[i], run_cut_hold, &requests[i])
                    if status != VREP_OK:
                        failed = i
                        break
            if release or status != VREP_OK:
                for i in range(count):
                    # Whatever failed: a lane that holds for another cut is left alone.
                    other = vrep_group_call(handles[i], run_cut_release, &requests[i])
                    if status == VREP_OK and other != VREP_OK:
                        status, failed = other, i
    finally:
        for group in entered:
            group.leave()
    try:
        check(status)
    except Exception as error:
        error.lane = failed
        raise
    return [requests[i].seq for i in range(count)]


def cut_all(groups, bytes cut_id, double limit_ms=10.0):
    """Hold, mark and release some lanes, for one cut; return the seqs of their marks. Each holds
    until all have marked: so the first one waits for as little as can be. What fails is raised with
    ``lane``, the number of the group that failed: the cut is void."""
    return cut_lanes(groups, cut_id, limit_ms, True, True)


def cut_hold(groups, bytes cut_id, double limit_ms=10.0):
    """As `cut_all`, but the lanes hold until `cut_release`, or for ``limit_ms``."""
    return cut_lanes(groups, cut_id, limit_ms, True, False)


def cut_release(groups, bytes cut_id):
    """Let lanes go on that hold for a cut. TimeLimitError, with ``lane``: one did not hold any
    more, so the cut is void; the others go on all the same."""
    cut_lanes(groups, cut_id, 10.0, False, True)


def note_past(bytes group_id, shm_dir, state_dir):
    """A VM has the disks of a group that is not open here: the next open believes nothing.
    LockedError: a filter has it, and nothing is stored."""
    if len(group_id) != 16:
        raise InvalidError("group_id is not 16 bytes")
    cdef bytes shm = b"" if shm_dir is None else str(shm_dir).encode()
    cdef bytes state = str(state_dir).encode()
    cdef const char *where = NULL if shm_dir is None else <const char *>shm
    cdef const char *stored = state
    cdef const uint8_t *group = <const uint8_t *><const char *>group_id
    cdef int status
    with nogil:
        status = vrep_group_note_past(group, where, stored)
    check(status)
