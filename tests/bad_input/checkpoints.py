"""Checkpoints and config files that are damaged, and what is said of them."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from swa_backend.checkpoint import read_checkpoint
from swa_vllm.tools.common.arguments import check_output_path
from swa_vllm.tools.engines.texts import tokens_of
from tests.bad_input.row import Bad

WEIGHTS = "model.safetensors"
_AGAIN = "download or copy the checkpoint again"
_CONFIG_TOO = f"{_AGAIN}, or correct the config"
Damage = Callable[[Path], object]


def _bytes(change: Callable[[bytes], bytes]) -> Damage:
    """Change what is in the file of weights."""
    return lambda model: (model / WEIGHTS).write_bytes(change((model / WEIGHTS).read_bytes()))


def _tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    """Change which tensors there are, in a file that is whole."""
    return lambda model: save_file(
        change(load_file(model / WEIGHTS)), model / WEIGHTS, metadata={"format": "pt"}
    )


def _without(part: str) -> Damage:
    return _tensors(lambda tensors: {k: v for k, v in tensors.items() if part not in k})


def _halved(name: str) -> Damage:
    return _tensors(
        lambda tensors: tensors | {k: v[::2].clone() for k, v in tensors.items() if name in k}
    )


def _config(**keys: Any) -> Damage:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text()) | keys
        (model / "config.json").write_text(json.dumps(config))

    return change


def _index(text: str) -> Damage:
    return lambda model: (model / f"{WEIGHTS}.index.json").write_text(text)


def _of_another_model(model: Path) -> None:
    save_file({"transformer.h.0.attn.weight": torch.zeros(4, 4)}, model / WEIGHTS)


def _add_adapter(model: Path) -> None:
    """What PEFT saves for a model."""
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.zeros(8, 64)}, model / "adapter_model.safetensors")
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def _replace_by_adapter(model: Path) -> None:
    _add_adapter(model)
    (model / WEIGHTS).unlink()


def _leave_an_adapter(model: Path) -> None:
    (model / "config.json").unlink()
    _add_adapter(model)


def _damaged(name: str, damage: Damage, got: str, allowed: str, do: str = _CONFIG_TOO) -> Bad:
    return Bad(name, damage, got, allowed, do, ValidationError, ValueError)


# What is done to the tiny model, which slides.
CHECKPOINTS = [
    _damaged("empty file", _bytes(lambda b: b""), "0 bytes", "less than its header", _AGAIN),
    _damaged("cut in the header", _bytes(lambda b: b[:50]), "50 bytes", "its header", _AGAIN),
    _damaged(
        "cut in a tensor", _bytes(lambda b: b[:-1000]), "cut short: it has", " bytes;", _AGAIN
    ),
    _damaged(
        "no safetensors",
        _bytes(lambda b: (4).to_bytes(8, "little") + b"what" + b[12:]),
        WEIGHTS,
        "is no safetensors file",
        _AGAIN,
    ),
    _damaged(
        "a list for a header",
        _bytes(lambda b: (2).to_bytes(8, "little") + b"[]"),
        WEIGHTS,
        "is no safetensors file",
        _AGAIN,
    ),
    _damaged("a page of HTML", _bytes(lambda b: b"<html>" * 99), "594 bytes", "its header", _AGAIN),
    _damaged("index is no JSON", _index("{"), WEIGHTS, "is no index of weights", _AGAIN),
    _damaged("index of another kind", _index("[]"), WEIGHTS, "is no index of weights", _AGAIN),
    _damaged(
        "a file that the index names is missing",
        _index(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": WEIGHTS}})),
        "lacks model-1.safetensors",
        "1 of 2 files that model.safetensors.index.json names",
        _AGAIN,
    ),
    _damaged(
        "a projection is missing",
        _without("layers.2.self_attn.q_proj"),
        "lack layers.2.self_attn.q_proj",
        "of the 4 layers",
    ),
    _damaged("a layer is missing", _without("layers.3."), "lack layers.3.", "of the 4 layers"),
    _damaged(
        "layers are missing",
        _config(num_hidden_layers=5, layer_types=None),
        "lack layers.4.",
        "of the 5",
    ),
    _damaged(
        "too many layers",
        _config(num_hidden_layers=3, layer_types=None),
        "have a layer 3",
        "num_hidden_layers=3",
    ),
    _damaged("another model", _of_another_model, "lack layers.0.", "of the 4 layers"),
    _damaged("half of the keys", _halved("layers.1.self_attn.k_proj"), "[32, 64]", "be [64, 64]"),
    _damaged("half of an MLP", _halved("layers.1.mlp.up_proj"), "[64, 64]", "be [128, 64]"),
    _damaged("another vocabulary", _config(vocab_size=1000), "[512, 64]", "be [1000, 64]"),
    _damaged("another head size", _config(head_dim=24), "[128, 64]", "must be [96, 64]"),
    _damaged("a head size of 0", _config(head_dim=0), "[128, 64]", "must be [0, 64]"),
    _damaged("another hidden size", _config(hidden_size=96), "[512, 64]", "must be [512, 96]"),
    _damaged(
        "an adapter beside the weights",
        _add_adapter,
        "LoRA adapter (adapter_model.safetensors) beside the weights",
        "vLLM would load it",
        "move it and adapter_config.json to a directory of their own, and serve it with "
        "--enable-lora",
    ),
    _damaged(
        "an adapter alone",
        _replace_by_adapter,
        "LoRA adapter (adapter_model.safetensors)",
        "no weights of a model",
        "give the directory of the model that it was made for",
    ),
    _damaged(
        "names of PEFT",
        _tensors(lambda tensors: {f"base_model.model.{k}": v for k, v in tensors.items()}),
        "(base_model.model.",
        "vLLM knows no 'base_model'",
        "merge the adapter with PEFT's merge_and_unload()",
    ),
]


def _text(text: str | bytes) -> Damage:
    data = text.encode() if isinstance(text, str) else text
    return lambda model: (model / "config.json").write_bytes(data)


def _key(name: str, value: Any, got: str, allowed: str, do: str = "correct it, or") -> Bad:
    return Bad(f"{name} is {value!r}", _config(**{name: value}), got, allowed, do)


@contextmanager
def no_rights(path: Path) -> Iterator[None]:
    """Within, this process may not enter the directory ``path``."""
    user = os.geteuid()
    path.chmod(0)
    if user == 0:  # who may do anything
        os.seteuid(65534)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(user)
        path.chmod(0o700)


_QWEN3 = "give the config.json of a Qwen3"
# What is done to a config.json.
CONFIG_FILES = [
    Bad(
        "none",
        lambda model: (model / "config.json").unlink(),
        "does not exist",
        "Give a",
        "download",
    ),
    Bad(
        "an adapter",
        _leave_an_adapter,
        "does not exist, but an adapter_config.json",
        "this is a LoRA adapter",
        "Give the directory of the model that it was made for",
    ),
    Bad("not JSON", _text("{"), "config.json is not JSON", "property name", _QWEN3),
    Bad("empty", _text(""), "config.json is not JSON", "Expecting value", _QWEN3),
    Bad("not UTF-8", _text(b"\xff\xfe{}"), "config.json is not JSON", "codec can't decode", _QWEN3),
    Bad("a list", _text("[]"), "holds a JSON list", "not an object", _QWEN3),
    Bad("a number", _text("4096"), "holds a JSON int", "not an object", _QWEN3),
    Bad(
        "no keys", _text("{}"), "model_type None", "must be one of qwen3, qwen3_moe", "layers must"
    ),
    _key("model_type", "llama", "'llama' is no", "must be one of qwen3, qwen3_moe", "text layers"),
    _key("model_type", ["qwen3"], "['qwen3'] is no", "must be one of qwen3,", "text layers"),
    *(
        _key(key, value, f"got {value!r}", f"{key} must be an integer >= 1 and below 2**31")
        for key in ("num_hidden_layers", "num_attention_heads", "max_position_embeddings")
        for value in (0, "4", None)
    ),
    _key("num_key_value_heads", 2.5, "got 2.5", "must be an integer >= 1"),
    _key("head_dim", True, "got True", "head_dim must be an integer >= 1"),
    _key("head_dim", -32, "got -32", "head_dim must be an integer >= 1"),
    _key("rope_parameters", "yarn", "got 'yarn'", "rope_parameters must be an object"),
    _key("max_window_layers", "2", "got '2'", "max_window_layers must be an integer"),
    _key("quantization_config", "fp8", "got 'fp8'", "quantization_config must be an object"),
    _key("layer_types", "sliding_attention", "got 'sliding_attention'", "must be a list"),
    Bad(
        "sliding_window is a long list",
        _config(sliding_window=list(range(1000))),
        "got a list of length 1000;",
        "sliding_window must be an integer",
        "correct it, or",
    ),
    _key("layer_types", [1, 2, 3, 4], "got [1, 2, 3, 4]", "layer_types must be a list"),
]

# What is done with a directory that this user may not enter.
UNREADABLE = [
    Bad("config.json", read_checkpoint, "/test_places", "cannot be read: Permission", "can read"),
    Bad(
        "text",
        lambda path: tokens_of("model", path / "text"),
        "/text",
        "cannot be read: Permission denied",
        "--text",
    ),
    *(
        Bad(
            flag,
            lambda path, flag=flag: check_output_path(flag, path / "figures"),
            f"{flag} /",
            "this user cannot write there",
            "name another place",
        )
        for flag in ("--json", "--plot")
    ),
]
