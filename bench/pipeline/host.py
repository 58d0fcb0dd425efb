"""Serve one disk over NBD, vhost-user-blk or iSCSI until SIGTERM, tapped or not; then say what was.

    python -m bench.pipeline.host SOCKET IMAGE [--follow PROGRAM] [--vhost | --iscsi]

With ``--iscsi`` the socket is HOST:PORT.

With ``--follow`` the group has its replication tap, and a second process reads and
checksums every record. Prints one JSON object: the group's status, the server's
counters, what the follower saw, and the CPU seconds of both.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from bench.peers import iscsi
from vrep._core.filter import Group
from vrep._core.serve import Iscsi, Server

RING_BYTES = 256 << 20
GROUP_ID = bytes(range(16))
SIGNALS = {signal.SIGTERM, signal.SIGINT}


def server_of(group: Group, socket: str, front: str) -> Server:
    if front == "vhost":
        return Server(group, vhost={"disk": socket})
    if front == "nbd":
        return Server(group, socket)
    host, _, port = socket.rpartition(":")
    return Server(group, iscsi=Iscsi(GROUP_ID, ("disk",), host, int(port), iscsi.NAME))


def counters(server: Server, front: str) -> dict[str, Any]:
    if front == "vhost":
        return dict(server.vhost_stats()["disk"])
    return dict(server.iscsi_stats() if front == "iscsi" else server.stats)


def serve(
    socket: str, image: str, follow: str | None, front: str, shm: Path, state: Path
) -> dict[str, Any]:
    follower: subprocess.Popen[bytes] | None = None
    seen: dict[str, int] = {}
    group = Group(
        [("disk", f"file:{image}")],
        group_id=GROUP_ID,
        epoch_id=bytes(range(16)),
        shm_dir=shm,
        state_dir=state,
        tap=follow is not None,
        ring_bytes=RING_BYTES,
    )
    server = server_of(group, socket, front)
    if follow is not None:
        fds = group.consumer_attach("target")
        command = [follow, str(shm / "ring"), *map(str, fds)]
        follower = subprocess.Popen(command, pass_fds=fds, stdout=subprocess.PIPE)
    server.start()
    signal.sigwait(SIGNALS)
    stats = counters(server, front)
    server.stop()
    if follower is not None:
        follower.send_signal(signal.SIGTERM)
        seen = json.loads(follower.communicate(timeout=60)[0])
    status = dict(group.status())
    group.close()
    used = resource.getrusage(resource.RUSAGE_SELF)
    theirs = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "status": status,
        "server": stats,
        "follower": seen,
        "cpu_s": used.ru_utime + used.ru_stime,
        "follower_cpu_s": theirs.ru_utime + theirs.ru_stime,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("socket")
    parser.add_argument("image")
    parser.add_argument("--follow")
    fronts = parser.add_mutually_exclusive_group()
    fronts.add_argument("--vhost", action="store_const", dest="front", const="vhost")
    fronts.add_argument("--iscsi", action="store_const", dest="front", const="iscsi")
    parser.set_defaults(front="nbd")
    arguments = parser.parse_args()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm", prefix="vrep-bench-") as shm,
        tempfile.TemporaryDirectory(dir=Path(arguments.image).parent) as state,
    ):
        result = serve(
            arguments.socket,
            arguments.image,
            arguments.follow,
            arguments.front,
            Path(shm),
            Path(state),
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
