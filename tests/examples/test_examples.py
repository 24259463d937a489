"""The examples, run as a user runs them."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from quickstart import plain_message
from swa_backend.options import SWAOptions
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.alone

TIMEOUT_S = 300
QUICKSTART = [sys.executable, "examples/quickstart.py"]


def user_environment(**changes: str) -> dict[str, str]:
    """This environment without what the tests set for engines of their own."""
    ours = ("VLLM_", "OMP_", "SWA_")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    return {**inherited, "SWA_VENV": sys.prefix, **changes}


def run(command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=user_environment(**env),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@contextmanager
def running(command: list[str], log: Path, **env: str) -> Iterator[psutil.Popen]:
    """A process that is killed in the end, with all it started."""
    with log.open("w") as output:
        process = psutil.Popen(
            command, cwd=ROOT, env=user_environment(**env), stdout=output, stderr=subprocess.STDOUT
        )
    family = [process]
    try:
        yield process
        family += children(process)
    finally:
        family += children(process)
        for member in family:
            if member.is_running():
                member.kill()
        process.wait(30)


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def wait_until(condition: Callable[[], bool], log: Path) -> None:
    for _ in range(TIMEOUT_S):
        if condition():
            return
        time.sleep(1)
    pytest.fail(f"waited {TIMEOUT_S} s; log:\n{log.read_text()[-3000:]}")


def is_gone(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(scope="module")
def kept_quickstart() -> Iterator[str]:
    """What ``quickstart.sh --keep`` printed; its server runs until the tests are over."""
    result = run(["bash", "examples/quickstart.sh", "--keep"])
    stop = re.search(r"kill -INT (\d+)", result.stdout)
    try:
        assert result.returncode == 0, result.stdout + result.stderr
        yield result.stdout
    finally:
        if stop and psutil.pid_exists(int(stop[1])):
            os.killpg(int(stop[1]), signal.SIGKILL)


@pytest.mark.parametrize(
    "line",
    [
        "(APIServer pid=17) INFO 12-01 05:42:14 [compilation.py:317] Loading weights",
        "\x1b[36m(RayWorkerProc pid=16, ip=127.0.0.3)\x1b[0m (Worker_TP0 pid=16) "
        "INFO 11-30 20:09:36 [layer_table.py:56] Loading weights",
        "\x1b[36m(pid=21)\x1b[0m Loading weights\x1b[32m [repeated 2x across cluster]\x1b[0m",
    ],
    ids=["vllm", "ray-worker", "ray-repeated"],
)
def test_start_up_messages_are_plain(line: str) -> None:
    assert plain_message(line) == "Loading weights"


def test_quickstart_gets_a_real_answer(kept_quickstart: str) -> None:
    assert re.search(r"^ +-> .*\bParis\b", kept_quickstart, re.MULTILINE)


def test_quickstart_answers_a_long_prompt_with_and_without_window(kept_quickstart: str) -> None:
    answers = re.findall(
        r"^ +(window and sinks|full attention) +-> (.+)", kept_quickstart, re.MULTILINE
    )
    assert [name for name, _ in answers] == ["window and sinks", "full attention"]
    assert answers[0][1] != answers[1][1]
    assert "the ship sailed" in answers[1][1].lower()


def test_quickstart_shows_the_window_of_every_layer(kept_quickstart: str) -> None:
    rows = re.findall(
        r"^ +SWA (\d+)-(\d+) +(full|sliding) +(-|\d+) ", kept_quickstart, re.MULTILINE
    )
    assert rows == [("0", "14", "full", "-"), ("15", "29", "sliding", "128")]


def test_quickstart_measures_the_pages_of_one_window(kept_quickstart: str) -> None:
    found = re.search(r"held after (\d+) tokens .*: (\d+); .* 30 layers: (\d+)", kept_quickstart)
    assert found is not None
    num_tokens, held, full = map(int, found.groups())
    pages_in_full = -(-num_tokens // 32)
    assert full == 30 * pages_in_full
    # The poll may be a step or two older than the token count: a page of the 15 full layers.
    # Sliding layers hold the window's four pages, or five where it starts inside one, and one of
    # sinks.
    least, most = 15 * (pages_in_full - 1 + 5), 15 * (pages_in_full + 6)
    assert least <= held <= most


def _in_shell(line: str) -> subprocess.CompletedProcess[bytes]:
    """What a user does who copies the line."""
    return subprocess.run(  # noqa: S602 (printed by our own script)
        line,
        shell=True,
        capture_output=True,
        check=True,
        timeout=TIMEOUT_S,
    )


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_quickstart_keep_prints_requests_that_work(kept_quickstart: str) -> None:
    ask, scrape = re.findall(r"^ *(curl .*)$", kept_quickstart, re.MULTILINE)
    reply = _in_shell(ask)
    assert json.loads(reply.stdout)["choices"][0]["message"]["content"].strip()
    reply = _in_shell(scrape)
    assert re.search(rb'^swa_pages_freed_total\{engine="0",.*\} [1-9]', reply.stdout, re.MULTILINE)


def test_quickstart_keep_prints_a_command_that_stops_the_server(kept_quickstart: str) -> None:
    (line, pid) = re.findall(r"^ *(kill -INT (\d+))$", kept_quickstart, re.MULTILINE)[0]
    server = psutil.Process(int(pid))
    family = [server, *children(server)]
    _in_shell(line)
    wait_until(lambda: all(map(is_gone, family)), ROOT / ".cache" / "quickstart.log")


def test_quickstart_fails_with_the_reason_of_the_server(tmp_path: Path) -> None:
    result = run([*QUICKSTART, "--model", str(tmp_path / "nowhere")])
    assert result.returncode == 1
    assert "vllm serve ended with status 1" in result.stderr
    assert "nowhere" in result.stderr


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM], ids=lambda sign: sign.name)
def test_interrupted_quickstart_leaves_no_server(tmp_path: Path, sign: signal.Signals) -> None:
    log = tmp_path / "log"
    with running(QUICKSTART, log) as process:
        wait_until(lambda: bool(children(process)), log)
        server = children(process)
        process.send_signal(sign)
        assert process.wait(TIMEOUT_S) != 0
        assert all(map(is_gone, server))


def test_offline_generate_takes_the_window_from_its_options() -> None:
    options = ["--window", "64", "--full-attention-layers", "every:10", "--max-tokens", "12"]
    result = run([sys.executable, "examples/offline_generate.py", *options])
    assert result.returncode == 0, result.stderr
    assert re.search(r"^ +-> .*\bParis\b", result.stdout, re.MULTILINE)
    assert re.search(r"tokens/s$", result.stdout, re.MULTILINE)
    rows = re.findall(r"SWA ([\d, -]+?) +(\w+) +(-|\d+) ", result.stdout + result.stderr)
    assert ("0-8, 10-18, 20-28", "sliding", "64") in rows
    assert ("9, 19, 29", "full", "-") in rows


def test_serve_script_serves_the_demo_model_where_told(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", tmp_path / "log"
    options = ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    with running(["bash", "examples/serve_qwen3.sh", "demo", *options], log) as server:
        wait_until(lambda: answers(url) or is_gone(server), log)
        request = {"model": "demo", "prompt": "The capital of France is", "max_tokens": 4}
        reply = httpx.post(f"{url}/v1/completions", json=request, timeout=TIMEOUT_S)
        assert reply.json()["choices"][0]["text"].strip()
        family = [server, *children(server)]
        server.send_signal(signal.SIGINT)  # reaches vLLM, not a shell around it
        wait_until(lambda: all(map(is_gone, family)), log)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).is_success
    except httpx.TransportError:
        return False


def test_serve_script_gives_qwen3_8b_a_window(tmp_path: Path) -> None:
    stub = tmp_path / "bin" / "vllm"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    command = ["bash", "examples/serve_qwen3.sh", "qwen3-8b", "--port", "9000"]
    arguments = run(command, SWA_VENV=str(tmp_path)).stdout.splitlines()
    assert arguments[:2] == ["serve", "Qwen/Qwen3-8B"]
    assert arguments[-2:] == ["--port", "9000"]
    config = json.loads(arguments[arguments.index("--additional-config") + 1])
    options = SWAOptions.from_dict(config["swa"])
    assert (options.window, options.full_attention_layers) == (4096, "every:4")


def test_serve_script_refuses_another_model() -> None:
    result = run(["bash", "examples/serve_qwen3.sh", "llama"])
    assert result.returncode == 2
    assert "got 'llama'; allowed are qwen3-8b and demo" in result.stderr


def _demonstrate(module: str, log: Path) -> str:
    """What a demonstration in several processes printed; it ended well, and they are gone."""
    family: set[psutil.Process] = set()
    path = os.pathsep.join(filter(None, [str(ROOT / "examples"), os.environ.get("PYTHONPATH")]))
    with running([sys.executable, "-m", module], log, PYTHONPATH=path) as process:

        def ended() -> bool:
            family.update(children(process))
            return process.poll() is not None

        wait_until(ended, log)
        assert process.returncode == 0, log.read_text()
        assert all(map(is_gone, family))
    text = log.read_text()
    assert re.search(r"^ +-> .*\bParis\b", text, re.MULTILINE)
    return text


def test_ray_cluster_answers_over_two_nodes_and_leaves_nothing(tmp_path: Path) -> None:
    text = _demonstrate("ray_cluster.run_local", tmp_path / "log")
    assert re.search(r"SWA 15-29 +sliding +128 +4 ", text)
    found = re.search(r"each sliding layer: (\d+); with full attention: (\d+)", text)
    assert found is not None
    # The window's five pages, the sinks' and one that is being written, of 36.
    assert 5 <= int(found[1]) <= 7 < int(found[2])
    assert "\x1b" not in text
    assert "pid=" not in text


def test_servers_for_prompts_and_answers_move_pages_and_leave_nothing(tmp_path: Path) -> None:
    """The script itself compares their answers with those of a single server."""
    text = _demonstrate("prefill_decode.run_local", tmp_path / "log")
    short, long = map(int, re.findall(r"bytes moved: (\d+)", text))
    assert 0 < short < long
