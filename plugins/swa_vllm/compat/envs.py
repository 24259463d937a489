"""Environment variables that the plugin reads and sets.

No other module does, but for the probe that Ray runs on nodes, and the tools.
"""

import os

ALLOW_UNTESTED = "SWA_ALLOW_UNTESTED_VLLM"
RAY_ON_CPU = "SWA_RAY_ON_CPU"
# Directory that an engine's page managers count in, set by the process that starts the engine.
METRICS_DIR = "SWA_METRICS_DIR"
# prometheus_client's directory for the metrics of several processes.
SHARED_METRICS_DIR = "PROMETHEUS_MULTIPROC_DIR"
# Layers of each pipeline stage, with commas between them; vLLM reads it.
LAYER_PARTITION = "VLLM_PP_LAYER_PARTITION"
# Set to 1, vLLM takes a --max-model-len beyond what the model was made for.
ALLOW_LONG_MAX_MODEL_LEN = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
# Names of variables that vLLM copies to Ray's actors.
_RAY_COPIES = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"
# Read by a worker process before vLLM hands it the driver's environment.
_READ_EARLY = (RAY_ON_CPU, "OMP_NUM_THREADS")


def read_variable(name: str) -> str | None:
    """Value of a variable; None where it is unset."""
    return os.environ.get(name)


def is_variable_on(name: str) -> bool:
    """Whether a switch is set to ``1``."""
    return os.environ.get(name) == "1"


def is_batch_invariant() -> bool:
    """Whether vLLM was asked for results that do not depend on the batch, as vLLM reads it."""
    from vllm import envs  # this module is imported where there is no vLLM, too

    return envs.VLLM_BATCH_INVARIANT


def set_metrics_dir(path: str) -> None:
    """Have the engines that this process starts count in the directory ``path``."""
    os.environ[METRICS_DIR] = path


def copy_variable_to_ray(name: str) -> None:
    """Have vLLM copy a variable to Ray's actors, which inherit nothing else."""
    copied = {*filter(None, os.environ.get(_RAY_COPIES, "").split(",")), name}
    os.environ[_RAY_COPIES] = ",".join(sorted(copied))


def variables_read_early() -> dict[str, str]:
    """Variables that a worker reads first, and their values here."""
    return {name: os.environ[name] for name in _READ_EARLY if name in os.environ}
