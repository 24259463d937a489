"""Serve the demo model on two Ray nodes of this machine, show its memory, and end everything.

python -m ray_cluster.run_local, in the directory examples
"""

import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import torch
from safetensors.torch import load_file, save_file

from make_demo_model import ensure_demo_model
from quickstart import (
    PAGE_SIZE,
    SERVE_ARGS,
    SINKS,
    QuickstartError,
    Server,
    ask,
    exit_on_signal,
    long_prompt,
    most_pages_of_a_request,
    stream_measuring_pages,
)
from ray_cluster.local_cluster import ClusterError, local_ray_cluster

QUESTION = "What is the capital of France?"
NUM_NODES = 2
NUM_KV_HEADS = 4  # the demo model has 3, which two workers cannot share
RAY_ARGS = (
    *("--tensor-parallel-size", str(NUM_NODES), "--distributed-executor-backend", "ray"),
    # The two best first tokens are 0.1 apart, which bfloat16 sums over workers may round away.
    *("--dtype", "float32", "--block-size", str(PAGE_SIZE)),
    *("--additional-config", json.dumps(SINKS)),
)


def pad_heads(source: Path, target: Path, num_kv_heads: int) -> None:
    """Write a checkpoint with more attention heads, all zero, which computes the same.

    Args:
        source: directory of a dense Qwen3 in one safetensors file.
        target: an empty directory.
        num_kv_heads: at least those of ``source``; query heads keep their ratio to them.
    """
    config = json.loads((source / "config.json").read_text())
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    kv_rows = num_kv_heads * config["head_dim"]
    rows = {"q_proj": group * kv_rows, "k_proj": kv_rows, "v_proj": kv_rows}
    state = load_file(source / "model.safetensors")
    for name, tensor in state.items():
        projection = name.split(".")[-2]
        if projection in rows:
            state[name] = _grow(tensor, 0, rows[projection])
        elif projection == "o_proj" and name.endswith("weight"):
            state[name] = _grow(tensor, 1, group * kv_rows)
    shutil.copytree(
        source, target, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True
    )
    save_file(state, target / "model.safetensors", {"format": "pt"})
    changed = {"num_attention_heads": group * num_kv_heads, "num_key_value_heads": num_kv_heads}
    (target / "config.json").write_text(json.dumps({**config, **changed}, indent=2))


def _grow(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim).contiguous()


def demonstrate(model: Path) -> None:
    """Start the cluster and a server on it, and print its answers.

    Raises:
        ClusterError, QuickstartError: something did not start.
    """
    log_path = Path(".cache/ray_cluster.log")
    print(f"Starting a Ray cluster of {NUM_NODES} nodes on this machine", flush=True)
    with local_ray_cluster(NUM_NODES) as cluster:
        print(f"Starting vllm serve {' '.join(RAY_ARGS)}; its log is {log_path}", flush=True)
        # Threads that wait for one another take the processor from those that would go on.
        threads = max(1, (os.cpu_count() or 1) // NUM_NODES)
        environment = {**cluster.environment, "OMP_NUM_THREADS": str(threads)}
        server = Server(model, log_path, [*SERVE_ARGS, *RAY_ARGS], environment)
        try:
            server.wait(progress=True)
            print(f"\n{QUESTION}\n  -> {ask(server.url, QUESTION)}")
            text, num_tokens, _, _ = stream_measuring_pages(server.url, long_prompt())
            print(f"\nA long prompt\n  -> {text.strip()}")
            print("\nWindow of every layer:\n  " + "\n  ".join(server.window_table()))
            most = most_pages_of_a_request(server.url)
            full = math.ceil(num_tokens / PAGE_SIZE)
            print(
                f"\nMost pages held after {num_tokens} tokens in each sliding layer: {most}; "
                f"with full attention: {full} ({most / full:.0%})"
            )
        finally:
            server.stop()
    print("\nThe server and the cluster are gone")


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGTERM, exit_on_signal)
    if torch.cuda.is_available():
        sys.exit("error: this shows Ray on a machine without GPUs, and here is one; see README.md")
    demo = ensure_demo_model(Path(".cache/demo"))["mixed"]
    with TemporaryDirectory(prefix="swa-demo-") as directory:
        model = Path(directory)
        pad_heads(demo, model, NUM_KV_HEADS)
        try:
            demonstrate(model)
        except (ClusterError, QuickstartError, httpx.HTTPError) as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
