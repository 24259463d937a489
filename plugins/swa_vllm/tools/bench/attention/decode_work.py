"""The keys that decode kernels read and the programs they start: ours, and vLLM's in Triton."""

from dataclasses import replace
from typing import Any

from swa_backend.kernels.plans import NumberFormat, Target, plan_decode
from swa_vllm.tools.bench.attention.stock_kernel import stock_work
from swa_vllm.tools.bench.attention.times import HEAD_DIM, PAGE, AttentionCase


def decode_work(target: Target, case: AttentionCase) -> dict[str, Any]:
    """Count keys read and programs launched on ``target``, here and by vLLM's Triton kernel.

    ``here_read`` and ``stock_read`` are multiples of the keys that a query sees, the latter at the
    worst of 32 lengths.
    """
    plan = plan_decode(
        target,
        num_tokens=case.batch,
        num_reqs=case.batch,
        num_kv_heads=case.num_kv_heads,
        group=case.group,
        head_dim=HEAD_DIM,
        page=PAGE,
        window=case.window,
        has_sinks=False,
        is_ragged=False,
        query_format=NumberFormat.BFLOAT16,
        kv_format=NumberFormat.BFLOAT16,
    )
    lengths = range(case.seq_len, case.seq_len + 32)
    stock = [stock_work(replace(case, seq_len=seq_len)) for seq_len in lengths]
    return {
        "window": case.window,
        "seq_len": case.seq_len,
        "batch": case.batch,
        "num_bytes": case.num_bytes,
        # Tiles begin where the window does, and the last is masked; test_kernels.py counts them.
        "here_read": 1.0,
        "here_programs": case.batch * case.num_kv_heads * plan.num_parts,
        "stock_read": max(work.num_keys for work in stock) / case.window,
        "stock_programs": stock[0].launched,
        "stock_useful": stock[0].useful,
    }
