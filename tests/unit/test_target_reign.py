"""The rules of epochs, over a manifest that nobody stores."""

from __future__ import annotations

import numpy as np
import pytest

from vrep._core import layout
from vrep.errors import StateError
from vrep.target.manifest import DiskEntry, EpochEntry, EpochState, Manifest, Position
from vrep.target.reign import given_back

HERE, THERE = b"h" * 16, b"t" * 16


def entry(epoch: int, state: EpochState, writer: bytes, parent: Position) -> EpochEntry:
    return EpochEntry(
        epoch=epoch,
        state=state,
        epoch_id=bytes([epoch]) * 16,
        writer=writer,
        parent=parent,
        wall_ns=epoch,
    )


def manifest() -> Manifest:
    """One writer, and another that took over at its record 50 and has not decided."""
    return Manifest(
        group_id=b"g" * 16,
        store_id=b"s" * 16,
        name="web",
        epochs=(
            entry(1, EpochState.ACCEPTED, HERE, Position()),
            entry(2, EpochState.PROVISIONAL, THERE, Position(1, 0, 50)),
        ),
        disks=(DiskEntry("root", 1 << 20, 0),),
        wrapped_keys=(),
        segments=np.zeros(0, layout.MANIFEST_SEGMENT),
        runs=np.zeros(0, layout.MANIFEST_RUN),
        wall_ns=1,
    )


def test_a_rollback_goes_on_behind_all_that_the_writer_has_here() -> None:
    epochs = given_back(manifest(), 2, Position(1, 0, 80), 9)
    assert [each.state for each in epochs[:2]] == [EpochState.ACCEPTED, EpochState.ABANDONED]
    assert (epochs[2].writer, epochs[2].parent) == (HERE, Position(1, 0, 80))


def test_an_epoch_that_wrote_is_not_rolled_back() -> None:
    # Its records stand behind those of the writer before it, whose last place is not known here.
    with pytest.raises(StateError, match="epoch 2 wrote records"):
        given_back(manifest(), 2, Position(2, 0, 60), 9)
