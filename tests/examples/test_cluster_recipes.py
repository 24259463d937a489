"""The recipes for clusters with GPUs, as far as a machine without one can tell.

Compose and KubeRay files against published schemas, and their commands against the programs that
take them.
"""

import argparse
import gzip
import json
import re
import shlex
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from jsonschema.validators import validator_for
from packaging.version import Version
from ray.scripts.scripts import cli as ray_command
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from swa_backend.options import SWAOptions
from tests.helpers.paths import DATA, ROOT

RECIPES = ROOT / "examples" / "ray_cluster"
COMPOSE = (RECIPES / "compose.yaml").read_text()
KUBERAY = (RECIPES / "kuberay.yaml").read_text()
PAGE = (RECIPES / "README.md").read_text()

SCHEMAS = {
    "Compose": "compose-spec.json",
    "RayCluster": "raycluster-v1.json.gz",
    "Service": "service-v1.json",
}
# What a user sets on the second of two machines.
ENVIRONMENT = {"RAY_AUTH_TOKEN": "secret", "NODE_IP": "10.0.0.2", "HEAD_IP": "10.0.0.1"}


def schema(kind: str) -> Any:
    """A published schema that refuses unknown fields."""
    data = (DATA / "schemas" / SCHEMAS[kind]).read_bytes()
    if (
        kind == "RayCluster"
    ):  # an API server drops what it does not know, unless it is told to refuse
        return closed(json.loads(gzip.decompress(data)))
    return json.loads(data)


def closed(part: Any) -> Any:
    """The same schema, of objects that have no other fields than those that it names."""
    if isinstance(part, list):
        return [closed(item) for item in part]
    if not isinstance(part, dict):
        return part
    part = {key: closed(value) for key, value in part.items()}
    if part.get("type") == "object" and "properties" in part:
        part["additionalProperties"] = False
    return part


def problems(document: Any, kind: str) -> list[str]:
    """What the schema has against a document, each with its place."""
    rules = schema(kind)
    errors = validator_for(rules)(rules).iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in errors]


def interpolated(part: Any, environment: Mapping[str, str]) -> Any:
    """A part of a Compose file after Docker Compose put the variables in.

    Raises:
        KeyError: a variable is required and not set.
    """
    if isinstance(part, dict):
        return {key: interpolated(value, environment) for key, value in part.items()}
    if isinstance(part, list):
        return [interpolated(item, environment) for item in part]
    if not isinstance(part, str):
        return part

    def value(found: re.Match[str]) -> str:
        name, operator, word = found.groups()
        if operator == ":?" and not environment.get(name):
            raise KeyError(name)
        return environment.get(name) or (word if operator == ":-" else "")

    return re.sub(r"\$\{(\w+)(?:(:[-?])([^}]*))?\}", value, part)


def read_compose(text: str = COMPOSE, environment: Mapping[str, str] = ENVIRONMENT) -> Any:
    """The Compose file as a machine with these variables reads it."""
    return interpolated(yaml.safe_load(text), environment)


def compose_problems(text: str) -> list[str]:
    """What is wrong with a Compose file."""
    return problems(read_compose(text), "Compose")


def kuberay_problems(text: str) -> list[str]:
    """What is wrong with manifests, each by the schema of its kind."""
    return [
        p for manifest in yaml.safe_load_all(text) for p in problems(manifest, manifest["kind"])
    ]


def test_compose_file_follows_the_published_schema() -> None:
    assert compose_problems(COMPOSE) == []


def test_kuberay_manifests_follow_the_published_schemas() -> None:
    assert kuberay_problems(KUBERAY) == []


@pytest.mark.parametrize(
    ("right", "wrong", "problem"),
    [
        ("ipc: host", "ipcs: host", "'ipcs' does not match"),
        ("network_mode: host", "network_mode: [host]", "is not of type 'string'"),
        ("capabilities: [gpu]", "capability: [gpu]", "'capability' does not match"),
        ("start_period: 1m", "start_periods: 1m", "'start_periods' does not match"),
        ("service_healthy", "service_ready", "server.depends_on"),
        ("volumes:\n  huggingface:", "volume:\n  huggingface:", "'volume' does not match"),
    ],
)
def test_mistake_in_the_compose_file_is_seen(right: str, wrong: str, problem: str) -> None:
    assert right in COMPOSE
    assert problem in "\n".join(compose_problems(COMPOSE.replace(right, wrong)))


@pytest.mark.parametrize(
    ("right", "wrong", "problem"),
    [
        ("authOptions:", "authOption:", "'authOption' was unexpected"),
        ("mode: token", "mode: tokens", "'tokens' is not one of"),
        ("replicas: 1 #", "replicas: one #", "is not of type 'integer'"),
        ("mountPath:", "path:", "'path' was unexpected"),
        ("readinessProbe:", "readyProbe:", "'readyProbe' was unexpected"),
        ("limits:", "limit:", "'limit' was unexpected"),
        ("selector:", "selectors:", "'selectors' was unexpected"),
        ("port: 8000}]", "port: http}]", "is not of type 'integer'"),
    ],
)
def test_mistake_in_a_kuberay_manifest_is_seen(right: str, wrong: str, problem: str) -> None:
    assert right in KUBERAY
    assert problem in "\n".join(kuberay_problems(KUBERAY.replace(right, wrong)))


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_compose_file_asks_for_what_has_no_default(name: str) -> None:
    without = {key: value for key, value in ENVIRONMENT.items() if key != name}
    with pytest.raises(KeyError, match=name):
        read_compose(environment=without)


def compose_commands(text: str = COMPOSE) -> list[list[str]]:
    """Commands of the services and of their health checks, as words."""
    services = read_compose(text)["services"].values()
    checks = [s["healthcheck"]["test"][1:] for s in services if "healthcheck" in s]
    return [shlex.split(s["command"]) for s in services] + checks


def kuberay_commands(text: str = KUBERAY) -> list[list[str]]:
    """Commands that the shells of head and workers run, Ray started as KubeRay does."""
    spec = next(iter(yaml.safe_load_all(text)))["spec"]
    found = []
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        start = ["ray", "start", *(["--head"] if group is spec["headGroupSpec"] else [])]
        start += ["--block", *(f"--{k}={v}" for k, v in group["rayStartParams"].items())]
        environment = {"KUBERAY_GEN_RAY_START_CMD": shlex.join(start)}
        found += run_by_shell([*container["command"], *container["args"]], environment)
    return found


def run_by_shell(command: list[str], environment: Mapping[str, str]) -> list[list[str]]:
    """Commands of Ray and vLLM that a shell runs, whose places are taken by scripts."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("ray", "vllm"):
            script = Path(folder, name)
            script.write_text('#!/bin/bash\nprintf "%s\\n" "${0##*/}" "$@" > "$0.$$"\n')
            script.chmod(0o755)
        environment = {"PATH": f"{folder}:/usr/bin:/bin", **environment}
        # Captured output is read until what the shell left in the background has ended too.
        subprocess.run(command, env=environment, capture_output=True, check=True, timeout=60)
        return [file.read_text().splitlines() for file in Path(folder).glob("*.*")]


class RefusedError(Exception):
    """A program does not take the words it was given."""


def take_ray(words: list[str]) -> None:
    """Let a command of Ray read its options, without running it."""
    name, *rest = words
    try:
        ray_command.commands[name].make_context(name, rest)
    except click.UsageError as error:
        raise RefusedError(error.message) from error


def take_vllm(words: list[str]) -> argparse.Namespace:
    """Options of ``vllm serve``, as vLLM reads them."""

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> None:
            raise RefusedError(message)

    parser = Parser()
    ServeSubcommand().subparser_init(parser.add_subparsers(parser_class=Parser))
    return parser.parse_args(words)


def check_commands(commands: list[list[str]]) -> dict[str, int]:
    """Have each command read by its program.

    Returns:
        How many there are of each.

    Raises:
        RefusedError: a program does not take an option.
    """
    found = dict.fromkeys(("ray start", "ray health-check", "vllm serve"), 0)
    for program, *words in commands:
        if program == "ray":
            take_ray(words)
        elif program == "vllm":
            args = take_vllm(words)
            SWAOptions.from_dict(args.additional_config["swa"])
        else:
            continue
        found[f"{program} {words[0]}"] += 1
    return found


on_both_vllms = pytest.mark.only_on("0.32/V1", "0.33/V1")  # the image has the newer one


@on_both_vllms
def test_ray_and_vllm_take_the_commands() -> None:
    counts = {"ray start": 2, "ray health-check": 1, "vllm serve": 1}
    assert check_commands(compose_commands()) == counts
    assert check_commands(kuberay_commands()) == counts


@on_both_vllms
@pytest.mark.parametrize(
    ("right", "wrong", "problem"),
    [
        ("ray start --head --block", "ray start --head --blocks", "--blocks"),
        ("--node-ip-address=${NODE_IP} --port", "--node-ip=${NODE_IP} --port", "--node-ip"),
        ("health-check, --address", "health-check, --addresses", "--addresses"),
        ("--port=6379", "--port=ray", "not a valid integer"),
        ("--tensor-parallel-size", "--tensor-parallelism", "--tensor-parallelism"),
        ("${STAGES:-1}", "${STAGES:-one}", "invalid"),
    ],
)
def test_wrong_flag_in_the_compose_file_is_seen(right: str, wrong: str, problem: str) -> None:
    assert right in COMPOSE
    with pytest.raises(RefusedError, match=problem):
        check_commands(compose_commands(COMPOSE.replace(right, wrong)))


@on_both_vllms
@pytest.mark.parametrize(
    ("right", "wrong", "problem"),
    [
        ("rayStartParams: {}", "rayStartParams: {num-gpu: '8'}", "--num-gpu"),
        ("ray health-check;", "ray health-check --addresses;", "--addresses"),
        ("--pipeline-parallel-size", "--pipeline-parallelism", "--pipeline-parallelism"),
    ],
)
def test_wrong_flag_in_a_kuberay_manifest_is_seen(right: str, wrong: str, problem: str) -> None:
    assert right in KUBERAY
    with pytest.raises(RefusedError, match=problem):
        check_commands(kuberay_commands(KUBERAY.replace(right, wrong)))


def test_server_has_a_shard_or_stage_for_each_gpu_of_the_manifest() -> None:
    spec = next(iter(yaml.safe_load_all(KUBERAY)))["spec"]
    gpus = 0
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        gpus += group.get("replicas", 1) * container["resources"]["limits"]["nvidia.com/gpu"]
    (serve,) = (words for program, *words in kuberay_commands() if program == "vllm")
    args = take_vllm(serve)
    assert args.tensor_parallel_size * args.pipeline_parallel_size == gpus


def test_service_leads_to_the_port_and_head_of_the_manifest() -> None:
    cluster, service = yaml.safe_load_all(KUBERAY)
    assert service["spec"]["selector"] == {
        "ray.io/cluster": cluster["metadata"]["name"],
        "ray.io/node-type": "head",
    }
    (container,) = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    (port,) = service["spec"]["ports"]
    assert (
        port["port"] == container["readinessProbe"]["httpGet"]["port"] == take_vllm(["serve"]).port
    )


def test_every_node_has_the_image_of_the_dockerfile() -> None:
    services = read_compose()["services"].values()
    (tag,) = {service["image"] for service in services}
    for build in (service["build"] for service in services):
        context = (RECIPES / build["context"]).resolve()
        assert context == ROOT
        assert (context / build["dockerfile"]).samefile(RECIPES / "Dockerfile")
    for file, built in re.findall(r"docker build -f (\S+) -t (\S+) ", PAGE):
        assert (ROOT / file).samefile(RECIPES / "Dockerfile")
        assert built in (tag, f"REGISTRY/{tag}")
    assert set(re.findall(r"image: (?:&\w+ )?(\w\S*)", KUBERAY)) == {f"REGISTRY/{tag}"}


def test_image_has_the_agent_that_kuberay_probes_and_a_ray_with_tokens() -> None:
    assert '"ray[default]"' in (RECIPES / "Dockerfile").read_text()
    spec = next(iter(yaml.safe_load_all(KUBERAY)))["spec"]
    assert Version(spec["rayVersion"]) >= Version("2.53")  # KubeRay's validation.go and pod.go
