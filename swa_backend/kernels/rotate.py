"""A kernel that moves rotated queries to earlier positions, by the model's table of rotations."""

import torch
import triton
import triton.language as tl

from swa_backend.kernels.launch import kernel_launcher
from swa_backend.kernels.plans import Target


@triton.jit(do_not_specialize_on_alignment=["distances_ptr"])
def rotate_kernel(
    out_ptr,
    states_ptr,
    table_ptr,
    distances_ptr,
    stride_out_token,
    stride_out_head,
    stride_states_token,
    stride_states_head,
    stride_table_position,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    IS_NEOX: tl.constexpr,
):
    """Rotate all heads of one token; elements from ``ROTARY_DIM`` on stay as they are."""
    token = tl.program_id(0).to(tl.int64)
    distance = tl.load(distances_ptr + token)
    heads = tl.arange(0, HEADS)[:, None]
    dims = tl.arange(0, HEAD_DIM)
    # Elements are rotated in pairs: neighbours, or those half of ``ROTARY_DIM`` apart.
    HALF: tl.constexpr = ROTARY_DIM // 2
    if IS_NEOX:
        is_first = dims < HALF
        pair = dims % HALF
        partner = (dims + HALF) % ROTARY_DIM
    else:
        is_first = dims % 2 == 0
        pair = dims // 2
        partner = dims ^ 1
    is_rotated = dims < ROTARY_DIM
    row_ptr = table_ptr + tl.abs(distance) * stride_table_position
    # YaRN's attention factor is in the table, and in the states already.
    factor = tl.load(table_ptr).to(tl.float32)
    cos = tl.load(row_ptr + pair, mask=is_rotated, other=0.0).to(tl.float32) / factor
    sin = tl.load(row_ptr + HALF + pair, mask=is_rotated, other=0.0).to(tl.float32) / factor
    cos = tl.where(is_rotated, cos, 1.0)
    sin = tl.where(is_first == (distance >= 0), sin, -sin)

    offset = token * stride_states_token + heads * stride_states_head
    is_head = heads < NUM_HEADS
    states = tl.load(states_ptr + offset + dims[None, :], mask=is_head, other=0.0)
    is_read = is_head & is_rotated[None, :]
    partners = tl.load(states_ptr + offset + partner[None, :], mask=is_read, other=0.0)
    out = states.to(tl.float32) * cos[None, :] + partners.to(tl.float32) * sin[None, :]
    out_offset = token * stride_out_token + heads * stride_out_head + dims[None, :]
    tl.store(out_ptr + out_offset, out.to(out_ptr.dtype.element_ty), mask=is_head)


def launch_rotate(
    out: torch.Tensor,
    states: torch.Tensor,
    distances: torch.Tensor,
    table: torch.Tensor,
    *,
    is_neox: bool,
    target: Target,
) -> None:
    """Launch the kernel, one program for each token."""
    num_tokens, num_heads, head_dim = states.shape
    constants = {
        "NUM_HEADS": num_heads,
        "HEADS": triton.next_power_of_2(num_heads),
        "HEAD_DIM": head_dim,
        "ROTARY_DIM": table.shape[1],
        "IS_NEOX": is_neox,
    }
    launcher = kernel_launcher(rotate_kernel, constants, target.options(), target)
    launcher(
        (num_tokens, 1, 1),
        (out, states, table),
        (distances,),
        (*out.stride()[:2], *states.stride()[:2], table.stride(0)),
        (),
    )
