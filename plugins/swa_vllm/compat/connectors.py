"""What vLLM's KV connectors know of windows."""

NIXL = "NixlConnector"
# Where vLLM finds the connector of that name that this plugin puts in the place of vLLM's.
NIXL_PATH = "swa_vllm.distributed.nixl"

_ONE_TABLE = "knows one table of pages for all layers, so that vLLM would free none"
_NEEDS_GPU = "does not start without a GPU and was not tried with windows"
# Why a connector is refused; of all others it is that nobody tried them.
_REASONS = {
    "DecodeBenchConnector": "fills pages with what no model computed",
    "ExampleConnector": _ONE_TABLE,
    "FlexKVConnectorV1": _ONE_TABLE,
    "HF3FSKVConnector": _ONE_TABLE,
    "LMCacheConnectorV1": _ONE_TABLE,
    "OffloadingConnector": _NEEDS_GPU,
    "SimpleCPUOffloadConnector": _NEEDS_GPU,
}


def why_refused(connector: str | None) -> str:
    """Say why a connector other than NIXL's is not served with windows."""
    return _REASONS.get(connector or "", "was not tried with windows")
