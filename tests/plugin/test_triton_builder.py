"""Builder and layer implementation, driven with what both model runners of vLLM pass.

The V2 runner's ``build_attn_metadata`` itself makes the batches.
"""

import inspect
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker import workspace
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata

from swa_backend import reference
from swa_backend.options import SWAConfigError
from swa_backend.pages import WindowPages
from swa_backend.window import Phase
from swa_vllm.attention.layer import PromptCachedAttention, phase_of_layers
from swa_vllm.attention.triton.backend import SWATritonBackend, SWATritonImpl
from swa_vllm.attention.triton.builder import SWATritonMetadata
from swa_vllm.attention.triton.scratch import Scratch
from swa_vllm.config.swa_config import SWAConfig
from swa_vllm.refusals import check_servable
from tests.helpers.engines import ModelFactory
from tests.helpers.kernel_layer import (
    CPU,
    HEADS,
    PAGE,
    SINKS,
    SIZE,
    WINDOW,
    KernelLayer,
    by_v1,
)
from tests.helpers.tiny_models import FULL

# Of each request: tokens before, and queries.
DECODES = ((70, 1), (5, 1), (31, 1))
MIXED = ((70, 1), (5, 1), (40, 30), (0, 50))
ANSWERS = ((100, 1), (5, 1), (60, 1))  # of the first a page can be freed


@pytest.fixture
def setup(tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch) -> KernelLayer:
    return KernelLayer(tiny_model(**FULL), monkeypatch)


def by_v2(
    setup: KernelLayer, batch: dict[str, Any], *, for_cudagraph_capture: bool = False
) -> SWATritonMetadata:
    groups = SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(layer_names=[setup.name], kv_cache_spec=setup.spec)]
    )
    metadata = build_attn_metadata(
        [[setup.group]],
        num_reqs=len(batch["seq_lens"]),
        num_tokens=batch["num_tokens"],
        query_start_loc_gpu=batch["query_start_loc"],
        query_start_loc_cpu=batch["query_start_loc"].clone(),
        max_query_len=batch["max_query_len"],
        seq_lens=batch["seq_lens"],
        max_seq_len=128,
        block_tables=[batch["block_table"]],
        slot_mappings=batch["slots"][None],
        kv_cache_config=groups,
        for_cudagraph_capture=for_cudagraph_capture,
        rswa_prefix_lens=batch["prompt_lens"],
    )
    return metadata[setup.name]


RUNNERS = {"V1": by_v1, "V2": by_v2, "V2, capturing": partial(by_v2, for_cudagraph_capture=True)}


@pytest.fixture(params=RUNNERS)
def runner(request: pytest.FixtureRequest) -> Callable[[KernelLayer, Any], SWATritonMetadata]:
    return RUNNERS[request.param]


def test_decodes_refer_to_the_runners_own_buffers(
    setup: KernelLayer, runner: Callable[[KernelLayer, Any], SWATritonMetadata]
) -> None:
    """What a CUDA graph holds stays where it is."""
    batch = setup.batch(DECODES, pad_to=5, num_padding=2)
    metadata = runner(setup, batch)
    assert metadata.prefills is None
    assert metadata.decodes is not None
    assert metadata.decodes.query_start_loc is None
    assert metadata.decodes.tokens == slice(0, 5)
    for tensor, name in (
        (metadata.decodes.block_table, "block_table"),
        (metadata.decodes.seq_lens, "seq_lens"),
        (metadata.slots, "slots"),
    ):
        assert tensor.data_ptr() == batch[name].data_ptr()


def test_mixed_batch_is_split_once_and_what_is_not_stored_has_no_slot(
    setup: KernelLayer, runner: Callable[[KernelLayer, Any], SWATritonMetadata]
) -> None:
    batch = setup.batch(MIXED)
    batch["slots"][10] = 7  # in the null page
    metadata = runner(setup, batch)
    assert metadata.decodes is not None
    assert metadata.prefills is not None
    assert (metadata.decodes.tokens, metadata.prefills.tokens) == (slice(0, 2), slice(2, 82))
    assert metadata.prefills.query_start_loc is not None
    assert metadata.prefills.query_start_loc.tolist() == [0, 30, 80]
    assert metadata.slots[10] == -1
    assert (metadata.slots >= 0).sum() == 81
    again = runner(setup, setup.batch(MIXED))
    assert again.prefills is not None
    assert again.prefills.query_start_loc is not None
    starts = again.prefills.query_start_loc.data_ptr()
    assert starts == metadata.prefills.query_start_loc.data_ptr()  # persistent


def check_layer(
    setup: KernelLayer,
    runner: Callable[[KernelLayer, Any], SWATritonMetadata],
    requests: Any,
    pad_to: int,
    prompt_lens: list[int] | None = None,
) -> None:
    """Assert that the layer writes what it must and gives the oracle's output."""
    batch = setup.batch(requests, pad_to, pad_to - len(requests), prompt_lens)
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(1 + 4 * pad_to, PAGE, 1, 2 * SIZE, generator=generator).transpose(1, 2)
    if setup.phase == "decode" and prompt_lens is not None:
        for row, (context, _) in enumerate(requests):
            dead = WindowPages(WINDOW, PAGE, max(SINKS, prompt_lens[row])).dead(context)
            cache[batch["block_table"][row, dead.start : dead.stop].long()] = float("nan")
    heads = (HEADS, 1, 1)
    query, key, value = (
        torch.randn(batch["num_tokens"], n, SIZE, generator=generator) for n in heads
    )
    expected = reference.prefill_attention(
        query.double(),
        key,
        value,
        cache.clone(),
        batch["block_table"],
        batch["query_start_loc"],
        batch["seq_lens"],
        window=WINDOW,
        sink_tokens=SINKS,
        sink_query=setup.shifted(query.double(), batch),
        phase=Phase(setup.phase),
        prompt_lens=None if prompt_lens is None else _padded(batch["prompt_lens"], pad_to),
    )
    written = cache.clone()
    reference.write_pages(key, value, written, batch["slots"])
    output = torch.full_like(query, float("nan"))
    metadata = runner(setup, batch)
    setup.layer.impl.forward(setup.layer, query, key, value, cache, metadata, output)
    num_tokens = int(batch["query_start_loc"][-1])
    assert float((output - expected)[:num_tokens].abs().max()) < 2.0**-18
    assert torch.allclose(cache, written, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize(
    ("requests", "pad_to"),
    [(DECODES, 3), (DECODES, 5), (MIXED, 4)],
    ids=["decodes", "padded", "mixed"],
)
def test_layer_equals_the_oracle(
    requests: Any,
    pad_to: int,
    setup: KernelLayer,
    runner: Callable[[KernelLayer, Any], SWATritonMetadata],
) -> None:
    check_layer(setup, runner, requests, pad_to)


def _padded(lens: torch.Tensor, num_rows: int) -> torch.Tensor:
    return torch.nn.functional.pad(lens, (0, num_rows - len(lens)))


@pytest.mark.parametrize(
    ("phase", "requests", "pad_to", "prompt_lens"),
    [
        ("prefill", DECODES, 3, [70, 6, 40]),
        ("prefill", DECODES, 5, [70, 6, 40]),
        ("prefill", MIXED, 4, [20, 6, 55, 60]),
        ("decode", ANSWERS, 3, [9, 6, 30]),
        ("decode", ANSWERS, 5, [2, 101, 60]),
        ("decode", (*ANSWERS, *MIXED[2:], (90, 20)), 6, [9, 5, 61, 55, 60, 20]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layer_of_a_window_in_one_phase_only_equals_the_oracle(
    phase: str,
    requests: Any,
    pad_to: int,
    prompt_lens: list[int],
    runner: Callable[[KernelLayer, Any], SWATritonMetadata],
    tiny_model: ModelFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts that have ended, that end with the query or in the chunk, and that go on."""
    setup = KernelLayer(tiny_model(**FULL), monkeypatch, phase=phase)
    check_layer(setup, runner, requests, pad_to, prompt_lens)
    runner(setup, setup.batch(requests))  # as vLLM warms up and captures: without lengths
    check_layer(setup, runner, requests, pad_to, prompt_lens)


def test_lengths_of_prompts_stay_where_a_cuda_graph_reads_them(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = KernelLayer(tiny_model(**FULL), monkeypatch, phase="prefill")
    builder = setup.group.get_metadata_builder()
    lens = [
        builder._find_prompt_lens(SimpleNamespace(num_reqs=5, rswa_prefix_lens=given))
        for given in (None, torch.full((3,), 9, dtype=torch.int32))
    ]
    assert lens[0].data_ptr() == lens[1].data_ptr()
    assert lens[1].tolist() == [9, 9, 9, 0, 0]


def test_a_builder_for_layers_with_and_without_a_phase_is_an_error(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM makes one where all of a KV group have one backend."""
    setup = KernelLayer(tiny_model(**FULL), monkeypatch, phase="prefill")
    names = [setup.name, "model.layers.1.self_attn.attn"]
    with set_current_vllm_config(setup.config):
        PromptCachedAttention(HEADS, SIZE, 1.0, prefix=names[1], swa=setup.layer.swa)
    for name in names:
        phase_of_layers([name], setup.config)
    with pytest.raises(RuntimeError, match="share an attention backend"):
        phase_of_layers(names, setup.config)


def test_drafts_are_verified_as_decodes_if_the_window_keeps_their_pages(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a longer chunk a page may not be stored, which decodes would read."""
    speculation = {"method": "ngram", "num_speculative_tokens": 3}
    rows = [(30, 2), (31, 4), (40, 1)]
    for window, num_decodes in ((2, 1), (3, 1), (4, 3), (20, 3)):
        setup = KernelLayer(tiny_model(**FULL), monkeypatch, window, speculative_config=speculation)
        metadata = by_v1(setup, setup.batch(rows))
        assert metadata.decodes is not None
        assert len(metadata.decodes.seq_lens) == num_decodes


@pytest.mark.parametrize("is_shifted", [False, True], ids=["plain", "shifted"])
def test_layers_allocate_nothing(
    is_shifted: bool, tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: vLLM's workspace has all that is needed before it may grow no more."""
    rotary = _rotary() if is_shifted else None
    setup = KernelLayer(tiny_model(**FULL), monkeypatch, rotary=rotary)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    workspace.init_workspace_manager(CPU)
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, partial(_refuse_inside_a_layer, getattr(torch, name)))
    try:
        setup.group.create_metadata_builders(setup.config, CPU, kernel_block_size=PAGE)
        workspace.lock_workspace()
        for count in (1, 8):
            check_layer(setup, by_v1, [(40, 1)] * count, pad_to=count)
        check_layer(setup, by_v1, MIXED, pad_to=len(MIXED))
    finally:
        workspace.reset_workspace_manager()


@pytest.mark.parametrize("is_shifted", [False, True], ids=["plain", "shifted"])
def test_scratch_is_counted_when_vllm_measures_its_memory(
    is_shifted: bool, tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM gives the KV cache what its profiling run leaves; the workspace may not grow then."""
    drafts = {"method": "ngram", "num_speculative_tokens": 3}
    rotary = _rotary() if is_shifted else None
    layer = KernelLayer(tiny_model(**FULL), monkeypatch, rotary=rotary, speculative_config=drafts)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    workspace.init_workspace_manager(CPU)
    try:
        rows = torch.zeros(128, HEADS, SIZE)
        layer.layer.impl.forward(layer.layer, rows, rows, rows, rows, None, rows)
        manager = workspace.current_workspace_manager()
        reserved = manager._current_workspaces[0]
        assert reserved is not None
        # 8 requests of 4 queries, in 2 parts with the sinks.
        least = 8 * 4 * HEADS * 2 * (SIZE + 1) * 4 + is_shifted * rows.nbytes
        assert reserved.nbytes >= least
        workspace.lock_workspace()
        layer.group.create_metadata_builders(layer.config, CPU, kernel_block_size=PAGE)
        metadata = by_v1(layer, layer.batch([(40, 4)] * 8))
        assert metadata.decodes is not None
        check_layer(layer, by_v1, [(40, 4)] * 8, pad_to=8)
        assert manager._current_workspaces[0] is reserved
    finally:
        workspace.reset_workspace_manager()


def _rotary() -> Any:
    angles = torch.arange(128)[:, None] * 10.0 ** -torch.linspace(0, 3, SIZE // 2)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    return SimpleNamespace(cos_sin_cache=table, rotary_dim=SIZE, is_neox_style=True)


def _refuse_inside_a_layer(allocate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    frames = inspect.stack()
    called_by = [frame.function for frame in frames]
    allowed = "_ensure_workspace_size" in called_by or "reference.py" in frames[1].filename
    assert allowed or SWATritonImpl.forward.__name__ not in called_by
    return allocate(*args, **kwargs)


def test_cuda_graphs_hold_uniform_decodes(setup: KernelLayer) -> None:
    builder = setup.group.get_metadata_builder()
    support = builder.get_cudagraph_support(setup.config, setup.spec)
    assert support is AttentionCGSupport.UNIFORM_BATCH
    assert setup.group.backend is SWATritonBackend
    assert setup.spec.storage.spare_tokens == 0


def test_profiling_gives_zeros(setup: KernelLayer) -> None:
    output = torch.full((3, HEADS, SIZE), float("nan"))
    got = setup.layer.impl.forward(setup.layer, output, output, output, output, None, output)
    assert got.eq(0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alibi_slopes": [1.0]}, "have no ALiBi on these kernels"),
        ({"logits_soft_cap": 30.0}, "have no a soft cap of the logits"),
        ({"kv_sharing_target_layer_name": "x"}, "have no KV sharing"),
        ({"attn_type": "encoder"}, "have no attention of type encoder"),
        ({"head_size": 80}, "power of two and at least 16, got 80; remove the window"),
    ],
)
def test_layer_refuses(changes: dict[str, Any], message: str) -> None:
    arguments = {"num_heads": 2, "head_size": 64, "scale": 1.0, "sliding_window": 8}
    with pytest.raises(ValueError, match=message):
        SWATritonImpl(**{**arguments, **changes})


@pytest.mark.parametrize("name", ["fp8", "fp8_e5m2"])
def test_fp8_pages_are_read_with_the_layers_scales(name: str) -> None:
    calls = []
    writes: Any = SimpleNamespace(write=lambda *args, **kwargs: calls.append((args, kwargs)))
    impl = SWATritonImpl(2, 64, 1.0, 2, sliding_window=8, kv_cache_dtype=name)
    layer: Any = SimpleNamespace(_k_scale_float=0.5, _v_scale_float=2.0)
    rows = torch.zeros(1, 2, 64)
    metadata = SWATritonMetadata(torch.zeros(1).long(), writes, None, None, Scratch(0))
    cache = torch.zeros(1, 2, 16, 128).byte()
    impl.forward(layer, rows, rows, rows, cache, metadata, rows)
    ((args, kwargs),) = calls
    wanted = torch.float8_e5m2 if name == "fp8_e5m2" else torch.float8_e4m3fn
    assert args[2].dtype == wanted
    assert (kwargs["k_scale"], kwargs["v_scale"]) == (0.5, 2.0)


def _on_gpu(monkeypatch: pytest.MonkeyPatch, capability: int, is_fnuz: bool = False) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr(current_platform, "is_cuda", lambda: capability > 0)
    monkeypatch.setattr(current_platform, "is_cuda_alike", lambda: True)
    monkeypatch.setattr(current_platform, "is_fp8_fnuz", lambda: is_fnuz)
    found = SimpleNamespace(to_int=lambda: capability)
    monkeypatch.setattr(current_platform, "get_device_capability", lambda: found)


def test_refused_on_old_gpus_and_with_foreign_caches(
    setup: KernelLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    _on_gpu(monkeypatch, 90)
    setup.config.cache_config.cache_dtype = "fp8"
    check_servable(setup.config, SWAConfig.from_vllm(setup.config))
    setup.config.cache_config.cache_dtype = "int8_per_token_head"
    with pytest.raises(SWAConfigError, match="int8_per_token_head is unknown to the kernels"):
        check_servable(setup.config, SWAConfig.from_vllm(setup.config))
    _on_gpu(monkeypatch, 0, is_fnuz=True)
    setup.config.cache_config.cache_dtype = "fp8"
    with pytest.raises(SWAConfigError, match=r"fp8 .fnuz. is unknown"):
        check_servable(setup.config, SWAConfig.from_vllm(setup.config))
    _on_gpu(monkeypatch, 75)
    setup.config.cache_config.cache_dtype = "auto"
    with pytest.raises(SWAConfigError, match="on a GPU that is too old remove the window"):
        check_servable(setup.config, SWAConfig.from_vllm(setup.config))


def test_foreign_caches_that_the_checkpoint_asks_for_are_refused(
    setup: KernelLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where vLLM's config still says "auto"."""
    _on_gpu(monkeypatch, 0, is_fnuz=True)
    setup.config.quant_config = SimpleNamespace(kv_cache_scheme={})
    with pytest.raises(SWAConfigError, match=r"fp8 .the checkpoint asks for it.*fnuz. is unknown"):
        check_servable(setup.config, SWAConfig.from_vllm(setup.config))
    model = setup.config.model_config
    model.dtype = torch.float16
    model.hf_config.quantization_config = {
        "quant_method": "modelopt",
        "kv_cache_quant_algo": "NVFP4",
    }
    with pytest.raises(SWAConfigError, match=r"nvfp4 .the.*use --kv-cache-dtype float16 or one of"):
        check_servable(setup.config, SWAConfig.from_vllm(setup.config))
    setup.config.cache_config.cache_dtype = "float16"
    check_servable(setup.config, SWAConfig.from_vllm(setup.config))
