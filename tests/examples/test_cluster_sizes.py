"""The page's table of replicas, stages and shards: each row is what its own line prints."""

import json
import re
import subprocess
from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import Any

import pytest
from vllm.config import CacheConfig

from swa_vllm.tools.cli import main
from tests.helpers.paths import ROOT

PAGE = (ROOT / "examples" / "ray_cluster" / "README.md").read_text()
GIB = 2**30
VOCABULARY = 151936
HEAD_DIM = 128


@dataclass(frozen=True)
class Shape:
    """A Qwen3 model as its config.json has it.

    Attributes:
        mlp: hidden size of an MLP, or of an expert.
        experts: of a layer; 0 in a dense model.
        tied: whether the embedding is the output layer too.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    experts: int = 0
    tied: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """Fields of the config.json that a plan reads."""
        kind = (
            ("qwen3_moe", "Qwen3MoeForCausalLM") if self.experts else ("qwen3", "Qwen3ForCausalLM")
        )
        return {
            "model_type": kind[0],
            "architectures": [kind[1]],
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": HEAD_DIM,
            "max_position_embeddings": 40960,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
        }

    @property
    def num_parameters(self) -> int:
        """Numbers in the checkpoint."""
        embeddings = VOCABULARY * self.hidden * (1 if self.tied else 2)
        attention = 2 * (self.heads + self.kv_heads) * HEAD_DIM * self.hidden
        mlp = 3 * self.hidden * self.mlp * max(self.experts, 1) + self.hidden * self.experts
        norms = 2 * self.hidden + 2 * HEAD_DIM
        return embeddings + self.layers * (attention + mlp + norms) + self.hidden


SHAPES = {
    "Qwen3-0.6B": Shape(28, 1024, 16, 8, 3072, tied=True),
    "Qwen3-8B": Shape(36, 4096, 32, 8, 12288),
    "Qwen3-32B": Shape(64, 5120, 64, 8, 25600),
    "Qwen3-30B-A3B": Shape(48, 2048, 32, 4, 768, experts=128),
    "Qwen3-235B-A22B": Shape(94, 4096, 64, 4, 1536, experts=128),
}


# Memory of a card in GiB, by the GB that it is sold with; what is neither weights nor KV cache.
CARDS = {24: 22, 80: 79, 141: 139}
RESERVE_GIB = 2

ROW = re.compile(
    r"^\| (?P<model>Qwen3-\S+) \| (?P<cards>\d+) of (?P<card>\d+) GB "
    r"\| (?P<replicas>\d+) x (?P<stages>\d+) x (?P<shards>\d+) \| (?P<memory>\d+) GiB "
    r"\| (?P<full>\S+) \| (?P<here>\S+) \| `(?P<line>plan .+)` \|$",
    re.MULTILINE,
)
ROWS = [found.groupdict() for found in ROW.finditer(PAGE)]
(FUNCTION,) = re.findall(r"^plan\(\) \{.*?^\}$", PAGE, re.MULTILINE | re.DOTALL)


def arguments(line: str) -> list[str]:
    """What the page's shell function gives to ``swa``."""
    script = f"swa() {{ printf '%s\\n' \"$@\"; }}\n{FUNCTION}\n{line}"
    ran = subprocess.run(["bash", "-ec", script], capture_output=True, text=True, check=True)
    return ran.stdout.splitlines()


def test_table_has_every_model_and_card() -> None:
    assert {row["model"] for row in ROWS} == SHAPES.keys()
    assert {int(row["card"]) for row in ROWS} == CARDS.keys()
    assert len(ROWS) == PAGE.count("| `plan ")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["line"])
def test_row_is_what_its_line_prints(
    row: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / row["model"]).mkdir()
    config = json.dumps(SHAPES[row["model"]].config)
    (tmp_path / row["model"] / "config.json").write_text(config)
    monkeypatch.chdir(tmp_path)
    assert main(arguments(row["line"])) == 0
    printed = capsys.readouterr().out
    figures, _by_phase = re.findall(r"^32000 .*$", printed, re.MULTILINE)
    full, _, here = figures.split()[-3:]
    assert (row["full"], row["here"]) == (full, here)
    assert "this plugin does not start" not in printed


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["line"])
def test_line_of_a_row_is_about_its_cards(row: dict[str, str]) -> None:
    shape, card = SHAPES[row["model"]], CARDS[int(row["card"])]
    cards, replicas, stages, shards, memory = (
        int(row[name]) for name in ("cards", "replicas", "stages", "shards", "memory")
    )
    assert row["line"] == f"plan {row['model']} {stages} {shards} {memory}GiB"
    assert replicas * stages * shards == cards
    assert shape.heads % shards == 0
    weights = 2 * shape.num_parameters / GIB / (stages * shards)
    assert memory == floor(CacheConfig().gpu_memory_utilization * card - weights - RESERVE_GIB)


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        *(("Qwen3-0.6B", 0.6), ("Qwen3-8B", 8.2), ("Qwen3-32B", 32.8), ("Qwen3-30B-A3B", 30.5)),
        ("Qwen3-235B-A22B", 235.1),
    ],
)
def test_shapes_have_the_published_number_of_parameters(model: str, billions: float) -> None:
    assert round(SHAPES[model].num_parameters / 1e9, 1) == billions
