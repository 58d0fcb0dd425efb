"""The command line: its verbs, its errors, what it prints, and what it must not import."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from vrep import errors
from vrep.app import cli, cli_tree
from vrep.app.cli_common import parse_duration, parse_size
from vrep.app.cli_group import parse_disks
from vrep.app.cli_output import age_text, size_text, table
from vrep.app.cli_status import text_of
from vrep.examine import examine_disk
from vrep.site import Site

VERBS = """
site init|invite|join|list|remove
run
service install|uninstall
key create|list|export|verify|import|release|releases|rotate
protect
unprotect
attach
detach
pause
resume
resync
resize
object put|list|get
status
checkpoint
points
changes
test start|list|stop
failover start|commit|rollback
move
reverse
failback
export
verify
repair
demo
"""


def commands() -> dict[str, Any]:
    """Every leaf of the tree by its words."""
    found: dict[str, Any] = {}

    def walk(command: Any, words: tuple[str, ...]) -> None:
        below = getattr(command, "commands", None)
        if below is None:
            found[" ".join(words)] = command
            return
        for name, child in below.items():
            walk(child, (*words, name))

    walk(typer.main.get_command(cli_tree.build()), ())
    return found


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any, Any]:
    """Exit code, answer, error."""
    code = cli.run([*arguments, "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, json.loads(err) if err else None


def test_every_verb_exists() -> None:
    wanted = set()
    for line in VERBS.split("\n"):
        first, _, rest = line.partition(" ")
        if first:
            wanted |= {f"{first} {verb}" for verb in rest.split("|")} if rest else {first}
    assert set(commands()) == wanted


def test_every_command_takes_the_directory_and_json() -> None:
    without = {}
    for name, command in commands().items():
        options = {option for param in command.params for option in param.opts}
        if missing := {"--dir", "--json"} - options:
            without[name] = missing
    assert set(without) == {"demo"}  # it makes its own sites


def test_every_command_and_option_says_what_it_does() -> None:
    silent = [name for name, command in commands().items() if not command.help]
    for name, command in commands().items():
        silent += [
            f"{name} {param.opts[0]}"
            for param in command.params
            if param.param_type_name == "option"
            and not param.help
            and "--format" not in param.opts
            and "--guest" not in param.opts
        ]
    assert silent == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["test", "nonsense"],
        ["export", "web"],
        ["protect", "web", "--disk", "root", "--to", "b", "--key", "k"],
        ["status", "--nonsense"],
        ["run", "--role", "nonsense"],
        ["test", "start", "web", "--force"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_a_usage_error(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Site.init(tmp_path / "site", name="a")
    extra = [] if "nonsense" in arguments[:2] else ["--dir", str(tmp_path / "site")]
    code, answer, error = run_json(capsys, *arguments, *extra)
    assert (code, answer) == (errors.UsageError.exit_code, None)
    assert error["error"]["exit_code"] == errors.UsageError.exit_code


def test_an_error_is_one_line_without_a_traceback(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Site.init(tmp_path / "site", name="a")
    code = cli.run(["pause", "web", "--dir", str(tmp_path / "site")])
    out, err = capsys.readouterr()
    assert code == errors.NotFoundError.exit_code
    assert out == ""
    assert err == "vrep: It was not found: no group 'web' is protected here\n"


@pytest.mark.parametrize(
    "text", ["[network", "[network]\nlisten = 7", "[networks]\n", '[metrics]\nport = "1"']
)
def test_wrong_settings_are_named_before_anything_starts(
    text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    site = Site.init(tmp_path / "site", name="a")
    site.paths.config.write_text(text)
    assert cli.run(["run", "--dir", str(tmp_path / "site")]) == errors.ConfigError.exit_code
    assert str(site.paths.config) in capsys.readouterr().err
    assert not site.paths.socket("site").exists()


def test_a_directory_that_is_no_site_runs_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.run(["run", "--dir", str(tmp_path)]) == errors.StateError.exit_code
    assert "vrep site init" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        [
            "protect",
            "web",
            "--disk",
            "a=file:/x",
            "--to",
            "b",
            "--key",
            "k",
            "--ring",
            "9" * 400 + "G",
        ],
        ["protect", "web", "--disk", "a=file:/x", "--to", "b", "--key", "k", "--rate", "9" * 18],
        ["site", "invite", "--lifetime", "9" * 400 + "w"],
        ["site", "invite", "--lifetime", "2y"],
        ["site", "invite", "--lifetime", "9999w"],
        ["checkpoint", "web", "\udcff\udcfe"],
    ],
    ids=lambda words: ascii(words[-2:]),
)
def test_what_has_no_end_is_refused_in_a_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Site.init(tmp_path / "site", name="a", listen="127.0.0.1:9000")
    code = cli.run([*arguments, "--dir", str(tmp_path / "site")])
    out, err = capsys.readouterr()
    assert (code, out) == (errors.InvalidError.exit_code, "")
    assert err.count("\n") == 1
    assert len(err) < 300


def test_a_fault_of_its_own_is_told_as_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fault(_site: Site, _group: str) -> None:
        raise RuntimeError("nobody foresaw this")

    monkeypatch.setattr(Site, "pause", fault)
    pause = ["pause", "web", "--dir", str(tmp_path)]
    assert cli.run(pause) == errors.InternalError.exit_code == 70
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("vrep: A fault of vrep itself")
    assert lines[-1].endswith("RuntimeError: nobody foresaw this")
    code, answer, error = run_json(capsys, *pause)
    assert (code, answer) == (70, None)
    assert error["error"]["type"] == "InternalError"
    assert "nobody foresaw this" in error["error"]["traceback"]


def test_an_error_of_the_system_names_the_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Site.init(tmp_path / "site", name="a")
    gone = tmp_path / "gone.key"
    code = cli.run(["key", "import", str(gone), "--dir", str(tmp_path / "site")])
    assert code == errors.VrepError.exit_code
    assert str(gone) in capsys.readouterr().err


def test_a_site_and_its_keys(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VREP_DIR", str(tmp_path / "site"))
    code, made, _ = run_json(capsys, "site", "init", "--name", "east", "--listen", "127.0.0.1:9000")
    assert (code, made["name"], made["listen"]) == (0, "east", "127.0.0.1:9000")
    _, listed, _ = run_json(capsys, "site", "list")
    assert listed["site"]["site_id"] == made["site_id"]
    assert listed["peers"] == []
    _, invited, _ = run_json(capsys, "site", "invite", "--lifetime", "10m")
    assert invited["lifetime_s"] == 600
    assert invited["token"]

    secret = tmp_path / "passphrase"
    secret.write_text("correct horse\n")
    export = tmp_path / "acme.key"
    _, created, _ = run_json(capsys, "key", "create", "acme")
    sealed = ["--passphrase-file", str(secret)]
    assert run_json(capsys, "key", "export", "acme", "--out", str(export), *sealed)[1]["sealed"]
    code, _, error = run_json(capsys, "key", "verify", "acme", str(export))
    assert code == errors.TenantKeyError.exit_code
    assert "passphrase" in error["error"]["text"]
    _, verified, _ = run_json(capsys, "key", "verify", "acme", str(export), *sealed)
    assert verified["key_id"] == created["key_id"]
    _, keys, _ = run_json(capsys, "key", "list")
    assert [(k["name"], k["verified"] is not None) for k in keys["keys"]] == [("acme", True)]
    code, _, error = run_json(capsys, "key", "export", "acme", "--out", str(export))
    assert code == errors.ExistsError.exit_code  # an existing file is never replaced
    assert str(export) in error["error"]["text"]


def test_status_of_a_site_that_does_not_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Site.init(tmp_path / "site", name="east")
    where = ["--dir", str(tmp_path / "site")]
    code, answer, _ = run_json(capsys, "status", *where)
    assert code == 0
    assert answer["roles"] == {"filter": False, "source": False, "target": False}
    code, answer, _ = run_json(capsys, "status", "--check", *where)
    assert (code, answer["exit_code"], answer["verdict"]) == (2, 2, "critical")
    code, _, error = run_json(capsys, "status", "nothing", *where)
    assert code == errors.NotFoundError.exit_code
    assert "nothing" in error["error"]["text"]


def test_status_for_people() -> None:
    target = {
        "site": "east", "rpo_ms": 1234, "lag_bytes": 3 << 20, "dirty_bytes": 65536,
        "unshipped_bytes": 25, "total_bytes": 100, "durable_seq": 7,
        "newest_point": {"point": "pos:1/0/7", "time": "2026-01-31T12:00:00.000000Z"},
    }  # fmt: skip
    group = {
        "role": "source", "state": "initial-sync", "conditions": ["fenced"], "clients": 1,
        "targets": [target], "error": "no route", "unverified": "",
    }  # fmt: skip
    held = {
        "role": "target",
        "state": "replicating",
        "conditions": [],
        "source": {"site": "west"},
        "durable": "1/0/9",
        "newest_point": {"point": "pos:1/0/8", "time": None},
        "verdict": {
            "point": "pos:1/0/7", "state": "bad", "text": "seg-00000001: byte 9",
            "made": "2026-01-31T12:00:00.000000Z",
        },
    }  # fmt: skip
    status = {
        "site": {"name": "west"},
        "roles": {"filter": True, "source": True, "target": False},
        "groups": {"web": group, "mail": held},
    }
    lines = text_of(status).splitlines()
    assert lines[0] == "site west; not running here, or hanging: target"
    assert lines[1].split()[:3] == ["GROUP", "STATE", "CONDITIONS"]
    assert re.split(r" {2,}", lines[2]) == [
        "web", "initial-sync 75 %", "fenced", "east", "1.2 s", "3.0 MiB", "64.0 KiB", "1",
        "to seq 7", "2026-01-31T12:00:00.000000Z", "-",
    ]  # fmt: skip
    assert re.split(r" {2,}", lines[3]) == [
        "mail", "replicating (held here)", "-", "west", "-", "-", "-", "-", "to pos:1/0/9",
        "pos:1/0/8", "bad, 2026-01-31T12:00Z",
    ]  # fmt: skip
    assert [line for line in lines[4:] if not line.startswith(("web: initial", "web: fenced"))] == [
        "web: no route", "mail: pos:1/0/7: bad: seg-00000001: byte 9"
    ]  # fmt: skip
    assert any(line.startswith("web: fenced: ") for line in lines)


@pytest.mark.parametrize("verb", ["test", "failover"])
@pytest.mark.parametrize(
    "words",
    [
        ["web"],
        ["web", "--at", "-5m"],
        ["--at", "nightly", "web", "--json"],
        ["--at=pos:1/0/7", "web"],
        ["web", "--at", "2026-01-02T03:04:05Z"],
        ["web", "--since", "pos:1/0/3", "--at", "nightly"],
        ["--since=-2h", "web"],
    ],
    ids=" ".join,
)
def test_the_short_way_means_what_the_parser_means(
    verb: str,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    calls: list[tuple[Any, ...]] = []

    class Stopped(errors.VrepError):
        """Stopped."""

    def start(
        site: Site,
        group: str,
        at: str = "latest",
        *,
        force: bool = False,
        since: str | None = None,
        onto: dict[str, str] | None = None,
    ) -> None:
        assert not onto
        calls.append((site.paths.root, group, at, force, since))
        raise Stopped

    monkeypatch.setattr(Site, "test_start", start)
    monkeypatch.setattr(Site, "failover_start", start)
    line = [verb, "start", *words, "--dir", str(tmp_path)]
    if verb == "failover":
        line.append("--force")
    assert cli.run(line) == Stopped.exit_code
    with pytest.raises(Stopped):
        cli_tree.invoke(line)
    capsys.readouterr()
    assert len(calls) == 2
    assert calls[0] == calls[1]
    assert calls[0][0] == tmp_path


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["status"], ["numpy", "rich", "vrep.recovery"]),
        (["pause", "web"], ["numpy", "rich", "vrep.recovery"]),
        (["test", "start", "web"], ["typer", "rich", "structlog", "pydantic"]),
    ],
    ids=["status", "pause", "test start"],
)
def test_a_command_imports_what_it_needs_only(
    arguments: list[str], absent: list[str], tmp_path: Path
) -> None:
    code = (
        "import sys; from vrep.app.cli import run; run(sys.argv[2:]);"
        "print([m for m in sys.argv[1].split(',') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, ",".join(absent), *arguments, "--dir", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"
    assert "Traceback" not in done.stderr


def test_a_reader_that_leaves_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m vrep.app.cli --help | true",
        shell=True,
        capture_output=True,
        check=False,
    )
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512", 512),
        ("64K", 65536),
        ("1.5G", 3 << 29),
        ("2T", 2 << 40),
        ("10MiB", 10 << 20),
        ("7b", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("30s", 30), ("10m", 600), ("24h", 86400), ("1.5d", 129600)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "-1", "1X", "1e3", "K", "1 2", "9" * 400 + "G", "9" * 18 + "w"]
)
def test_wrong_sizes_and_durations(text: str) -> None:
    with pytest.raises(errors.InvalidError):
        parse_size(text)
    with pytest.raises(errors.InvalidError):
        parse_duration(text)


def test_disks() -> None:
    assert parse_disks(["root=file:/a=b", "data=block:/dev/sdb"]) == {
        "root": "file:/a=b",
        "data": "block:/dev/sdb",
    }
    for wrong in (["root"], ["=file:/a"], ["root="], ["a=file:/a", "a=file:/b"]):
        with pytest.raises(errors.UsageError):
            parse_disks(wrong)


def test_figures_for_people() -> None:
    assert [size_text(n) for n in (0, 1023, 1024, 5 << 30, 3 << 40)] == [
        "0 B", "1023 B", "1.0 KiB", "5.0 GiB", "3.0 TiB",
    ]  # fmt: skip
    assert [age_text(n) for n in (0, 999, 1500, 600_000, 7_200_000)] == [
        "0 ms", "999 ms", "1.5 s", "10 min", "2.0 h",
    ]  # fmt: skip
    assert table(("A", "B"), [("long", "x")]) == "A     B\nlong  x"
    assert table(("A",), [], "none") == "none"


@pytest.mark.parametrize("whole", [True, False])
def test_points_are_listed_though_the_history_is_damaged(
    whole: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vrep.recovery.check import Verdict
    from vrep.recovery.points import Gap, MarkInfo, PointInfo, PointList, PointRange
    from vrep.recovery.verdict import VerdictInfo

    first = PointInfo("pos:1/0/5", "2026-01-01T00:00:00.000000Z")
    last = PointInfo("pos:1/0/9", "2026-01-01T00:01:00.000000Z")
    lost = PointInfo("pos:1/0/10", "2026-01-01T00:02:00.000000Z")
    verdict = Verdict(
        whole=whole,
        sealed=True,
        checked_to="pos:1/0/9",
        tallied_to="pos:1/0/9",
        records=9,
        tallies=1,
        error="" if whole else "OmittedError: record 7 is missing",
    )
    found = PointList(
        group="web",
        group_id="0" * 32,
        newest=last,
        oldest=first,
        ranges=[PointRange(first, last)],
        gaps=[Gap(lost, lost, open=True)],
        marks=[MarkInfo("pos:1/0/6", "2026-01-01T00:00:30.000000Z", "nightly", recoverable=True)],
        epochs=[],
        key_held=True,
        verdict=verdict,
        verdicts=[
            VerdictInfo("pos:1/0/6", None, "void", "other store", "2026-01-02T00:00:00Z", "east"),
            VerdictInfo("pos:1/0/9", None, "good", "", "2026-01-03T00:00:00Z", "east"),
        ],
    )
    monkeypatch.setattr(Site, "points", lambda _site, _group, progress: found)
    expected = 0 if whole else errors.IntegrityError.exit_code
    assert cli.run(["points", "web"]) == expected
    out, err = capsys.readouterr()
    assert [line.split()[1:3] for line in out.splitlines()[1:5]] == [
        ["any", "write"], ["checkpoint", "nightly"], ["to", "here"], ["gap,", "still"],
    ]  # fmt: skip
    assert [line.split("  ")[-1].strip() for line in out.splitlines()[1:5]] == [
        "-", "void, 2026-01-02T00:00Z", "good, 2026-01-03T00:00Z", "-",
    ]  # fmt: skip
    assert "pos:1/0/6: void: other store" in out
    assert ("history is whole up to pos:1/0/9" in out) is whole
    assert ("record 7 is missing" in err) is not whole
    code, answer, error = run_json(capsys, "points", "web")
    assert code == expected
    assert answer["verdict"]["whole"] is whole
    assert (error is None) is whole


@pytest.mark.parametrize("verb", [["verify", "acme"], ["import"]], ids=lambda v: v[0])
@pytest.mark.parametrize("content", [bytes(range(256)), b"a" * (1 << 20)], ids=["bytes", "long"])
def test_a_file_that_is_no_key_is_named(
    verb: list[str], content: bytes, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Site.init(tmp_path / "site", name="a").key_create("acme")
    file = tmp_path / "thing"
    file.write_bytes(content)
    code, _, error = run_json(capsys, "key", *verb, str(file), "--dir", str(tmp_path / "site"))
    assert code == errors.TenantKeyError.exit_code
    assert f"{file} is not text that 'vrep key export' wrote" in error["error"]["text"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ring", "10"], "a ring of 10 bytes"),
        (["--ring", "1T"], "68719476736"),
        (["--tcp", "0.0.0.0:10809"], "loopback"),
        (["--tcp", "example.com:10809"], "loopback"),
        (["--tcp", "10809"], "HOST:PORT"),
        (["--socket-group", "no-such-group"], "'no-such-group'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_the_filter_would_refuse_protects_nothing(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    site = Site.init(tmp_path / "site", name="a")
    protect = ["protect", "web", "--disk", "root=file:x", "--to", "b", "--key", "acme"]
    code, _, error = run_json(capsys, *protect, *options, "--dir", str(tmp_path / "site"))
    assert code == errors.InvalidError.exit_code
    assert words in error["error"]["text"]
    assert list(site.groups.names()) == []


def test_a_qcow2_image_is_not_taken_for_a_raw_one(tmp_path: Path) -> None:
    image = tmp_path / "web.qcow2"
    image.write_bytes(b"QFI\xfb".ljust(65536, b"\0"))
    with pytest.raises(errors.UnsupportedError, match="qemu-img convert"):
        examine_disk(0, "root", f"file:{image}")
    with pytest.raises(errors.InvalidError, match=r"web\.qcow2"):  # by QEMU: it is damaged
        examine_disk(0, "root", f"qcow2:{image}")
    image.write_bytes(bytes(65536))
    with pytest.raises(errors.InvalidError, match="no qcow2 image"):
        examine_disk(0, "root", f"qcow2:{image}")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1537k"], check=True)
    disk = examine_disk(3, "root", f"qcow2:{image}")
    assert (disk.uri, disk.bytes, disk.index) == (f"qcow2:{image}", 1537 * 1024, 3)


def test_a_passphrase_file_that_is_no_text_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Site.init(tmp_path / "site", name="a").key_create("acme")
    secret = tmp_path / "secret"
    secret.write_bytes(b"\xff\xfe")
    export = ["key", "export", "acme", "--out", str(tmp_path / "acme.key")]
    more = ["--passphrase-file", str(secret), "--dir", str(tmp_path / "site")]
    code, _, error = run_json(capsys, *export, *more)
    assert code == errors.UsageError.exit_code
    assert str(secret) in error["error"]["text"]
    assert not (tmp_path / "acme.key").exists()
