"""What each layer of a model would do, from vLLM's own configuration of it."""

from itertools import groupby
from typing import Any

from vllm import ModelRegistry
from vllm.engine.arg_utils import EngineArgs

from swa_vllm.attention import windowed_backend
from swa_vllm.options import layer_plan, swa_options
from swa_vllm.refusals import check_servable
from swa_vllm.registration import MODELS

_HEADER = ("layers", "kind", "window", "sinks", "backend", "KV spec")


def layer_table(model: str, options: dict[str, Any]) -> str:
    """A line for each run of equal layers; before it vLLM's class of the model, behind it warnings.

    Raises:
        ValueError, RuntimeError: vLLM or this plugin would refuse it.
    """
    config = EngineArgs(
        model=model, skip_tokenizer_init=True, additional_config={"swa": options}
    ).create_engine_config()
    architectures = config.model_config.architectures
    found, architecture = ModelRegistry.resolve_model_cls(architectures, config.model_config)
    path = f"{found.__module__}:{found.__qualname__}"
    if path != MODELS.get(architecture):
        raise RuntimeError(
            f"vLLM serves it with {path}, which knows nothing of windows: options are ignored"
        )
    plan = layer_plan(config)
    if plan.slides:
        check_servable(config)
    backend = windowed_backend(config)
    sliding = (
        str(swa_options(config).sink_tokens),
        "chosen by vLLM" if backend is None else backend.get_name(),
        "SWASpec",
    )
    rows: list[tuple[str, ...]] = [_HEADER]
    for window, run in groupby(enumerate(plan.windows), key=lambda item: item[1]):
        indices = [index for index, _ in run]
        span = f"{indices[0]}-{indices[-1]}" if len(indices) > 1 else str(indices[0])
        rest = ("full", "-", "-", "chosen by vLLM", "FullAttentionSpec")
        rows.append((span, *(rest if window is None else ("sliding", str(window), *sliding))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([path, *lines, *(f"warning: {text}" for text in plan.warnings)])
