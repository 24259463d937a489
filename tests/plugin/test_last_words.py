"""What a user reads last when an engine is refused: our sentence, below stack and wrapper."""

import subprocess
import sys
from pathlib import Path

from tests.helpers.paths import DATA

MODEL = str(DATA / "tiny-swa-sliding")
SENTENCE = (
    "error: swa.sink_tokens must be an integer >= 0 and below 2**31 (tokens that stay visible)"
)
LLM = """
from vllm import LLM
if __name__ == "__main__":
    LLM({model!r}, additional_config={{"swa": {{"sink_tokens": -1}}}})
"""
CAUGHT = """
from vllm.engine.arg_utils import EngineArgs
try:
    EngineArgs({model!r}, additional_config={{"swa": {{"sink_tokens": -1}}}}).create_engine_config()
except ValueError:
    print("caught")
"""
FOREIGN = '{"swa": {"window": 8}}'


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_offline(tmp_path: Path) -> None:
    script = tmp_path / "offline.py"
    script.write_text(LLM.format(model=MODEL))
    done = run(sys.executable, str(script))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(SENTENCE)


def test_vllm_serve() -> None:
    vllm = Path(sys.executable).with_name("vllm")
    done = run(str(vllm), "serve", MODEL, "--additional-config", '{"swa": {"sink_tokens": -1}}')
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(SENTENCE)


def test_a_model_without_windows(tiny_llama: Path) -> None:
    vllm = Path(sys.executable).with_name("vllm")
    done = run(str(vllm), "serve", str(tiny_llama), "--additional-config", FOREIGN)
    assert "LlamaForCausalLM is not served with windows" in done.stderr.splitlines()[-1]


def test_a_refusal_that_was_caught_is_not_repeated(tmp_path: Path) -> None:
    script = tmp_path / "caught.py"
    script.write_text(CAUGHT.format(model=MODEL))
    done = run(sys.executable, str(script))
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "caught")
    assert "error: swa" not in done.stderr
