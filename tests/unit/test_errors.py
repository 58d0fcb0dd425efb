"""Statuses become exceptions; exceptions carry a message and an exit code."""

import inspect

import pytest

import vrep
from vrep import errors
from vrep._core import _status

KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.VrepError)
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_has_message_and_code(kind: type[errors.VrepError]) -> None:
    assert kind.__doc__, kind
    assert "__doc__" in vars(kind)
    assert 10 <= kind.exit_code < 126
    assert str(kind()) == kind.summary()
    assert str(kind("disk 'a'")) == f"{kind.summary()}: disk 'a'"


def test_every_status_has_its_own_exception() -> None:
    seen = {}
    for status in range(-1, -200, -1):
        name = _status.status_name(status)
        if name == "E_?":
            break
        with pytest.raises(errors.VrepError, match=name) as caught:
            _status.check_status(status)
        assert caught.type is not errors.VrepError, name
        seen[status] = caught.type
    assert len(seen) > 20
    assert len(set(seen.values())) == len(seen)


def test_success_and_counts_pass_through() -> None:
    assert _status.check_status(0) == 0
    assert _status.check_status(4096) == 4096


def test_foreign_status_is_an_error() -> None:
    with pytest.raises(errors.VrepError, match=r"E_\?"):
        _status.check_status(-9999)


def test_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert version("vrep") == vrep.__version__
