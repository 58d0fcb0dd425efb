#!/bin/sh
# Build the documentation into build/docs; a warning is an error.
set -eu
cd "$(dirname "$0")/.."
.venv/bin/sphinx-build -q -W --keep-going -b html docs build/docs
