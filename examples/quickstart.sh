#!/usr/bin/env bash
# From nothing to a windowed model answering over HTTP. --keep leaves the server running.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash examples/setup_env.sh
exec "${SWA_VENV:-.venv}/bin/python" examples/quickstart.py "$@"
