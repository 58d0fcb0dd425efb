"""A group's replication from the source's side: one thread that keeps it going.

It holds the ring, connects to the target, agrees on the position to resume at, opens a new
stream and lets a `Shipper` run, while this thread takes acknowledgements. Whatever goes wrong
ends the attempt and begins the next after a backoff; nothing of it reaches the guest. Beside it
a `Spiller` keeps the ring from filling up, as long as the group's hold on the ring stands.
"""

from __future__ import annotations

import base64
import contextlib
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import structlog

from vrep import threads
from vrep._core.seal import Sealer
from vrep.control import ControlClient
from vrep.errors import (
    AgainError,
    FencedError,
    PeerError,
    StateError,
    TenantKeyError,
    UnsupportedError,
    VrepError,
)
from vrep.groups import GroupDefinition, GroupDirectory, ParentPosition
from vrep.keys.datakey import DataKey
from vrep.keys.identity import SiteIdentity
from vrep.keys.tenant import TenantKeyring
from vrep.lanes import lane_of
from vrep.source.attach import RingHold
from vrep.source.bandwidth import Bandwidth
from vrep.source.delta import Delta, HashBook, Line
from vrep.source.effort import Effort
from vrep.source.feed import Feed
from vrep.source.halt import Halt, go_on
from vrep.source.holder import Holder, SealKeys, stream_of
from vrep.source.lost import Ranges, mark_lost, ranges_lost
from vrep.source.session_view import SessionView, spill_view
from vrep.source.ship import Shipper, new_buffers
from vrep.source.shipped import Shipped
from vrep.source.spiller import Spiller
from vrep.wire import messages as m
from vrep.wire.peers import Peer, PeerRegistry
from vrep.wire.site import connect
from vrep.wire.stream import Clock, SystemClock
from vrep.wire.transport import FrameTransport, Timeouts

BACKOFF_FIRST_S: Final = 0.2
BACKOFF_MAX_S: Final = 15.0
BACKOFF_OPENED_S: Final = 1.0
"""the longest pause after a session that the target opened"""
FENCED_RETRY_S: Final = 5.0
STATUS_EVERY_S: Final = 1.0
STOP_S: Final = 5.0
"""shorter than a command waits for the process that stops its session"""
GAP_WAIT_S: Final = 10.0
CHANNEL: Final = 1

log = structlog.get_logger("vrep.source")

Connect = Callable[..., FrameTransport]


class RefusedError(PeerError):
    """The target refused the group."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{text} ({code})")
        self.code = code


class ReplacedError(FencedError):
    """This writer was replaced by a newer epoch and is refused."""

    def __init__(self, message: m.Refused) -> None:
        super().__init__(message.text)
        at = message.epoch.parent if message.epoch is not None else None
        self.left = ParentPosition(at.epoch, at.lane, at.seq) if at is not None else None


class GroupSession:
    """Replicates one group until stopped."""

    def __init__(
        self,
        name: str,
        groups: GroupDirectory,
        identity: SiteIdentity,
        peers: PeerRegistry,
        keys: TenantKeyring,
        filter_control: ControlClient,
        *,
        timeouts: Timeouts | None = None,
        clock: Clock | None = None,
        connect_peer: Connect = connect,
        spiller: Spiller | None = None,
        bandwidth: Bandwidth | None = None,
    ) -> None:
        self.name = name
        self.view = SessionView()
        self.cut_at: Callable[[], tuple[int, int]] = lambda: (0, 0)
        """of a lane: epoch and seq of its mark in the newest cut of all lanes that is durable with
        each; zeroes: none"""
        self.history_lost: Callable[[], None] = lambda: None
        """of a lane: told that the target lost some of what it had, before anything is done"""
        self._groups = groups
        self._identity = identity
        self._peers = peers
        self._keys = keys
        self._filter = filter_control
        self._timeouts = timeouts
        self._clock = clock or SystemClock()
        self._connect = connect_peer
        self._stopping = threading.Event()
        self._nudge = threading.Event()
        self._spiller = spiller
        self._bandwidth = bandwidth
        self._sealing = SealKeys(name, groups, keys)
        self._holder = Holder(
            name, groups, peers, filter_control, self._sealing, spiller, self._clock,
            self._stopping,
        )  # fmt: skip
        self._effort: Effort | None = None
        # Of one shipper after the other: what an ended attempt leaves behind is freed late.
        self._buffers = new_buffers()
        self._transport: FrameTransport | None = None
        self._sent_keys: tuple[str, ...] | None = None
        self._opened = False
        """by the target, in this attempt"""
        self._replicated = False
        """and then it held more than before"""
        self._bytes_before = 0
        self._records_before = 0
        self._thread = threading.Thread(target=self._run, name=f"source:{name}", daemon=True)

    def start(self) -> None:
        if self._spiller is not None:
            self._spiller.renew = self._holder.renew
            self._spiller.start()
        self._thread.start()

    def stop(self, timeout_s: float = STOP_S) -> None:
        """End the session; the filter goes on recording. One that is just connecting ends when
        that does."""
        self._stopping.set()
        self.reload()
        self._thread.join(timeout_s)
        if self._spiller is not None:
            self._spiller.stop()

    def reload(self) -> None:
        """The definition changed, or a retry is wanted at once."""
        self._nudge.set()
        transport = self._transport
        if transport is not None and self._wants_end():
            transport.close("the group was changed")

    def _wants_end(self) -> bool:
        if self._stopping.is_set():
            return True
        try:
            definition = self._groups.load(self.name)
        except VrepError:
            return True
        # The target hears of other wrapped keys when a session opens.
        sent = self._sent_keys
        return definition.paused or sent not in (None, definition.wrapped_keys)

    # ---- the loop ------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether its thread runs; what ended it stands in the log."""
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException:
            log.exception("session ended", group=self.name)
            raise
        finally:
            self.view.connected = False
            self._holder.drop()

    def _loop(self) -> None:
        backoff = BACKOFF_FIRST_S
        while not self._stopping.is_set():
            self._nudge.clear()
            self._opened = self._replicated = False
            wait_s = 0.0
            try:
                definition = self._groups.load(self.name)
                self.view.paused = definition.paused
                if definition.paused:
                    self._keep_history(definition)
                    self._report_idle(definition, "paused")
                    self._nudge.wait(FENCED_RETRY_S)
                    continue
                self.view.attempts += 1
                self._attempt(definition)
                wait_s = BACKOFF_FIRST_S
            except FencedError as error:
                self._note_fenced(error)
                self._report_idle(definition, "fenced")
                wait_s = FENCED_RETRY_S
            except (VrepError, OSError) as error:
                self._failed(error)
            except Exception as error:
                log.exception("session failed", group=self.name)
                self._failed(error)
            finally:
                self.view.connected = False
                if self._spiller is not None:
                    self._spiller.connected = False
                self.view.conditions = []  # of the target, which says nothing now
                self._holder.drop_unless_alive()
            # What was reached may soon be reached again: a link that is up for moments only is
            # not to be met by chance.
            if self._replicated:
                backoff = BACKOFF_FIRST_S
            elif self._opened:
                backoff = min(backoff, BACKOFF_OPENED_S)
            if not self._stopping.is_set():
                self._nudge.wait(wait_s or backoff * random.uniform(0.5, 1.0))
            backoff = min(backoff * 2, BACKOFF_MAX_S)

    def _failed(self, error: BaseException) -> None:
        text = str(error) or type(error).__name__
        if text != self.view.error:
            log.warning("replication interrupted", group=self.name, error=text)
        self.view.error = text

    def _set_fenced(self, fenced: bool, text: str, left: ParentPosition | None = None) -> None:
        if fenced != self.view.fenced:
            log.warning("fenced" if fenced else "no longer fenced", group=self.name, reason=text)
        self.view.fenced, self.view.error = fenced, text if fenced else ""
        if not fenced:
            self.view.rival_clients = None
        try:
            self._groups.update(self.name, fenced=fenced, left=left if fenced else None)
        finally:
            if self._groups.load(self.name).options.on_fence == "pause":
                self._filter.call("pause_guest", group=self.name, paused=fenced)

    def _note_fenced(self, error: FencedError) -> None:
        """It is refused whether or not that can be written down and the filter told; the next
        refusal tries again."""
        try:
            self._set_fenced(True, str(error), getattr(error, "left", None))
        except VrepError as failed:
            log.warning("fenced, and not all is done", group=self.name, error=str(failed))

    def _keep_history(self, definition: GroupDefinition) -> None:
        """Spill, although nothing is to be sent."""
        if self._spiller is None:
            return
        try:
            self._holder.take(definition, self._sealing.open(definition))
        except (VrepError, OSError) as error:
            log.debug("nothing can be spilled", group=self.name, error=str(error))
        self._show_spill()

    # ---- one attempt -----------------------------------------------------------

    def _attempt(self, definition: GroupDefinition) -> None:
        self._sent_keys = None
        try:
            data_key = self._sealing.open(definition)
            peer = self._peers.get(definition.to_site)
            self._holder.take(definition, data_key)
        except Exception:
            self._report_idle(definition, "error")  # its VM may write all the same
            raise
        self._show_spill()
        with (
            self._link(peer) as transport,
            self._holder.claim(definition, data_key) as (hold, feed),
        ):
            if self._wants_end():
                return
            opened = self._open(transport, hold, feed, definition)
            self._opened = True
            go_on(self._groups, self._filter, self.name)  # what halted the guest did not happen
            self._note_keys(definition)  # as it was sent: what comes next may read it anew
            adopted = self._adopt_epoch(definition, opened.epoch)
            if self._wants_end():
                self._nudge.set()  # at once
                return
            if adopted is not definition:
                hold, feed = self._holder.take(adopted, data_key)
            self._replicate(transport, hold, feed, adopted, data_key, opened)

    @contextlib.contextmanager
    def _link(self, peer: Peer) -> Iterator[FrameTransport]:
        """A connection to the target, which `stop` cuts."""
        with self._connect(
            self._identity, peer, timeouts=self._timeouts, clock=self._clock
        ) as transport:
            self._transport = transport
            try:
                yield transport
            finally:
                self._transport = None

    def _report_idle(self, definition: GroupDefinition, state: str) -> None:
        """Tell the target, which gets no records, that this site lives and how many clients
        use its disks: it refuses a failover by that, or shows that two VMs run."""
        try:
            with self._link(self._peers.get(definition.to_site)) as transport:
                if self._stopping.is_set():
                    return
                try:
                    clients = int(self._filter.call("status")[self.name]["clients"])
                except (VrepError, KeyError):  # of a group that is not served, nor passed through
                    clients = None
                params = {"group_id": definition.group_id, "state": state, "clients": clients}
                answer = transport.ask("group.report", params)
                rivals = answer.get("clients") if isinstance(answer, dict) else None
                self.view.rival_clients = rivals if isinstance(rivals, int) else None
        except (VrepError, OSError) as error:
            log.debug("the target was not told", group=self.name, error=str(error))

    def _note_keys(self, definition: GroupDefinition) -> None:
        """The target holds these wrapped keys, durably: it did before it opened the group."""
        self._sent_keys = definition.wrapped_keys
        try:
            self._groups.update(self.name, keys_at_target=definition.keys_digest)
        except VrepError as error:
            log.warning("not noted that the target has the keys", group=self.name, error=str(error))

    def _open(
        self, transport: FrameTransport, hold: RingHold, feed: Feed, definition: GroupDefinition
    ) -> m.GroupOpened:
        parent, sizes = definition.parent, hold.status().get("disks", {})
        transport.send(
            m.OpenGroup(
                group_id=bytes.fromhex(definition.group_id),
                name=definition.name,
                epoch=m.EpochInfo(
                    counter=definition.epoch,
                    id=bytes.fromhex(definition.epoch_id),
                    parent=m.Position(epoch=parent.epoch, lane=parent.lane, seq=parent.seq)
                    if parent.epoch
                    else None,
                ),
                disks=[
                    m.DiskInfo(index=d.index, name=d.name, size=int(sizes.get(d.name, d.bytes)))
                    for d in definition.disks
                ],
                lanes=[
                    m.LaneOffer(
                        lane=lane_of(definition.name),
                        durable_seq=self.view.durable_seq,
                        oldest_seq=feed.oldest + 1,
                        newest_seq=hold.reader.head,
                    )
                ],
                wrapped_keys=[base64.b64decode(blob) for blob in definition.wrapped_keys],
                window=f"{definition.options.window_s}s" if definition.options.window_s else "",
                quota=definition.options.quota_bytes,
            ),
            CHANNEL,
        )
        while True:
            message = transport.expect(transport.timeouts.dead_after_s).message
            if isinstance(message, m.GroupOpened):
                return message
            if isinstance(message, m.Refused):
                self._refused(message)
            if isinstance(message, m.Bye):
                raise PeerError("the target ended the connection")

    @staticmethod
    def _refused(message: m.Refused) -> None:
        if message.code == "fenced":
            raise ReplacedError(message)
        raise RefusedError(message.code, message.text)

    def _adopt_epoch(self, definition: GroupDefinition, epoch: m.EpochInfo) -> GroupDefinition:
        """Take over the epoch that the target gave back to this writer after a rollback."""
        self._set_fenced(False, "the target accepts this writer")
        if (epoch.counter, epoch.id.hex()) == (definition.epoch, definition.epoch_id):
            return definition
        if epoch.counter < definition.epoch:
            raise StateError(
                f"the target accepts epoch {epoch.counter}, older than {definition.epoch}"
            )
        parent = epoch.parent
        definition = self._groups.update(
            self.name,
            epoch=epoch.counter,
            epoch_id=epoch.id.hex(),
            parent=ParentPosition(parent.epoch, parent.lane, parent.seq)
            if parent
            else ParentPosition(),
        )
        log.info("new epoch", group=self.name, epoch=epoch.counter)
        return definition

    def _settle(
        self,
        hold: RingHold,
        feed: Feed,
        durable_seq: int,
        *,
        compare: bool = False,
        lost: Ranges | None = None,
        went_back: bool = False,
    ) -> None:
        """Make sure that everything that follows what the target holds is here, or is a gap.
        Nothing is spilled meanwhile. `compare`: not all is there below that, it says; `lost`: but
        for this all is. `went_back`: it holds what this site does not know to have sent."""
        reader = hold.reader
        if durable_seq > reader.head:
            raise StateError(
                f"the target holds seq {durable_seq} but this site never wrote past "
                f"{reader.head}: the state of the filter was replaced by an older one. Stop 'vrep "
                f"run', empty the file {self._groups.path(self.name) / 'state'} and start it: all "
                "is compared then"
            )
        acknowledged = int(hold.status()["acknowledged"])
        if self._spiller is not None:
            self._spiller.durable = durable_seq
        feed.mend(durable_seq)
        if durable_seq < acknowledged or compare or went_back:
            ranges = lost if durable_seq >= acknowledged and not went_back else None
            log.warning(
                "this site went back to an earlier state: all is compared"
                if went_back
                else "the target lost what it had acknowledged: it is compared or sent",
                group=self.name,
                durable_seq=durable_seq,
                acknowledged=acknowledged,
                all=ranges is None,
            )
            self.history_lost()
            # In this order: cut off between the two, the next attempt finds the loss again.
            self.view.lost_bytes = mark_lost(hold, ranges)
            self.view.history_lost = not went_back
            self.view.rolled_back = went_back
            if compare or went_back:
                # What was spilled would follow, and end a gap of which it does not know.
                feed.drop()
            self._lose_ring(hold, feed)
        elif not feed.reaches(durable_seq) and not hold.jumps(feed.floor):
            log.warning(
                "records that were spilled are lost: a gap stands for them",
                group=self.name,
                durable_seq=durable_seq,
                released_seq=feed.floor,
            )
            self._lose_ring(hold, feed)
        hold.await_marks(self._stopping)

    def _lose_ring(self, hold: RingHold, feed: Feed) -> None:
        """Begin a gap in place of what the ring holds; copies in flight delay it."""
        deadline = time.monotonic() + GAP_WAIT_S
        while True:
            try:
                with feed.lock:  # the filter lets go of memory that may be being read
                    hold.lose_ring()
                return
            except AgainError:
                if time.monotonic() > deadline or self._stopping.wait(0.05):
                    raise

    def _replicate(
        self,
        transport: FrameTransport,
        hold: RingHold,
        feed: Feed,
        definition: GroupDefinition,
        data_key: DataKey,
        opened: m.GroupOpened,
    ) -> None:
        durable = opened.lanes[0].durable.seq
        shipped = Shipped(self._groups.path(self.name), definition, self._clock)
        with self._spiller.still() if self._spiller else contextlib.nullcontext():
            compare = opened.compare is True
            lost = ranges_lost(opened, definition, hold.status()) if compare else None
            went_back = shipped.went_back(durable)
            self._settle(hold, feed, durable, compare=compare, lost=lost, went_back=went_back)
        shipped.begin(durable)
        stream_id = secrets.token_bytes(16)
        sealer = Sealer(
            data_key.stream_key(stream_id),
            stream_id,
            epoch=definition.epoch,
            lane=lane_of(definition.name),
            resume_seq=durable,
            secret=data_key.hash_secret(),
            level=definition.options.compression,
        )
        if self._effort is None or self._effort.most != definition.options.compression:
            self._effort = Effort(definition.options.compression)
        transport.send(
            m.StreamStart(
                stream_id=stream_id,
                key_generation=data_key.generation,
                lane=lane_of(definition.name),
                resume_seq=durable,
            ),
            CHANNEL,
        )
        shipper = Shipper(
            feed,
            sealer,
            transport,
            CHANNEL,
            self._clock,
            self._bandwidth,
            self._effort,
            self._buffers,
            shipped.allow,
        )
        shipper.open_stream(stream_of(definition, data_key, self._clock))
        self._acknowledged(feed, durable, durable)
        self.view.durable_seq = self.view.received_seq = durable
        self.view.conditions = list(opened.conditions)
        self.view.show_points(opened.lanes[0].points)
        self.view.connected, self.view.error = True, ""
        if self._spiller is not None:
            self._spiller.connected = True
        log.info("replicating", group=self.name, resume_seq=durable, epoch=definition.epoch)
        with self._comparing(transport, hold, definition, data_key, opened) as delta:
            hold.resync(True, definition.options.rate_bytes_per_s)
            self._flow(transport, hold, feed, shipper, delta, shipped)

    def _flow(
        self,
        transport: FrameTransport,
        hold: RingHold,
        feed: Feed,
        shipper: Shipper,
        delta: Delta | None,
        shipped: Shipped,
    ) -> None:
        """Ship and listen until the connection ends."""
        failure: list[BaseException] = []
        thread = threading.Thread(
            target=self._ship,
            args=(shipper, transport, failure),
            name=f"ship:{self.name}",
            daemon=True,
        )
        threads.start(thread)
        halt = Halt(self.name, self._groups, self._filter, transport)
        try:
            self._listen(transport, hold, feed, shipper, halt, delta, shipped)
        except VrepError as error:
            raise (failure[0] if failure else error) from None
        finally:
            halt.close()
            shipper.stop()
            transport.close()
            thread.join()
            shipped.end()
            failure.clear()  # with it goes what its frames hold
            self._bytes_before += shipper.bytes_sent
            self._records_before += shipper.records_sent
            self._stop_resync(hold)

    @contextlib.contextmanager
    def _comparing(
        self,
        transport: FrameTransport,
        hold: RingHold,
        definition: GroupDefinition,
        data_key: DataKey,
        opened: m.GroupOpened,
    ) -> Iterator[Delta | None]:
        """Compare what is unshipped with what the target holds, if it can say what. What was
        sealed under a data key that cannot be opened is sent again."""
        if m.FEATURE_HASHES not in transport.peer_features:
            yield None
            return
        keys = {data_key.generation: data_key}
        for index in range(len(definition.wrapped_keys)):
            with contextlib.suppress(TenantKeyError):
                key = self._sealing.open(definition, index)
                keys[key.generation] = key
        parent = definition.parent
        delta = Delta(
            hold,
            transport,
            HashBook(keys.values()),
            bytes.fromhex(definition.group_id),
            Line(definition.epoch, parent.epoch, parent.seq),
            self.view.delta,
            empty=opened.empty,
        )
        try:
            delta.start()
        except UnsupportedError as error:  # a filter of an older release
            log.info("nothing is compared", group=self.name, error=str(error))
            yield None
            return
        try:
            yield delta
        finally:
            delta.stop()

    @staticmethod
    def _ship(shipper: Shipper, transport: FrameTransport, failure: list[BaseException]) -> None:
        try:
            shipper.run()
        except BaseException as error:  # noqa: BLE001 - handed to the session, which ends with it
            failure.append(error)
            transport.close("shipping failed")
        finally:
            shipper.stop()
            shipper.join()

    def _stop_resync(self, hold: RingHold) -> None:
        """Without a target, copies would only take the ring's room from the guest's writes."""
        try:
            hold.resync(False, 0)
        except VrepError as error:
            log.debug("filter not reached", group=self.name, error=str(error))

    # ---- acknowledgements --------------------------------------------------------

    def _acknowledged(self, feed: Feed, received_seq: int, durable_seq: int) -> None:
        feed.report(received=received_seq, durable=durable_seq)
        if self._spiller is not None:
            self._spiller.durable = durable_seq

    def _show_spill(self) -> None:
        """What the spill holds."""
        spiller = self._spiller
        if spiller is None:
            return
        spill, durable = spiller.spill, self.view.durable_seq
        held = spill.bytes if spill.last > durable else 0
        self.view.spill = spill_view(
            spill.quota_bytes,
            held=held,
            last_seq=spill.last if held else 0,
            oldest_ns=spill.oldest_ns(durable),
            full=spiller.full,
        )

    def _listen(
        self,
        transport: FrameTransport,
        hold: RingHold,
        feed: Feed,
        shipper: Shipper,
        halt: Halt,
        delta: Delta | None,
        shipped: Shipped,
    ) -> None:
        next_status = 0.0
        while not self._stopping.is_set():
            event = transport.receive(STATUS_EVERY_S)
            self.view.bytes_sent = self._bytes_before + shipper.bytes_sent
            self.view.records_sent = self._records_before + shipper.records_sent
            self.view.round_trip_s = transport.round_trip_s
            self.view.compression = self._effort.level if self._effort is not None else None
            if event is not None and isinstance(event.message, m.Request):
                halt.answer(event.message)
            elif event is not None and isinstance(event.message, m.Response):
                if delta is not None:
                    delta.answered(event.message)
            elif event is not None and not self._take(event.message, feed, shipper):
                return
            if transport.renewal_due:
                log.info("the connection carried much: another is made", group=self.name)
                self._nudge.set()  # at once
                return
            if time.monotonic() >= next_status:
                next_status = time.monotonic() + STATUS_EVERY_S
                if not hold.alive():
                    raise StateError("the filter restarted")
                status = hold.status()
                self.view.history_lost = self.view.history_lost and bool(status["gap"])
                self.view.rolled_back = self.view.rolled_back and bool(status["gap"])
                shipped.settle()
                self._show_spill()
                transport.post(self._report(status), CHANNEL)

    def _take(self, message: object, feed: Feed, shipper: Shipper) -> bool:
        match message:
            case m.Ack():
                progress = message.durable_seq > self.view.durable_seq
                self._replicated = self._replicated or progress
                self.view.received_seq = message.received_seq
                self.view.durable_seq = message.durable_seq
                self.view.conditions = list(message.conditions)
                self.view.show_points(message.points)
                head = feed.ring.head
                if message.received_seq > head:
                    raise StateError(f"the target acknowledged {message.received_seq}, past {head}")
                self._acknowledged(feed, message.received_seq, message.durable_seq)
                shipper.acknowledged(progress=progress)
            case m.Refused():
                self._refused(message)
            case m.Error():
                raise PeerError(f"{message.text} ({message.code})")
            case m.Bye():
                return False
        return True

    def _report(self, status: Mapping[str, Any]) -> m.Status:
        return m.Status(
            time_ns=self._clock.time_ns(),
            state="gap" if status["gap"] else "replicating",
            conditions=["unverified"] if status["unverified"] else [],
            values={
                "clients": int(status.get("clients", 0)),
                "head": int(status["head"]),
                "dirty-bytes": int(status["dirty_bytes"]),
                "unshipped-bytes": int(status["unshipped_bytes"]),
                **({"cut-epoch": cut[0], "cut-seq": cut[1]} if (cut := self.cut_at())[1] else {}),
            },
        )


__all__ = ["GroupSession", "RefusedError"]
