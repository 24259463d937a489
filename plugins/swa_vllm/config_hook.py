"""What happens once vLLM's config is complete, in the process that starts the engine."""

import atexit
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

import swa_backend
from swa_backend.layers import describe_windows
from swa_backend.window import Phase
from swa_vllm.compat.prompt_lens import send_prompt_lens
from swa_vllm.config.rope import lost_rope_theta
from swa_vllm.config.swa_config import SWAConfig, is_draft
from swa_vllm.distributed.prepare import prepare_ray, prepare_transfer
from swa_vllm.metrics.mfu import wrong_flops
from swa_vllm.metrics.scrape import serve_counts
from swa_vllm.refusals import (
    check_servable,
    refuse_draft_of_others,
    refuse_drafts,
    refuse_foreign_model,
    refuse_stages_on_cpus,
    refuse_unserved,
    refuse_wrong_weights,
)

logger = init_logger(f"vllm.{__name__}")


@contextmanager
def _repeated_at_exit() -> Iterator[None]:
    """Have a refusal said once more if it ends the process.

    Else the stack and the lines that pydantic wraps a ValueError in come last.
    """
    try:
        yield
    except ValueError as error:
        atexit.register(_say_last, error)
        raise


def _say_last(error: ValueError) -> None:
    """Print ``error`` if nobody caught it, as Python keeps what it printed a stack of."""
    printed: Any = getattr(sys, "last_value", None)
    details = printed.errors() if hasattr(printed, "errors") else ()
    if any(detail.get("ctx", {}).get("error") is error for detail in details):
        print(f"\nerror: {error}", file=sys.stderr, flush=True)


class ConfigHook(VerifyAndUpdateConfig):
    """vLLM's hook on the config of a Qwen3."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what cannot be served, have metrics served, and have others compared with us.

        These are Ray's nodes, and servers that exchange pages.

        With a window in one phase only, Model Runner V1 is made to tell builders the lengths of
        prompts; with V2 the model does that itself.

        Logs what slides in one line. Warns of metrics of vLLM's own that do not know the window,
        and of an override that loses the checkpoint's RoPE theta.

        The model checks again, in its own process, what vLLM made of the config since.

        Raises:
            SWAConfigError: contradictory options, or something that windows are not served with.
            ValueError: a local checkpoint whose weights are not what its config says.
            RuntimeError: another plugin holds the attention backend slot, or the model.
        """
        with _repeated_at_exit():
            _prepare_engine(vllm_config)


def _prepare_engine(vllm_config: VllmConfig) -> None:
    """Do what the hook says that it does."""
    if is_draft(vllm_config.model_config):
        # Of a config that vLLM makes of the target's, which was checked if that is a Qwen3.
        refuse_draft_of_others(vllm_config)
        return
    refuse_foreign_model(vllm_config)
    swa = SWAConfig.from_vllm(vllm_config)
    if wrong := wrong_flops(vllm_config, swa.layers, swa.options.phase):
        logger.warning("SWA %s", wrong)
    if lost := lost_rope_theta(vllm_config.model_config):
        logger.warning("%s", lost)
    draft = SWAConfig.of_draft(vllm_config)
    draft_slides = draft is not None and draft.slides
    if not swa.slides and not draft_slides:
        return
    if swa.slides:
        check_servable(vllm_config, swa)
    refuse_drafts(vllm_config, swa, draft)
    refuse_stages_on_cpus(vllm_config)
    refuse_wrong_weights(vllm_config)
    if draft is not None:
        model_config = vllm_config.speculative_config.draft_model_config
        refuse_wrong_weights(vllm_config, model_config)
        if draft.slides:
            check_servable(vllm_config, draft, model_config)
    if swa.slides:
        # Early, in one line: whoever starts a server sees that the options were read.
        described = describe_windows(swa.layers, swa.options)
        logger.info("swa-backend %s: %s", swa_backend.__version__, described)
    if swa.options.phase is not Phase.BOTH and not vllm_config.use_v2_model_runner:
        send_prompt_lens(vllm_config.model_config)
    prepare_ray(vllm_config)
    prepare_transfer(vllm_config)
    if swa.frees_pages or draft_slides:
        serve_counts(vllm_config, swa)


@cache
def hook_after(hook: type[VerifyAndUpdateConfig]) -> type[VerifyAndUpdateConfig]:
    """A subclass of ``hook`` that does what :class:`ConfigHook` does, once ``hook`` has run."""

    class WindowsToo(hook):
        @staticmethod
        def verify_and_update_config(vllm_config: VllmConfig) -> None:
            hook.verify_and_update_config(vllm_config)
            ConfigHook.verify_and_update_config(vllm_config)

    return WindowsToo


@cache
def refusing_hook(hook: type[VerifyAndUpdateConfig]) -> type[VerifyAndUpdateConfig]:
    """A subclass of ``hook`` that first refuses options of windows, with SWAConfigError."""

    class RefusesWindows(hook):
        @classmethod
        def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
            with _repeated_at_exit():
                refuse_unserved(vllm_config)
            super().verify_and_update_config(vllm_config)

    return RefusesWindows
