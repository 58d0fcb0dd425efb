#!/bin/sh
# Run every fuzz target for a number of seconds, two at a time, after its canary
# has proven that the target reaches the code and that a crash would be noticed.
# usage: fuzz.sh SECONDS
set -eu
cd "$(dirname "$0")/.."
seconds=$1

cmake --preset fuzz -Wno-dev --log-level=WARNING
cmake --build --preset fuzz -- --quiet

targets=$(find tests/fuzz -name 'fuzz_*.c' -exec basename {} .c \; | sort)
[ -n "$targets" ] || {
    echo "fuzz: tests/fuzz holds no fuzz_*.c" >&2
    exit 1
}
printf '%s\n' $targets | xargs -P 2 -I '{}' scripts/fuzz-target.sh '{}' "$seconds"
