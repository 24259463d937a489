"""Models of the Hugging Face hub, where its cache here has them; nothing is downloaded."""

import os
import re
from pathlib import Path

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def find_model(model: str, *, whole: bool = False) -> Path:
    """Find what a verb's MODEL names: a path, or a model of the hub in the cache.

    Args:
        whole: whether the weights are needed, and not ``config.json`` alone.

    Returns:
        The path itself, or the cache's directory of the model; a path that does not exist is left
        to whoever reads it.

    Raises:
        ValueError: a name of the hub that the cache has nothing, or not enough, of.
    """
    path = Path(model)
    if not is_hub_name(model) or os.path.exists(path):
        return path
    found = _cached_snapshot(model)
    missing = "config.json"
    if found is not None and (found / missing).exists():
        missing = "weights"
        if not whole or any(found.glob("*.safetensors")):
            return found
    raise ValueError(
        f"{model} is no directory here, and the Hugging Face cache {hub_cache()} has no {missing} "
        f"of it; run {download_command(model, whole=whole)}"
    )


def is_hub_name(model: str) -> bool:
    """Whether a model is named as on the hub."""
    return _NAME.fullmatch(model) is not None


def download_command(model: str, *, whole: bool) -> str:
    """Spell the command that brings a model, or its ``config.json``, into the cache."""
    return f"hf download {model}{'' if whole else ' config.json'}"


def hub_cache() -> Path:
    """The directory that huggingface_hub caches models in, by its environment variables."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    home = os.environ.get("HF_HOME")
    if not home:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home).expanduser() / "hub"


def _cached_snapshot(model: str) -> Path | None:
    """The newest snapshot of a model's main branch in the cache."""
    directory = hub_cache() / f"models--{model.replace('/', '--')}"
    try:
        revision = (directory / "refs" / "main").read_text().strip()
    except OSError:
        return None
    return directory / "snapshots" / revision
