#!/usr/bin/env bash
# The plain `vllm serve` lines. The plugin needs no flag: installing it is enough.
#
#   bash examples/serve_qwen3.sh qwen3-8b [vllm arguments]   Qwen/Qwen3-8B with a window of 4096
#   bash examples/serve_qwen3.sh demo [vllm arguments]       the demo model, whose config has one
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=${SWA_VENV:-.venv}/bin
model=${1:-}
shift || true

case $model in
qwen3-8b)
    # Every fourth layer keeps full attention; the others see the last 4096 tokens.
    exec "$bin/vllm" serve Qwen/Qwen3-8B \
        --additional-config '{"swa": {"window": 4096, "full_attention_layers": "every:4"}}' \
        --reasoning-parser qwen3 --enable-auto-tool-choice --tool-call-parser hermes "$@"
    ;;
demo)
    "$bin/python" examples/make_demo_model.py .cache/demo
    # GiB. On CPUs vLLM would take nearly all of the machine's memory; GPUs ignore this.
    export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
    exec "$bin/vllm" serve .cache/demo/mixed --served-model-name demo --max-model-len 4096 "$@"
    ;;
*)
    echo "error: got '$model'; allowed are qwen3-8b and demo" >&2
    exit 2
    ;;
esac
