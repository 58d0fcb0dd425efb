"""Groups at a target: which source is heard, and what becomes of their stores.

A `GroupHost` is one group at this target: its store, and at most one session. A session is
one channel of one connection. A new session of a group ends the old one and waits until what
that one sent is durable, so that the source goes on from a position that nothing can undo.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from msgspec import UnsetType

from vrep.errors import (
    BusyError,
    FencedError,
    IntegrityError,
    InvalidError,
    NotFoundError,
    PeerError,
    StateError,
    StorageError,
    StoreFullError,
    TimeLimitError,
    VrepError,
)
from vrep.groups import check_name
from vrep.lanes import group_of, lane_id, lane_ids_agree
from vrep.target import runs
from vrep.target.base import BaseDesk, BaseOffer, end_before
from vrep.target.epochs import epoch_state, judge, plain, wire_epoch
from vrep.target.halts import Halts
from vrep.target.manifest import DiskEntry, EpochEntry, EpochState, Position
from vrep.target.removal import remove_store
from vrep.target.session import DRAIN_S, Session, wire_points
from vrep.target.store import GroupStore, StoreOptions, StoreSpec
from vrep.wire import messages as m
from vrep.wire.transport import FrameTransport

__all__ = ["WINDOW_BYTES_MIN", "GroupHost", "RefusedError"]

WINDOW_BYTES_MIN: Final = 40 << 20
"""a whole record of the largest kind must fit"""
FULL_DRAIN_S: Final = 1.0
REOPEN_S: Final = 5.0
CONNECTED_S: Final = 10.0
"""a session whose source said something so lately counts as connected"""
GONE_S: Final = 20.0
"""silence after which a source is gone: longer than its pauses between two attempts after a
short cut, and than its process needs to come back"""

CLOCKS_APART_S: Final = 300.0
"""one of two clocks that differ by so much is wrong, whatever the link does"""
WINDOW_S_MAX: Final = 100 * 366 * 86400
_WINDOW: Final = re.compile(r"([0-9]{1,12})s")

log = logging.getLogger("vrep.target")


def _window_s(text: str) -> int:
    """Seconds of an offer's window; 0 when there is none."""
    match = _WINDOW.fullmatch(text)
    if text and (match is None or int(match[1]) > WINDOW_S_MAX):
        raise RefusedError("invalid", f"a window of {text!r}")
    return int(match[1]) if match else 0


def _wire_lost(store: GroupStore) -> list[m.LostRange] | UnsetType:
    ranges = store.lost()
    if ranges is None:
        return m.UNSET
    return [m.LostRange(disk=r.disk, offset=r.offset, length=r.length) for r in ranges]


class RefusedError(PeerError):
    """The group is refused."""

    def __init__(self, code: m.RefusalCode, text: str, epoch: m.EpochInfo | None = None) -> None:
        super().__init__(f"{text} ({code})")
        self.message = m.Refused(code=code, text=text[:4096], epoch=epoch)


@dataclass(frozen=True)
class Sign:
    """The last sign of life of the site whose VM writes the group, or wrote it."""

    seen_s: float
    site_id: bytes = b""
    site: str = ""
    status: m.Status | None = None
    """what it said of itself, if it said anything"""


class GroupHost:
    """One group at this target. Every change of it holds its lock; records do not."""

    def __init__(
        self,
        stores: Path,
        group_id: bytes,
        options: StoreOptions,
        window_bytes: int,
        open_store: Callable[..., GroupStore] = GroupStore.open,
        *,
        gone_s: float = GONE_S,
        site: bytes = b"",
        all_hosts: Callable[[], Iterable[GroupHost]] = lambda: (),
    ) -> None:
        """`site` is the one that this target is of, `all_hosts` are of all that it holds."""
        self.group_id = group_id
        self.error: VrepError | None = None
        """why the store cannot be opened"""
        self._stores = stores
        self._options = options
        self._window = max(window_bytes, WINDOW_BYTES_MIN)
        self._open_store = open_store
        self._store: GroupStore | None = None
        self._session: Session | None = None
        self._gone_s = gone_s
        self._site = site
        self._all_hosts = all_hosts
        self.bases = BaseDesk()
        # Who was there before this process started cannot be known: it may be there still.
        self._since_s = time.monotonic()
        self._sign = Sign(float("-inf"))
        self._retry_s = 0.0
        self._closed = False
        self.halts = Halts()
        self._lock = threading.RLock()

    @property
    def name(self) -> str:
        store = self._store
        return store.name if store is not None else self.group_id.hex()

    @property
    def vacant(self) -> bool:
        """Whether there is nothing to know of the group: no store, nor one that cannot be read."""
        return self._store is None and self.error is None and self.bases.now is None

    @property
    def session(self) -> Session | None:
        return self._session

    @property
    def failed(self) -> bool:
        """Whether opening the store (again) may help: a damaged one stays damaged until
        somebody sees to it and says `reload`, or the source asks for it."""
        store = self._store
        if store is None:
            return not isinstance(self.error, IntegrityError)
        return store.failure is not None

    def retry_due(self) -> bool:
        """Whether it is time to try: not more often than the pauses allow."""
        now = time.monotonic()
        if now < self._retry_s:
            return False
        self._retry_s = now + REOPEN_S
        return True

    def load(self) -> GroupStore | None:
        """The store, opened if it is there; again after a failure. None when the group has
        none yet. Raises what makes it unusable, and remembers it in `error`."""
        with self._lock:
            if self._closed:
                raise StateError("the target stops")
            if self._store is not None and self._store.failure is None:
                return self._store
            if self._store is not None:
                log.warning("group %s: the store is opened again", self.name)
                self._end_session(None)
                self._store.close()
                self._store = None
            try:
                self._store = self._open_store(self._stores, self.group_id, options=self._options)
            except NotFoundError:
                self.error = None
                return None
            except VrepError as error:
                self.error = error
                raise
            self.error = None
            return self._store

    # ---- sessions ------------------------------------------------------------------

    def open_session(
        self, transport: FrameTransport, channel: int, message: m.OpenGroup
    ) -> Session:
        """Take a source on; RefusedError says why not."""
        with self._lock:
            if transport.peer is None:
                raise RefusedError("not-allowed", "only a site that joined may send")
            site_id = bytes.fromhex(transport.peer.site_id)
            self._heard(site_id, transport.peer.name)  # it lives, whether or not it is refused
            if self.bases.busy:
                raise RefusedError("busy", "what the old disks hold is sealed first")
            store = self._admit(site_id, message)
            manifest = store.manifest
            newest = message.lanes[0].newest_seq
            verdict = judge(manifest, message.epoch, newest, site_id)
            if verdict.code is not None:
                raise RefusedError(verdict.code, verdict.text, wire_epoch(manifest, verdict.epoch))
            self._check_disks(store, message)
            if store.salvaged and m.FEATURE_COMPARE not in transport.peer_features:
                text = "records were lost here, and the source's release is too old to compare"
                raise RefusedError("version", text)
            self._end_session(m.Bye(reason="the source connected again"))
            try:
                store.commit(FULL_DRAIN_S if store.full else DRAIN_S)
            except (StoreFullError, TimeLimitError) as error:
                raise RefusedError("full" if store.full else "busy", str(error)) from None
            store.set_unprotected(False)
            store.set_limits(_window_s(message.window), message.quota)
            if message.wrapped_keys:
                store.set_wrapped_keys(message.wrapped_keys)
            session = Session(
                store, verdict.epoch, transport, channel, self.conditions, self._cuts_stand
            )
            here = store.resume_position()
            position = m.Position(epoch=here.epoch, lane=manifest.lane, seq=here.seq)
            points = wire_points(store)
            self._session = session  # who is told that it is open finds it connected
            try:
                transport.send(
                    m.GroupOpened(
                        epoch=wire_epoch(manifest, verdict.epoch),
                        lanes=[m.LaneState(durable=position, received=position, points=points)],
                        credit_bytes=self._window,
                        empty=not store.received.epoch,
                        compare=True if store.salvaged else m.UNSET,
                        lost=_wire_lost(store),
                        conditions=self.conditions(),
                    ),
                    channel,
                )
            except BaseException:
                self._session = None
                raise
            store.listen(session.acknowledge)
            return session

    def _cuts_stand(self) -> bool:
        """Whether a cut that the source knows to be durable may be the last point of the group.
        Not while a lane here cannot be read, or is in a gap: that may stand for what was lost, the
        cut's mark with it, and the other lanes' older history belongs to what can be recovered."""
        for host in self._all_hosts():
            if lane_id(host.group_id, 0) == lane_id(self.group_id, 0):
                store = host._store
                if store.in_gap if store is not None else host.error is not None:
                    return False
        return True

    def _admit(self, site_id: bytes, message: m.OpenGroup) -> GroupStore:
        """The store for an offer, created on first contact."""
        if len(message.lanes) != 1:
            raise RefusedError("invalid", "each lane of a group has a channel of its own")
        if not lane_ids_agree(message.name, self.group_id, message.lanes[0].lane):
            raise RefusedError("invalid", f"{message.name!r} and its lane do not belong together")
        try:
            store = self.load()
            if store is None:
                store = self._create(site_id, message)
        except StoreFullError as error:
            raise RefusedError("full", str(error)) from None
        except IntegrityError as error:
            raise RefusedError("damaged", str(error)) from None
        except (StorageError, StateError) as error:
            raise RefusedError("busy", str(error)) from None
        return store

    def _create(self, site_id: bytes, message: m.OpenGroup) -> GroupStore:
        offer = message.epoch
        if offer.counter < 1:
            raise RefusedError("invalid", "epochs begin at 1")
        try:
            # They come from another site, and become names of exports and of files.
            check_name(group_of(message.name))
            for disk in message.disks:
                check_name(disk.name, "disk")
        except InvalidError as error:
            raise RefusedError("invalid", str(error)) from None
        if len({disk.name for disk in message.disks}) != len(message.disks):
            raise RefusedError("invalid", "two disks have one name")
        parent = offer.parent
        spec = StoreSpec(
            name=message.name,
            disks=[DiskEntry(d.name, d.size, d.index) for d in message.disks],
            epoch=EpochEntry(
                epoch=offer.counter,
                state=EpochState.ACCEPTED,
                epoch_id=offer.id,
                writer=site_id,
                parent=Position(parent.epoch, parent.lane, parent.seq) if parent else Position(),
                wall_ns=time.time_ns(),
            ),
            wrapped_keys=message.wrapped_keys,
        )
        try:
            self._store = self._open_store(
                self._stores, self.group_id, create=spec, options=self._options
            )
        except InvalidError as error:
            raise RefusedError("invalid", str(error)) from None
        log.info("group %s: a new store", message.name)
        return self._store

    @staticmethod
    def _check_disks(store: GroupStore, message: m.OpenGroup) -> None:
        """Sizes change with the order of the records, and may do so in those to come."""
        offered = {disk.index: disk.name for disk in message.disks}
        held = {disk.index: disk.name for disk in store.disks}
        if offered != held:
            wrong = sorted(set(offered.items()) ^ set(held.items()))
            text = f"disk {wrong[0][1]!r} is not the same at both sites"
            raise RefusedError("size-mismatch", text)

    def _end_session(self, message: m.Message | None) -> None:
        self._sign = self._last_sign()
        session, self._session = self._session, None
        if session is not None:
            session.end(message)

    def drop_session(self, session: Session) -> None:
        """The connection of a session ended."""
        session.end()
        with self._lock:
            if self._session is session:
                self._end_session(None)

    # ---- epochs --------------------------------------------------------------------

    # ---- moves ---------------------------------------------------------------------

    def halt(self, *, pause: bool) -> Position:
        """Let the source halt its guest, for a move; the position of the last change that it
        made. It goes on when nobody asks for `keep_halted` for a while, or its session ends."""
        with self._lock:
            session = self._session
            if session is None or session.ended:
                raise StateError(f"the source of {self.name!r} is not connected")
            asked = self.halts.ask(session.transport, "group.halt", {"pause": pause})
        try:
            head = int(self.halts.wait(asked)["head"])
        except TimeLimitError:
            self.halts.tell(session.transport, "group.go-on")
            raise
        with self._lock:
            if self._session is not session or session.ended:
                raise StateError("the session of the source ended meanwhile: its guest goes on")
            position = Position(session.epoch.epoch, session.store.manifest.lane, head)
            self.halts.begin(session, position)
            return position

    def keep_halted(self) -> dict[str, Any]:
        """The move is under way still; how far the group is durable here. StateError when the
        guest goes on."""
        with self._lock:
            self.halts.require(self._session, renew=True)
            return {"durable": list(self.require().durable)}

    def go_on(self) -> dict[str, Any]:
        """The move does not happen."""
        with self._lock:
            self.halts.end()
        return {}

    def end_late_halt(self) -> None:
        """A move that nobody asks for any more does not happen."""
        with self._lock:
            if self.halts.late():
                log.warning("group %s: a move was given up: its guest goes on", self.name)
                self.halts.end()

    def raise_epoch(
        self,
        writer: bytes,
        parent: Position | None,
        state: EpochState,
        *,
        halted: bool = False,
    ) -> EpochEntry:
        """Append an epoch and end the session of the writer that it fences. `halted`: of a move,
        StateError unless that writer's guest is halted behind `parent` and all that it wrote is
        durable here."""
        with self._lock:
            store = self.require()
            if halted:
                known = store.manifest.current_epoch
                raised = known.writer == writer and known.state is EpochState.PROVISIONAL
                if raised and known.parent == parent:
                    return known  # nobody heard the answer
                last = self.halts.require(self._session)
                if parent != last:
                    raise StateError(f"the source's last change is {last}, and not {parent}")
            if self._session is not None:
                self._session.mute()
            try:
                self._drain_for_failover(store)
                if halted and store.durable != parent:
                    raise StateError(
                        f"{store.durable} is durable here, the source's last change is {parent}"
                    )
                entry = store.raise_epoch(writer=writer, parent=parent, state=state)
            except VrepError:
                self._end_session(m.Bye(reason="an epoch could not be raised"))
                raise
            self._fence(store)
            return entry

    def _drain_for_failover(self, store: GroupStore) -> None:
        try:
            store.commit(FULL_DRAIN_S if store.full else DRAIN_S)
        except (StoreFullError, TimeLimitError) as error:
            # What waits was never acknowledged as durable: a disaster does not wait for it.
            log.warning("group %s: records are left behind: %s", store.name, error)

    def accept_epoch(self, epoch: int) -> EpochEntry:
        with self._lock:
            return self.require().accept_epoch(epoch)

    def roll_back_epoch(self, epoch: int) -> EpochEntry:
        with self._lock:
            entry = self.require().roll_back_epoch(epoch)
            self._fence(self.require())
            return entry

    def follow(
        self, epochs: Sequence[EpochEntry], offer: BaseOffer | None = None
    ) -> dict[str, Any]:
        """Another site took the group over, and protects it to here: its history goes on in the
        epochs that it raised. `offer`: what this site can seal of its old disks before; while that
        is under way the answer says how far it is, and the same is to be asked again. Else nothing
        is to be done while there is no store: the first session of that site makes one. What an
        earlier base left short of the fork goes up to it, offer or not."""
        with self._lock:
            if offer is not None:
                under_way = self.bases.seal(self._store_for, epochs, offer)
                if under_way is not None:
                    return under_way
            elif self.bases.busy:
                return self.bases.told()  # of an offer that was made before
            store = self.load()
            if store is not None:
                self._drain_for_failover(store)
                end_before(store, epochs)
                store.follow(epochs)
                self._fence(store)
            return {}

    def _store_for(self, spec: StoreSpec) -> GroupStore:
        """The store, with nothing on its way; a new one if there is none."""
        store = self.load()
        if store is None:
            store = self._store = self._open_store(
                self._stores, self.group_id, create=spec, options=self._options
            )
            log.info("group %s: a new store, for what the old disks hold", spec.name)
        self._drain_for_failover(store)
        return store

    def _fence(self, store: GroupStore) -> None:
        session = self._session
        current = store.manifest.current_epoch
        if session is None or session.epoch.epoch == current.epoch:
            return
        self._end_session(
            m.Refused(
                code="fenced",
                text=f"epoch {current.epoch} took the group over",
                epoch=wire_epoch(store.manifest, current),
            )
        )

    def require(self) -> GroupStore:
        store = self.load()
        if store is None:
            raise NotFoundError(f"no store of group {self.group_id.hex()}")
        return store

    # ---- signs of life ---------------------------------------------------------------

    def _heard(self, site_id: bytes, site: str, status: m.Status | None = None) -> bool:
        """A site said something; whether it is one whose VM may use the group's disks, which
        any may be while the store cannot be read. What it said of its VM counts until it says
        otherwise."""
        store = self._store
        if store is not None and all(entry.writer != site_id for entry in store.epochs):
            return False
        last = self._last_sign()
        if status is None and last.site_id == site_id:
            status = last.status
        self._sign = Sign(time.monotonic(), site_id, site, status)
        return True

    def report(self, site_id: bytes, site: str, status: m.Status) -> None:
        """A source that sends nothing, since it is paused, fenced or in trouble, says how its
        VM is."""
        with self._lock:
            if not self._heard(site_id, site, status):
                raise FencedError("only a site that wrote the group may report on it")

    def written_by(self, site_id: bytes) -> bool:
        """Whether a site is the writer of the current epoch, as far as that is known."""
        store = self._store
        return store is None or store.manifest.current_epoch.writer == site_id

    def _last_sign(self) -> Sign:
        """Of a session whose connection died unnoticed the source may know already, and have
        reported since."""
        session = self._session
        if session is None or session.seen_s < self._sign.seen_s:
            return self._sign
        return Sign(session.seen_s, session.epoch.writer, session.site, session.status)

    # ---- what is known ---------------------------------------------------------------

    def source(self) -> dict[str, Any]:
        """How the source is, as far as this site can know. `guest_clients` is None when it did
        not say; `gone_in_s` is how long it must stay silent to count as gone."""
        session, sign = self._session, self._last_sign()
        status, now = sign.status, time.monotonic()
        silent_s = now - sign.seen_s
        connected = session is not None and not session.ended and now - session.seen_s < CONNECTED_S
        gone_in_s = self._gone_s - (now - max(sign.seen_s, self._since_s))
        return {
            "connected": connected,
            "site": sign.site,
            "silent_s": round(silent_s, 3) if sign.site else None,
            "gone_in_s": round(max(0.0, gone_in_s), 3),
            "guest_clients": status.values.get("clients") if status else None,
            "seen_ns": status.time_ns if status else 0,
            "state": status.state if status else "",
            "values": dict(status.values) if status else {},
            "conditions": list(status.conditions) if status else [],
        }

    def _old_source_lives(self, current: EpochEntry) -> bool:
        """Whether a site that was replaced was heard lately: then two VMs may run."""
        sign = self._sign
        lately = time.monotonic() - sign.seen_s < self._gone_s
        return lately and sign.site_id != current.writer

    def conditions(self) -> list[str]:
        store = self._store
        if store is None:
            return []
        found = ["target-full"] if store.full else []
        session = self._session
        if session is not None and abs(session.clock_ahead_s) > CLOCKS_APART_S:
            found.append("clocks-apart")
        return [*found, *store.usage().conditions]

    def epoch_state(self) -> dict[str, Any]:
        with self._lock:
            return {**epoch_state(self.require()), "source": self.source()}

    def status(self) -> dict[str, Any]:
        """One group of ``target.sock`` status. Takes no lock: it is asked for when something
        hangs, too."""
        store, session = self._store, self._session
        if store is None:
            return {
                "group_id": self.group_id.hex(),
                "name": self.group_id.hex(),
                "state": "error",
                "error": str(self.error) if self.error else "not opened",
                "conditions": ["damaged"] if isinstance(self.error, IntegrityError) else [],
            }
        current = store.manifest.current_epoch
        source = self.source()
        conditions = self.conditions()
        if store.manifest.unprotected:
            conditions.append("unprotected")  # nobody is missed
        elif not source["connected"]:
            conditions.append("source-silent")
        if self.bases.busy:
            conditions.append("sealing-base")
        if self._old_source_lives(current):
            conditions.append("old-source-alive")
        state = "replicating" if source["connected"] else "offline"
        if source["connected"] and source["state"] == "gap":
            state = "gap"
        if current.writer == self._site:
            state = "failed-over"
        if store.failure is not None:
            state = "error"
        return {
            **store.status(),
            "state": state,
            "conditions": conditions,
            "error": str(store.failure) if store.failure else store.full_why,
            "epochs": [plain(entry) for entry in store.epochs],
            "source": source,
            "sessions": int(session is not None),
            "disks": [
                {"name": d.name, "size": d.bytes, "index": d.index} for d in store.disks_now()
            ],
        }

    def delete(self, site_id: bytes) -> None:
        """Remove the store, for the site that writes it."""
        with self._lock:
            self._require_writer(site_id)
            self._remove()

    def delete_unprotected(self) -> None:
        """Remove the store of a group that its source gave up, for this site."""
        with self._lock:
            manifest = self.require().manifest
            if not manifest.unprotected:
                raise StateError(
                    f"the source of {self.name!r} has not given it up: unprotect it there"
                )
            if manifest.current_epoch is not manifest.accepted_epoch:
                raise StateError(f"a failover of {self.name!r} is under way: roll it back first")
            self._remove()

    def unprotect(self, site_id: bytes) -> None:
        """The site that writes the group gives it up; its history stays."""
        with self._lock:
            store = self._require_writer(site_id)
            self._end_session(m.Bye(reason="the group is not protected any more"))
            store.set_unprotected(True)

    def keep(self, site_id: bytes, window_s: int, quota_bytes: int) -> None:
        """How much history the site that writes the group asks for; 0: no limit."""
        if not (0 <= window_s <= WINDOW_S_MAX and 0 <= quota_bytes < 1 << 63):
            raise InvalidError("the window or the quota is out of bounds")
        with self._lock:
            self._require_writer(site_id).set_limits(window_s, quota_bytes)

    def fold(self, horizon: Position) -> dict[str, Any]:
        """Keep recovery points from here on only; the store's thread folds the rest."""
        with self._lock:
            self.require().set_horizon(horizon)
        return {}

    def _require_writer(self, site_id: bytes) -> GroupStore:
        store = self.require()
        if store.manifest.current_epoch.writer != site_id:
            raise FencedError("only the site that writes a group may change what is kept of it")
        return store

    def _remove(self) -> None:
        with self._lock:
            store = self.require()
            if self._session is not None:
                self._session.delta.release()  # it may read, for a source that compares
            if runs.pinned(store.directory):
                raise BusyError("a recovery reads the history of this group")
            self._end_session(None)
            self._closed, self._store = True, None
            store.close()
            remove_store(store.directory)

    def close(self) -> None:
        """End the session and let go of the store; what is not durable yet gets a moment."""
        self.bases.stop()
        with self._lock:
            self._closed = True
            self._end_session(m.Bye(reason="the target stops"))
            store, self._store = self._store, None
            if store is None:
                return
            try:
                store.commit(2.0)
            except VrepError as error:
                log.warning("group %s: closed with records not durable: %s", store.name, error)
            store.close()

    def open_fenced(self, params: Mapping[str, Any]) -> EpochEntry:
        """`raise_epoch` with parameters from a control socket."""
        parent = params.get("parent")
        return self.raise_epoch(
            bytes.fromhex(str(params["writer"])),
            None if parent is None else Position(*(int(n) for n in parent)),
            EpochState[str(params.get("state", "provisional")).upper()],
            halted=bool(params.get("halted", False)),
        )
