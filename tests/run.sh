#!/usr/bin/env bash
# The test command: set-up, lint with a scan for insecure code, types, dependency audit and the whole
# test-suite, or with arguments what pytest makes of them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash examples/setup_env.sh
bin=${SWA_VENV:-.venv}/bin

stage() { printf '\n== %s\n' "$*"; "$@"; }

stage "$bin/ruff" check
stage "$bin/ruff" format --check
stage "$bin/mypy"
stage "$bin/lint-imports" --no-cache --no-logo
stage "$bin/python" tests/audit.py
for script in examples/*.sh examples/*/*.sh tests/*.sh .ci/run; do
    bash -n "$script"
done
if (($#)); then
    stage "$bin/pytest" "$@"
else
    # Most tests keep one core busy; those of a file share engines, and so a process.
    status=0
    stage "$bin/pytest" -n 2 --dist loadfile -m "not full and not soak and not alone" --durations=20 || status=$?
    stage "$bin/pytest" -m "alone and not full and not soak" --durations=20 || status=$?
    exit "$status"
fi
