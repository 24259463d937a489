"""The Dockerfiles: what they copy, install and start. No image is built."""

import json
import re
import shlex
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from swa_vllm.compat.versions import is_tested_version
from tests.helpers.paths import ROOT

SERVER = ROOT / "examples" / "Dockerfile"
NODE = ROOT / "examples" / "ray_cluster" / "Dockerfile"
CONTEXT = "/opt/swa-backend"

every_image = pytest.mark.parametrize("file", [SERVER, NODE], ids=["server", "node"])


def instructions(file: Path, name: str) -> list[str]:
    """Arguments of each instruction ``name``, on one line each."""
    text = file.read_text().replace("\\\n", " ")
    return re.findall(rf"^{name}[ \t]+(.+)$", text, re.MULTILINE)


def settings() -> ConfigParser:
    """What setup.cfg says."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


@every_image
def test_image_copies_what_the_package_is_built_from(file: Path) -> None:
    copied = set[str]()
    for line in instructions(file, "COPY"):
        *names, target = line.split()
        assert all((ROOT / name).exists() for name in names)
        assert target.rstrip("/") in (CONTEXT, f"{CONTEXT}/{names[0]}")
        copied |= set(names)
    roots = settings()["options"]["package_dir"].split()[2::3]
    assert copied >= {"setup.cfg", "pyproject.toml", "README.md", "LICENSE"}
    assert copied >= {root.split("/")[0] for root in roots}


@every_image
def test_image_has_a_tested_vllm(file: Path) -> None:
    (version,) = instructions(file, "ARG")
    name, _, number = version.partition("=")
    assert name == "VLLM_VERSION"
    assert is_tested_version(number)
    assert instructions(file, "FROM") == ["vllm/vllm-openai:v${VLLM_VERSION}"]


@every_image
def test_image_installs_this_package_beside_its_own_vllm(file: Path) -> None:
    (line,) = instructions(file, "RUN")
    subprocess.run(["bash", "-n", "-c", line], check=True)
    (package,) = (word for word in shlex.split(line) if word.startswith(CONTEXT))
    extras = Requirement(package.replace(CONTEXT, "swa-backend")).extras
    assert extras <= set(settings()["options.extras_require"])
    assert not extras & {"gpu", "cpu"}  # these bring a vLLM


def test_server_is_vllm_serve() -> None:
    (entry,) = instructions(SERVER, "ENTRYPOINT")
    assert json.loads(entry) == ["vllm", "serve"]
