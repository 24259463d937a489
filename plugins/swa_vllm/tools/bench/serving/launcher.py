"""Starting the arms of a served workload, each in a process and an environment of its own."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swa_backend.window import Phase
from swa_vllm.tools.bench.serving.arms import ServingArm
from swa_vllm.tools.bench.serving.process import ArmProcess


@dataclass(frozen=True)
class Launcher:
    """How the arms of one benchmark are started.

    Attributes:
        models: checkpoint with all layers sliding, by True, and with all full, by False.
        engine: arguments of vLLM's ``LLM``.
        batch: requests that Hugging Face's ``generate`` takes at once.
    """

    models: Mapping[bool, Path]
    dtype: str
    threads: int
    engine: Mapping[str, Any]
    batch: int = 8

    def start(self, arm: ServingArm, **engine: Any) -> ArmProcess:
        """Start an arm, and see that it serves the layers that were asked for.

        Args:
            engine: arguments of ``LLM`` in place of the launcher's.

        Raises:
            RuntimeError: it does not start, or serves other layers.
        """
        arguments = {
            "model": str(self.models[arm.windowed]),
            "dtype": self.dtype,
            "threads": self.threads,
        }
        if arm.spec is None:
            env = {"OMP_NUM_THREADS": str(self.threads)}
            arguments["batch"] = self.batch
            return ArmProcess(arm.name, "swa_vllm.tools.bench.serving.hugging_face", arguments, env)
        if arm.phase is not Phase.BOTH:
            arguments["additional_config"] = {"swa": {"phase": arm.phase}}
        arguments |= {**self.engine, **engine}
        process = ArmProcess(
            arm.name,
            "swa_vllm.tools.bench.serving.vllm_engine",
            arguments,
            self._environment(arm),
        )
        if process.facts["specs"] != [arm.spec]:
            process.__exit__(RuntimeError, None, None)
            raise RuntimeError(
                f"{arm.name} serves {', '.join(process.facts['specs'])} instead of {arm.spec}; "
                "is the plugin installed?"
            )
        return process

    def _environment(self, arm: ServingArm) -> dict[str, str]:
        """Set the variables that vLLM reads when it is imported."""
        return {
            "OMP_NUM_THREADS": str(self.threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            **({} if arm.with_plugin else {"VLLM_PLUGINS": ""}),
        }
