"""The script that trained the checkpoints in tests/data, a few steps of it, and the checkpoints."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import train_tiny_swa
from tests.helpers.paths import DATA
from tests.helpers.tiny_models import tiny_config
from train_tiny_swa import (
    MUON_LR,
    TRAINED_LENGTH,
    Muon,
    lr_factor,
    make_checkpoint,
    make_config,
    orthogonalize,
    train,
)

CHECKPOINTS = {"tiny-swa-sliding": 0, "tiny-swa-mixed": 2}  # and their max_window_layers
TEXT = (DATA / "acts-1-7.txt").read_text(encoding="utf-8")
WINDOW = 8
RunScript = Callable[..., None]


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch) -> RunScript:
    """The command line with these arguments, in this process."""

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["train_tiny_swa.py", *map(str, arguments)])
        train_tiny_swa.main()

    return run


def test_script_writes_a_windowed_checkpoint(
    tmp_path: Path, run_script: RunScript, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out_dir = tmp_path / "text", tmp_path / "model"
    text.write_text(TEXT[:8000])
    run_script(text, out_dir, "--window", WINDOW, "--max-window-layers", 1, "--steps", 2)
    assert "step 2/2  loss " in capsys.readouterr().out
    model = Qwen3ForCausalLM.from_pretrained(out_dir)
    assert model.dtype == torch.bfloat16
    assert model.config.sliding_window == WINDOW
    assert model.config.layer_types == ["full_attention"] + ["sliding_attention"] * 3
    tokenizer = AutoTokenizer.from_pretrained(out_dir)
    assert tokenizer.decode(tokenizer(TEXT[:500])["input_ids"]) == TEXT[:500]


def test_training_is_the_same_for_the_same_seed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tiny_config(vocab_size=train_tiny_swa.VOCAB_SIZE)
    monkeypatch.setattr(train_tiny_swa, "make_config", lambda *_: small)
    monkeypatch.setattr(train_tiny_swa, "TRAINED_LENGTH", 64)
    first, again, other = (
        make_checkpoint(
            TEXT[:8000], tmp_path / name, window=WINDOW, max_window_layers=0, steps=2, seed=seed
        )
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert first == again
    assert first != other


def test_training_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_tiny_swa, "TRAINED_LENGTH", 64)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(tiny_config(initializer_range=0.02))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    losses = train(model, torch.arange(1000) % 50, steps=30)
    assert losses[0] > 6
    assert losses[-1] < 2
    # The norms and the embedding too, which Muon does not take.
    assert all(not p.equal(before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("max_window_layers", [0, 2])
def test_sliding_layers_see_their_window_alone_in_training(max_window_layers: int) -> None:
    """By the gradient of one token's hidden state, in the mode that is trained."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(make_config(WINDOW, max_window_layers)).train()
    batch = torch.randint(model.config.vocab_size, (1, TRAINED_LENGTH))
    states = model(batch, labels=batch, use_cache=False, output_hidden_states=True).hidden_states

    def seen(layer: int) -> list[int]:
        """Positions whose input to ``layer`` the last position's output depends on."""
        (grad,) = torch.autograd.grad(states[layer + 1][0, -1].sum(), states[layer], None, True)
        return grad[0].abs().sum(-1).nonzero().flatten().tolist()

    last = range(TRAINED_LENGTH - WINDOW, TRAINED_LENGTH)
    for layer in range(3):  # the last layer's state has gone through the final norm too
        full = layer < max_window_layers
        assert seen(layer) == list(range(TRAINED_LENGTH) if full else last)


def test_muon_updates_as_torchs_does() -> None:
    """torch's own computes in bfloat16: equal up to that."""
    torch.manual_seed(0)
    shapes = ((16, 32), (48, 16), (16, 32))
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    muon = Muon(ours)
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0, adjust_lr_fn="original")
    for _ in range(3):
        for our, their in zip(ours, theirs, strict=True):
            our.grad = torch.randn(our.shape)
            their.grad = our.grad.clone()
        muon.step(lr=0.1)
        reference.step()
    assert all(parameter.grad is None for parameter in ours)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, atol=3 * 0.1 * 2**-6, rtol=0)


def test_orthogonalized_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 24, 64), (3, 64, 24)):
        values = torch.linalg.svdvals(orthogonalize(100 * torch.randn(shape)))
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_training_follows_the_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    monkeypatch.setattr(Muon, "step", lambda _, lr: rates.append(lr))
    monkeypatch.setattr(train_tiny_swa, "TRAINED_LENGTH", 64)
    train(Qwen3ForCausalLM(tiny_config()), torch.arange(100), steps=4)
    assert rates == [MUON_LR, MUON_LR, MUON_LR, MUON_LR / 2]


def test_learning_rate_is_flat_then_falls_to_nothing() -> None:
    factors = [lr_factor(step, 8) for step in range(9)]
    assert factors == [1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (TEXT[:200], (), "more than 512 are needed"),
        (TEXT, ("--window", 0), "window must be 1 to 511 tokens, got 0"),
        (TEXT, ("--window", 512), "window must be 1 to 511 tokens, got 512"),
        (TEXT, ("--max-window-layers", 4), "max_window_layers must be 0 to 3, got 4"),
        (TEXT, ("--max-window-layers", -1), "max_window_layers must be 0 to 3, got -1"),
        (TEXT, ("--steps", 0), "steps must be at least 1, got 0"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_what_cannot_be_trained_is_refused(
    text: str,
    options: tuple[object, ...],
    message: str,
    tmp_path: Path,
    run_script: RunScript,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        run_script(tmp_path / "text", tmp_path / "model", *options)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("nowhere", None, "nowhere"), ("latin", "é".encode("latin-1"), "can't decode")],
    ids=["missing", "not UTF-8"],
)
def test_unreadable_text_is_an_error(
    name: str,
    content: bytes | None,
    message: str,
    tmp_path: Path,
    run_script: RunScript,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        run_script(tmp_path / name, tmp_path / "model")
    assert message in capsys.readouterr().err


def test_existing_directory_is_left_alone(
    tmp_path: Path, run_script: RunScript, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_script(tmp_path / "text", tmp_path)
    assert "exists; remove it or name another directory" in capsys.readouterr().err


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_committed_checkpoint_is_of_the_scripts_making(name: str) -> None:
    """Its config and its vocabulary; trained weights depend on the machine."""
    expected = make_config(64, CHECKPOINTS[name]).to_dict()
    config = Qwen3Config.from_pretrained(DATA / name).to_dict()
    changed = {key for key, value in expected.items() if config[key] != value}
    assert changed <= {"architectures", "dtype", "transformers_version", "_name_or_path"}
    assert config["dtype"] == "bfloat16"
    tokenizer = Tokenizer.from_file(str(DATA / name / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config["vocab_size"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_committed_checkpoint_is_below_8_mb(name: str) -> None:
    size = sum(path.stat().st_size for path in (DATA / name).rglob("*"))
    assert 0 < size < 8_000_000
