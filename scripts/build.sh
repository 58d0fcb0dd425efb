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
    # Only vrep is built with what stands in .venv: a package that has no wheel gets what it asks for.
    .venv/bin/python -c '
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))
more = project["project"]["optional-dependencies"]["dev"]
needed = project["build-system"]["requires"] + project["project"]["dependencies"] + more
print(*needed, sep="\n")' > .venv/requirements.txt
    $pip install --retries 10 --timeout 60 --requirement .venv/requirements.txt
fi
$pip install --no-build-isolation --no-deps --editable .
touch "$stamp"
