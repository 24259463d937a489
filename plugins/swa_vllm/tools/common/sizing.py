"""The arithmetic of vLLM's start-up: what it makes of a model's layers. No vLLM is imported.

vLLM 0.32 and 0.33: ``v1/core/kv_cache_utils.py``; for the dtype of the KV cache
``utils/torch_utils.py`` and ``Attention``. ``tests/tools/test_plan.py`` holds this against vLLM's
own functions and against engines that were started.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from typing import Any

from swa_backend.checkpoint import Checkpoint, LinearState
from swa_backend.layers import LINEAR
from swa_backend.pages import WindowPages, ceil_div
from swa_backend.request_pages import PagePolicy
from swa_backend.window import Phase, num_pinned
from swa_vllm.compat.cache_dtypes import FP8, UNQUANTIZED
from swa_vllm.compat.kv_groups import split_into_kv_groups
from swa_vllm.tools.common.arms import Arm

DTYPE_BYTES = {
    "bfloat16": 2,
    "float16": 2,
    "half": 2,
    "float32": 4,
    "float": 4,
    "fp8": 1,
    "fp8_e4m3": 1,
    "fp8_e5m2": 1,
}
MODEL_DTYPES = ("auto", "bfloat16", "float16", "half", "float32", "float")
CACHE_DTYPES = (*UNQUANTIZED, *FP8)
# vLLM's names of KV cache dtypes, by modelopt's.
_MODELOPT_CACHES = {"fp8": "fp8_e4m3", "nvfp4": "nvfp4"}
# Rotary embeddings whose max_position_embeddings is the scaled length already.
_SCALED_ROPE = ("default", "yarn", "longrope", "llama3", "su")


class Device(StrEnum):
    """The device that serves: it decides vLLM's defaults, and whether sinks need own slots."""

    GPU = "gpu"
    CPU = "cpu"

    @property
    def block_size(self) -> int:
        """Tokens of a page by vLLM's default."""
        return 16 if self is Device.GPU else 128

    def num_steps_in_flight(self, num_stages: int = 1) -> int:
        """Count steps in flight: one a stage, and one by asynchronous scheduling on GPUs.

        With stages that is Model Runner V2's; V1 turns asynchronous scheduling off there.
        """
        return num_stages + (self is Device.GPU)


@dataclass(frozen=True)
class Limits:
    """The limits that an engine is started with.

    Attributes:
        max_num_batched_tokens: most tokens of a step, which a prefill is cut into.
        spare_tokens: slots behind the newest token that the attention backend needs.
    """

    block_size: int
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int
    num_steps_in_flight: int
    spare_tokens: int = 0

    @property
    def max_in_flight_tokens(self) -> int:
        """Most tokens that are scheduled and not yet settled."""
        return self.num_steps_in_flight * self.max_num_batched_tokens


@dataclass(frozen=True)
class KVGroups:
    """KV groups of one kind of layer; all manage their pages alike.

    Attributes:
        num_groups: groups, each with a block table of its own.
        layers: numbers of the layers of all groups together, which take turns.
        num_padding: layers that vLLM adds so that all groups have one size.
        is_linear: whether the layers have a state in the place of keys and values.
    """

    policy: PagePolicy
    num_groups: int
    layers: tuple[int, ...]
    num_padding: int
    is_linear: bool = False

    @property
    def num_layers(self) -> int:
        """Layers of all groups together."""
        return len(self.layers)

    def most_layers(self, stage: Sequence[int]) -> int:
        """Count the layers of a group in a pipeline stage, of the group that has the most there."""
        groups = (self.layers[first :: self.num_groups] for first in range(self.num_groups))
        return max(len(set(group).intersection(stage)) for group in groups)


def stages_of(num_layers: int, num_stages: int, partition: str | None = None) -> tuple[range, ...]:
    """Divide layers among pipeline stages, as vLLM does.

    Args:
        partition: the value of ``VLLM_PP_LAYER_PARTITION``; None where it is unset.

    Raises:
        ValueError: a stage would have no layer, or the partition is of other layers or stages.
    """
    if num_stages > num_layers:
        raise ValueError(
            f"--pipeline-parallel-size {num_stages} is more than this model's {num_layers} layers; "
            "give fewer"
        )
    if partition is None:
        each, left = divmod(num_layers, num_stages)
        # The last stage has the output embedding, and the first the input's: others come first.
        first = num_stages - 1 - left
        sizes = [each + (first <= rank < num_stages - 1) for rank in range(num_stages)]
    else:
        sizes = _sizes_of_partition(partition, num_layers, num_stages)
    ends = list(accumulate(sizes))
    return tuple(range(end - size, end) for size, end in zip(sizes, ends, strict=True))


def _sizes_of_partition(partition: str, num_layers: int, num_stages: int) -> list[int]:
    try:
        sizes = [int(size) for size in partition.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != num_stages or sum(sizes) != num_layers or min(sizes) < 1:
        raise ValueError(
            f"VLLM_PP_LAYER_PARTITION={partition} does not divide this model's {num_layers} layers "
            f"among --pipeline-parallel-size {num_stages}: give a number of layers for each stage, "
            "at least 1, with commas between them, or unset it"
        )
    return sizes


def kv_groups_of(
    arm: Arm,
    windows: tuple[int | None, ...],
    sinks: int,
    limits: Limits,
    phase: Phase = Phase.BOTH,
    num_prompt: int | None = None,
    linear: Collection[int] = (),
) -> list[KVGroups]:
    """Make the KV groups of a model, full layers' first.

    Stock vLLM refuses mixed layers and knows no sinks; its arm is what its page manager would do
    with the same layers.

    Args:
        windows: the window of each layer, None for full attention.
        sinks: leading tokens that sliding layers keep.
        phase: whose tokens have the window here. With the prompt's alone every page stays, and
            layers with and without a window are of one kind.
        num_prompt: tokens of each request's prompt, which stays with a window in generated tokens
            only; None for the longest one, which start-up reckons with.
        linear: layers with linear attention, whose windows are None too.
    """
    keeps_all = arm is Arm.FULL or (arm is Arm.SWA and phase is Phase.PREFILL)
    kinds = defaultdict[int | str | None, list[int]](list)
    for layer, window in enumerate(windows):
        kinds[LINEAR if layer in linear else None if keeps_all else window].append(layer)
    size, num_groups = split_into_kv_groups(list(map(len, kinds.values())))
    groups = []
    for (kind, layers), number in zip(kinds.items(), num_groups, strict=True):
        if kind is None:
            policy = PagePolicy(limits.block_size)
        elif isinstance(kind, str):
            policy = _state_policy(limits)
        elif arm is Arm.SWA and phase is Phase.DECODE:
            longest = limits.max_model_len if num_prompt is None else num_prompt
            policy = _prompt_window_policy(kind, num_pinned(sinks, phase, longest), limits)
        else:
            policy = _sliding_page_policy(arm, kind, sinks, limits)
        padding = number * size - len(layers)
        groups.append(KVGroups(policy, number, tuple(layers), padding, kind == LINEAR))
    return sorted(groups, key=lambda group: group.policy.window is not None)


@dataclass(frozen=True)
class _StatePages(WindowPages):
    """Pages of a state: each step writes one, and reads the one that the step before wrote."""

    def holes(self, num_pages: int, num_tokens: int) -> range:
        last = ceil_div(num_tokens, self.page_size) - 1
        return range(num_pages, max(num_pages, last))


def _state_policy(limits: Limits) -> PagePolicy:
    """Make the rules of a state in vLLM's cache mode "align", that of prefix caching."""
    pages = _StatePages(window=2, page_size=limits.block_size)
    return PagePolicy(limits.block_size, pages, stores_all=False, cap=2)


def page_size_with_states(
    state: LinearState,
    block_size: int,
    token_bytes: int,
    *,
    tensor_parallel_size: int,
    model_bytes: int,
    state_bytes: int,
) -> int:
    """Compute the tokens of a page that a state of one layer fits into, as vLLM does.

    Args:
        state: that of all devices.
        block_size: what the page would be without states, of which it is a multiple.
        token_bytes: of a token's keys and values in one layer on a device.
        model_bytes: of an element in the model's dtype, which the convolution's inputs have.
        state_bytes: of an element of the matrices.
    """
    needed = state.num_conv_elements * model_bytes + state.num_matrix_elements * state_bytes
    return block_size * ceil_div(needed, tensor_parallel_size * block_size * token_bytes)


def _sliding_page_policy(arm: Arm, window: int, sinks: int, limits: Limits) -> PagePolicy:
    size = limits.block_size
    if arm is Arm.STOCK:
        in_flight = limits.max_in_flight_tokens
        cap = ceil_div(min(window - 1 + in_flight, limits.max_model_len), size) + 1
        return PagePolicy(size, WindowPages(window, size), cap=cap)
    # Nothing is rolled back but the tokens that a session drops when its turn ends.
    rollback, spare = limits.num_steps_in_flight - 1, limits.spare_tokens
    pages = WindowPages(window, size, sinks, rollback_tokens=rollback)
    longest = limits.max_model_len + spare
    cap = pages.charge(1, limits.max_num_batched_tokens + rollback, spare, longest)
    return PagePolicy(
        size, pages, stores_all=False, spare_tokens=spare, frees_by_schedule=True, cap=cap
    )


def _prompt_window_policy(window: int, pinned_tokens: int, limits: Limits) -> PagePolicy:
    """Make the rules of requests that keep their first ``pinned_tokens``, and store every page."""
    size, spare = limits.block_size, limits.spare_tokens
    pages = WindowPages(window, size, pinned_tokens)
    held = pages.max_held_without_holes(limits.max_in_flight_tokens, spare)
    cap = min(held, ceil_div(limits.max_model_len + spare, size))
    return PagePolicy(size, pages, spare_tokens=spare, cap=cap)


def kv_heads_of_a_device(checkpoint: Checkpoint, tensor_parallel_size: int) -> int:
    """Count the KV heads that each device stores; more devices than heads store copies.

    Raises:
        ValueError: the heads cannot be divided among so many devices.
    """
    heads, num_queries = checkpoint.num_kv_heads, checkpoint.config.num_attention_heads
    few, many = sorted((heads, tensor_parallel_size))
    if num_queries % tensor_parallel_size or many % few:
        raise ValueError(
            f"--tensor-parallel-size {tensor_parallel_size} does not divide this model's "
            f"{num_queries} attention heads and {heads} KV heads evenly; give one that does"
        )
    return max(1, heads // tensor_parallel_size)


def bytes_of_an_element(checkpoint: Checkpoint, dtype: str, cache_dtype: str) -> int:
    """Look up the bytes of an element of the KV cache.

    Raises:
        ValueError: the checkpoint names no dtype, or an unknown one.
    """
    if cache_dtype == "auto":
        cache_dtype = size_cache_dtype(checkpoint.quantization)
    if cache_dtype != "auto":
        if cache_dtype not in DTYPE_BYTES:
            raise ValueError(
                f"the checkpoint asks for a KV cache in {cache_dtype}, which windowed layers do "
                f"not have; give --kv-cache-dtype, one of {', '.join(CACHE_DTYPES[1:])}"
            )
        return DTYPE_BYTES[cache_dtype]
    return bytes_of_a_weight(checkpoint, dtype)


def bytes_of_a_weight(checkpoint: Checkpoint, dtype: str) -> int:
    """Look up the bytes of an element in the model's dtype.

    Raises:
        ValueError: the checkpoint names no dtype, or an unknown one.
    """
    if dtype == "auto":
        if checkpoint.dtype not in DTYPE_BYTES:
            raise ValueError(
                f"the checkpoint's config.json has dtype {checkpoint.dtype!r}; give --dtype, one "
                f"of {', '.join(MODEL_DTYPES[1:])}"
            )
        # vLLM rounds weights of 32 bits unless it is asked not to.
        dtype = "bfloat16" if checkpoint.dtype == "float32" else checkpoint.dtype
    return DTYPE_BYTES[dtype]


def size_cache_dtype(quantization: Mapping[str, Any]) -> str:
    """Name the KV cache dtype that a checkpoint asks for, "auto" where it asks for none.

    Args:
        quantization: that of a :class:`Checkpoint`.
    """
    method = str(quantization.get("quant_method", "")).lower().replace("_", "-")
    if method == "compressed-tensors":
        return "auto" if quantization.get("kv_cache_scheme") is None else "fp8"
    # Before 0.31 modelopt wrote two objects.
    producer, inner = (
        found if isinstance(found := quantization.get(key), dict) else {}
        for key in ("producer", "quantization")
    )
    if not method.startswith("modelopt") and producer.get("name") != "modelopt":
        return "auto"
    keys = ("kv_cache_scheme", "kv_cache_quant_algo")
    asked = next((c[key] for key in keys for c in (inner, quantization) if c.get(key)), None)
    if isinstance(asked, dict):
        bits = asked.get("num_bits") if asked.get("type") == "float" else None
        asked = (
            "nvfp4" if bits == 4 else "fp8" if bits == 8 and asked.get("dynamic") is False else None
        )
    return _MODELOPT_CACHES.get(str(asked).lower(), "auto")


def longest_text_in_limits(checkpoint: Checkpoint) -> int:
    """Compute the ``max_model_len`` that vLLM takes from a checkpoint."""
    rope = checkpoint.config.rope_parameters
    factor = 1.0 if rope["rope_type"] in _SCALED_ROPE else rope.get("factor") or 1.0
    return int(checkpoint.max_positions * factor)
