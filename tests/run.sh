#!/usr/bin/env bash
# The test command: set-up, lint, types and the whole test-suite. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash examples/setup_env.sh
bin=${SWA_VENV:-.venv}/bin

stage() { printf '\n== %s\n' "$*"; "$@"; }

stage "$bin/ruff" check
stage "$bin/ruff" format --check
stage "$bin/mypy"
for script in examples/*.sh examples/*/*.sh tests/*.sh .ci/run; do
    bash -n "$script"
done
stage "$bin/pytest" "$@"
