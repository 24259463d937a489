"""The versions of vLLM that the plugin was tested with."""

from packaging.version import InvalidVersion, Version

from swa_vllm.compat import envs

TESTED_VERSIONS = ("0.32", "0.33")


def vllm_version() -> str:
    """Version of the vLLM in this process."""
    from vllm.version import __version__

    return str(__version__)


def is_tested_version(version: str) -> bool:
    """Whether the plugin was tested with this version of vLLM."""
    try:
        release = Version(version).release
    except InvalidVersion:
        return False
    return ".".join(map(str, release[:2])) in TESTED_VERSIONS


def is_allowed_version(version: str) -> bool:
    """Whether windows are served with this version: tested, or allowed by the environment."""
    return is_tested_version(version) or envs.is_variable_on(envs.ALLOW_UNTESTED)


def untested_reason() -> str:
    """Why an untested vLLM refuses a windowed model, and what to do."""
    return (
        f"swa_vllm was tested with vLLM {' and '.join(TESTED_VERSIONS)}; this is "
        f"{vllm_version()}. Install one of those, or {untested_remedy()}"
    )


def untested_remedy() -> str:
    """How to try an untested vLLM all the same."""
    value = envs.read_variable(envs.ALLOW_UNTESTED)
    here = "" if value is None else f" (here it is {value!r})"
    return f"set {envs.ALLOW_UNTESTED}=1{here} to try this one"
