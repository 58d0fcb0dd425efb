#!/bin/sh
# Run one fuzz target: first its canary, which must be found, then the real one,
# which must find nothing. Inputs found are kept in build/fuzz-corpus/.
# usage: fuzz-target.sh NAME SECONDS
set -eu
cd "$(dirname "$0")/.."
name=$1
seconds=$2
canary_seconds=60

seeds=tests/fuzz/corpus/$name
corpus=build/fuzz-corpus/$name
log=build/fuzz/$name.log
mkdir -p "$corpus" "$corpus.canary"
[ -d "$seeds" ] || seeds=
dictionary=
[ ! -e "tests/fuzz/$name.dict" ] || dictionary="-dict=tests/fuzz/$name.dict"

fail() {
    tail -n 40 "$1" >&2
    echo "fuzz: $name: $2 (log: $1)" >&2
    exit 1
}

common="-print_final_stats=1 -max_len=65536 -timeout=20 -rss_limit_mb=2048 $dictionary"

if "build/fuzz/${name}_canary" $common -max_total_time="$canary_seconds" \
    -artifact_prefix="build/fuzz/$name.canary." "$corpus.canary" $seeds \
    >"$log.canary" 2>&1; then
    fail "$log.canary" "the canary was not found in $canary_seconds s"
fi
grep -q 'fuzz canary found' "$log.canary" || fail "$log.canary" "crashed before its canary"

"build/fuzz/$name" $common -max_total_time="$seconds" \
    -artifact_prefix="build/fuzz/$name." "$corpus" $seeds >"$log" 2>&1 ||
    fail "$log" "found a failure"

edges=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$log" | tail -n 1)
runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
[ "${edges:-0}" -gt 0 ] || fail "$log" "covered no edge"
echo "fuzz: $name: $edges edges covered in $runs runs, $seconds s, canary found"
