"""What a target says that it holds, and what a source believes of it, against the laboratory's
plain list of all changes: through failovers, folds and damage a hash is never another block's."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import recovery_lab as lab_module

from vrep._core import layout
from vrep._core.filter import Window
from vrep._core.hash import hash_blocks
from vrep.errors import ProtocolError
from vrep.keys.datakey import DataKey
from vrep.source.delta import HashBook, Line
from vrep.target.delta import look_up
from vrep.target.manifest import DiskEntry, EpochState, Position
from vrep.target.reader import StoreReader
from vrep.wire import messages as m

BLOCK = 4096

DISKS = [DiskEntry("root", (1 << 20) + 512, 0), DiskEntry("data", 300 * 1024 + 1536, 1)]
WINDOWS = [Window(7, 0, 0, DISKS[0].bytes), Window(9, 1, 8192, DISKS[1].bytes - 8192)]


@pytest.fixture
def lab(tmp_path: Path, rng: Any) -> Iterator[Any]:
    made = lab_module.Lab(tmp_path / "b", DISKS, rng, segment_bytes=1 << 18, merge=False)
    made.sync()
    yield made
    made.close()


def question(lab: Any, at_least: int = 0) -> m.HashQuestion:
    return m.HashQuestion(
        group_id=lab.group_id,
        at_least=at_least,
        ranges=[m.HashRange(disk=w.disk, offset=w.offset, length=w.length) for w in WINDOWS],
    )


def ask(lab: Any) -> m.HashAnswer:
    lab.commit()
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        position = reader.durable_of(lab.store.manifest.current_epoch.epoch)
        answer = look_up(reader, position, question(lab))
    # As it travels.
    return m.decode_hash_answer(
        msgspec.msgpack.decode(msgspec.msgpack.encode(m.plain_part(answer)))
    )


def line(lab: Any) -> Line:
    current = lab.store.manifest.current_epoch
    return Line(current.epoch, current.parent.epoch, current.parent.seq)


def read(lab: Any, answer: m.HashAnswer, book: HashBook | None = None) -> dict[Any, bytes]:
    """The blocks of which something is known, and their hashes."""
    book = book or HashBook([lab.key])
    found, _refused = book.read(answer, dict(enumerate(WINDOWS)), line(lab))
    known = {}
    for number, (keys, hashes) in found.items():
        for unit, key in enumerate(keys):
            if key:
                where = (WINDOWS[number].disk, WINDOWS[number].offset + unit * BLOCK)
                known[where] = hashes[16 * unit : 16 * unit + 16]
    return known


def truth(lab: Any) -> dict[Any, bytes]:
    """The hash of each whole block at the durable position of the writer's line."""
    manifest = lab.store.manifest
    here = Position(manifest.current_epoch.epoch, 0, max(lab.seq, 1))
    found = {}
    for disk, content in enumerate(lab.model(manifest.ancestry(here))):
        whole = len(content) // BLOCK * BLOCK
        hashes = hash_blocks(bytes(content[:whole]), BLOCK, secret=lab.key.hash_secret()).hashes
        found.update(((disk, n * BLOCK), value.tobytes()) for n, value in enumerate(hashes))
    return found


def fork(lab: Any) -> None:
    """A failover to an earlier point, kept or rolled back: what comes after it is abandoned."""
    here = lab.commit()
    lowest = max(2, lab.store.manifest.horizon.seq, lab.epoch.parent.seq + 1)
    parent = Position(here.epoch, 0, lab.rng.randrange(min(lowest, here.seq), here.seq + 1))
    if lab.rng.random() < 0.7:
        lab.new_epoch(lab.store.add_epoch(writer=b"n" * 16, parent=parent))
        return
    given_up = lab.store.add_epoch(writer=b"o" * 16, parent=parent, state=EpochState.PROVISIONAL)
    lab.new_epoch(lab.store.roll_back_epoch(given_up.epoch))


def fold(lab: Any) -> None:
    horizon = lab.mark("horizon")
    lab.commit()
    lab.store.fold(horizon)


@pytest.mark.parametrize("round_", range(6))
def test_what_is_known_is_what_is_held(lab: Any, round_: int) -> None:
    for turn in range(4):
        for _ in range(lab.rng.randrange(5, 40)):
            lab.random_write()
        # Of a few random writes none may cover a block whole, or none may be left to see.
        lab.write(1, 8192, lab.rng.randbytes(BLOCK))
        known, held = read(lab, ask(lab)), truth(lab)
        assert (1, 8192) in known
        assert {where: held[where] for where in known} == known
        (fork if turn % 2 == round_ % 2 else fold)(lab)


def test_a_fold_keeps_the_hashes(lab: Any) -> None:
    for _ in range(120):
        lab.random_write()
    horizon = lab.mark("here")
    for _ in range(30):
        lab.write(1, 0, lab.rng.randbytes(65536))  # segments behind it
    lab.commit()
    before = read(lab, ask(lab))
    assert lab.store.fold(horizon)
    assert read(lab, ask(lab)) == before
    assert {where: truth(lab)[where] for where in before} == before


def test_each_block_of_a_large_record_is_found_by_itself(lab: Any) -> None:
    """Pieces cut it, and blocks of it were written again, whole and in part."""
    lab.write(0, 512, lab.rng.randbytes(700_000))
    lab.write(0, 40960, lab.rng.randbytes(BLOCK))
    lab.write(0, 81920 + 100, lab.rng.randbytes(50))
    lab.zeroes(0, 122880, BLOCK)
    known, held = read(lab, ask(lab)), truth(lab)
    assert (0, 0) not in known  # not whole
    assert (0, 81920) not in known
    assert (0, 122880) not in known
    blocks = [n * BLOCK for n in range(1, 171) if n not in (20, 30)]
    assert sorted(at for disk, at in known if disk == 0) == blocks
    assert {where: held[where] for where in known} == known


@pytest.mark.parametrize("round_", range(8))
def test_what_was_tampered_with_is_never_believed(lab: Any, round_: int) -> None:
    for _ in range(40):
        lab.random_write()
    answer, held = ask(lab), truth(lab)
    assert len(answer.records) > 3
    for _ in range(60):
        number = lab.rng.randrange(len(answer.records))
        known = read(lab, alter(lab, answer, number))
        assert {where: held[where] for where in known} == known
    assert read(lab, answer) == {where: held[where] for where in read(lab, answer)}


def alter(lab: Any, answer: m.HashAnswer, number: int) -> m.HashAnswer:
    """One record of an answer is not what was stored."""
    rng, records = lab.rng, list(answer.records)
    one, other = records[number], records[rng.randrange(len(records))]
    match rng.choice(["header", "word", "piece", "stream", "swap", "swap-piece"]):
        case "swap":
            # The runs name another record now. Where that one had the block as well, in an
            # earlier state, this is what a target is trusted not to say.
            place_of_other = records.index(other)
            records[number], records[place_of_other] = other, one
            for run in answer.runs:
                if run.record in (number, place_of_other):
                    disk, at, length = place(records[run.record])
                    if disk == WINDOWS[run.range].disk and at <= run.offset < at + length:
                        return answer
        case "swap-piece":
            if one.piece != other.piece:
                records[number] = msgspec.structs.replace(one, piece=other.piece, word=other.word)
        case "stream":
            records[number] = msgspec.structs.replace(one, stream=rng.choice([1, 5000]))
        case "word":
            word = one.word ^ (1 << rng.randrange(32))
            records[number] = msgspec.structs.replace(one, word=word)
        case field:
            raw = bytearray(getattr(one, field))
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            records[number] = msgspec.structs.replace(one, **{field: bytes(raw)})
    return msgspec.structs.replace(answer, records=records)


def place(item: m.HashRecord) -> tuple[int, int, int]:
    disk = int.from_bytes(item.header[14:16], "little")
    return disk, *(int.from_bytes(item.header[a:b], "little") for a, b in ((24, 32), (32, 36)))


def test_a_run_outside_of_what_was_asked_or_sealed_is_not_believed(lab: Any) -> None:
    lab.write(0, 16384, lab.rng.randbytes(32768))
    answer = ask(lab)
    (run,) = answer.runs
    assert len(read(lab, answer)) == 8
    for wrong in (
        m.HashRun(0, run.offset - BLOCK, BLOCK, run.record),
        m.HashRun(0, run.offset + run.length, BLOCK, run.record),
        m.HashRun(0, run.offset + 512, BLOCK, run.record),
        m.HashRun(0, run.offset, run.length + BLOCK, run.record),
        m.HashRun(0, DISKS[0].bytes, BLOCK, run.record),
        m.HashRun(1, run.offset, BLOCK, run.record),
        m.HashRun(5, run.offset, BLOCK, run.record),
        m.HashRun(0, run.offset, BLOCK, 17),
    ):
        assert read(lab, msgspec.structs.replace(answer, runs=[wrong])) == {}


def test_records_that_a_failover_abandoned_are_not_believed(lab: Any) -> None:
    """Whatever a target's index says: they are not on the writer's line."""
    parent = lab.write(0, 0, b"a" * 8192)
    lab.write(0, 0, b"b" * 8192)
    lab.commit()
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        wrong = look_up(reader, reader.durable, question(lab))
    lab.new_epoch(lab.store.add_epoch(writer=b"n" * 16, parent=parent))
    lab.write(1, 0, b"c" * 512)
    right = read(lab, ask(lab))
    assert len(wrong.records) == 1
    assert read(lab, wrong) == {}
    assert set(right) == {(0, 0), (0, BLOCK)}
    assert {where: truth(lab)[where] for where in right} == right


def test_records_behind_what_the_target_says_are_not_believed() -> None:
    line = Line(5, 3, 40)
    assert line.holds(5, 50, 50)
    assert not line.holds(5, 51, 50)
    assert line.holds(3, 40, 50)
    assert not line.holds(3, 41, 50)
    assert not line.holds(4, 1, 50)
    assert line.holds(2, 70, 50)
    assert not line.holds(6, 1, 50)
    assert not Line(1).holds(0, 0, 50)


def test_another_key_opens_nothing(lab: Any) -> None:
    for _ in range(10):
        lab.write(0, 0, lab.rng.randbytes(8192))
    answer = ask(lab)
    assert read(lab, answer, HashBook([DataKey.create(lab.group_id)])) == {}
    assert read(lab, answer, HashBook([DataKey.create(lab.group_id, 2)])) == {}
    both = HashBook([DataKey.create(lab.group_id, 2), lab.key])
    assert read(lab, answer, both) == read(lab, answer)
    assert both.secrets[1] == lab.key.hash_secret()


def test_a_piece_that_costs_more_than_it_saves_is_left_out(lab: Any) -> None:
    lab.write(0, 0, lab.rng.randbytes(1 << 20))
    for at in range(1, 256):
        lab.write(0, at * BLOCK, lab.rng.randbytes(BLOCK))
    answer = ask(lab)
    large = [item for item in answer.records if place(item)[2] == 1 << 20]
    assert large == []
    assert len(answer.records) == 255


@pytest.mark.parametrize(
    "plain",
    [
        None,
        {},
        {"group_id": b"g" * 16, "at_least": -1, "ranges": []},
        {"group_id": b"g" * 16, "at_least": 1, "ranges": []},
        {"group_id": b"g" * 16, "at_least": 1, "ranges": [{"disk": 0, "offset": 0, "length": 0}]},
        {
            "version": 2,
            "group_id": b"g" * 16,
            "at_least": 1,
            "ranges": [{"disk": 0, "offset": 0, "length": 4096}],
        },
    ],
)
def test_nonsense_is_no_question(plain: Any) -> None:
    with pytest.raises(ProtocolError):
        m.decode_hash_question(plain)


def test_kinds_are_those_of_the_format() -> None:
    """The place of fields that both ends read from headers."""
    names = [name for name, _ in sorted(layout.RECORD.fields.items(), key=lambda f: f[1][1])]
    assert names[3:10] == ["flags", "epoch", "lane", "disk", "seq", "offset", "length"]


def test_an_answer_of_many_small_records_needs_little_memory(lab: Any) -> None:
    """Random writes of one block each: an answer has a record for nearly every block."""
    lab.write(0, 0, lab.rng.randbytes(BLOCK))
    answer = ask(lab)
    many = msgspec.structs.replace(answer, records=answer.records[:1] * 4000)
    book = HashBook([lab.key])
    tracemalloc.start()
    try:
        _found, refused = book.read(many, dict(enumerate(WINDOWS)), line(lab))
        used = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert refused == 0
    assert used < 8 << 20
