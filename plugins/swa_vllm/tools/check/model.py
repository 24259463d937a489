"""The table of what each layer of a model would do, from vLLM's own configuration of it."""

from typing import Any

from vllm import ModelRegistry
from vllm.engine.arg_utils import EngineArgs

from swa_backend.window import Phase
from swa_vllm.attention.backends import windowed_backend
from swa_vllm.attention.layer_table import kind_of_layer, lines_of_layers
from swa_vllm.compat.architectures import MODELS
from swa_vllm.config.rope import lost_rope_theta
from swa_vllm.config.swa_config import SWAConfig
from swa_vllm.refusals import check_servable

_HEADER = ("layers", "kind", "window", "sinks", "backend", "KV spec")
# Of full and of sliding layers.
_SPECS = {
    Phase.BOTH: ("FullAttentionSpec", "SWASpec"),
    Phase.PREFILL: ("PromptCacheSpec", "PromptCacheSpec"),
    Phase.DECODE: ("PromptCacheSpec", "PromptWindowSpec"),
}


def inspect_layers(model: str, arguments: dict[str, Any]) -> str:
    """Make a line for each run of equal layers, below vLLM's class of the model.

    Warnings about the options and overrides follow.

    Args:
        arguments: more arguments of vLLM's engine.

    Raises:
        ValueError, RuntimeError: vLLM or this plugin would refuse it.
    """
    config = EngineArgs(model=model, skip_tokenizer_init=True, **arguments).create_engine_config()
    architectures = config.model_config.architectures
    found, architecture = ModelRegistry.resolve_model_cls(architectures, config.model_config)
    path = f"{found.__module__}:{found.__qualname__}"
    if path != MODELS.get(architecture):
        raise RuntimeError(
            f"vLLM serves it with {path}, which knows nothing of windows: options are ignored"
        )
    swa = SWAConfig.from_vllm(config)
    if swa.slides:
        check_servable(config, swa)
    backend = windowed_backend(swa.implementation)
    phase = swa.options.phase
    full_spec, sliding_spec = _SPECS[phase]
    sliding = (
        str(swa.options.sink_tokens),
        "chosen by vLLM" if backend is None else backend.get_name(),
        sliding_spec,
    )
    full = ("-", "-", "chosen by vLLM", full_spec)
    linear = ("linear", "-", "-", "chosen by vLLM", "MambaSpec")
    described = [
        (
            index,
            linear
            if index in swa.layers.linear
            else (
                kind_of_layer(window, phase),
                *(full if window is None else (str(window), *sliding)),
            ),
        )
        for index, window in enumerate(swa.layers.windows)
    ]
    lines = lines_of_layers(_HEADER, described)
    warnings = list(swa.layers.warnings)
    if lost := lost_rope_theta(config.model_config):
        warnings.append(lost)
    return "\n".join([path, *lines, *(f"warning: {text}" for text in warnings)])
