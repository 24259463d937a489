"""Engine settings that windowed layers refuse, by name and before weights are loaded."""

from vllm.config import VllmConfig

from swa_backend.config import SWAConfigError
from swa_vllm.attention import prefill_pages
from swa_vllm.options import swa_options
from swa_vllm.poison import check_poison_possible


def check_engine(vllm_config: VllmConfig) -> None:
    """Raise SWAConfigError if the engine is set up in a way that windows are not exact in."""
    if vllm_config.kv_transfer_config is not None:
        raise SWAConfigError(
            "KV connectors and KV cache offloading (--kv-transfer-config, --kv-offloading-size) "
            "know nothing of the pages that a window frees; remove them, or serve full attention"
        )
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name) > 1:
            raise SWAConfigError(
                f"{name}={getattr(parallel, name)} splits a window over workers, which is not "
                "served; leave it at 1"
            )
    prefill_pages(vllm_config)
    if swa_options(vllm_config).debug_poison:
        check_poison_possible(vllm_config)
