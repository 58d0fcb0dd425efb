"""The ring of tenant keys: files, exports that people type, releases."""

from __future__ import annotations

import contextlib
import datetime
import json
import stat
import threading
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrep.errors import TenantKeyError
from vrep.keys import (
    KeyExistsError,
    KeyFileError,
    KeyNotVerifiedError,
    SiteIdentity,
    TenantKey,
    TenantKeyring,
    UnknownKeyError,
    armor,
    opener,
    read_log,
    release,
    tenant_key_id,
)
from vrep.keys.release import is_release
from vrep.keys.tenant import export_text, import_text

COST = 1 << 10
NOW = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
KEY = TenantKey("acme", bytes(range(32)), NOW)


def ring(tmp_path: Path, name: str = "site") -> TenantKeyring:
    return TenantKeyring(tmp_path / name, now=lambda: NOW)


def test_create_list_and_file_mode(tmp_path: Path) -> None:
    keys = ring(tmp_path)
    assert keys.list() == []
    info = keys.create("acme")
    keys.create("beta")
    assert [each.name for each in keys.list()] == ["acme", "beta"]
    assert info.key_id == tenant_key_id(keys.get("acme").secret)
    path = tmp_path / "site" / "keys" / "acme.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert keys.find(info.key_id).secret == keys.get("acme").secret
    assert sorted(p.name for p in path.parent.iterdir()) == ["acme.key", "beta.key"]


def test_a_key_is_never_replaced(tmp_path: Path) -> None:
    keys = ring(tmp_path)
    before = keys.create("acme")
    with pytest.raises(KeyExistsError, match=before.key_id):
        keys.create("acme")
    other = ring(tmp_path, "other")
    other.create("acme")
    with pytest.raises(KeyExistsError, match="'--name' keeps it"):
        keys.import_key(other.export("acme"))
    assert keys.info("acme") == before


@pytest.mark.parametrize("name", ["", "../up", ".hidden", "a/b", "x" * 64, "a b", "n\n"])
def test_names_that_are_no_file_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(TenantKeyError):
        ring(tmp_path).create(name)


def test_unknown_and_damaged_keys(tmp_path: Path) -> None:
    keys = ring(tmp_path)
    with pytest.raises(UnknownKeyError, match="acme"):
        keys.get("acme")
    with pytest.raises(UnknownKeyError, match="0011223344556677"):
        keys.find("0011223344556677")
    keys.create("acme")
    path = tmp_path / "site" / "keys" / "acme.key"
    record = json.loads(path.read_text())
    record["secret"] = "A" * 42 + "E="
    path.write_text(json.dumps(record))
    with pytest.raises(KeyFileError, match="acme"):
        keys.get("acme")
    record["version"] = 9
    path.write_text(json.dumps(record))
    with pytest.raises(KeyFileError, match="version 9"):
        keys.get("acme")


def test_secrets_do_not_show(tmp_path: Path) -> None:
    keys = ring(tmp_path)
    keys.create("acme")
    key = keys.get("acme")
    shown = repr(key) + repr(keys.info("acme")) + repr(keys._read("acme"))
    assert key.secret.hex() not in shown
    assert repr(key.secret) not in shown


@pytest.mark.parametrize("passphrase", [None, "correct horse"])
def test_export_and_import(tmp_path: Path, passphrase: str | None) -> None:
    keys, other = ring(tmp_path), ring(tmp_path, "other")
    keys.create("acme")
    text = keys.export("acme", passphrase, scrypt_n=COST)
    info = other.import_key("sent by letter:\n\n" + text + "\nregards\n", passphrase)
    assert info.origin == "imported"
    assert other.get("acme").secret == keys.get("acme").secret
    # Once more is no harm; under a name of its own it is a second entry.
    assert other.import_key(text, passphrase) == info
    assert other.import_key(text, passphrase, name="copy").key_id == info.key_id


PINNED = """\
-----BEGIN VREP TENANT KEY-----
Version: 1
Name: acme
Key-Id: 4c223113afa04dfa
Created: 2026-01-02T03:04:05+00:00
Protection: none

1: aaaq eaye auda ocaj bifq ydio b4ib ceqt = 3tux
2: cqkr mfyy denb wha5 dypq = zmo2
check: 5adc8a221f19f6ca
-----END VREP TENANT KEY-----
"""


def test_the_exported_text_is_pinned() -> None:
    # What one release exported, every later one must read.
    assert export_text(KEY) == PINNED
    assert import_text(PINNED) == KEY


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("eaye", "eayf", "line 1"),
        ("wha5", "wha4", "line 2"),
        ("2: cqkr mfyy denb wha5 dypq = zmo2\n", "", "check"),
        ("Name: acme", "Name: acne", "check"),
        ("4c223113afa04dfa", "4c223113afa04dfb", "check"),
        ("-----END VREP TENANT KEY-----\n", "", "cut short"),
        ("TENANT KEY", "HOUSE KEY", "HOUSE KEY"),
    ],
)
def test_a_mistyped_export_says_where(old: str, new: str, message: str) -> None:
    with pytest.raises(KeyFileError, match=message):
        import_text(PINNED.replace(old, new))


@given(at=st.integers(0, len(PINNED) - 1), letter=st.characters(codec="ascii"))
def test_one_changed_letter_never_gives_another_key(at: int, letter: str) -> None:
    changed = PINNED[:at] + letter + PINNED[at + 1 :]
    with contextlib.suppress(KeyFileError):
        assert import_text(changed) == KEY


@given(st.text(max_size=400))
def test_any_text_is_refused_by_name(text: str) -> None:
    begin, end = PINNED.splitlines()[0], PINNED.splitlines()[-1]
    for each in (text, f"{begin}\n{text}\n{end}\n"):
        with pytest.raises(KeyFileError):
            import_text(each)


@given(body=st.binary(max_size=300))
def test_armor_round_trip(body: bytes) -> None:
    headers = {"A": "1", "B": "two words"}
    text = armor.encode("KIND", headers, body)
    block = armor.decode("before\n" + text.replace("\n", "\r\n") + "after", "KIND")
    assert (block.kind, block.headers, block.body) == ("KIND", headers, body)


def test_passphrases(tmp_path: Path) -> None:
    keys = ring(tmp_path)
    keys.create("acme")
    text = keys.export("acme", "right", scrypt_n=COST)
    with pytest.raises(KeyFileError, match="passphrase is wrong"):
        import_text(text, "wrong")
    with pytest.raises(KeyFileError, match="give it"):
        import_text(text)


@pytest.mark.parametrize(
    "cost", ["n=1 r=8 p=1", "n=1073741824 r=8 p=1", "n=1000 r=8 p=1", "n=x r=8 p=1"]
)
def test_a_file_cannot_ask_for_any_memory(cost: str) -> None:
    headers = {
        "Version": "1",
        "Name": "acme",
        "Key-Id": KEY.key_id,
        "Created": NOW.isoformat(),
        "Protection": "scrypt aes-256-gcm",
        "Scrypt": cost,
    }
    with pytest.raises(KeyFileError, match="cost"):
        import_text(armor.encode("VREP TENANT KEY", headers, bytes(76)), "word")


def test_verify_is_remembered(tmp_path: Path) -> None:
    keys = ring(tmp_path)
    keys.create("acme")
    keys.create("beta")
    with pytest.raises(KeyNotVerifiedError, match="accept-key-loss"):
        keys.require_verified("acme")
    assert keys.require_verified("acme", accept_key_loss=True).verified is None
    with pytest.raises(TenantKeyError, match=keys.info("beta").key_id):
        keys.verify("acme", keys.export("beta"))
    with pytest.raises(KeyFileError):
        keys.verify("acme", keys.export("acme")[:-40])
    with pytest.raises(KeyNotVerifiedError):
        keys.require_verified("acme")
    assert keys.verify("acme", keys.export("acme")).verified == NOW
    assert ring(tmp_path).require_verified("acme").verified == NOW


def test_release_reaches_one_host_and_is_logged(tmp_path: Path) -> None:
    keys = ring(tmp_path)
    keys.create("acme")
    target = SiteIdentity.create(tmp_path / "target", "target")
    third = SiteIdentity.create(tmp_path / "third", "third")
    text = keys.release("acme", target.certificate_pem, reason="site lost")
    assert keys.get("acme").secret.hex() not in text
    assert is_release(text)
    assert not is_release(keys.export("acme"))
    there = ring(tmp_path, "target")
    info = there.import_released(text, opener(target))
    assert info.origin == "released"
    assert there.get("acme").secret == keys.get("acme").secret
    with pytest.raises(TenantKeyError, match="not for this one"):
        there.import_released(text, opener(third))
    keys.release("acme", third.certificate_pem)
    first, second = read_log(keys.release_log_path)
    assert (first.recipient, first.reason, first.key_id) == ("target", "site lost", info.key_id)
    assert (first.recipient_fingerprint, second.recipient) == (target.fingerprint, "third")


def test_a_released_key_that_was_changed(tmp_path: Path) -> None:
    keys = ring(tmp_path)
    keys.create("acme")
    target = SiteIdentity.create(tmp_path / "target", "target")
    block = armor.decode(
        keys.release("acme", target.certificate_pem), kind := "VREP RELEASED TENANT KEY"
    )
    for at in (0, 1, 40, 70, 80, len(block.body) - 1):
        body = bytearray(block.body)
        body[at] ^= 1
        with pytest.raises(KeyFileError):
            opener(target)(armor.encode(kind, block.headers, bytes(body)))
    with pytest.raises(KeyFileError, match="changed"):
        opener(target)(armor.encode(kind, block.headers | {"Name": "other"}, block.body))
    with pytest.raises(TenantKeyError, match="recipient"):
        keys.release("acme", "no certificate")


def test_the_log_notices_changes(tmp_path: Path) -> None:
    keys = ring(tmp_path)
    keys.create("acme")
    target = SiteIdentity.create(tmp_path / "target", "target")
    for _ in range(3):
        keys.release("acme", target.certificate_pem)
    log = keys.release_log_path
    lines = log.read_bytes().splitlines(keepends=True)
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    log.write_bytes(lines[0] + lines[2])
    with pytest.raises(TenantKeyError, match="before its line 2"):
        read_log(log)
    log.write_bytes(b"".join(lines)[:-9])
    with pytest.raises(TenantKeyError, match="line 3"):
        read_log(log)
    assert read_log(tmp_path / "none") == []


def test_releases_at_once_are_one_chain(tmp_path: Path) -> None:
    keys = ring(tmp_path)
    keys.create("acme")
    target = SiteIdentity.create(tmp_path / "target", "target")
    threads = [
        threading.Thread(target=keys.release, args=("acme", target.certificate_pem))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_log(keys.release_log_path)) == 8


def test_lines_that_were_cut_off_the_log_are_noticed(tmp_path: Path) -> None:
    keys = ring(tmp_path)
    keys.create("acme")
    target = SiteIdentity.create(tmp_path / "target", "target")
    for _ in range(3):
        keys.release("acme", target.certificate_pem)
    log = keys.release_log_path
    lines = log.read_bytes().splitlines(keepends=True)
    for kept in range(3):
        log.write_bytes(b"".join(lines[:kept]))
        with pytest.raises(TenantKeyError, match="taken away"):
            read_log(log)
    log.unlink()
    with pytest.raises(TenantKeyError, match="taken away"):
        read_log(log)
    # Nor is a chain believed that was written anew.
    other = ring(tmp_path, "other")
    other.create("acme")
    for _ in range(4):
        other.release("acme", target.certificate_pem)
    log.write_bytes(other.release_log_path.read_bytes())
    with pytest.raises(TenantKeyError, match="written anew"):
        read_log(log)
    log.with_suffix(".head").write_bytes(b"{")
    with pytest.raises(TenantKeyError, match="head"):
        read_log(log)


def test_a_release_that_a_crash_cut_off_leaves_a_log_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ring(tmp_path)
    keys.create("acme")
    target = SiteIdentity.create(tmp_path / "target", "target")
    keys.release("acme", target.certificate_pem, reason="first")
    log = keys.release_log_path
    whole = log.read_bytes()
    keys.release("acme", target.certificate_pem, reason="second")
    line = log.read_bytes()[len(whole) :]
    head = log.with_suffix(".head").read_bytes()
    # After the line, before the head: nothing was handed out, and the log says more.
    with monkeypatch.context() as patch:
        patch.setattr(release, "write_atomic", mock.Mock(side_effect=OSError("power")))
        with pytest.raises(OSError, match="power"):
            keys.release("acme", target.certificate_pem, reason="third")
    assert [entry.reason for entry in read_log(log)] == ["first", "second", "third"]
    # Inside the line: it belongs to nobody, and the next one takes its place.
    log.write_bytes(whole + line + line[:40])
    log.with_suffix(".head").write_bytes(head)
    with pytest.raises(TenantKeyError, match="line 3"):
        read_log(log)
    keys.release("acme", target.certificate_pem, reason="fourth")
    assert [entry.reason for entry in read_log(log)] == ["first", "second", "fourth"]


def test_a_log_of_an_older_release_is_read_and_goes_on(tmp_path: Path) -> None:
    keys = ring(tmp_path)
    keys.create("acme")
    target = SiteIdentity.create(tmp_path / "target", "target")
    keys.release("acme", target.certificate_pem, reason="old")
    keys.release_log_path.with_suffix(".head").unlink()
    assert len(read_log(keys.release_log_path)) == 1
    keys.release("acme", target.certificate_pem, reason="new")
    assert [entry.reason for entry in read_log(keys.release_log_path)] == ["old", "new"]


# ---- generations -----------------------------------------------------------------------


def test_a_pending_generation_is_used_by_nobody(tmp_path: Path) -> None:
    keys = ring(tmp_path)
    first = keys.create("acme")
    assert keys.pending("acme") is None
    second = keys.add_generation("acme")
    assert (second.generation, second.state) == (2, "pending")
    assert second.key_id != first.key_id
    with pytest.raises(KeyExistsError):
        keys.add_generation("acme")
    with pytest.raises(KeyExistsError):
        keys.create("acme")
    assert keys.get("acme").key_id == first.key_id
    assert import_text(keys.export("acme")).key_id == first.key_id
    assert import_text(keys.export("acme", generation=2)).generation == 2
    assert keys.pending("acme") == second
    assert keys.find(second.key_id).generation == 2
    assert keys.verify("acme", keys.export("acme", generation=2)).generation == 2
    assert [(k.generation, k.verified) for k in keys.list()] == [(1, None), (2, NOW)]
    used = keys.activate("acme", 2)
    assert (used.state, used.verified) == ("current", NOW)
    assert keys.activate("acme", 2) == used
    assert keys.get("acme").key_id == second.key_id
    assert [k.state for k in keys.list()] == ["old", "current"]
    assert keys.find(first.key_id).generation == 1
    assert keys.names() == ["acme"]
    assert keys.info("acme").generation == 2


@pytest.mark.parametrize("passphrase", [None, "word"])
def test_generations_travel(tmp_path: Path, passphrase: str | None) -> None:
    keys = ring(tmp_path)
    keys.create("acme")
    keys.add_generation("acme")
    keys.activate("acme", 2)
    target = SiteIdentity.create(tmp_path / "target", "target")
    there = ring(tmp_path, "target")
    old = keys.export("acme", passphrase, generation=1, scrypt_n=COST)
    new = keys.export("acme", passphrase, scrypt_n=COST)
    there.import_key(old, passphrase)
    assert there.import_key(new, passphrase).generation == 2
    assert there.import_key(new, passphrase).state == "current"
    assert there.get("acme").secret == keys.get("acme").secret
    # Released, and in the other order.
    third = ring(tmp_path, "third")
    assert third.import_released(keys.release("acme", target.certificate_pem), opener(target))
    assert third.import_key(old, passphrase).state == "old"
    assert third.get("acme").generation == 2
    # Another tenant's key of the same name and a later generation is not taken for this one's.
    stranger = ring(tmp_path, "stranger")
    stranger.create("acme")
    stranger.add_generation("acme")
    with pytest.raises(KeyExistsError):
        there.import_key(stranger.export("acme", generation=2))


@pytest.mark.parametrize("text", ["0", "-1", "2x", "10000", "٢"])
def test_an_impossible_generation_is_refused(tmp_path: Path, text: str) -> None:
    keys = ring(tmp_path)
    keys.create("acme")
    block = armor.decode(keys.export("acme"), "VREP TENANT KEY")
    for headers in ({"Generation": text, "Replaces": "ab" * 8}, {"Generation": "2"}):
        changed = armor.encode("VREP TENANT KEY", block.headers | headers, block.body)
        with pytest.raises(KeyFileError, match="generation"):
            import_text(changed)
