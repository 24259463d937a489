"""The step of ``swa check`` that reads a model's files: it needs neither vLLM nor torch."""

from typing import Any

from swa_backend.can_slide import check_can_slide
from swa_backend.checkpoint import Checkpoint, read_checkpoint
from swa_backend.layers import describe_windows, resolve_layers
from swa_backend.weights import check_weights
from swa_backend.window import Phase
from swa_vllm.compat import envs
from swa_vllm.compat.architectures import UNPROVEN, check_architectures, phase_refused
from swa_vllm.config.additional_config import parse_additional_config
from swa_vllm.tools.check.problems import problem_of_message
from swa_vllm.tools.common.hub import find_model
from swa_vllm.tools.common.sizing import (
    kv_heads_of_a_device,
    longest_text_in_limits,
    stages_of,
)


def inspect_files(model: str, arguments: dict[str, Any]) -> str:
    """Check the config.json, the headers of weights, and the options for this model.

    With ``--hf-overrides`` the options wait for vLLM, which applies these.

    Args:
        arguments: of vLLM's engine, beside the model.

    Raises:
        ProblemError: no engine would serve it.
    """
    try:
        path = find_model(model)
        checkpoint = read_checkpoint(path)
        if not set(checkpoint.architectures) & set(UNPROVEN):  # which refuse windows themselves
            check_architectures(checkpoint.architectures)
        if path.is_dir():
            check_weights(path, checkpoint.config)
        kv_heads_of_a_device(checkpoint, arguments.get("tensor_parallel_size", 1))
        stages = arguments.get("pipeline_parallel_size", 1)
        stages_of(checkpoint.num_layers, stages, envs.read_variable(envs.LAYER_PARTITION))
        _check_length(checkpoint, arguments)
        if arguments.get("hf_overrides"):
            return f"{checkpoint.num_layers} layers"
        return _inspect_options(checkpoint, arguments)
    except ValueError as error:
        raise problem_of_message(str(error)) from error


def _check_length(checkpoint: Checkpoint, arguments: dict[str, Any]) -> None:
    asked, longest = arguments.get("max_model_len"), longest_text_in_limits(checkpoint)
    if asked is None or asked <= longest or arguments.get("hf_overrides"):
        return
    if not envs.is_variable_on(envs.ALLOW_LONG_MAX_MODEL_LEN):
        raise ValueError(
            f"--max-model-len {asked} is more than the {longest} tokens that this model was made "
            f"for; give at most {longest}, or stretch its RoPE with --hf-overrides"
        )


def _inspect_options(checkpoint: Checkpoint, arguments: dict[str, Any]) -> str:
    options = parse_additional_config(arguments.get("additional_config"))
    longest = arguments.get("max_model_len")
    layers = resolve_layers(checkpoint.config, options, max_model_len=longest)
    if not layers.slides:
        return describe_windows(layers, options)
    check_can_slide(checkpoint.config)
    if options.phase is not Phase.BOTH:
        asked = f'swa.phase="{options.phase}"'
        if refusal := phase_refused(asked, checkpoint.architectures):
            raise ValueError(refusal)
    return describe_windows(layers, options)
