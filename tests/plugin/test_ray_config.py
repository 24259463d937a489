"""What Ray changes before anything starts: the platform, the executor, and what is refused."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import platforms
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

import swa_vllm
from ray_cluster import run_local
from ray_cluster.local_cluster import ClusterError, LocalRayCluster
from swa_backend import __version__
from swa_vllm.attention.cpu.backend import SWACPUBackend
from swa_vllm.distributed.cpu_platform import RayCpuPlatform
from swa_vllm.distributed.executor import NodeCheckingRayExecutor
from swa_vllm.distributed.nodes import Installation, check_installations, installation_here
from tests.helpers.engines import EngineFactory, ModelFactory, generate
from tests.helpers.ray_cluster import config_on_ray
from tests.helpers.tiny_models import FULL, MIXED, SLIDING, Oracle, random_prompts

PLAIN_ATTENTION = AttentionSelectorConfig(64, torch.float32, "auto", 16)
HERE = Installation(__version__)


@pytest.mark.parametrize("value", [None, "", "0", "true"])
def test_platform_is_left_to_vllm_unless_asked_for(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SWA_RAY_ON_CPU", raising=False)
    if value is not None:
        monkeypatch.setenv("SWA_RAY_ON_CPU", value)
    assert swa_vllm.ray_cpu_platform() is None


def test_platform_is_left_to_a_vllm_that_is_not_built_for_cpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SWA_RAY_ON_CPU", "1")
    monkeypatch.setattr(platforms, "cpu_platform_plugin", lambda: None)
    assert swa_vllm.ray_cpu_platform() is None


def test_platform_asked_for_is_a_cpu_with_logical_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWA_RAY_ON_CPU", "1")
    path = swa_vllm.ray_cpu_platform()
    assert path is not None
    platform = resolve_obj_by_qualname(path)()
    assert platform.is_cpu()
    assert platform.ray_device_key == "GPU"


@pytest.mark.parametrize("name", ["CPU_ATTN", "CUSTOM"])
def test_platform_obeys_the_attention_backend(name: str) -> None:
    swa_vllm.register()
    backend = AttentionBackendEnum[name]
    path = RayCpuPlatform.get_attn_backend_cls(backend, PLAIN_ATTENTION)
    assert resolve_obj_by_qualname(path).get_name() == name


def test_platform_chooses_vllms_backend_where_none_is_given() -> None:
    path = RayCpuPlatform.get_attn_backend_cls(None, PLAIN_ATTENTION)
    assert path == AttentionBackendEnum.CPU_ATTN.get_path()


def test_platform_refuses_a_backend_of_other_devices() -> None:
    with pytest.raises(ValueError, match=r"FLASH_ATTN does not run on CPUs; allowed are CPU_ATTN"):
        RayCpuPlatform.get_attn_backend_cls(AttentionBackendEnum.FLASH_ATTN, PLAIN_ATTENTION)


@pytest.mark.parametrize("checkpoint", [MIXED, FULL], ids=["mixed", "full"])
def test_our_backend_serves_full_layers_as_vllms_does(
    checkpoint: dict[str, Any],
    tiny_model: ModelFactory,
    engine: EngineFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``--attention-backend CUSTOM`` gives it all layers, also of a model without a window."""
    model, prompts = tiny_model(**checkpoint), random_prompts([1, 100])
    expected = [answer.tokens for answer in generate(engine(model), prompts)]
    monkeypatch.setattr(platforms, "_current_platform", RayCpuPlatform())
    llm = engine(model, attention_config={"backend": "CUSTOM"})
    (backends,) = llm.apply_model(
        lambda m: [layer.self_attn.attn.attn_backend for layer in m.model.layers]
    )
    assert set(backends) == {SWACPUBackend}
    assert [answer.tokens for answer in generate(llm, prompts)] == expected


def test_workers_start_with_the_variables_that_they_read_first(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWA_RAY_ON_CPU", "1")
    monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", "MINE")
    config = config_on_ray(tiny_model(**MIXED))
    config.parallel_config.ray_runtime_env = {"env_vars": {"OMP_NUM_THREADS": "7", "A": "b"}}
    RayCpuPlatform.check_and_update_config(config)
    variables = config.parallel_config.ray_runtime_env["env_vars"]
    assert variables == {"SWA_RAY_ON_CPU": "1", "OMP_NUM_THREADS": "7", "A": "b"}
    assert os.environ["VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"] == "MINE,SWA_RAY_ON_CPU"


def test_without_ray_no_environment_is_made(tiny_model: ModelFactory) -> None:
    config = config_on_ray(tiny_model(**MIXED), distributed_executor_backend="mp")
    RayCpuPlatform.check_and_update_config(config)
    assert config.parallel_config.ray_runtime_env is None


@pytest.mark.parametrize("options", [{}, {"enabled": False}], ids=str)
def test_model_that_does_not_slide_keeps_vllms_executor(
    options: dict[str, Any], tiny_model: ModelFactory
) -> None:
    model = tiny_model(**(SLIDING if options else FULL))
    config = config_on_ray(model, additional_config={"swa": options})
    assert config.parallel_config.distributed_executor_backend == "ray"


@pytest.mark.parametrize("by_options", [False, True])
def test_sliding_model_has_its_nodes_checked(by_options: bool, tiny_model: ModelFactory) -> None:
    options = {"window": 24} if by_options else {}
    config = config_on_ray(
        tiny_model(**(FULL if by_options else MIXED)), additional_config={"swa": options}
    )
    assert config.parallel_config.distributed_executor_backend is NodeCheckingRayExecutor
    assert config.parallel_config.use_ray


def test_nodes_with_the_same_version_pass() -> None:
    check_installations(HERE, {"10.0.0.1 (a)": HERE, "10.0.0.2 (b)": HERE})


def test_every_differing_node_is_named_with_the_remedy() -> None:
    nodes = {
        "10.0.0.1 (a)": HERE,
        "10.0.0.2 (b)": Installation(None),
        "10.0.0.3 (c)": Installation("0.0.9"),
        "10.0.0.4 (d)": Installation(__version__, left_out_by="other"),
    }
    with pytest.raises(ValueError, match=r"node 10\.0\.0\.2 \(b\) has no swa-backend") as caught:
        check_installations(HERE, nodes)
    message = str(caught.value)
    assert "10.0.0.1" not in message
    assert "node 10.0.0.3 (c) has swa-backend 0.0.9" in message
    assert "node 10.0.0.4 (d) has it, but VLLM_PLUGINS='other' leaves the plugin" in message
    assert f'"pip install swa-backend=={__version__}"' in message


@pytest.mark.parametrize(
    ("value", "left_out_by"), [(None, None), ("swa,other", None), ("other", "other"), ("", "")]
)
def test_node_tells_whether_vllm_loads_the_plugin(
    value: str | None, left_out_by: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if value is not None:
        monkeypatch.setenv("VLLM_PLUGINS", value)
    assert installation_here() == Installation(__version__, left_out_by)


def test_node_that_does_not_start_is_an_error_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\necho no Ray here\n")
    stub.chmod(0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    (tmp_path / "temp").mkdir()
    with pytest.raises(ClusterError, match="a Ray node did not start:\nno Ray here"):
        LocalRayCluster(stub)
    assert not list((tmp_path / "temp").iterdir())


def test_local_demonstration_is_refused_where_a_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match="on a machine without GPUs"):
        run_local.main()


def test_padded_heads_change_no_answer(tiny_model: ModelFactory, tmp_path: Path) -> None:
    source = tiny_model(**MIXED)
    run_local.pad_heads(source, tmp_path, num_kv_heads=3)
    (prompt,) = random_prompts([100])
    before, after = Oracle(source).score(prompt), Oracle(tmp_path).score(prompt)
    assert (after.logprobs - before.logprobs).abs().max() <= before.noise
    assert json.loads((tmp_path / "config.json").read_text())["num_attention_heads"] == 6
