"""vLLM plugin: an unmodified engine serves Qwen3 with sliding window attention.

vLLM finds :func:`register` through the ``vllm.general_plugins`` entry point and calls it in every
process it starts. Importing this package does no work.
"""


def register() -> None:
    """Tell vLLM about the windowed model, KV cache spec and attention backend; idempotent.

    Raises:
        ImportError: vLLM is not installed.
    """
    try:
        import vllm  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise ImportError(
            "swa_vllm needs vLLM, which is not installed. On a machine with a GPU: "
            "pip install 'swa-backend[gpu]'; without one: pip install 'swa-backend[cpu]'"
        ) from error
    from swa_vllm.registration import register_all

    register_all()
