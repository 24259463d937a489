"""vLLM's Ray executor, which looks at the nodes before it starts workers on them."""

from typing import Any

import ray
from ray.util import placement_group_table
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2

from swa_vllm.distributed.nodes import check_installations, installation_here, installation_on_nodes


class NodeCheckingRayExecutor(RayExecutorV2):
    """Refuses nodes without this package, or with another version of it."""

    def _build_runtime_env(self) -> dict[str, Any]:
        """Check the nodes, where vLLM knows them and has started no worker yet.

        Raises:
            SWAConfigError: a node lacks the package or has another version.
        """
        table = placement_group_table(self.parallel_config.placement_group)
        used = set(table["bundles_to_node_id"].values())
        names = {
            f"{node['NodeManagerAddress']} ({node['NodeID']})": node["NodeID"]
            for node in ray.nodes()
            if node["NodeID"] in used
        }
        check_installations(installation_here(), installation_on_nodes(names))
        return dict(super()._build_runtime_env())
