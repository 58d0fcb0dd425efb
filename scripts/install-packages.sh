#!/bin/sh
# Install what is missing of packaging/debian-packages.txt.
# usage: install-packages.sh SECTION...
set -eu
cd "$(dirname "$0")/.."
list=packaging/debian-packages.txt

is_installed() {
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

fail() {
    printf 'vrep: %s\n' "$@" >&2
    exit 1
}

here=$(dpkg --print-architecture 2>/dev/null || echo unknown)
wanted=
for section in "$@"; do
    packages=$(awk -v wanted="[$section]" -v here="$here" '
        /^\[/ { inside = ($1 == wanted); next }
        inside && NF && $1 !~ /^#/ && (NF == 1 || $2 == here) { print $1 }' "$list")
    [ -n "$packages" ] || fail "$list has no section [$section]"
    wanted="$wanted $packages"
done

command -v dpkg-query >/dev/null ||
    fail "this is not a Debian system: install the equivalents of:" "$(echo $wanted)"

missing=
for package in $wanted; do
    is_installed "$package" || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

as_root=
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null ||
        fail "Debian packages are missing and there is no sudo. As root, run:" \
            "apt-get install$missing"
    as_root=sudo
fi

echo "vrep: installing Debian packages:$missing"
# A mirror that does not answer once, or another apt that is at work, is no reason to fail.
patient="-o Acquire::Retries=5 -o DPkg::Lock::Timeout=120"
$as_root apt-get $patient update -q
$as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get $patient install -q -y --no-install-recommends $missing ||
    fail "apt-get could not install:$missing"
