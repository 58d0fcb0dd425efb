#!/bin/sh
# Build and run the native tests under a CMake preset: native, asan or tsan.
set -eu
cd "$(dirname "$0")/.."
preset=$1

cmake --preset "$preset" -Wno-dev --log-level=WARNING
cmake --build --preset "$preset" -- --quiet
ctest --preset "$preset"
