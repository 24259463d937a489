"""Random tiny Qwen3s, engines and requests, each case from one integer, its seed.

The three lowest bits of a seed say what is to happen in its case (:data:`AIMS`), so that of eight
seeds in a row four are meant for each event, in every combination. A case says everything itself,
so that one that failed can be kept while the choices made here change.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from swa_backend.options import PrefillPages
from swa_backend.pages import WindowPages, ceil_div, max_partial_tokens
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
        phase: value of that option.
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
    phase: str = "both"

    @property
    def keeps_all(self) -> bool:
        """Whether every page of a request stays until its end."""
        return self.phase == "prefill"

    @property
    def stores_prompts(self) -> bool:
        """Whether every page of a prompt is stored, and stays as long as its request."""
        return self.phase != "both"

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each layer; None for full attention."""
        return tuple(self.window if slides else None for slides in self.windowed)

    @property
    def pages(self) -> WindowPages:
        """Of a request in a windowed layer."""
        return WindowPages(self.window, self.page_size, self.sinks)

    @property
    def num_groups(self) -> tuple[int, int]:
        """KV groups that vLLM makes of full layers, and of windowed ones."""
        num_windowed = sum(self.windowed)
        num_full = len(self.windowed) - num_windowed
        if self.keeps_all:
            return 1, 0
        if not num_full:
            return 0, 1
        few, many = sorted((num_full, num_windowed))
        size = many if many < 1.5 * few else few
        return ceil_div(num_full, size), ceil_div(num_windowed, size)

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
        if self.phase != "both":
            options["phase"] = self.phase
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
    """The case of a seed: the first of many random ones that can do what its seed asks for."""
    rng = random.Random(seed)
    aims = [is_met for bit, is_met in enumerate(AIMS.values()) if seed >> bit & 1]
    while True:
        case = _draw(rng)
        if all(is_met(case) for is_met in aims):
            return case


def _draw(rng: random.Random) -> Case:
    num_kv_heads = rng.choice([1, 1, 2, 3])
    windowed = tuple(rng.random() < 0.7 for _ in range(rng.choice([1, 2, 2, 2, 3, 4])))
    if not any(windowed):
        windowed = (*windowed[1:], True)
    page_size = rng.choice([32, 32, 32, 64, 96])
    near_a_page = page_size * rng.randint(1, 2) + rng.randint(-1, 1)
    sinks = rng.choice([0, 0, 1, 4, page_size, rng.randint(2, page_size + 9)])
    max_length = rng.choice([MAX_LENGTH, rng.randint(33, MAX_LENGTH)])
    max_requests = rng.randint(1, 8)
    sinks = min(sinks, max_length - 1)  # more are refused
    batches = _batch(rng, max_length), _batch(rng, max_length)
    if rng.random() < 0.5:  # some ask once more
        again = rng.sample(batches[0], k=rng.randint(1, len(batches[0])))
        batches = batches[0], tuple(sorted(again, key=lambda job: job.starts_at))
    case = Case(
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
        num_pages=0,
        max_length=max_length,
        chunk=max(max_requests, rng.choice([16, 33, 64, 130, 512])),
        max_requests=max_requests,
        caching=rng.random() < 0.7,
        is_async=rng.random() < 0.5,
        batches=batches,
        # Three seeds of four aim at what a window in both phases alone does.
        phase=rng.choice(["both", "prefill", "prefill", "decode", "decode"]),
    )
    if case.stores_prompts:
        case = replace(case, prefill_pages="auto")
    if case.phase == "decode":  # shift is refused; only answers longer than a window free pages
        case = replace(case, shift=False, window=rng.choice([1, 2, rng.randint(3, 40)]))
    least = _least_pages(case)
    return replace(case, num_pages=least + rng.choice([0, 0, least // 4, least, 5 * least]))


def _least_pages(case: Case) -> int:
    """What vLLM demands, or a little more: one request of the greatest length and the null page."""
    num_full, num_windowed = case.num_groups
    if case.keeps_all:
        return ceil_div(case.max_length, case.page_size) + 1
    if case.stores_prompts:
        longest = ceil_div(case.max_length + max_partial_tokens(case.page_size), case.page_size)
        return (num_full + num_windowed) * longest + 1
    longest = ceil_div(case.max_length + case.sinks, case.page_size)
    in_flight = ceil_div(case.window - 1 + 2 * case.chunk, case.page_size) + 1
    charged = min(longest, in_flight + 2 * case.pages.num_sink_pages)
    return num_full * longest + num_windowed * charged + 1


def _batch(rng: random.Random, max_length: int) -> tuple[Job, ...]:
    num_steps = rng.choice([1, 20])  # within which requests arrive
    jobs = [_job(rng, max_length, rng.randrange(num_steps)) for _ in range(rng.randint(1, 6))]
    return tuple(sorted(jobs, key=lambda job: job.starts_at))


def _job(rng: random.Random, max_length: int, starts_at: int) -> Job:
    num_tokens = min(max_length - 1, rng.randint(1, rng.choice([1, 8, 40, 100])))
    longest = max_length - num_tokens
    num_prompt = rng.choice([rng.randint(1, longest), rng.randint(ceil_div(longest, 2), longest)])
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


def _can_skip_pages(case: Case) -> bool:
    """A chunk of a first prompt passes over pages that it need not store."""
    is_kept = (
        case.stores_prompts
        or case.prefill_pages == PrefillPages.ALL.value
        or (case.prefill_pages == PrefillPages.AUTO.value and case.caching)
    )
    first = case.batches[0][0]
    num_tokens = min(case.chunk, first.num_shared + first.num_own)
    return not is_kept and len(case.pages.holes(0, num_tokens)) > 0


def _can_hit_across_freed_pages(case: Case) -> bool:
    """The second batch begins with a long prompt that one of the first batch's last ones was."""
    pages, (jobs, (again, *_)) = case.pages, case.batches
    num_pages = pages.num_sink_pages + pages.num_hit_pages + 1
    # A window of one sees no page that a hit could end with; who scores a prompt reads no cache.
    may_free = case.window > 1 and not case.stores_prompts
    return (case.caching and may_free and not again.scores_prompt) and any(
        job.text == again.text
        and again.num_shared >= job.num_shared > num_pages * case.page_size
        and not job.num_own
        and not job.aborted_at
        and job.starts_at == jobs[-1].starts_at
        for job in jobs
    )


def _can_run_short_of_pages(case: Case) -> bool:
    """Requests that run at once would hold more than the pool has."""
    return any(_num_pages_held(case, jobs) >= case.num_pages for jobs in case.batches)


def _num_pages_held(case: Case, jobs: tuple[Job, ...]) -> int:
    num_full, num_windowed = case.num_groups
    most = case.pages.max_survivors + case.pages.num_sink_pages
    running = [job for job in jobs if not job.aborted_at for _ in range(job.num_samples)]
    held = 0
    for job in running[: case.max_requests]:
        own = job.num_own + job.num_tokens + (0 if case.caching else job.num_shared)
        num_pages = ceil_div(own, case.page_size)
        most_windowed = most
        if case.stores_prompts:
            most_windowed += ceil_div(job.num_shared + job.num_own, case.page_size)
        held += num_full * num_pages + num_windowed * min(num_pages, most_windowed)
    return held


# What a case is meant for, by what shows before it runs that this may happen in it.
AIMS: dict[str, Callable[[Case], bool]] = {
    "skipped pages": _can_skip_pages,
    "hits across freed pages": _can_hit_across_freed_pages,
    "shortages of pages": _can_run_short_of_pages,
}
