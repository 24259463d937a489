"""Random tiny Qwen3s, engines and requests, each case from one integer.

A case says everything itself, so that one that failed can be kept while the choices made here
change.
"""

import random
from dataclasses import dataclass
from typing import Any, NamedTuple

from swa_backend.options import PrefillPages
from swa_backend.pages import ceil_div
from tests.helpers.tiny_models import FULL, ROPE, random_prompts

MAX_LENGTH = 256


class Job(NamedTuple):
    """One request.

    Attributes:
        text: which of some long texts its prompt begins with; others of that text share it.
        num_shared: how much of it.
        num_own: tokens of its own behind that.
        num_tokens: to generate.
        num_samples: that many answers by chance; with one the most likely tokens.
        starts_at: step of its batch.
        aborted_at: step, or 0.
        scores_prompt: whether log-probabilities of the prompt are wanted.
    """

    text: int
    num_shared: int
    num_own: int
    num_tokens: int
    num_samples: int = 1
    starts_at: int = 0
    aborted_at: int = 0
    scores_prompt: bool = False

    def prompt(self, seed: int) -> list[int]:
        """Its tokens; those of its own by ``seed``."""
        (shared,) = random_prompts([MAX_LENGTH], seed=self.text)
        (own,) = random_prompts([self.num_own], seed=1000 + seed)
        return shared[: self.num_shared] + own


@dataclass(frozen=True)
class Case:
    """A model, its window, an engine, and batches of requests, each served to its end.

    Attributes:
        windowed: whether each layer slides.
        by_checkpoint: whether the checkpoint says so, or the options.
        prefill_pages: value of that option.
        page_size: tokens.
        num_pages: of the pool, the null page included.
        chunk: most tokens of a step.
        is_async: whether steps are scheduled before the one before has ended.
    """

    dtype: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: str
    tied: bool
    windowed: tuple[bool, ...]
    by_checkpoint: bool
    window: int
    sinks: int
    shift: bool
    prefill_pages: str
    page_size: int
    num_pages: int
    max_length: int
    chunk: int
    max_requests: int
    caching: bool
    is_async: bool
    batches: tuple[tuple[Job, ...], ...]

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each layer; None for full attention."""
        return tuple(self.window if slides else None for slides in self.windowed)

    @property
    def checkpoint(self) -> dict[str, Any]:
        """Keys of its config."""
        kinds = ["sliding_attention" if slides else "full_attention" for slides in self.windowed]
        own = {"use_sliding_window": True, "sliding_window": self.window, "layer_types": kinds}
        return {
            "num_hidden_layers": len(self.windowed),
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rope_parameters": ROPE[self.rope],
            "tie_word_embeddings": self.tied,
            **(own if self.by_checkpoint else FULL),
        }

    @property
    def engine(self) -> dict[str, Any]:
        """Arguments of ``LLM``."""
        options: dict[str, Any] = {"prefill_pages": self.prefill_pages, "sink_tokens": self.sinks}
        if self.shift:
            options["position_shift"] = True
        if not self.by_checkpoint:
            options["window"] = self.window
            options["full_attention_layers"] = [i for i, w in enumerate(self.windowed) if not w]
        return {
            "dtype": self.dtype,
            "block_size": self.page_size,
            "num_gpu_blocks_override": self.num_pages,
            "max_model_len": self.max_length,
            "max_num_batched_tokens": self.chunk,
            "max_num_seqs": self.max_requests,
            "enable_prefix_caching": self.caching,
            "async_scheduling": self.is_async,
            "additional_config": {"swa": options},
        }


def random_case(seed: int) -> Case:
    """The case of a seed."""
    rng = random.Random(seed)
    num_kv_heads = rng.choice([1, 1, 2, 3])
    windowed = tuple(rng.random() < 0.7 for _ in range(rng.choice([1, 2, 2, 2, 3, 4])))
    if not any(windowed):
        windowed = (*windowed[1:], True)
    page_size = rng.choice([32, 32, 32, 64, 96])
    near_a_page = page_size * rng.randint(1, 2) + rng.randint(-1, 1)
    sinks = rng.choice([0, 0, 1, 4, page_size, rng.randint(2, page_size + 9)])
    max_length, max_requests = rng.randint(33, MAX_LENGTH), rng.randint(1, 8)
    sinks = min(sinks, max_length - 1)  # more are refused
    # What vLLM demands: one request of the greatest length, with every layer in a group of its own.
    least = len(windowed) * ceil_div(max_length + sinks, page_size) + 1
    return Case(
        dtype=rng.choice(["float32"] * 8 + ["bfloat16", "float16"]),
        num_heads=num_kv_heads * rng.choice([1, 2, 4]),
        num_kv_heads=num_kv_heads,
        head_dim=rng.choice([32, 32, 64, 80, 128]),
        rope=rng.choice([*ROPE]),
        tied=rng.random() < 0.5,
        windowed=windowed,
        by_checkpoint=rng.random() < 0.3,
        window=rng.choice([1, 2, near_a_page, near_a_page, rng.randint(3, 150)]),
        sinks=sinks,
        shift=sinks > 0 and rng.random() < 0.5,
        prefill_pages=rng.choice([*PrefillPages]).value,
        page_size=page_size,
        num_pages=least + rng.choice([0, 0, least // 4, least, 5 * least]),
        max_length=max_length,
        chunk=max(max_requests, rng.choice([16, 33, 64, 130, 512])),
        max_requests=max_requests,
        caching=rng.random() < 0.7,
        is_async=rng.random() < 0.5,
        batches=tuple(_batch(rng, max_length) for _ in range(2)),
    )


def _batch(rng: random.Random, max_length: int) -> tuple[Job, ...]:
    num_steps = rng.choice([1, 20])  # within which requests arrive
    jobs = [_job(rng, max_length, rng.randrange(num_steps)) for _ in range(rng.randint(1, 6))]
    return tuple(sorted(jobs, key=lambda job: job.starts_at))


def _job(rng: random.Random, max_length: int, starts_at: int) -> Job:
    num_tokens = min(max_length - 1, rng.randint(1, rng.choice([1, 8, 40, 100])))
    num_prompt = rng.randint(1, max_length - num_tokens)
    num_own = rng.choice([0, min(num_prompt, rng.randint(1, 40)), num_prompt])
    return Job(
        text=rng.randrange(2),
        num_shared=num_prompt - num_own,
        num_own=num_own,
        num_tokens=num_tokens,
        num_samples=rng.choice([1, 1, 1, 2, 3]),
        starts_at=starts_at,
        aborted_at=rng.choice([0, 0, 0, starts_at + rng.randint(1, 30)]),
        scores_prompt=rng.random() < 0.15,
    )
