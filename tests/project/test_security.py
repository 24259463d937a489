"""Nothing forbidden is excused from the static scan, and the audit finds what it is for."""

import json
import re
from pathlib import Path

import pytest

from tests import audit
from tests.helpers.paths import ROOT

# What ruff has no rule for.
UNRULED = re.compile(r"trust_remote_code=True|torch\.load\(|\bpickle\b|\bdill\b")


def _sources() -> list[Path]:
    return [
        path
        for room in ("swa_backend", "plugins", "examples")
        for path in (ROOT / room).rglob("*.py")
    ]


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_forbidden_is_excused(path: Path) -> None:
    text = path.read_text()
    excused = set(re.findall(r"\bS\d{3}\b", " ".join(re.findall(r"noqa.*", text))))
    assert excused <= {"S603", "S311"}  # a command without a shell, and numbers that are no secret
    assert not UNRULED.search(text)


def test_conflicting_requirement_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert audit.conflicts() == []
    info = tmp_path / "wanting-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: wanting\nVersion: 1.0\nRequires-Dist: nowhere-to-be-had\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert audit.conflicts() == ["wanting 1.0 requires nowhere-to-be-had, which is not installed."]


REPORT = {
    "dependencies": [
        {"name": "pytest", "version": "8.0", "vulns": [{"id": "A-1", "fix_versions": ["99"]}]},
        {
            "name": "torch",
            "version": "2.13.0+cpu",
            "vulns": [{"id": "A-2", "fix_versions": ["99"]}],
        },
        {"name": "httpx", "version": "0.28.1", "vulns": [{"id": "A-3", "fix_versions": []}]},
        {"name": "ray", "version": "2.60", "vulns": []},
        {"name": "vllm", "skip_reason": "not on the package index"},
    ]
}


@pytest.fixture
def pip_audit_is_there(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(audit, "conflicts", list)
    monkeypatch.setattr(audit, "find_spec", lambda name: name)
    return monkeypatch


def test_vulnerability_that_an_upgrade_avoids_is_printed_and_fails_a_strict_audit(
    pip_audit_is_there: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pip_audit_is_there.setattr(audit, "_ask_service", lambda: json.dumps(REPORT))
    avoidable = "pytest 8.0: A-1, fixed in 99"
    others = [
        "warning: torch 2.13.0+cpu: A-2, fixed in 99, held back by a pin",
        "warning: httpx 0.28.1: A-3, not fixed yet",
    ]
    audited = "audited for vulnerabilities, but for vllm"
    assert audit.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines) == sorted([f"warning: {avoidable}", *others, audited])
    assert audit.main(is_strict=True) == 1
    assert capsys.readouterr().out.splitlines() == [*others, audited, f"error: {avoidable}"]


def test_service_that_cannot_be_reached_is_said(
    pip_audit_is_there: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pip_audit_is_there.setattr(audit, "SERVICE", "http://127.0.0.1:9")  # nobody listens
    assert audit.main() == 0
    said = "NOT AUDITED for vulnerabilities: no answer from http://127.0.0.1:9"
    assert capsys.readouterr().out.startswith(said)
    assert audit.main(is_strict=True) == 1


def test_missing_auditor_fails_the_audit(
    pip_audit_is_there: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pip_audit_is_there.setattr(audit, "find_spec", lambda name: None)
    assert audit.main() == 1
    assert "pip-audit is not installed; run examples/setup_env.sh" in capsys.readouterr().out


def test_the_test_command_runs_scan_contracts_and_audit() -> None:
    script = (ROOT / "tests/run.sh").read_text()
    assert '"$venv/bin/ruff" check\n' in script
    assert '"$venv/bin/lint-imports"' in script
    assert '"$venv/bin/python" tests/audit.py\n' in script
