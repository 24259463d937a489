#!/usr/bin/env bash
# One command for a machine with a GPU: what only a GPU shows, in eleven minutes, recorded step by step
# in OUT/results.jsonl. It installs nothing. README.md beside this script says how to read it.
#
#     bash tests/gpu.sh [--again] [--dry-run] [OUT]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${SWA_VENV:-.venv}/bin/python
[[ -x $python ]] || python=python3
exec env PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" "$python" -m tests.helpers.gpu.run "$@"
