"""The kernels with one mistake each, to show that the smoke cases catch it."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from triton.runtime.errors import InterpreterError

import swa_backend

Record = Callable[[str, object], None]
# In the order of their imports.
MODULES = (
    "attention_call",
    "kernels.plans",
    "kernels.launch",
    "kernels.tiles",
    "kernels.decode",
    "kernels.prefill",
    "kernels.cache_write",
    "kernels.rotate",
    "ops.checks",
    "ops.dispatch",
    "ops.cache_write",
    "ops.decode",
    "ops.prefill",
    "ops.rotate",
    "ops.compile_ahead",
    "ops",
)


@dataclass(frozen=True)
class Mutant:
    """``old`` in a module's source, which must occur there once, becomes ``new``."""

    mistake: str
    module: str
    old: str
    new: str

    def __str__(self) -> str:
        return self.mistake


def load_kernels(
    monkeypatch: pytest.MonkeyPatch, directory: Path, mutant: Mutant | None
) -> ModuleType:
    """The operations over copies of the kernels, one of them mutated."""
    root = Path(swa_backend.__file__).parent
    for name in MODULES:
        place = "ops/__init__" if name == "ops" else name.replace(".", "/")
        source = (root / f"{place}.py").read_text()
        if mutant is not None and mutant.module == name:
            assert source.count(mutant.old) == 1, f"{mutant}: not once in {name}"
            source = source.replace(mutant.old, mutant.new)
        # A file, because Triton reads the source of its functions.
        path = directory / f"{name}.py"
        path.write_text(source)
        full_name = f"swa_backend.{name}"
        spec = importlib.util.spec_from_file_location(full_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, full_name, module)
        spec.loader.exec_module(module)
    return module


def assert_caught(
    mutant: Mutant,
    smoke: Callable[[ModuleType, pytest.MonkeyPatch, Path], None],
    monkeypatch: pytest.MonkeyPatch,
    directory: Path,
) -> None:
    """Assert that the smoke cases fail over the mutated kernels."""
    module = load_kernels(monkeypatch, directory, mutant)
    with pytest.raises((AssertionError, InterpreterError)) as caught:
        smoke(module, monkeypatch, directory)
    # Not by an accident of the mutation, such as a name that does not exist.
    assert caught.type is AssertionError or "OutOfBoundsError" in str(caught.value)


DECODE, TILES, WRITE, OPS = "kernels.decode", "kernels.tiles", "kernels.cache_write", "ops.decode"
PREFILL, DISPATCH, CALL = "kernels.prefill", "ops.dispatch", "attention_call"
ROTATE = "kernels.rotate"
MUTANTS = (
    Mutant(
        "window too wide",
        DECODE,
        "first_position, last_position, window, prompt_len",
        "first_position, last_position, window + 1, prompt_len",
    ),
    Mutant(
        "window too narrow",
        DECODE,
        "row_low = first_seen(position,",
        "row_low = first_seen(position + 1,",
    ),
    Mutant(
        "future visible", DECODE, "row_stop = position + 1", "row_stop = 0 * position + seq_len"
    ),
    Mutant("own key hidden", DECODE, "row_stop = position + 1", "row_stop = position"),
    Mutant(
        "last tile not masked",
        DECODE,
        "load_rows(value_ptr, slots, is_read,",
        "load_rows(value_ptr, slots, keys < key_stop + TILE,",
    ),
    Mutant("32-bit page arithmetic", DECODE, "pages.to(tl.int64) *", "pages *"),
    Mutant("tiles taken for aligned", DECODE, "(keys % PAGE)", "(offsets % PAGE)"),
    Mutant("pages not carried on", DECODE, "pages = next_pages", "pages = pages"),
    Mutant(
        "sinks in the window counted twice",
        DECODE,
        "row_stop = tl.minimum(row_low, sink_tokens)",
        "row_stop = tl.minimum(position + 1, sink_tokens)",
    ),
    Mutant(
        "sinks forgotten",
        DECODE,
        " stop = tl.minimum(sink_tokens",
        " stop = 0 * tl.minimum(sink_tokens",
    ),
    Mutant("sink query ignored", DECODE, "q_ptr = sink_query_ptr", "q_ptr = query_ptr"),
    Mutant(
        "rest of the tiles dropped",
        DECODE,
        "tl.cdiv(num_tiles, num_splits)",
        "(num_tiles // num_splits)",
    ),
    Mutant(
        "sinks taken for a part of the window",
        DECODE,
        "num_programs(2) - HAS_SINKS",
        "num_programs(2)",
    ),
    Mutant(
        "splits overlap",
        DECODE,
        "first_place + split * span",
        "first_place + split * (span - TILE)",
    ),
    Mutant(
        "heads grouped the other way",
        DECODE,
        "kv_head * GROUP + rows % GROUP",
        "rows % GROUP * tl.num_programs(1) + kv_head",
    ),
    Mutant(
        "all queries at the last position",
        DECODE,
        "position = seq_len - num_queries + query_idx",
        "position = seq_len - 1 + 0 * query_idx",
    ),
    Mutant("values read where keys are", DECODE, "key_ptr + HEAD_DIM * stride_kv_dim", "key_ptr"),
    Mutant("earlier tiles not rescaled", TILES, "acc * factor[:, None]", "acc"),
    Mutant("natural logarithm", DECODE, "top + tl.log2(", "top + tl.log("),
    Mutant(
        "last part not merged",
        DECODE,
        "mask=parts < num_parts, other",
        "mask=parts < num_parts - 1, other",
    ),
    Mutant(
        "empty parts merged",
        DECODE,
        'mask=(lse > float("-inf"))[:, None]',
        "mask=(parts < num_parts)[:, None]",
    ),
    Mutant(
        "prompt not divided among programs",
        DECODE,
        "tl.where(is_window, place - window_place + low, place)",
        "place - window_place + low",
    ),
    Mutant(
        "prompt in the window counted twice",
        DECODE,
        "position + 1, tl.minimum(row_low, sink_tokens))",
        "position + 1, sink_tokens)",
    ),
    Mutant(
        "prompt's last tile not masked",
        DECODE,
        "tl.minimum(stop, pinned_stop))",
        "tl.minimum(stop, pinned_stop + 16))",
    ),
    Mutant(
        "sinks behind a short prompt forgotten",
        DECODE,
        "sink_tokens = tl.maximum(sink_tokens, prompt_len)",
        "sink_tokens = prompt_len",
    ),
    Mutant(
        "generated tokens have the prompt's window",
        TILES,
        "low = tl.where(position < prompt_len, low, 0)",
        "low = tl.where(position < 2**30, low, 0)",
    ),
    Mutant(
        "last query of the prompt taken for generated",
        TILES,
        "low = tl.where(position < prompt_len, low, 0)",
        "low = tl.where(position < prompt_len - 1, low, 0)",
    ),
    Mutant("rows behind the last request left", DECODE, "num_reqs + 1, block", "num_reqs, block"),
    Mutant(
        "rows that see nothing left by a single part",
        DECODE,
        "is_stored = is_row\n",
        "is_stored = is_row & (total > 0.0)\n",
    ),
    Mutant(
        "parts stored in one place",
        DECODE,
        "out_offset = part * HEAD_DIM",
        "out_offset = (part - split) * HEAD_DIM",
    ),
    Mutant(
        "log-sum-exps stored in one place",
        DECODE,
        "lse_ptr + part, top",
        "lse_ptr + part - split, top",
    ),
    Mutant(
        "single part stored as the first head",
        DECODE,
        "        out_offset = token * stride_out_token + head",
        "        out_offset = token * stride_out_token + 0 * head",
    ),
    Mutant("parts not weighted", DECODE, "partial * weights[:, None]", "partial"),
    Mutant("value scale forgotten", DECODE, "value_scale / safe_total", "1.0 / safe_total"),
    Mutant(
        "head stride of a contiguous cache",
        DECODE,
        "*readable_cache.stride(),",
        "*readable_cache.contiguous().stride(),",
    ),
    Mutant(
        "stale table entry read",
        TILES,
        "mask=keys < stop, other=0",
        "mask=keys < stop + 2 * PAGE, other=0",
    ),
    Mutant("block given to the request before", TILES, "+ middle > block", "+ middle >= block"),
    Mutant(
        "nothing seen taken for infinity",
        TILES,
        'tl.where(new_top == float("-inf"), 0.0, new_top)',
        "new_top",
    ),
    Mutant("fp8 sign lost", TILES, "((wide & 0x80) << 8) | ", ""),
    Mutant("fp8 exponent off by one", DISPATCH, "_SHIFTED_E4M3 = 256.0", "_SHIFTED_E4M3 = 128.0"),
    Mutant("score scale of base e", OPS, "* math.log2(math.e)", "* 1.0"),
    Mutant("key scale forgotten", OPS, "self._score_scale * k_scale", "self._score_scale"),
    Mutant("negative slot stored", WRITE, "slot < 0", "slot < -9"),
    Mutant(
        "32-bit slot arithmetic", WRITE, "ptr + token).to(tl.int64)", "ptr + token).to(tl.int32)"
    ),
    Mutant(
        "fp8 cut off, not rounded",
        WRITE,
        "(bits + ((1 << (SHIFT - 1)) - 1) + ((bits >> SHIFT) & 1))",
        "bits",
    ),
    Mutant("fp8 overflow not saturated", WRITE, "tl.minimum(tl.abs(x), LARGEST)", "tl.abs(x)"),
    Mutant("fp8 NaN stored as a number", WRITE, "tl.where(x == x, rounded, 0x7F)", "rounded"),
    Mutant(
        "heads behind the last stored",
        WRITE,
        "is_head = heads < NUM_HEADS",
        "is_head = heads < HEADS",
    ),
)
PREFILL_MUTANTS = (
    Mutant(
        "window too wide",
        PREFILL,
        "row_low = first_seen(position,",
        "row_low = first_seen(position - 1,",
    ),
    Mutant(
        "first key of a block skipped",
        PREFILL,
        "context + first, last_position, window",
        "context + first + 1, last_position, window",
    ),
    Mutant(
        "tiles outside the window read",
        PREFILL,
        "context + first, last_position, window",
        "context, last_position, window",
    ),
    Mutant("future visible", PREFILL, "row_stop = position + 1", "row_stop = position + 2"),
    Mutant("own key hidden", PREFILL, "row_stop = position + 1", "row_stop = position"),
    Mutant(
        "own keys counted with the cached",
        PREFILL,
        "tl.where(is_read, keys, 2**31 - 1)",
        "keys",
    ),
    Mutant(
        "own keys read from pages",
        PREFILL,
        "cached_stop = tl.minimum(stop, context)",
        "cached_stop = stop",
    ),
    Mutant(
        "cached keys dropped", PREFILL, "cached_stop = tl.minimum(stop, context)", "cached_stop = 0"
    ),
    Mutant(
        "own tiles begin at the window",
        PREFILL,
        "own_start = tl.maximum(start, context)",
        "own_start = start",
    ),
    Mutant(
        "own keys of another request", PREFILL, "(token_start + keys - context)", "(keys - context)"
    ),
    Mutant("32-bit page arithmetic", PREFILL, "pages.to(tl.int64) *", "pages *"),
    Mutant("pages not carried on", PREFILL, "pages = next_pages", "pages = pages"),
    Mutant(
        "value scale applied to own values", PREFILL, "acc = acc / value_scale", "acc = acc / 1.0"
    ),
    Mutant("value scale forgotten", PREFILL, "acc = acc * value_scale", "acc = acc * 1.0"),
    Mutant("key scale forgotten", PREFILL, "score_scale * key_scale", "score_scale"),
    Mutant(
        "sinks in the window counted twice",
        PREFILL,
        "tl.minimum(row_low, sink_tokens)",
        "tl.minimum(position + 1, sink_tokens)",
    ),
    Mutant(
        "keys of the future unmasked",
        PREFILL,
        "seen_stop = context + first + 1",
        "seen_stop = last_position + 1",
    ),
    Mutant(
        "keys before the window unmasked",
        PREFILL,
        "seen_start = highest_low",
        "seen_start = start",
    ),
    Mutant("sinks forgotten", PREFILL, "range(1 - HAS_SINKS, 2)", "range(1, 2)"),
    Mutant("sink query ignored", PREFILL, "q_ptr = sink_query_ptr", "q_ptr = query_ptr"),
    Mutant("rest behind the last request left", PREFILL, "num_reqs + 1, block", "num_reqs, block"),
    Mutant(
        "request without keys divides by zero",
        PREFILL,
        "tl.where(total == 0.0, 1.0, total)",
        "total",
    ),
    Mutant(
        "heads grouped the other way",
        PREFILL,
        "kv_head * GROUP + rows % GROUP",
        "rows % GROUP * tl.num_programs(1) + kv_head",
    ),
    Mutant("sinks taken for absent", CALL, "and self.sink_tokens > 0", "and self.sink_tokens < 0"),
    Mutant(
        "prompt below the window forgotten",
        PREFILL,
        "sink_tokens = tl.maximum(sink_tokens, prompt_len)",
        "sink_tokens = sink_tokens",
    ),
    Mutant(
        "sinks behind a short prompt forgotten",
        PREFILL,
        "sink_tokens = tl.maximum(sink_tokens, prompt_len)",
        "sink_tokens = prompt_len",
    ),
    Mutant(
        "block that crosses the prompt's end begins at its window",
        TILES,
        "        low = tl.minimum(\n            first_seen(first, window, prompt_len, PHASE),",
        "        low = tl.maximum(\n            first_seen(first, window, prompt_len, PHASE),",
    ),
    Mutant(
        "tiles of a block that crosses the prompt's end unmasked",
        TILES,
        "last = tl.minimum(last, tl.maximum(prompt_len - 1, first))",
        "last = last",
    ),
)
ROTATE_MUTANTS = (
    Mutant("other direction", ROTATE, "is_first == (distance >= 0)", "is_first == (distance < 0)"),
    Mutant("direction of all alike", ROTATE, "is_first == (distance >= 0)", "is_first"),
    Mutant(
        "factor of the table kept", ROTATE, "tl.load(table_ptr)", "1.0 + 0.0 * tl.load(table_ptr)"
    ),
    Mutant("sines taken for cosines", ROTATE, "row_ptr + HALF + pair", "row_ptr + pair"),
    Mutant("neighbours taken for halves", ROTATE, "partner = dims ^ 1", "partner = dims ^ HALF"),
    Mutant("rest not kept", ROTATE, "tl.where(is_rotated, cos, 1.0)", "cos"),
    Mutant("next token's distance", ROTATE, "distances_ptr + token", "distances_ptr + token + 1"),
)
