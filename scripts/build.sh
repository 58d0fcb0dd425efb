#!/bin/sh
# Make .venv with everything that developing needs, and build vrep into it.
# Incremental: packages are installed again only when pyproject.toml changed.
set -eu
cd "$(dirname "$0")/.."

pip=".venv/bin/python -m pip --disable-pip-version-check --quiet --quiet"
stamp=.venv/.installed

if [ ! -x .venv/bin/python ]; then
    python3 -m venv .venv
fi
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    $pip install "scikit-build-core>=0.10" "cython>=3.1,<4" "numpy>=2.0"
    $pip install --no-build-isolation --editable ".[dev]"
    touch "$stamp"
else
    $pip install --no-build-isolation --no-deps --editable .
fi
