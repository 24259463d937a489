"""The device that kernels are launched on."""

from contextlib import AbstractContextManager
from functools import cache

import torch

from swa_backend.kernels.plans import Target


@cache
def target_of(device: torch.device) -> Target:
    """What the kernels need to know of ``device``.

    Raises:
        ValueError: no kernel runs there.
    """
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        num_processors = properties.multi_processor_count
        if torch.version.hip is not None:
            return Target("hip", properties.gcnArchName.split(":")[0], num_processors)
        return Target("cuda", 10 * properties.major + properties.minor, num_processors)
    from swa_backend.kernels.tiles import IS_INTERPRETED

    if device.type != "cpu" or not IS_INTERPRETED:
        raise ValueError(
            f'impl="triton" does not run on {device} tensors: use a GPU or impl="torch", or, on '
            "the CPU, set TRITON_INTERPRET=1 before Triton is imported (slow, for debugging)"
        )
    return Target("cpu", 0, num_processors=1)


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Launches inside go to the GPU that ``tensor`` is on; nothing for a CPU tensor."""
    place: AbstractContextManager[object] = torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
    return place
