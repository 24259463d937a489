"""The command line of `swa`: its help, its version, and what it says of a flag that it lacks."""

import re
import subprocess
import sys

import pytest

import swa_backend
from swa_vllm.tools.bench.flags import BENCHMARKS
from swa_vllm.tools.cli import main
from swa_vllm.tools.eval.flags import EVALUATIONS

VERBS = [
    *("plan", "check", "trace", "tune"),
    *(f"bench {name}" for name in BENCHMARKS),
    *(f"eval {name}" for name in EVALUATIONS),
]
# What flags that several verbs have are said to mean.
MEANINGS = {
    "--window": "tokens that a sliding layer sees, the newest included",
    "--sink-tokens": "first tokens of a text that sliding layers always see",
    "--full-attention-layers": "layers that keep full attention",
    "--max-num-batched-tokens": "most tokens of a step",
    "--kv-memory": "memory of one device for the KV cache",
    "--max-model-len": "longest request, prompt and answer together",
    "--block-size": "tokens of a KV cache page",
}


def help_of(verb: str, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What help says of each flag of a verb."""
    with pytest.raises(SystemExit) as ended:
        main([*verb.split(), "--help"])
    assert ended.value.code == 0
    _, _, options = capsys.readouterr().out.partition("\noptions:\n")
    parts = re.split(r"^  (?:-h, )?(--[a-z-]+)", options.partition("\nexample:")[0], flags=re.M)
    return {
        flag: " ".join(text.split()) for flag, text in zip(parts[1::2], parts[2::2], strict=True)
    }


@pytest.mark.parametrize("verb", ["", *VERBS, "bench", "eval"])
def test_help_imports_neither_torch_nor_vllm_and_says_nothing_else(verb: str) -> None:
    code = f"""
import sys
from swa_vllm.tools.cli import main
from swa_vllm.tools.eval.flags import EVALUATIONS
try:
    main([*{verb.split()!r}, "--help"])
except SystemExit as ended:
    assert not ended.code
assert not {{"torch", "vllm", "transformers", "triton"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: swa")


@pytest.mark.parametrize("verb", VERBS)
def test_a_flag_means_the_same_in_every_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = help_of(verb, capsys)
    for flag, meaning in MEANINGS.items():
        assert flag not in flags or meaning in flags[flag]
    assert not {"--chunk", "--sinks", "--windows"} & flags.keys()


# What does nothing unless it is given, or has no default.
SWITCHES = {"--help", "--json", "--plot", "--trace", "--once", "--quick", "--deep"}


@pytest.mark.parametrize("verb", VERBS)
def test_help_says_what_a_flag_does_and_its_default(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = help_of(verb, capsys)
    assert {flag for flag, text in flags.items() if "(default: " not in text} <= SWITCHES
    assert all(len(text.partition("(default: ")[0].split()) > 2 for text in flags.values())


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["plan", "m", "--windw", "8"], "(did you mean --window?)"),
        (["check", "--sink-token=4"], "(did you mean --sink-tokens?)"),
        (["trace", "--pool-token", "4"], "(did you mean --pool-tokens?)"),
        (["bench", "pages", "--quik"], "(did you mean --quick?)"),
        (["plan", "m", "--zzz"], "--help lists what there is"),
        (["--versoin", "plan", "m"], "(did you mean"),
    ],
)
def test_an_unknown_flag_suggests_the_near_one(
    arguments: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also a part of a name, which is not taken for the whole."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "unrecognized arguments: --" in error
    assert meant in error


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"swa-backend {swa_backend.__version__}\n"
