"""The nodes of a Ray cluster that serves windows: each needs this package in the driver's version.

A worker without it would load vLLM's own Qwen3, which ignores options and may attend to everything.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from swa_backend.options import SWAConfigError

DISTRIBUTION = "swa-backend"
# A node answers once Ray has started a worker on it.
ANSWER_TIMEOUT_S = 120


@dataclass(frozen=True)
class Installation:
    """What a node's Python environment has of this package.

    Attributes:
        version: of the distribution; None without it.
        left_out_by: value of ``VLLM_PLUGINS``, if that keeps vLLM from loading the plugin.
    """

    version: str | None
    left_out_by: str | None = None

    def __str__(self) -> str:
        if self.version is None:
            return f"has no {DISTRIBUTION}"
        if self.left_out_by is not None:
            return f"has it, but VLLM_PLUGINS={self.left_out_by!r} leaves the plugin 'swa' out"
        return f"has {DISTRIBUTION} {self.version}"


def check_installations(here: Installation, nodes: Mapping[str, Installation]) -> None:
    """Compare what the nodes have with what this process runs.

    Args:
        here: of this process.
        nodes: by the name of the node.

    Raises:
        SWAConfigError: a node differs; all that do are named.
    """
    differing = [f"node {name} {found}" for name, found in nodes.items() if found != here]
    if differing:
        raise SWAConfigError(
            f"every Ray worker needs {DISTRIBUTION} {here.version}, which runs here, but "
            f'{" and ".join(differing)}. On each of these nodes run "pip install '
            f'{DISTRIBUTION}=={here.version}" in the Python environment of "ray start", see that '
            "VLLM_PLUGINS is unset or names swa, and start Ray there again"
        )


def installation_on_nodes(node_ids: Mapping[str, str]) -> dict[str, Installation]:
    """Ask each of Ray's nodes, by a task, what it has installed.

    Args:
        node_ids: Ray's id of a node, by its name.

    Raises:
        SWAConfigError: a node does not answer.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    probe = ray.remote(num_cpus=0)(_make_installation_probe())
    pending = {
        name: probe.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        ).remote()
        for name, node_id in node_ids.items()
    }
    found = {}
    for name, result in pending.items():
        try:
            found[name] = Installation(*ray.get(result, timeout=ANSWER_TIMEOUT_S))
        except ray.exceptions.RayError as error:
            raise SWAConfigError(
                f"node {name} could not be asked for its version of {DISTRIBUTION} within "
                f"{ANSWER_TIMEOUT_S} s ({error}); see that Ray starts workers there, or take the "
                "node out of the cluster"
            ) from error
    return found


def installation_here() -> Installation:
    """Look up what this process runs."""
    return Installation(*_make_installation_probe()())


def _make_installation_probe() -> Any:
    # A function inside a function: Ray sends its code, and not its name in a module which the node
    # may not have.
    def probe() -> tuple[str | None, str | None]:
        import os
        from importlib.metadata import entry_points
        from importlib.util import find_spec

        ours = [
            point
            for point in entry_points(group="vllm.general_plugins")
            if point.value == "swa_vllm:register"
        ]
        # Metadata alone says little: Ray adds the driver's directory to the path of its workers,
        # and a source tree has metadata too.
        if not ours or ours[0].dist is None or find_spec("swa_vllm") is None:
            return None, None
        allowed = os.environ.get("VLLM_PLUGINS")
        left_out = allowed is not None and ours[0].name not in allowed.split(",")
        return ours[0].dist.version, allowed if left_out else None

    return probe
