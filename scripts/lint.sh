#!/bin/sh
# Every linter in check mode; or, with --fix, what can be put right by machine.
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"

rooms=$(find src tests bench examples docs -maxdepth 0 -type d 2>/dev/null || true)
c_files=$(find $rooms \( -name '*.c' -o -name '*.h' \))
cython_files=$(find src \( -name '*.pyx' -o -name '*.pxd' \))

if [ "${1:-}" = --fix ]; then
    clang-format -i $c_files
    ruff format --quiet .
    ruff check --quiet --fix .
    exit
fi

failed=0
check() {
    "$@" || {
        echo "lint: $1 complains" >&2
        failed=1
    }
}

check_c_format() {
    bad=$(for file in $c_files; do
        clang-format --dry-run --Werror "$file" 2>/dev/null || echo "  $file"
    done)
    [ -z "$bad" ] || {
        printf 'not formatted (make format puts it right):\n%s\n' "$bad" >&2
        return 1
    }
}

check ruff check --quiet .
check ruff format --quiet --check .
check mypy --no-error-summary
check check_c_format
check cython-lint $cython_files
check codespell $rooms scripts packaging cmake ./*.md
[ "$failed" -eq 0 ] || exit 1
echo "lint: clean"
