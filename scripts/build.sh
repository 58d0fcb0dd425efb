#!/bin/sh
# Make .venv with everything that developing needs, and build vrep into it.
# Incremental: packages are installed again only when pyproject.toml changed.
set -eu
cd "$(dirname "$0")/.."

pip=".venv/bin/python -m pip --disable-pip-version-check --quiet --quiet"
stamp=.venv/.installed

if ! .venv/bin/python -c '' 2>/dev/null; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "vrep: $(python3 --version) is too old, Python 3.11 is needed" >&2
        exit 1
    }
    python3 -m venv --clear .venv
fi
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    requires=$(.venv/bin/python -c '
import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])')
    $pip install $requires
    $pip install --no-build-isolation --editable ".[dev]"
    touch "$stamp"
else
    $pip install --no-build-isolation --no-deps --editable .
fi
