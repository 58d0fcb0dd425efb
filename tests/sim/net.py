"""Network: byte streams between two sites that are slow, cut and hung, and control sockets.

A stream is what `FrameTransport` asks for (`vrep.wire.stream.ByteStream`): TLS itself is left out.
Bytes of a direction arrive in order, some time after they were written. A *hang* holds them back
and lets nothing through, until it is over; a *cut* ends both ends at once, and of what was on its
way an arbitrary first part arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kernel import NS, Kernel, Killed, Process, Task, Violation

from vrep import errors
from vrep.control import Reply
from vrep.errors import NotFoundError, ProtocolError, TimeLimitError, UnreachableError, VrepError
from vrep.wire import messages as m
from vrep.wire.protocol import Connection, Role
from vrep.wire.stream import ConnectionLostError
from vrep.wire.transport import FrameTransport, Timeouts

if TYPE_CHECKING:
    from plan import Plan

NEAR_NS: Final = 300_000
"""sites of one data centre hear each other within that"""


class Line:
    """How bytes go between two places."""

    def __init__(self, kernel: Kernel, slow_ns: int) -> None:
        self.kernel = kernel
        self.slow_ns = slow_ns
        self.hung_until_ns = 0
        self.down_until_ns = 0

    def latency_ns(self) -> int:
        return 50_000 + self.kernel.rng.randrange(self.slow_ns)


class Pipe:
    """One direction."""

    def __init__(self, kernel: Kernel, line: Line) -> None:
        self.kernel = kernel
        self.line = line
        self.parts: list[tuple[int, bytearray]] = []
        self.held = 0
        self.ended = False
        """nothing more will arrive"""
        self.readers: list[Task] = []
        self.writers: list[Task] = []

    def put(self, data: bytes) -> None:
        last = self.parts[-1][0] if self.parts else 0
        at = max(last, self.kernel.now_ns + self.line.latency_ns())
        self.parts.append((at, bytearray(data)))
        self.held += len(data)
        self.kernel.event("sent")
        self.kernel.wake_all(self.readers)

    def ready_in_s(self) -> float | None:
        """Until the first part is there; None: nothing is on its way."""
        if not self.parts:
            return None
        at = max(self.parts[0][0], self.line.hung_until_ns)
        return max(0.0, (at - self.kernel.now_ns) / NS)

    def take(self, room: memoryview) -> int:
        part = self.parts[0][1]
        count = min(len(part), len(room))
        if count > 1 and self.kernel.rng.random() < 0.05:
            count = self.kernel.rng.randrange(1, count)
        room[:count] = part[:count]
        del part[:count]
        if not part:
            self.parts.pop(0)
        self.held -= count
        self.kernel.event("received")
        self.kernel.wake_all(self.writers)
        return count

    def end(self, *, lose: bool) -> None:
        """Nothing more is written. `lose`: of what is on its way, only a first part arrives."""
        if self.ended:
            return
        self.ended = True
        if lose and self.parts:
            keep = self.kernel.rng.randrange(len(self.parts) + 1)
            del self.parts[keep:]
            if self.parts and self.kernel.rng.random() < 0.5:
                part = self.parts[-1][1]
                del part[self.kernel.rng.randrange(len(part)) + 1 :]
            self.held = sum(len(part) for _at, part in self.parts)
        self.kernel.wake_all(self.readers)
        self.kernel.wake_all(self.writers)


class Stream:
    """One end."""

    dialer = ""
    """the site at the other one"""

    def __init__(self, owner: Process, incoming: Pipe, outgoing: Pipe, capacity: int) -> None:
        self._owner = owner
        self._kernel = owner.kernel
        self._in = incoming
        self._out = outgoing
        self._capacity = capacity
        self._closed = False

    def read_into(self, buffer: memoryview, timeout_s: float) -> int | None:
        kernel, pipe = self._kernel, self._in
        self._owner.burn()
        deadline = kernel.deadline(timeout_s)
        while True:
            if self._closed:
                return 0
            left_s = (deadline - kernel.now_ns) / NS
            ready_s = pipe.ready_in_s()
            if ready_s is not None and ready_s <= 0:
                return pipe.take(buffer)
            if ready_s is None and pipe.ended:
                return 0
            if left_s <= 0:
                kernel.give_way()
                return None
            kernel.block(pipe.readers, left_s if ready_s is None else min(left_s, ready_s))

    def write_some(self, data: bytes | bytearray | memoryview) -> int:
        self._owner.burn()
        pipe = self._out
        if pipe.ended or self._closed:
            raise ConnectionLostError("the peer ended it without a word")
        with memoryview(data).cast("B") as view:
            count = min(view.nbytes, self._capacity - pipe.held)
            if count > 0:
                pipe.put(bytes(view[:count]))
            return max(0, count)

    def write(self, data: bytes | bytearray | memoryview, stall_s: float) -> None:
        with memoryview(data).cast("B") as view:
            at = 0
            while at < view.nbytes:
                count = self.write_some(view[at:])
                at += count
                if at < view.nbytes and not count:
                    held = self._out.held
                    if not self._kernel.block(self._out.writers, stall_s):
                        raise TimeLimitError(f"the peer took no bytes for {stall_s:g} s")
                    if self._out.held == held and not self._out.ended:
                        continue
        self._kernel.maybe()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._out.end(lose=False)
        self._in.end(lose=True)


class Network(Line):
    """Between the sites: who listens, and all connections."""

    def __init__(self, kernel: Kernel, plan: Plan) -> None:
        super().__init__(kernel, plan.slow_ns)
        self.near = Line(kernel, min(plan.slow_ns, NEAR_NS))
        """between sites that are near each other"""
        self.near_sites: set[str] = set()
        self.capacity = 1 << 16
        self.features: Sequence[str] = [
            feature for feature in m.FEATURES if plan.delta or feature != m.FEATURE_HASHES
        ]
        """that both sites say they have"""
        self._serve: dict[str, tuple[Process, Callable[[Stream], None]]] = {}
        self._open: list[tuple[Pipe, Pipe]] = []

    def listen(self, site_id: str, process: Process, serve: Callable[[Stream], None]) -> None:
        self._serve[site_id] = (process, serve)

    def dial(self, site_id: str, process: Process, timeout_s: float) -> Stream:
        kernel = self.kernel
        process.burn()
        dialer = process.names["host"].identity.site_id
        line = self.near if {site_id, dialer} <= self.near_sites else self
        if kernel.now_ns < line.hung_until_ns:
            wait_s = (line.hung_until_ns - kernel.now_ns) / NS
            kernel.sleep(min(timeout_s, wait_s))
            if wait_s >= timeout_s:
                raise UnreachableError("timed out")
        kernel.sleep(line.latency_ns() / NS)
        server, serve = self._serve.get(site_id, (None, None))
        if kernel.now_ns < line.down_until_ns or server is None or serve is None or server.dead:
            raise UnreachableError("connection refused")
        there, back = Pipe(kernel, line), Pipe(kernel, line)
        self._open = [pair for pair in self._open if not (pair[0].ended and pair[1].ended)]
        self._open.append((there, back))
        near = Stream(process, back, there, self.capacity)
        far = Stream(server, there, back, self.capacity)
        far.dialer = dialer
        for owner, stream in ((process, near), (server, far)):
            owner.at_kill.append(stream.close)
        kernel.spawn(server, lambda: serve(far), "peer")
        kernel.event("connection")
        return near

    @property
    def connected(self) -> bool:
        return any(not one.ended and not two.ended for one, two in self._open)

    def cut(self, line: Line | None = None) -> None:
        """End every connection, or those of a line, in the middle of what is on its way."""
        ended = [pair for pair in self._open if line is None or pair[0].line is line]
        if any(not one.ended and not two.ended for one, two in ended):
            self.kernel.event("cut" if line is None else "cut between hosts")
        for pair in ended:
            for pipe in pair:
                pipe.end(lose=True)
        self._open = [pair for pair in self._open if pair not in ended]


class Peers:
    """In the place of PeerRegistry: sites that trust each other."""

    def __init__(self, peers: Sequence[Any]) -> None:
        self._peers = peers

    def get(self, name: str) -> Any:
        for peer in self._peers:
            if name in (peer.site_id, peer.name):
                return peer
        raise NotFoundError(f"no site {name!r}")

    def list(self) -> list[Any]:
        return [*self._peers]


class Wires:
    """`vrep.wire.site` over a simulated network."""

    def __init__(self, network: Network, process: Process, identity: Any) -> None:
        self._network = network
        self._process = process
        self._identity = identity

    def connect(
        self, identity: Any, peer: Any, *, timeouts: Any = None, clock: Any = None
    ) -> FrameTransport:
        """In the place of `connect`."""
        timeouts = timeouts or Timeouts()
        stream = self._network.dial(peer.site_id, self._process, timeouts.connect_s)
        connection = Connection(Role.CLIENT)
        transport = FrameTransport(stream, connection, peer=peer, timeouts=timeouts, clock=clock)
        try:
            features = self._network.features
            transport.greet(identity.site_id, identity.name, "vrep simulated", features)
        except BaseException:
            transport.close()
            raise
        return transport

    def listener(
        self, identity: Any, peers: Any, _invites: Any, _address: str, handler: Any, **options: Any
    ) -> Listener:
        """In the place of `Listener`."""
        return Listener(self._network, self._process, identity, peers, handler, options)


class Listener:
    """Accepts connections of the peer, as `vrep.wire.site.Listener` does."""

    def __init__(
        self,
        network: Network,
        process: Process,
        identity: Any,
        peers: Any,
        handler: Callable[[FrameTransport], None],
        options: Mapping[str, Any],
    ) -> None:
        self.address = "simulated:1"
        self._network = network
        self._process = process
        self._identity = identity
        self._peers = peers
        self._handler = handler
        self._options = options

    def start(self) -> None:
        self._network.listen(self._identity.site_id, self._process, self._serve)

    def close(self) -> None:
        site_id = self._identity.site_id
        self._network.listen(site_id, self._process, lambda stream: stream.close())

    def _serve(self, stream: Stream) -> None:
        connection = Connection(Role.SERVER, known=True, allocate=self._options["allocate"])
        peer = self._peers.get(stream.dialer)
        transport = FrameTransport(
            stream, connection, peer=peer, timeouts=self._options["timeouts"]
        )
        try:
            site, features = self._identity, self._network.features
            transport.greet(site.site_id, site.name, "vrep simulated", features)
            self._handler(transport)
        except ProtocolError as error:
            # Nothing here changes bytes, so a rule that is broken is a defect of one of the ends.
            raise Violation(f"a rule of the wire is broken: {error.detail}") from None
        except (VrepError, OSError) as error:
            self._process.kernel.note(f"connection ended: {error}")
        finally:
            transport.close()
            stream.close()


class Controls:
    """The control sockets of one host, by path."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._servers: dict[str, tuple[Process, Mapping[str, Any]]] = {}

    def server(self, process: Process) -> Callable[..., Any]:
        """In the place of ControlServer, for a process."""
        controls = self

        class ControlServer:
            def __init__(self, path: Path, methods: Mapping[str, Any]) -> None:
                self._path = str(path)
                controls._servers[self._path] = (process, methods)

            def close(self) -> None:
                controls._servers.pop(self._path, None)

            def __enter__(self) -> ControlServer:
                return self

            def __exit__(self, *_exc: object) -> None:
                self.close()

        return ControlServer

    def client(self, caller: Process) -> Callable[..., Any]:
        """In the place of ControlClient, for a process."""
        controls = self

        class ControlClient:
            def __init__(self, path: Path, timeout: float = 10.0) -> None:
                self._path = str(path)
                self._timeout_s = timeout

            def call(self, method: str, **params: Any) -> Any:
                return self._ask(method, params).result

            def call_fds(self, method: str, **params: Any) -> tuple[Any, list[int]]:
                reply = self._ask(method, params)
                return reply.result, reply.fds

            def _ask(self, method: str, params: dict[str, Any]) -> Reply:
                caller.burn()
                return controls.ask(self._path, method, params, self._timeout_s)

        return ControlClient

    def ask(self, path: str, method: str, params: dict[str, Any], timeout_s: float) -> Reply:
        process, methods = self._servers.get(path, (None, {}))
        if process is None or process.dead:
            raise UnreachableError(f"{path}: connection refused")
        kernel = self._kernel
        kernel.event("hashes" if method == "delta_answer" else "control call")
        answer: list[Reply | VrepError] = []
        done: list[Task] = []

        def serve() -> None:
            try:
                try:
                    result = methods[method](params)
                    answer.append(result if isinstance(result, Reply) else Reply(result))
                except VrepError as error:
                    answer.append(error)
                except (KeyError, TypeError, ValueError, OSError) as error:
                    answer.append(errors.VrepError(f"{type(error).__name__}: {error}"))
            except Killed:
                answer.append(UnreachableError(f"{path}: it ended"))
                raise
            finally:
                kernel.wake_all(done)

        if kernel.current is None:
            serve()
        else:
            kernel.spawn(process, serve, f"control:{method}")
            if not kernel.wait_until(lambda: answer or process.dead, timeout_s, done):
                raise TimeLimitError(f"{path} does not answer")
        if not answer:
            raise UnreachableError(f"{path}: it ended")
        if isinstance(answer[0], VrepError):
            raise answer[0]
        return answer[0]
