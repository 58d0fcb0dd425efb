#!/bin/sh
# Build and run the native tests under a CMake preset: native, asan or tsan.
set -eu
cd "$(dirname "$0")/.."
preset=$1

cmake --preset "$preset" -Wno-dev --log-level=WARNING
cmake --build --preset "$preset" -- --quiet
# A test forks to see that a second process is refused; the child does little more.
TSAN_OPTIONS="die_after_fork=0 ${TSAN_OPTIONS-}" ctest --preset "$preset"
