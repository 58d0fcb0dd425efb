"""Serve: the disks of a group over NBD, vhost-user-blk and iSCSI, on a thread of their own.

The thread is C from end to end: it never takes the GIL, and neither Python's
garbage collector nor a busy interpreter can delay a guest.
"""

import os
from typing import NamedTuple

from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from vrep._core._status cimport check
from vrep._core.filter cimport Group, vrep_group
from vrep.errors import BusyError, GoneError, InvalidError, VrepError

cdef extern from "serve/loop.h" nogil:
    struct vrep_loop:
        pass
    int vrep_loop_create(vrep_group *group, vrep_loop **out)
    int vrep_loop_start(vrep_loop *loop)
    int vrep_loop_stop(vrep_loop *loop, bint drain, uint32_t timeout_ms)
    void vrep_loop_destroy(vrep_loop *loop)

cdef extern from "serve/accept.h" nogil:
    struct vrep_traffic:
        uint64_t requests
        uint64_t read_bytes
        uint64_t written_bytes
        uint64_t errors

cdef extern from "serve/nbd.h" nogil:
    enum:
        VREP_NBD_CONNECTIONS_MAX
    struct vrep_nbd_server:
        pass
    struct vrep_nbd_config:
        const char *unix_path
        uint32_t unix_mode
        int64_t unix_group
        const char *tcp_host
        uint16_t tcp_port
        uint16_t connections
        uint64_t elsewhere
    struct vrep_nbd_client:
        char address[64]
        char export_name "export"[64]
        uint64_t connected_ns
        vrep_traffic traffic
    struct vrep_nbd_stats:
        uint64_t accepted
        uint64_t refused
        uint64_t fenced
        vrep_traffic traffic
        uint64_t stalls
        uint32_t connections
    int vrep_nbd_create(vrep_loop *loop, const vrep_nbd_config *config, vrep_nbd_server **out)
    uint16_t vrep_nbd_port(const vrep_nbd_server *server)
    void vrep_nbd_destroy(vrep_nbd_server *server)
    uint32_t vrep_nbd_clients(vrep_nbd_server *server, vrep_nbd_client *out, uint32_t most)
    void vrep_nbd_stats_of "vrep_nbd_stats"(vrep_nbd_server *server, vrep_nbd_stats *out)

cdef extern from "serve/vhost.h" nogil:
    struct vrep_vhost_server:
        pass
    struct vrep_vhost_config_server:
        const char *unix_path
        uint32_t unix_mode
        int64_t unix_group
        uint32_t disk
        uint32_t block_bytes
        uint16_t queues
    enum:
        VREP_VHOST_MONITORS_MAX
    struct vrep_vhost_monitor:
        char address[64]
        uint64_t connected_ns
        bint holds
    struct vrep_vhost_stats:
        vrep_vhost_monitor monitor[2]
        uint64_t accepted
        uint64_t refused
        vrep_traffic traffic
        uint64_t resubmitted
        uint64_t stalls
    int vrep_vhost_create(vrep_loop *loop, const vrep_vhost_config_server *config,
                          vrep_vhost_server **out)
    void vrep_vhost_destroy(vrep_vhost_server *server)
    void vrep_vhost_stats_of "vrep_vhost_stats"(vrep_vhost_server *server, vrep_vhost_stats *out)

cdef extern from "scsi/scsi.h" nogil:
    struct vrep_scsi_unit_config:
        uint16_t disk
        uint32_t block_bytes
        bint removable
        const char *reservations_path
    struct vrep_scsi_config:
        uint8_t group_id[16]
        const vrep_scsi_unit_config *units
        uint32_t units_count

cdef extern from "serve/iscsi.h" nogil:
    enum:
        VREP_ISCSI_SESSIONS_MAX
        VREP_ISCSI_RULES_MAX
    struct vrep_iscsi_server:
        pass
    struct iscsi_credentials:
        const char *name
        const char *secret
        const char *mutual_name
        const char *mutual_secret
    struct vrep_iscsi_rule:
        const char *initiator
        const char *address
    struct vrep_iscsi_config:
        const char *host
        uint16_t port
        uint16_t sessions
        const char *target_name
        iscsi_credentials credentials
        const vrep_iscsi_rule *rules
        uint32_t rules_count
        vrep_scsi_config scsi
    struct vrep_iscsi_session:
        char address[64]
        char initiator[224]
        uint64_t connected_ns
        vrep_traffic traffic
    struct vrep_iscsi_stats:
        uint64_t accepted
        uint64_t refused
        vrep_traffic traffic
        uint64_t stalls
        uint32_t connections
    int vrep_iscsi_create(vrep_loop *loop, const vrep_iscsi_config *config,
                          vrep_iscsi_server **out)
    uint16_t vrep_iscsi_port(const vrep_iscsi_server *server)
    void vrep_iscsi_destroy(vrep_iscsi_server *server)
    uint32_t vrep_iscsi_sessions(vrep_iscsi_server *server, vrep_iscsi_session *out, uint32_t most)
    void vrep_iscsi_stats_of "vrep_iscsi_stats"(vrep_iscsi_server *server, vrep_iscsi_stats *out)

cdef extern from "filter/group.h" nogil:
    uint32_t vrep_group_disks(const vrep_group *group)
    const char *vrep_group_disk_name(const vrep_group *group, uint32_t disk)

CONNECTIONS_MAX = VREP_NBD_CONNECTIONS_MAX

cdef enum:
    VHOST_MAX = 64  # VREP_DISKS_MAX


cdef dict _moved(const vrep_traffic *traffic):
    return {
        "requests": traffic.requests,
        "read_bytes": traffic.read_bytes,
        "written_bytes": traffic.written_bytes,
        "errors": traffic.errors,
    }


class Iscsi(NamedTuple):
    """An iSCSI target: ``disks`` are its logical units, in this order.

    ``chap`` is the name and secret that initiators prove, ``mutual`` those that the target proves
    to them; without ``chap`` it listens on the loopback only. ``rules`` admit pairs of a name and
    an address or network, either of them ``None``; without any, whoever authenticates.
    ``reservations`` is a directory, where persistent reservations are kept; ``None``: nowhere.
    The medium of a disk in ``removable`` can be ejected and loaded again.
    """

    group_id: bytes
    disks: tuple[str, ...]
    host: str
    port: int
    target: str
    block_bytes: int = 512
    reservations: str | None = None
    chap: tuple[str, str] | None = None
    mutual: tuple[str, str] | None = None
    rules: tuple[tuple[str | None, str | None], ...] = ()
    sessions: int = 0
    removable: tuple[str, ...] = ()


cdef class Server:
    """Serves a group until ``stop``. Bound and listening once made, answering once started.

    :param group: an open group; it cannot be closed while it is served.
    :param unix_path: a Unix socket for NBD; a stale one there is replaced, a live one refused.
    :param mode: of the sockets.
    :param socket_gid: group that owns the sockets; ``None`` leaves it.
    :param tcp: ``(host, port)``, a loopback address; port 0 takes any (see ``port``).
    :param connections: of NBD, at a time; 0 is the most, ``CONNECTIONS_MAX``.
    :param vhost: Unix sockets of disks, by their names, for vhost-user-blk; NBD does not show them.
    :param vhost_block: what their guests see as a block: 512 or 4096 bytes.
    :param iscsi: an `Iscsi`; NBD does not show its disks either.
    """

    cdef readonly Group group
    cdef vrep_loop *loop
    cdef vrep_nbd_server *server
    cdef vrep_iscsi_server *target
    cdef object iscsi
    cdef vrep_vhost_server *vhost[VHOST_MAX]
    cdef uint32_t vhost_disk[VHOST_MAX]
    cdef uint32_t vhost_count
    cdef bint running, counted, stuck

    def __cinit__(self, Group group not None, unix_path=None, mode=0o600, socket_gid=None,
                  tcp=None, connections=0, vhost=None, uint32_t vhost_block=512, iscsi=None):
        cdef vrep_nbd_config config
        vhost = vhost or {}
        if unix_path is None and tcp is None and not vhost and iscsi is None:
            raise InvalidError("neither unix_path nor tcp nor vhost nor iscsi is given")
        if not 0 <= mode <= 0o777:
            raise InvalidError(f"mode is {mode:o}: 0 to 777")
        if not 0 <= connections <= CONNECTIONS_MAX:
            raise InvalidError(f"connections is {connections}: 0 to {CONNECTIONS_MAX}")
        self.group = group
        if group.handle == NULL:
            raise GoneError("the group is closed")
        if group.users:
            raise BusyError("the group is served already")
        path = None if unix_path is None else os.fsencode(unix_path)
        host = None if tcp is None else tcp[0].encode()
        config.unix_path = NULL
        if path is not None:
            config.unix_path = path
        config.unix_mode = mode
        config.unix_group = -1 if socket_gid is None else socket_gid
        config.tcp_host = NULL
        config.tcp_port = 0
        if tcp is not None:
            config.tcp_host = host
            config.tcp_port = tcp[1]
        config.connections = connections
        config.elsewhere = 0
        disks = [vrep_group_disk_name(group.handle, i).decode()
                 for i in range(vrep_group_disks(group.handle))]
        shown = [*vhost, *(iscsi.disks if iscsi is not None else ())]
        unknown = sorted(set(shown) - set(disks))
        if unknown:
            raise InvalidError(f"the group has no disk {unknown[0]!r}")
        if len(set(shown)) < len(shown):
            raise InvalidError("a disk is served over one front-end, once")
        check(vrep_loop_create(group.handle, &self.loop))
        where = unix_path if tcp is None else tcp
        try:
            for name, where in vhost.items():
                self._serve_vhost(disks.index(name), os.fsencode(where), vhost_block, &config)
                config.elsewhere |= <uint64_t>1 << disks.index(name)
            if iscsi is not None:
                where = f"{iscsi.host}:{iscsi.port}"
                self._serve_iscsi(iscsi, disks)
                for name in iscsi.disks:
                    config.elsewhere |= <uint64_t>1 << disks.index(name)
            where = unix_path if tcp is None else tcp
            if where is not None:
                check(vrep_nbd_create(self.loop, &config, &self.server))
        except VrepError as error:
            error.add_note(f"while listening on {where}")
            raise
        group.users += 1
        self.counted = True

    cdef int _serve_vhost(self, uint32_t disk, bytes path, uint32_t block_bytes,
                          const vrep_nbd_config *nbd) except -1:
        cdef vrep_vhost_config_server config
        config.unix_path = path
        config.unix_mode = nbd.unix_mode
        config.unix_group = nbd.unix_group
        config.disk = disk
        config.block_bytes = block_bytes
        config.queues = 0
        check(vrep_vhost_create(self.loop, &config, &self.vhost[self.vhost_count]))
        self.vhost_disk[self.vhost_count] = disk
        self.vhost_count += 1
        return 0

    cdef int _serve_iscsi(self, iscsi, list disks) except -1:
        cdef vrep_scsi_unit_config units[VHOST_MAX]
        cdef vrep_iscsi_rule rules[VREP_ISCSI_RULES_MAX]
        cdef vrep_iscsi_config config
        if len(iscsi.group_id) != 16:
            raise InvalidError("group_id: 16 bytes are needed")
        if len(iscsi.rules) > VREP_ISCSI_RULES_MAX:
            raise InvalidError(f"rules are {len(iscsi.rules)}: at most {VREP_ISCSI_RULES_MAX}")
        if not 0 <= iscsi.sessions <= VREP_ISCSI_SESSIONS_MAX:
            raise InvalidError(f"sessions is {iscsi.sessions}: 0 to {VREP_ISCSI_SESSIONS_MAX}")
        if set(iscsi.removable) - set(iscsi.disks):
            raise InvalidError("removable: a disk that is no unit of the target")
        kept = [  # what the pointers below point into
            None if iscsi.reservations is None
            else os.fsencode(os.path.join(iscsi.reservations, f"reservations.{disks.index(name)}"))
            for name in iscsi.disks
        ]
        for i, name in enumerate(iscsi.disks):
            units[i].disk = disks.index(name)
            units[i].block_bytes = iscsi.block_bytes
            units[i].removable = name in iscsi.removable
            units[i].reservations_path = NULL
            if kept[i] is not None:
                units[i].reservations_path = kept[i]
        pairs = [tuple(None if part is None else part.encode() for part in rule)
                 for rule in iscsi.rules]
        for i, (initiator, address) in enumerate(pairs):
            rules[i].initiator = NULL
            rules[i].address = NULL
            if initiator is not None:
                rules[i].initiator = initiator
            if address is not None:
                rules[i].address = address
        words = [None if word is None else word.encode()
                 for word in (iscsi.chap or (None, None)) + (iscsi.mutual or (None, None))]
        host, target = iscsi.host.encode(), iscsi.target.encode()
        config.host = host
        config.port = iscsi.port
        config.sessions = iscsi.sessions
        config.target_name = target
        config.credentials.name = NULL
        config.credentials.secret = NULL
        config.credentials.mutual_name = NULL
        config.credentials.mutual_secret = NULL
        if words[0] is not None:
            config.credentials.name = words[0]
            config.credentials.secret = words[1]
        if words[2] is not None:
            config.credentials.mutual_name = words[2]
            config.credentials.mutual_secret = words[3]
        config.rules = rules
        config.rules_count = len(pairs)
        for i in range(16):
            config.scsi.group_id[i] = iscsi.group_id[i]
        config.scsi.units = units
        config.scsi.units_count = len(iscsi.disks)
        check(vrep_iscsi_create(self.loop, &config, &self.target))
        self.iscsi = iscsi
        return 0

    cdef void _destroy(self) noexcept nogil:
        cdef uint32_t i
        for i in range(self.vhost_count):
            vrep_vhost_destroy(self.vhost[i])
        self.vhost_count = 0
        vrep_iscsi_destroy(self.target)
        vrep_nbd_destroy(self.server)
        vrep_loop_destroy(self.loop)
        self.target = NULL
        self.server = NULL
        self.loop = NULL

    def __dealloc__(self):
        if self.running:
            with nogil:
                self.stuck = vrep_loop_stop(self.loop, False, 1000) < 0
        if self.counted:
            self.group.users -= 1
        if self.stuck and self.group.handle != NULL:
            return  # the group still holds commands that name this memory: it is left to it
        self._destroy()

    def start(self):
        """Answer clients, on a new thread."""
        if not self.counted:
            raise GoneError("the server was stopped")
        if self.running:
            raise BusyError("the server runs already")
        check(vrep_loop_start(self.loop))
        self.running = True

    def stop(self, bint drain=True, uint32_t timeout_ms=10000):
        """Refuse new work; answer what was submitted (``drain``) or cut; end the thread.

        TimeLimitError: commands were still in flight, such as reads of a view that nobody
        fills. The thread has ended all the same, and the group may be closed.
        """
        cdef int status = 0
        if not self.counted:
            return
        if self.running:
            self.running = False
            with nogil:
                status = vrep_loop_stop(self.loop, drain, timeout_ms)
        self.group.users -= 1
        self.counted = False
        self.stuck = status < 0
        if not self.stuck:
            with nogil:
                self._destroy()
        check(status)

    @property
    def port(self):
        """The TCP port, 0 without one."""
        return 0 if self.server == NULL else vrep_nbd_port(self.server)

    def clients(self):
        """Those connected now, each a dict."""
        cdef vrep_nbd_client *found
        cdef uint32_t count
        monitors = self._monitors() + self._sessions()
        if self.server == NULL:
            return monitors
        found = <vrep_nbd_client *>PyMem_Malloc(CONNECTIONS_MAX * sizeof(vrep_nbd_client))
        if found == NULL:
            raise MemoryError
        try:
            count = vrep_nbd_clients(self.server, found, CONNECTIONS_MAX)
            return monitors + [
                {
                    "address": found[i].address.decode("ascii", "replace"),
                    "disk": found[i].export_name.decode("utf-8", "replace"),
                    "connected_at": found[i].connected_ns / 1e9,
                    **_moved(&found[i].traffic),
                }
                for i in range(count)
            ]
        finally:
            PyMem_Free(found)

    def _monitors(self):
        """Counters are those of the disk: they stand with the one that holds it."""
        cdef vrep_vhost_stats stats
        cdef vrep_traffic nothing = vrep_traffic(0, 0, 0, 0)
        cdef uint32_t i, k
        found = []
        for i in range(self.vhost_count):
            vrep_vhost_stats_of(self.vhost[i], &stats)
            name = vrep_group_disk_name(self.group.handle, self.vhost_disk[i]).decode()
            for k in range(VREP_VHOST_MONITORS_MAX):
                if not stats.monitor[k].address[0]:
                    continue
                found.append({
                    "address": stats.monitor[k].address.decode("ascii", "replace"),
                    "disk": name,
                    "connected_at": stats.monitor[k].connected_ns / 1e9,
                    **_moved(&stats.traffic if stats.monitor[k].holds else &nothing),
                })
        return found

    @property
    def iscsi_port(self):
        """The port of the iSCSI target, 0 without one."""
        return 0 if self.target == NULL else vrep_iscsi_port(self.target)

    def _sessions(self):
        cdef vrep_iscsi_session *found
        cdef uint32_t count
        if self.target == NULL:
            return []
        found = <vrep_iscsi_session *>PyMem_Malloc(
            VREP_ISCSI_SESSIONS_MAX * sizeof(vrep_iscsi_session))
        if found == NULL:
            raise MemoryError
        try:
            count = vrep_iscsi_sessions(self.target, found, VREP_ISCSI_SESSIONS_MAX)
            return [
                {
                    "address": " ".join(filter(None, (
                        found[i].address.decode("ascii", "replace"),
                        found[i].initiator.decode("utf-8", "replace")))),
                    "disk": ",".join(self.iscsi.disks),
                    "connected_at": found[i].connected_ns / 1e9,
                    **_moved(&found[i].traffic),
                }
                for i in range(count)
            ]
        finally:
            PyMem_Free(found)

    def iscsi_stats(self):
        """Counters of the iSCSI target since it was made."""
        cdef vrep_iscsi_stats stats
        if self.target == NULL:
            raise GoneError("the server was stopped, or serves no iSCSI")
        vrep_iscsi_stats_of(self.target, &stats)
        return {
            "connections": stats.connections,
            "accepted": stats.accepted,
            "refused": stats.refused,
            **_moved(&stats.traffic),
            "stalls": stats.stalls,
        }

    def vhost_stats(self):
        """Of each disk that is served over vhost-user-blk: counters since the server was made."""
        cdef vrep_vhost_stats stats
        cdef uint32_t i
        found = {}
        for i in range(self.vhost_count):
            vrep_vhost_stats_of(self.vhost[i], &stats)
            name = vrep_group_disk_name(self.group.handle, self.vhost_disk[i]).decode()
            found[name] = {
                "accepted": stats.accepted,
                "refused": stats.refused,
                **_moved(&stats.traffic),
                "resubmitted": stats.resubmitted,
                "stalls": stats.stalls,
            }
        return found

    @property
    def stats(self):
        """Counters of NBD since the server was made, those of ended connections included."""
        cdef vrep_nbd_stats stats
        if self.server == NULL:
            raise GoneError("the server was stopped, or serves no NBD")
        vrep_nbd_stats_of(self.server, &stats)
        return {
            "connections": stats.connections,
            "accepted": stats.accepted,
            "refused": stats.refused,
            "fenced": stats.fenced,
            **_moved(&stats.traffic),
            "stalls": stats.stalls,
        }

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exception):
        self.stop()
