"""A windowed layer over vLLM's C++ operators, with its builder and without an engine."""

from typing import Any

import pytest
import torch
from vllm import EngineArgs
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.v1.attention.backend import CommonAttentionMetadata

from swa_backend import reference
from swa_backend.pages import WindowPages, max_partial_tokens
from swa_backend.window import Phase, last_unshifted, num_pinned
from swa_vllm.attention.cpu.builder import SWACPUMetadata
from swa_vllm.attention.cpu.position_shift import ShiftedScratch
from swa_vllm.tools.engines.batches import BLOCK_SIZE, make_batch
from tests.helpers.engines import ModelFactory
from tests.helpers.kernel_layer import CPU, SIZE, windowed_layer
from tests.helpers.tiny_models import FULL

WINDOW, HEADS, KV_HEADS = 40, 4, 2
NUM_PAGES = 80
# Of each request: tokens before, and queries.
BATCHES = {
    "decodes": ((70, 1), (5, 1), (300, 1), (43, 1), (44, 1), (45, 1)),
    "short chunks": ((70, 3), (0, 5), (39, 2), (43, 1), (39, 3), (43, 3)),
    "mixed": ((70, 1), (0, 300), (5, 1), (130, 200), (33, 30), (96, 64), (201, 1)),
}


class CPULayer:
    """One windowed layer with its group, and pages of random keys and values.

    Attributes:
        dense: the same pages as the oracle reads them, ``[num_pages, Hkv, block, 2 * head_size]``.
    """

    def __init__(
        self,
        model: Any,
        monkeypatch: pytest.MonkeyPatch,
        sink_tokens: int,
        *,
        is_shifted: bool,
        dtype: str = "float32",
        phase: Phase = Phase.BOTH,
    ) -> None:
        options = {"window": WINDOW, "sink_tokens": sink_tokens, "position_shift": is_shifted}
        if phase is not Phase.BOTH:
            options["phase"] = phase.value
        self.config = EngineArgs(
            str(model),
            skip_tokenizer_init=True,
            dtype=dtype,
            block_size=BLOCK_SIZE,
            max_model_len=512,
            additional_config={"swa": {k: v for k, v in options.items() if v}},
        ).create_engine_config()
        with set_current_vllm_config(self.config):
            rotary = RotaryEmbedding(SIZE, SIZE, 512, 10000.0, True, torch.float32)
        self.rotary = rotary if is_shifted else None
        self.layer, self.group = windowed_layer(
            self.config,
            monkeypatch,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            window=WINDOW,
            rotary=rotary,
        )
        shape = (NUM_PAGES, KV_HEADS, BLOCK_SIZE, 2 * SIZE)
        self.layer.kv_cache = torch.zeros(shape, dtype=self.config.model_config.dtype)
        with set_current_vllm_config(self.config):
            self.group.create_metadata_builders(self.config, CPU, kernel_block_size=BLOCK_SIZE)
        self.sink_tokens, self.phase = sink_tokens, phase
        self._fill_pages()

    def _fill_pages(self) -> None:
        generator = torch.Generator().manual_seed(0)
        cache = self.layer.kv_cache
        self.dense = torch.randn(cache.shape, generator=generator).to(cache.dtype)
        tokens = self.dense.transpose(1, 2).flatten(0, 1)
        key, value = (x.contiguous() for x in tokens.chunk(2, dim=-1))
        self.write(key, value, torch.arange(len(tokens)))

    def write(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        self.layer.impl.do_kv_cache_update(self.layer, key, value, self.layer.kv_cache, slots)

    def build(self, batch: CommonAttentionMetadata) -> SWACPUMetadata:
        metadata: SWACPUMetadata = self.group.get_metadata_builder().build(0, batch)
        return metadata

    def shifted(self, query: torch.Tensor, batch: CommonAttentionMetadata) -> torch.Tensor | None:
        """Queries as the sinks shall meet them."""
        if self.rotary is None:
            return None
        lengths = batch.query_start_loc.diff().tolist()
        distances = [
            (torch.arange(end - n, end) - last_unshifted(WINDOW, self.sink_tokens)).clamp(min=0)
            for end, n in zip(batch.seq_lens.tolist(), lengths, strict=True)
        ]
        return reference.rotate_back(query, torch.cat(distances), self.rotary.cos_sin_cache)

    def check(
        self,
        requests: tuple[tuple[int, int], ...],
        *,
        has_holes: bool = False,
        prompts: list[int] | None = None,
    ) -> SWACPUMetadata:
        """Assert that a step gives the oracle's output."""
        contexts, queries = map(list, zip(*requests, strict=True))
        holes = WindowPages(WINDOW, BLOCK_SIZE, self.sink_tokens) if has_holes else None
        spare = max_partial_tokens(BLOCK_SIZE) if prompts else self.sink_tokens
        batch = make_batch(contexts, queries, holes, spare, prompts)
        for row, (context, _) in enumerate(requests):
            pinned = num_pinned(self.sink_tokens, self.phase, prompts[row] if prompts else 0)
            dead = WindowPages(WINDOW, BLOCK_SIZE, pinned).dead(context)
            batch.block_table_tensor[row, dead.start : dead.stop] = 10**6  # nobody looks at it
        generator = torch.Generator().manual_seed(1)
        query, key, value = (
            torch.randn(sum(queries), n, SIZE, generator=generator)
            for n in (HEADS, KV_HEADS, KV_HEADS)
        )
        expected = reference.prefill_attention(
            query.double(),
            key,
            value,
            self.dense,
            batch.block_table_tensor,
            batch.query_start_loc,
            batch.seq_lens,
            window=WINDOW,
            sink_tokens=self.sink_tokens,
            sink_query=self.shifted(query.double(), batch),
            phase=self.phase,
            prompt_lens=batch.rswa_prefix_lens,
        )
        metadata = self.build(batch)
        output = torch.full_like(query, float("nan"))
        cache = self.layer.kv_cache
        self.layer.impl.forward(self.layer, query, key, value, cache, metadata, output)
        assert float((output - expected).abs().max()) < 2.0**-18
        return metadata


@pytest.mark.parametrize("has_holes", [False, True], ids=["stored", "holes"])
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize(
    ("sinks", "is_shifted"), [(0, False), (5, False), (33, False), (1, True), (5, True)]
)
def test_layer_equals_the_oracle(
    sinks: int,
    is_shifted: bool,
    name: str,
    has_holes: bool,
    tiny_model: ModelFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = CPULayer(tiny_model(**FULL), monkeypatch, sinks, is_shifted=is_shifted)
    layer.check(BATCHES[name], has_holes=has_holes)


# Of each request: tokens before, queries, and the length of its prompt.
ANSWERS = {
    "decodes": ((70, 1, 5), (72, 1, 33), (300, 1, 100), (64, 1, 24), (90, 1, 96), (103, 1, 64)),
    "drafts": ((70, 3, 5), (300, 4, 100), (71, 1, 33), (64, 3, 25)),
    "mixed": (
        (70, 1, 5),
        (0, 300, 300),
        (130, 200, 200),
        (33, 30, 20),
        (299, 1, 300),
        (20, 100, 40),
        (201, 1, 9),
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("sinks", [0, 5, 33])
def test_layer_of_a_window_in_the_answer_only_equals_the_oracle(
    sinks: int, name: str, tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = CPULayer(tiny_model(**FULL), monkeypatch, sinks, is_shifted=False, phase=Phase.DECODE)
    *_, prompts = map(list, zip(*ANSWERS[name], strict=True))
    layer.check(tuple(row[:2] for row in ANSWERS[name]), prompts=prompts)


def test_scores_of_shifted_sinks_are_kept_in_two_parts(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A score rounded to bfloat16 and what is left of it together are twice as precise."""
    sinks = 5
    layer = CPULayer(tiny_model(**FULL), monkeypatch, sinks, is_shifted=True, dtype="bfloat16")
    batch = make_batch([96], [64], spare_tokens=sinks)
    (part,) = layer.build(batch).parts
    assert isinstance(part.sinks, ShiftedScratch)
    shift = layer.layer.impl.shift
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(64, HEADS, SIZE, generator=generator).bfloat16()
    wide = shift.widen_query(query, part.sinks, layer.layer.kv_cache)
    assert torch.equal(wide[..., :SIZE], query)
    rounded, rest = wide[..., SIZE : SIZE + 2 * sinks].double().chunk(2, dim=-1)
    assert not wide[..., SIZE + 2 * sinks :].any()
    turned = shift.rotate(query, -part.sinks.distances).double().unflatten(1, (KV_HEADS, -1))
    page = layer.dense[batch.block_table_tensor[0, 0].long()].double()
    scores = torch.einsum("nhgd,hsd->nhgs", turned, page[:, :sinks, :SIZE]).flatten(1, 2)
    assert bool((rounded - scores).abs().max() > 2.0**-9)
    assert torch.allclose(rounded + rest, scores, rtol=2.0**-16, atol=2.0**-16)
