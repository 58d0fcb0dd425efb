#!/bin/sh
# Answer for a target whose machinery is not built in this release.
# usage: not-yet.sh TARGET REASON
echo "make $1: not yet: $2" >&2
exit 1
