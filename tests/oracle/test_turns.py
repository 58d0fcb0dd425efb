"""A history that another site had for a while: what this store holds of it, and what it claims."""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import recovery_lab as lab_module

from vrep import errors
from vrep._core import layout
from vrep.recovery.history import History, resolve
from vrep.recovery.points import list_points
from vrep.recovery.view import start_test, stop_test
from vrep.target.manifest import DiskEntry, EpochEntry, EpochState, Position
from vrep.target.reign import followed, left_at
from vrep.target.store import StoreReader

OURS = b"t" * 16


@pytest.fixture
def lab(tmp_path: Path, rng: random.Random) -> Iterator[Any]:
    lab = lab_module.Lab(tmp_path, [DiskEntry("root", 1 << 20, 0)], rng)
    yield lab
    lab.close()


def epoch(number: int, writer: bytes, parent: Position) -> EpochEntry:
    return EpochEntry(number, EpochState.ACCEPTED, secrets.token_bytes(16), writer, parent, number)


def away_and_back(lab: Any) -> tuple[Position, Position]:
    """Epoch 1 was left at a point before its end; epoch 2 was written to the other site; epoch 3,
    of the first writer again, begins 50 records later. The fork, and the last of epoch 1."""
    lab.sync()
    for _ in range(20):
        lab.random_write()
    fork = lab.random_write()
    last = [lab.random_write() for _ in range(10)][-1]
    lab.commit()
    store = lab.store
    two = store.raise_epoch(writer=OURS, parent=fork, state=EpochState.ACCEPTED)
    three = epoch(3, lab.source_id, Position(2, 0, fork.seq + 50))
    store.follow([store.manifest.epochs[0], two, three])
    return fork, last


def latest(lab: Any) -> Position:
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        found = History(reader).latest().position
        assert resolve(reader, f"pos:{found}", None, 0).position == found
    points = lab.store.points()
    assert points is not None
    assert points[1].position == found  # what the target tells is what a recovery finds
    return found


def test_nothing_that_another_site_holds_is_a_point(lab: Any) -> None:
    fork, last = away_and_back(lab)
    for _ in range(2):
        assert latest(lab) == fork
        with StoreReader(lab.paths.store, lab.group_id) as reader:
            for seq in (fork.seq + 1, last.seq, fork.seq + 50):
                for number in (2, 3):
                    with pytest.raises(errors.RecoveryError):
                        resolve(reader, f"pos:{number}/0/{seq}", None, 0)
        lab.close()
        lab.open()  # the same from the files
    raised = lab.store.raise_epoch(writer=OURS, parent=None, state=EpochState.PROVISIONAL)
    assert raised.parent == fork  # not the last record, which was left behind
    lab.store.roll_back_epoch(raised.epoch)


def test_a_line_that_was_away_begins_with_a_gap(lab: Any) -> None:
    fork, _last = away_and_back(lab)
    lab.new_epoch(lab.store.manifest.current_epoch)
    lab.commit()
    lab.close()
    lab.open()  # a stream that began changes nothing
    lab.start_stream()
    with pytest.raises(errors.CorruptError, match="not held here"):
        lab.random_write()
    lab.changes.pop() if lab.changes[-1].position.epoch == 3 else None
    lab.seq = fork.seq + 50
    lab.start_stream()
    begun = lab.gap_begin(jump=3)
    lab.write(0, 0, lab.rng.randbytes(1 << 20), layout.KIND_SYNC)
    lab.commit()
    assert latest(lab) == fork
    ended = lab.gap_end()
    lab.commit()
    assert latest(lab) == ended
    point = lab.random_write()
    lab.commit()
    assert latest(lab) == point
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        with pytest.raises(errors.GapError):
            resolve(reader, f"pos:{begun}", None, 0)
        assert bytes(lab.at(point)[0]) != bytes(lab.at(fork)[0])
    lab.close()
    found = list_points(lab.paths, "web")
    assert found.verdict.whole, found.verdict
    lab.open()
    for at in (fork, point):
        view = start_test(lab.paths, "web", f"pos:{at}")
        try:
            with lab_module.Nbd(view.socket, "root") as client:
                assert client.read(0, 1 << 20) == bytes(lab.at(at)[0])
        finally:
            stop_test(lab.paths, view.id)


def test_epochs_of_another_history_are_not_followed(lab: Any) -> None:
    known = lab.store.manifest.epochs
    one = known[0]
    two = epoch(2, OURS, Position(1, 0, 7))
    assert followed(known, [one, two]) == (one, two)
    assert followed((one, two), [one, two]) == (one, two)
    provisional = EpochEntry(2, EpochState.PROVISIONAL, b"p" * 16, OURS, two.parent, 2)
    for told in (
        [two],
        [epoch(1, lab.source_id, Position()), two],
        [EpochEntry(1, EpochState.ACCEPTED, one.epoch_id, OURS), two],
        [one, provisional],
        [one, epoch(3, OURS, Position(2, 0, 9))],
        [one, epoch(2, OURS, Position(2, 0, 9))],
    ):
        with pytest.raises((errors.StateError, errors.InvalidError)):
            followed(known, told)


def test_where_a_line_left_an_epoch() -> None:
    one = epoch(1, b"a" * 16, Position())
    two = epoch(2, OURS, Position(1, 0, 7))
    low = epoch(3, OURS, Position(2, 0, 5))
    three = epoch(3, OURS, Position(2, 0, 9))
    assert left_at([one, two], 1) == Position(1, 0, 7)
    assert left_at([one, two, three], 1) == Position(1, 0, 7)
    assert left_at([one, two, three], 2) == Position(2, 0, 9)
    assert left_at([one, two, low], 1) == Position(1, 0, 5)
    with pytest.raises(errors.StateError):
        left_at([one, epoch(3, OURS, Position(1, 0, 4))], 2)
    # After a failover that was rolled back, another one to a point before that.
    back = epoch(3, b"a" * 16, Position(1, 0, 9))
    assert left_at([one, two, back, epoch(4, OURS, Position(1, 0, 6))], 3) == Position(1, 0, 6)
    assert left_at([one, two, back, epoch(4, OURS, Position(3, 0, 12))], 3) == Position(3, 0, 12)
