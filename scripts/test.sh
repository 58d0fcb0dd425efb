#!/bin/sh
# Everything that `make test` checks, pytest last. A stage that fails does not hide
# the next one: pytest's summary names it again, and the exit status tells.
set -u
cd "$(dirname "$0")/.."

VREP_FAILED_STAGES=
stage() {
    name=$1
    shift
    echo "== $name"
    began=$(date +%s)
    "$@" || VREP_FAILED_STAGES="$VREP_FAILED_STAGES $name"
    echo "== $name took $(($(date +%s) - began)) s"
}

stage lint scripts/lint.sh
stage native scripts/native.sh native
stage asan scripts/native.sh asan
stage tsan scripts/native.sh tsan
stage model docs/internals/model/check
stage docs scripts/docs.sh
stage fuzz env SECONDS="${VREP_FUZZ_SECONDS:-30}" tests/fuzz/run

echo "== pytest"
export VREP_FAILED_STAGES
# Many tests wait for processes of theirs, so there are more workers than two processors need. A
# file stays with one worker: its fixtures are made once.
.venv/bin/python -m pytest -m "not slow" -n 3 --dist loadfile --durations=30
status=$?
[ -z "$VREP_FAILED_STAGES" ] || exit 1
exit "$status"
