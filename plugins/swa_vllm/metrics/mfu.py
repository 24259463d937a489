"""What vLLM's FLOPs metrics (``--enable-mfu-metrics``) count of a window."""

from vllm.config import VllmConfig
from vllm.v1.metrics.perf import ParsedArgs, SlidingWindowAttentionParser

from swa_backend.layers import LayerPlan
from swa_backend.window import Phase


def wrong_flops(vllm_config: VllmConfig, layers: LayerPlan, phase: Phase) -> str | None:
    """Say what the metrics count in the place of what is served; None if they are right, or off.

    vLLM looks at the checkpoint's config, and has no place for windows that come by options. It
    counts a window in all tokens.

    Args:
        phase: whose tokens have the window.
    """
    if not vllm_config.observability_config.enable_mfu_metrics:
        return None
    args = ParsedArgs()
    args.num_hidden_layers = len(layers.windows)
    args = SlidingWindowAttentionParser().parse(args, vllm_config)
    counted = [args.sliding_window] * args.num_swa_layers
    served = [window for window in layers.windows if window is not None]
    if counted == served and phase is Phase.BOTH:
        return None
    whose = " in the prompt only" if phase is Phase.PREFILL else ""
    return (
        "--enable-mfu-metrics reads the checkpoint's config only: it counts "
        f"{_describe_counted_windows(counted)}, and served are "
        f"{_describe_counted_windows(served)}{whose}. Its FLOPs and bytes of attention are wrong "
        "by that"
    )


def _describe_counted_windows(windows: list[int]) -> str:
    if not windows:
        return "no windows"
    return f"{len(windows)} layers with a window of {' or '.join(map(str, sorted(set(windows))))}"
