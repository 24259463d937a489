#!/usr/bin/env bash
# Tensor parallelism over a Ray cluster of two nodes, all on this machine and without a GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash examples/setup_env.sh
export PYTHONPATH=examples${PYTHONPATH:+:$PYTHONPATH}
exec "${SWA_VENV:-.venv}/bin/python" -m ray_cluster.run_local "$@"
