"""The filter process: hosts the native groups of this site and their NBD sockets.

Python opens and closes groups and answers the control socket; guests' I/O runs on native
threads that never enter Python. A group that cannot be opened is tried again and says why; its
disks are passed through meanwhile, unreplicated, so that its VM can run.
"""

from __future__ import annotations

import base64
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec
import numpy as np
import structlog

from vrep._core.filter import Group
from vrep.app.filter_cuts import FilterCuts
from vrep.app.hosted import Hosted, close, open_group, serve, serve_or_close
from vrep.app.publishing import Publisher
from vrep.app.resizing import note_sizes, plan_resize
from vrep.app.rest import rest
from vrep.app.strangers import note_stranger
from vrep.control import ControlServer, Reply
from vrep.errors import (
    BusyError,
    DetachedError,
    FencedError,
    GapError,
    GoneError,
    InvalidError,
    LockedError,
    NotFoundError,
    StateError,
    StorageError,
    VrepError,
)
from vrep.groups import GroupDefinition, GroupDirectory, gives_way, pauses_guest
from vrep.paths import SitePaths
from vrep.settings import Config

if TYPE_CHECKING:
    pass

SCAN_EVERY_S: Final = 1.0
RETRY_MAX_S: Final = 30.0
HANDOVER_S: Final = 60.0
PAUSE_GUEST_MS: Final = 5000
"""commands of a guest that is paused get so long to end"""

log = structlog.get_logger("vrep.filter")


@dataclass
class _Failed:
    """A group that could not be opened, and when to try again."""

    error: VrepError
    pause_s: float
    not_before: float
    locked_since: float = math.inf
    """when another was found to have its disks (monotonic)"""


class FilterHost:
    """Serves every group of a site until closed.

    `bypass_why`: this process stands in for a filter that does not start, and passes every group
    through. Only such a one can do without settings (None): it does not know where the change
    maps are, so every block that its groups have is copied again later.
    """

    def __init__(self, paths: SitePaths, config: Config | None, *, bypass_why: str = "") -> None:
        assert config is not None or bypass_why
        self._paths = paths
        self._config = config
        self._bypass_why = bypass_why
        self._groups = GroupDirectory(paths.root)
        self._cuts = FilterCuts(self._groups, self._lane)
        self._hosted: dict[str, Hosted] = {}
        self._passed: dict[str, Hosted] = {}
        """groups that are passed through; each stands in `_failed` as well, with the reason"""
        self._failed: dict[str, _Failed] = {}
        self._lock = threading.Lock()
        self._scanning = threading.Lock()
        self._resyncing = threading.Lock()
        self._stopping = threading.Event()
        self._control: ControlServer | None = None

    def start(self) -> None:
        """Open all groups, then the control socket: who connects finds them served."""
        run = self._paths.make_run()
        self._scan()
        self._control = ControlServer(
            run / "filter.sock",
            {
                "reload": self._reload,
                "status": self._status,
                "clients": lambda p: self._host(p).clients(),
                "pause_guest": self._pause_guest,
                "front": self._front,
                "consumer_attach": self._consumer_attach,
                "consumer_detach": self._consumer_detach,
                "mark": self._mark,
                "cut": self._cuts.cut,
                "cut_mark": self._cuts.mark,
                "cut_hold": self._cuts.hold,
                "cut_release": self._cuts.release,
                "cut_complete": self._cuts.complete,
                "resync": self._resync,
                "lose_ring": self._lose_ring,
                "compare": self._compare,
                "delta_begin": self._delta_begin,
                "delta_take": self._delta_take,
                "delta_answer": self._delta_answer,
                "delta_end": self._delta_end,
                "handover_begin": self._handover_begin,
                "handover_cancel": self._handover_cancel,
                "let_go": self._let_go,
                "take_back": self._take_back,
                "release": self._release,
                "resize": self._resize,
                "publish_objects": self._publish_objects,
                "mirror_begin": self._mirror_begin,
                "mirror_live": self._mirror_live,
                "mirror_mark": self._mirror_mark,
                "mirror_distrust": self._mirror_distrust,
                "mirror_barrier": self._mirror_barrier,
                "mirror_rest": lambda params: rest(self._host(params), params),
                "mirror_end": self._mirror_end,
                "stop": self._stop_requested,
            },
        )

    def run(self) -> None:
        """Until `request_stop`. Nothing that goes wrong with the groups' files ends it: the
        guests of all groups are served by this process."""
        while not self._stopping.wait(SCAN_EVERY_S):
            try:
                self._scan()
            except Exception as error:  # noqa: BLE001 - guests are served all the same
                log.error("the groups cannot be looked at", error=_text(error))

    def request_stop(self) -> None:
        self._stopping.set()

    def close(self) -> None:
        """Stop serving; every group is closed cleanly, so the next start finds nothing to do."""
        self._stopping.set()
        if self._control is not None:
            self._control.close()
        with self._scanning, self._lock:
            ending = [*self._hosted.values(), *self._passed.values()]
            self._hosted, self._passed = {}, {}
        for one in ending:
            self._try_close(one)

    # ---- groups ------------------------------------------------------------------

    def _scan(self) -> None:
        with self._scanning:
            if self._stopping.is_set() and self._control is not None:
                return
            names = set(self._groups.names())
            with self._lock:
                gone = [
                    held.pop(name)
                    for held in (self._hosted, self._passed)
                    for name in set(held) - names
                ]
                self._failed = {n: f for n, f in self._failed.items() if n in names}
                missing = sorted(names - set(self._hosted))
            for one in gone:
                self._try_close(one)
            self._end_late_handovers()
            for one in list(self._hosted.values()):
                if one.server is None:
                    one.group.attend()  # what is acknowledged of it is known all the same
                if one.publisher is not None:
                    one.publisher.step(one.group)
            for name in missing:
                self._try_open(name)

    def _try_open(self, name: str) -> None:
        failed = self._failed.get(name)
        if failed is not None and time.monotonic() < failed.not_before:
            return
        if not self._end_bypass(name):
            return
        definition = None
        try:
            definition = self._groups.load(name)
            if definition.detached:
                raise DetachedError(
                    f"{name!r} is detached: its VM runs without the filter; 'vrep attach' ends that"
                )
            if definition.yielded:
                raise DetachedError(
                    f"another site took {name!r} over, and protects it back to here: its disks "
                    "are left alone"
                )
            if definition.read_through_vm and not definition.mirrored:
                raise DetachedError(
                    f"{name!r} has a qcow2 image, which is replicated once its VM was attached: "
                    f"'vrep attach {name} --vm ... --mode mirror'"
                )
            if self._bypass_why:
                raise StateError(self._bypass_why)
            hosted = self._open(definition)
        except Exception as caught:  # noqa: BLE001 - it stands in the status
            # Whatever is wrong with one group, the others' guests are served.
            error = caught if isinstance(caught, VrepError) else VrepError(_text(caught))
            pause_s = min(failed.pause_s * 2, RETRY_MAX_S) if failed else 1.0
            news = failed is None or str(failed.error) != str(error)
            if news:
                level = log.info if isinstance(error, DetachedError) else log.error
                level("group cannot be served", group=name, error=str(error))
            if isinstance(error, LockedError):
                pause_s = 1.0  # asking is cheap, and a VM that was switched may be waiting
            passed = (
                definition is not None
                and not isinstance(error, DetachedError | LockedError)  # another has the disks
                and self._pass_through(definition, news)
            )
            # To try again would take the disks away from who uses them: see `_reload`.
            now = time.monotonic()
            failure = _Failed(error, pause_s, math.inf if passed else now + pause_s)
            if definition is not None and isinstance(error, LockedError):
                since = failed.locked_since if failed is not None else math.inf
                where = self._groups.path(name), self._shm_if_any(name)
                failure.locked_since = note_stranger(definition, since, *where)
            with self._lock:
                self._failed[name] = failure
            return
        with self._lock:
            self._failed.pop(name, None)
            self._hosted[name] = hosted
        log.info("group served", group=name, opened_as=hosted.group.status()["opened_as"])
        self._note_sizes(hosted)

    def _note_sizes(self, hosted: Hosted) -> None:
        """A plan that stays although it was carried out means nothing: it is told again later."""
        try:
            note_sizes(self._groups, hosted.definition, hosted.group)
        except VrepError as error:
            name = hosted.definition.name
            log.warning("sizes of disks are not noted", group=name, error=str(error))

    def _pass_through(self, definition: GroupDefinition, news: bool) -> bool:
        """Serve the disks of a group that cannot be served as it should. Whether it does."""
        if pauses_guest(definition) or definition.mirrored:  # that VM has its disks
            return False
        name = definition.name
        try:
            group = open_group(self._paths, definition, self._shm_if_any(name), bypass=True)
            hosted = Hosted(definition, group, serve_or_close(self._paths, definition, group))
        except Exception as caught:  # noqa: BLE001 - the reason before stands in the status
            if news:
                log.error("group is not passed through either", group=name, error=_text(caught))
            return False
        with self._lock:
            self._passed[name] = hosted
        log.warning("group is passed through, nothing is replicated", group=name)
        return True

    def _shm_if_any(self, name: str) -> Path | None:
        if self._config is None:
            return None
        try:
            return self._paths.make_shm(name, self._config.filter.shm_dir)
        except (OSError, VrepError):
            return None

    def _end_bypass(self, name: str) -> bool:
        """Give up passing a group through, unless a client would notice."""
        passed = self._passed.get(name)
        if passed is None:
            return True
        if self._bypass_why or passed.clients():
            return False
        with self._lock:
            del self._passed[name]
        self._try_close(passed)
        return True

    def _open(self, definition: GroupDefinition, *, handover: bool = False) -> Hosted:
        assert self._config is not None
        shm = self._paths.make_shm(definition.name, self._config.filter.shm_dir)
        group = open_group(self._paths, definition, shm, handover=handover)
        server = None
        if not pauses_guest(definition):
            server = serve_or_close(self._paths, definition, group)
        publisher = Publisher(definition.name, self._groups.path(definition.name))
        publisher.begin(group)
        return Hosted(definition, group, server, str(shm / "ring"), publisher=publisher)

    def _try_close(self, hosted: Hosted) -> None:
        """One group that does not end well leaves the others alone: its next start finds out."""
        try:
            close(hosted)
        except Exception as error:  # noqa: BLE001 - the others are closed all the same
            name = hosted.definition.name
            log.error("group was not closed cleanly", group=name, error=_text(error))

    # ---- control -----------------------------------------------------------------

    def _host(self, params: Mapping[str, Any]) -> Hosted:
        name = str(params["group"])
        with self._lock:
            hosted = self._hosted.get(name)
            failed = self._failed.get(name)
        if hosted is not None:
            return hosted
        if failed is not None:
            raise failed.error
        raise NotFoundError(f"no group {name!r} is served here")

    def _lane(self, name: str) -> Group:
        return self._host({"group": name}).group

    def _status(self, params: Mapping[str, Any]) -> dict[str, Any]:
        if params.get("group") is not None:
            return self._status_of(self._host(params))
        with self._lock:
            hosted, failed = dict(self._hosted), dict(self._failed)
            passed = dict(self._passed)
        answer: dict[str, Any] = {name: self._status_of(one) for name, one in hosted.items()}
        answer.update({name: {"error": str(one.error)} for name, one in failed.items()})
        for name, one in passed.items():
            flush_failed = one.group.status()["flush_failed"]
            clients = len(one.clients())
            answer.setdefault(name, {"error": ""}).update(
                bypass=True, clients=clients, flush_failed=flush_failed
            )
        return answer

    @staticmethod
    def _status_of(hosted: Hosted) -> dict[str, Any]:
        return {
            **hosted.group.status(),
            "disks": dict(hosted.group.disks),
            "clients": len(hosted.clients()),
            "guest_paused": hosted.server is None,
            "ring_path": hosted.ring_path,
        }

    def _consumer_attach(self, params: Mapping[str, Any]) -> Reply:
        hosted = self._host(params)
        group = hosted.group
        target_id = bytes.fromhex(str(params.get("target_id", ""))) or bytes(16)
        durable = int(params.get("durable", group.status()["durable"]))
        fds = group.consumer_attach(_role(params), target_id, durable)
        return Reply({"ring_path": hosted.ring_path}, list(fds))

    def _consumer_detach(self, params: Mapping[str, Any]) -> dict[str, Any]:
        self._host(params).group.consumer_detach(_role(params))
        return {}

    def _mark(self, params: Mapping[str, Any]) -> dict[str, Any]:
        hosted = self._host(params)
        try:
            seq = hosted.group.mark(str(params.get("label", "")))
        except GoneError:
            if not hosted.group.status()["gap"]:
                raise
            raise GapError(
                f"there is no recovery point of {hosted.definition.name!r} until its sync has ended"
            ) from None
        return {"seq": seq, "wall_ns": time.time_ns()}

    def _resync(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """What is not said stays: copying runs, or waits for a target, as it did, at the rate
        that the group has."""
        hosted = self._host(params)
        allowed, rate = params.get("allowed"), params.get("bytes_per_s")
        if params.get("all") and hosted.publisher is not None:
            hosted.publisher.lost()
        with self._resyncing:  # a session that begins meanwhile has the last word
            if allowed is None:
                allowed = hosted.group.status()["resync_allowed"]
            if rate is None:
                rate = hosted.definition.options.rate_bytes_per_s
            hosted.group.resync(
                bool(allowed), bytes_per_s=int(rate), everything=bool(params.get("all", False))
            )
        return {}

    def _lose_ring(self, params: Mapping[str, Any]) -> dict[str, Any]:
        hosted = self._host(params)
        with self._scanning:  # nothing is published between the two
            if hosted.publisher is not None:
                hosted.publisher.lost()
            hosted.group.lose_ring()
        return {}

    def _publish_objects(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Put what is due into the order now."""
        with self._scanning:
            hosted = self._host(params)
            if hosted.publisher is not None:
                hosted.publisher.step(hosted.group)
        return {}

    # ---- comparing -----------------------------------------------------------------

    def _compare(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Ranges of a disk may differ from what the target holds."""
        ranges = np.array(params["ranges"], "<u8").reshape(-1, 2)
        self._host(params).group.compare(int(params["disk"]), ranges)
        return {}

    def _delta_begin(self, params: Mapping[str, Any]) -> dict[str, Any]:
        secrets = [base64.b64decode(secret) for secret in params["secrets"]]
        self._host(params).group.delta_begin(secrets)
        return {}

    def _delta_take(self, params: Mapping[str, Any]) -> dict[str, Any]:
        windows, at_least = self._host(params).group.delta_take(int(params["most"]))
        return {"windows": windows, "at_least": at_least}

    def _delta_answer(self, params: Mapping[str, Any]) -> dict[str, Any]:
        group = self._host(params).group
        for number, keys, hashes in params["answers"]:
            try:
                group.delta_answer(int(number), base64.b64decode(keys), base64.b64decode(hashes))
            except NotFoundError:
                continue  # forgotten meanwhile: it is asked for again, or sent
        return {}

    def _delta_end(self, params: Mapping[str, Any]) -> dict[str, Any]:
        self._host(params).group.delta_end()
        return {}

    def _pause_guest(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Serve a group's guest no more, or again. Its connections end, the socket is gone: a
        QEMU with `reconnect-delay` waits. The group stays open, and is copied as ever."""
        name = str(params["group"])
        self._cuts.settle()
        with self._scanning:
            if name in self._passed and params["paused"]:
                with self._lock:
                    passed = self._passed.pop(name)
                    if name in self._failed:
                        self._failed[name].not_before = 0.0
                log.warning("guest is paused", group=name)
                self._try_close(passed)
                return {}
        hosted = self._host(params)
        with self._scanning:  # no two of these, and no close, at a time
            if self._hosted.get(hosted.definition.name) is not hosted:
                return {}
            if params["paused"] and (server := hosted.take_server()) is not None:
                log.warning("guest is paused", group=hosted.definition.name)
                server.stop(drain=True, timeout_ms=PAUSE_GUEST_MS)
            elif not params["paused"] and hosted.server is None:
                hosted.server = serve(self._paths, hosted.definition, hosted.group)
                log.info("guest is served again", group=hosted.definition.name)
        return {}

    def _front(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Serve a group over the front-ends that its definition names now. BusyError while a VM
        uses a disk: it would find its server gone."""
        hosted = self._host(params)
        name = hosted.definition.name
        with self._scanning:
            if hosted.clients():
                raise BusyError(f"a VM uses the disks of {name!r}: shut it down first")
            definition = self._groups.load(name)
            server = hosted.take_server()
            before = hosted.definition
            hosted.definition = msgspec.structs.replace(
                hosted.definition, disks=definition.disks, options=definition.options
            )
            if server is not None:
                server.stop(drain=True)
                try:
                    hosted.server = serve(self._paths, hosted.definition, hosted.group)
                except VrepError:  # a port that is taken: as it was before
                    hosted.definition = before
                    hosted.server = serve(self._paths, before, hosted.group)
                    raise
        return {}

    # ---- hand-over -----------------------------------------------------------------

    def _handover_begin(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Open a group beside the VM that has its disks open, for the VM to switch to."""
        name = str(params["group"])
        definition = self._groups.load(name)
        if pauses_guest(definition):
            raise FencedError(f"another site took {name!r} over")
        with self._scanning:
            if self._bypass_why:
                raise StateError(self._bypass_why)
            if not self._end_bypass(name):
                raise BusyError(f"{name!r} is passed through, to somebody who uses it")
            until = time.monotonic() + HANDOVER_S
            hosted = self._hosted.get(name)
            if hosted is not None:
                handover = hosted.group.status()["handover"]
                if handover not in ("in", "past"):
                    raise BusyError(f"{name!r} is served: no other VM has its disks open")
                if handover == "in":
                    hosted.handover_until = until
                    return {}
                self._give_up(hosted)  # as the detach would have done that was cut off
            hosted = self._open(definition, handover=True)
            hosted.handover_until = until
            with self._lock:
                self._failed.pop(name, None)
                self._hosted[name] = hosted
        log.info("group waits for its VM", group=name)
        return {}

    def _handover_cancel(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The VM did not switch: its disks are its own again."""
        with self._scanning:
            hosted = self._host(params)
            if hosted.group.status()["handover"] == "in":
                self._give_up(hosted)
        return {}

    def _end_late_handovers(self) -> None:
        """Called with `_scanning` held. A VM that waits for an answer has switched, and is not
        left alone: its locks will show that it did."""
        for hosted in list(self._hosted.values()):
            if hosted.handover_until and time.monotonic() > hosted.handover_until:
                status = hosted.group.status()
                if status["handover"] != "in":
                    hosted.handover_until = 0.0
                elif not status["handover_waiting"]:
                    log.warning("no VM switched to the group", group=hosted.definition.name)
                    self._give_up(hosted)

    def _give_up(self, hosted: Hosted) -> None:
        with self._lock:
            self._hosted.pop(hosted.definition.name, None)
        self._try_close(hosted)

    def _let_go(self, params: Mapping[str, Any]) -> dict[str, Any]:
        self._host(params).group.let_go()
        return {}

    def _take_back(self, params: Mapping[str, Any]) -> dict[str, Any]:
        self._host(params).group.take_back()
        return {}

    def _release(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Serve a group no more that was detached or given up; its files say that it is."""
        name = str(params["group"])
        if not gives_way(self._groups.load(name)):
            raise StateError(f"{name!r} is not detached")
        with self._scanning:
            hosted = self._hosted.get(name)
            if hosted is not None:
                self._give_up(hosted)
            with self._lock:
                self._failed.pop(name, None)
                passed = self._passed.pop(name, None)
            if passed is not None:
                self._try_close(passed)
            self._try_open(name)  # it is refused, and the status says why
        return {}

    # ---- sizes -----------------------------------------------------------------------

    def _resize(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Give a disk another size. Its clients' connections end once what they sent is done: one
        that connects again learns the size."""
        with self._scanning:
            hosted = self._host(params)
            name, group = hosted.definition.name, hosted.group
            if group.status()["mirror"]:
                raise StateError(f"{name!r} is mirrored: its VM has the disk, and cannot resize it")
            if group.status()["handover"]:
                raise StateError(f"{name!r} is on its way between a VM and the filter")
            definition = self._groups.load(name)
            plan = plan_resize(definition, dict(group.disks), params)
            if plan is None:
                return {"bytes": dict(group.disks)[str(params["disk"])], "changed": False}
            disk, was, size = plan
            self._groups.update(name, resizing={disk: (was, size)})
            log.info("disk gets another size", group=name, disk=disk, bytes=size)
            self._end_for_resize(hosted)
            self._try_open(name)
            with self._lock:
                now, failed = self._hosted.get(name), self._failed.get(name)
            if now is None:
                raise failed.error if failed else NotFoundError(f"{name!r} is not protected")
            got = dict(now.group.disks)[disk]
        if got != size:
            raise StorageError(f"disk {disk!r} could not be given {size} bytes: it has {got}")
        return {"bytes": size, "changed": True}

    def _end_for_resize(self, hosted: Hosted) -> None:
        """Drain a group and close it, with all that is known of it left in memory."""
        name = hosted.definition.name
        with self._lock:
            self._hosted.pop(name, None)
            self._failed[name] = _Failed(StateError(f"{name!r} is being resized"), 0.5, 0.0)
        try:
            server = hosted.take_server()
            if server is not None:
                server.stop(drain=True)
        finally:
            hosted.group.close(clean=False)

    # ---- mirror: the VM keeps its disks (filter/mirror.c) ----------------------------

    def _mirror_begin(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Open a group whose VM is to mirror its writes; its definition says so."""
        name = str(params["group"])
        definition = self._groups.load(name)
        if not definition.mirrored:
            raise StateError(f"{name!r} is not mirrored")
        with self._scanning:
            if not self._end_bypass(name):
                raise BusyError(f"{name!r} is passed through, to somebody who uses it")
            hosted = self._hosted.get(name)
            if hosted is not None and not hosted.group.status()["mirror"]:
                raise BusyError(f"{name!r} is served: no VM has its disks open")
            if hosted is None:
                hosted = self._open(definition)
                with self._lock:
                    self._failed.pop(name, None)
                    self._hosted[name] = hosted
        return {}

    def _mirror_live(self, params: Mapping[str, Any]) -> dict[str, Any]:
        self._host(params).group.mirror_live()
        return {}

    def _mirror_mark(self, params: Mapping[str, Any]) -> dict[str, Any]:
        ranges = [(int(offset), int(length)) for offset, length in params["ranges"]]
        self._host(params).group.mirror_mark(int(params["disk"]), ranges)
        return {}

    def _mirror_distrust(self, params: Mapping[str, Any]) -> dict[str, Any]:
        self._host(params).group.mirror_distrust()
        return {}

    def _mirror_barrier(self, params: Mapping[str, Any]) -> dict[str, Any]:
        self._host(params).group.mirror_barrier(int(params["copies"]))
        return {}

    def _mirror_end(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """A group whose definition does not say any more that it is mirrored is opened as it does
        say."""
        name = str(params["group"])
        if self._groups.load(name).mirrored:
            raise StateError(f"{name!r} is mirrored")
        with self._scanning:
            hosted = self._hosted.get(name)
            if hosted is not None and hosted.group.status()["mirror"]:
                self._give_up(hosted)
            with self._lock:
                self._failed.pop(name, None)
            self._try_open(name)
        return {}

    def _reload(self, _params: Mapping[str, Any]) -> dict[str, Any]:
        with self._lock:
            for failed in self._failed.values():
                failed.not_before = 0.0
        self._scan()
        return {}

    def _stop_requested(self, _params: Mapping[str, Any]) -> dict[str, Any]:
        self._stopping.set()
        return {}


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, VrepError) else f"{type(error).__name__}: {error}"


def _role(params: Mapping[str, Any]) -> Literal["target", "observer"]:
    match params.get("role", "target"):
        case "target":
            return "target"
        case "observer":
            return "observer"
        case role:
            raise InvalidError(f"a consumer is a target or an observer, not {role!r}")


__all__ = ["FilterHost"]
