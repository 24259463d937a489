"""What an engine of several machines needs where its model slides."""

from vllm.config import VllmConfig

from swa_backend.options import SWAConfigError
from swa_vllm.compat.connectors import NIXL_PATH


def prepare_ray(vllm_config: VllmConfig) -> None:
    """Have the nodes checked, if Ray serves a model that slides.

    Raises:
        SWAConfigError: an executor whose nodes nobody would ask.
    """
    parallel = vllm_config.parallel_config
    on_ray = "ray" in (parallel.distributed_executor_backend, parallel.data_parallel_backend)
    if not on_ray:
        return
    if parallel.data_parallel_size > 1 and parallel.distributed_executor_backend != "ray":
        raise SWAConfigError(
            "data parallelism over Ray with "
            f"--distributed-executor-backend {parallel.distributed_executor_backend} starts "
            "workers on nodes that nobody asked for this package; leave that argument out"
        )
    from vllm.v1.executor import Executor

    from swa_vllm.distributed.executor import NodeCheckingRayExecutor

    stock = Executor.get_class(vllm_config)
    if not issubclass(NodeCheckingRayExecutor, stock):
        raise SWAConfigError(
            f"the Ray executor {stock.__name__} was not tested with windows; unset "
            "VLLM_USE_RAY_V2_EXECUTOR_BACKEND, which selects it"
        )
    parallel.distributed_executor_backend = NodeCheckingRayExecutor


def prepare_transfer(vllm_config: VllmConfig) -> None:
    """Have servers compare their windows before they exchange pages over NIXL."""
    if vllm_config.kv_transfer_config is not None:
        vllm_config.kv_transfer_config.kv_connector_module_path = NIXL_PATH
