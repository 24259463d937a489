"""A Ray cluster of several nodes on this machine, each with one logical device and no GPU."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path

import psutil

START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 30
OBJECT_STORE_BYTES = 128 * 1024 * 1024
# All of 127.0.0.0/8 is loopback on Linux. Ray replaces 127.0.0.1 by a public address, and no other.
FIRST_HOST = 2


class ClusterError(RuntimeError):
    """A Ray node did not start."""


class LocalRayCluster:
    """Ray's head and further nodes, at loopback addresses of their own and behind a token.

    Some of Ray's servers listen on all of the machine's addresses all the same; who has no token
    gets no answer from them.

    Attributes:
        address: host and port of the head.
        environment: variables that a process needs to use this cluster from a CPU build of vLLM.
    """

    def __init__(self, python: Path | str = sys.executable) -> None:
        """Start the head, with one logical device.

        Args:
            python: runs the head and its workers.

        Raises:
            ClusterError: it did not start; the message has the end of its log.
        """
        self._directory = Path(tempfile.mkdtemp(prefix="swa-ray-"))
        self._nodes: list[psutil.Popen] = []
        self._hosts = count(FIRST_HOST)
        host = f"127.0.0.{FIRST_HOST}"
        port, client_port = _free_ports(host, 2)
        self.address = f"{host}:{port}"
        self._token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.environment = {"RAY_ADDRESS": self.address, "SWA_RAY_ON_CPU": "1", **self._token}
        head = ("--head", f"--port={port}", f"--ray-client-server-port={client_port}")
        place = ("--include-dashboard=false", f"--temp-dir={self._directory}")
        self._start([*head, *place], python, {})

    def add_node(self, python: Path | str = sys.executable, **environment: str) -> psutil.Popen:
        """Start one more node with one logical device.

        Args:
            python: runs the node and its workers.
            environment: variables of both, beside those of this process.

        Raises:
            ClusterError: it did not start; the message has the end of its log.
        """
        return self._start([f"--address={self.address}"], python, environment)

    def stop_node(self, node: psutil.Popen) -> None:
        """End a node and every process that it started."""
        family = _family(node)
        with contextlib.suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
            node.terminate()
            node.wait(STOP_TIMEOUT_S)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with contextlib.suppress(ProcessLookupError):  # children of a node that died by itself
            os.killpg(node.pid, signal.SIGKILL)
        psutil.wait_procs(family, STOP_TIMEOUT_S)
        self._nodes.remove(node)

    def stop(self) -> None:
        """End all nodes, the head last, and remove their files."""
        for node in reversed(list(self._nodes)):
            self.stop_node(node)
        shutil.rmtree(self._directory, ignore_errors=True)

    def processes(self) -> list[psutil.Process]:
        """List the nodes' processes, their workers among them."""
        return [process for node in self._nodes for process in _family(node)]

    def _start(
        self, arguments: Sequence[str], python: Path | str, environment: Mapping[str, str]
    ) -> psutil.Popen:
        number = next(self._hosts)
        log = self._directory / f"node-{number}.log"
        common = (f"--node-ip-address=127.0.0.{number}", "--block", "--disable-usage-stats")
        size = ("--num-gpus=1", "--num-cpus=1", f"--object-store-memory={OBJECT_STORE_BYTES}")
        command = [str(python), "-m", "ray.scripts.scripts", "start", *arguments, *common, *size]
        with log.open("wb") as output:
            node = psutil.Popen(
                command,
                env={**os.environ, **self._token, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._nodes.append(node)
        try:
            _wait_for_start(node, log)
        except BaseException:
            self.stop()
            raise
        return node


@contextlib.contextmanager
def local_ray_cluster(num_nodes: int) -> Iterator[LocalRayCluster]:
    """A cluster of ``num_nodes`` that is gone afterwards, whatever happens."""
    cluster = LocalRayCluster()
    try:
        for _ in range(num_nodes - 1):
            cluster.add_node()
        yield cluster
    finally:
        cluster.stop()


def _family(node: psutil.Popen) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [node, *node.children(recursive=True)]
    return [node]


def _wait_for_start(node: psutil.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while "Ray runtime started" not in log.read_text(errors="replace"):
        if node.poll() is not None or time.monotonic() > deadline:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise ClusterError(f"a Ray node did not start:\n{tail}")
        time.sleep(0.1)


def _free_ports(host: str, num_ports: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(num_ports)]
        for probe in probes:
            probe.bind((host, 0))
        return [probe.getsockname()[1] for probe in probes]
