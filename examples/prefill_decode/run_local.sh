#!/usr/bin/env bash
# Prefill and decode on servers of their own, all on this machine and without a GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash examples/setup_env.sh
export PYTHONPATH=examples${PYTHONPATH:+:$PYTHONPATH}
exec "${SWA_VENV:-.venv}/bin/python" -m prefill_decode.run_local "$@"
