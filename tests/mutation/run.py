"""Runs the mutants of one part and writes down what survived; goes on where it was cut off.

    python -m tests.mutation.run PART [--again] [--report]

PART is one of ``targets.PARTS``. Mutants are made in a copy of this repository, in
``.cache/mutation/PART`` or ``$SWA_MUTATION_DIR/PART``, beside Cosmic Ray's session.
"""

import argparse
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from tests.mutation.report import Mutant, key_of, read_survivors, write_down
from tests.mutation.targets import PARTS, SAMPLE_SIZE, SEED, WHOLE

ROOT = Path(__file__).parents[2]
# Operators of Cosmic Ray that are left out, as regular expressions; README.md says why.
LEFT_OUT = (
    r"core/ReplaceBinaryOperator_\w+_(Pow|RShift|LShift|BitOr|BitAnd|BitXor)",
    r"core/ReplaceBinaryOperator_BitOr_",
    r"core/ReplaceComparisonOperator_(Eq|NotEq|Lt|LtE|Gt|GtE)_Is",
    r"core/ReplaceComparisonOperator_(Is|IsNot)_(Eq|NotEq|Lt|Gt)",
    r"core/RemoveDecorator",
)
# The server's own time limit is shorter. Strings of JSON are strings of TOML.
CONFIG = """[cosmic-ray]
module-path = {modules}
timeout = 200.0
excluded-modules = []
test-command = {command}

[cosmic-ray.distributor]
name = "local"

[cosmic-ray.filters.operators-filter]
exclude-operators = {left_out}
"""
# What conftest.py sets before it imports torch, which the server has imported by then.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join((".", "plugins", "examples")),
    "TRITON_INTERPRET": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
CLIENT, SOCKET = "tests/mutation/client.py", "server.sock"


class Session:
    """Cosmic Ray's session of a part, and the copy that it changes."""

    def __init__(self, part: str) -> None:
        self.part = part
        directory = Path(os.environ.get("SWA_MUTATION_DIR", ROOT / ".cache" / "mutation")) / part
        self.tree = directory.resolve() / "tree"
        self._file, self._config = self.tree.parent / "session.sqlite", self.tree.parent / "cr.toml"

    def prepare(self) -> None:
        """Copy the sources; list the mutants, unless that was done before.

        Raises:
            RuntimeError: a module is no longer what it was then.
        """
        if self._file.exists():
            for path in PARTS[self.part]:
                if self._original(path).read_bytes() != (ROOT / path).read_bytes():
                    raise RuntimeError(
                        f"{path} has changed since its mutants were listed; delete {self._file} "
                        "to begin anew"
                    )
        shutil.rmtree(self.tree, ignore_errors=True)
        _copy_repository(self.tree)
        self._config.write_text(
            CONFIG.format(
                modules=json.dumps([*PARTS[self.part]]),
                command=json.dumps(f"{sys.executable} -IS {CLIENT} {SOCKET}"),
                left_out=json.dumps(LEFT_OUT),
            )
        )
        if not self._file.exists():
            new = self._file.with_suffix(".new")
            self._run("cosmic-ray", "init", str(self._config), str(new))
            self._run("cr-filter-operators", str(new), str(self._config))
            self._run("cr-filter-pragma", str(new))
            _keep_sample(new, None if self.part == WHOLE else SAMPLE_SIZE)
            for path in PARTS[self.part]:
                self._original(path).write_bytes((ROOT / path).read_bytes())
            new.rename(self._file)

    def forget_survivors(self) -> None:
        """Make those that have survived and are not judged pending again."""
        judged = {key_of(survivor) for survivor in read_survivors() if survivor["judged"]}
        with closing(sqlite3.connect(self._file)) as db, db:
            rows = db.execute(
                "SELECT job_id, module_path, operator_name, occurrence FROM mutation_specs "
                "JOIN work_results USING (job_id) WHERE test_outcome = 'SURVIVED'"
            ).fetchall()
            again = [(job,) for job, *key in rows if tuple(key) not in judged]
            db.executemany("DELETE FROM work_results WHERE job_id = ?", again)

    def execute(self) -> None:
        """Check that the tests pass without a mutant, then run all pending ones."""
        with closing(sqlite3.connect(self._file)) as db, db:
            # Could not be tried when a run was cut off.
            db.execute("DELETE FROM work_results WHERE test_outcome = 'INCOMPETENT'")
        with self._server():
            self._run(sys.executable, "-IS", CLIENT, SOCKET)
            self._run("cosmic-ray", "exec", str(self._config), str(self._file))

    def mutants(self) -> list[Mutant]:
        """All that are to run, and what became of each."""
        with closing(sqlite3.connect(self._file)) as db:
            rows = db.execute(
                "SELECT module_path, operator_name, occurrence, COALESCE(test_outcome, 'PENDING'), "
                "COALESCE(diff, ''), COALESCE(output, '') "
                "FROM mutation_specs LEFT JOIN work_results USING (job_id)"
            )
            return [Mutant(*row) for row in rows]

    def num_listed(self) -> dict[str, int]:
        """How many mutants each module has, with those outside the sample."""
        with closing(sqlite3.connect(self._file)) as db:
            return dict(db.execute("SELECT module_path, num_mutants FROM listed"))

    def _original(self, path: str) -> Path:
        """The file beside the session that keeps a module as its mutants were listed."""
        return self.tree.parent / path.replace("/", ".")

    def _run(self, *command: str) -> None:
        subprocess.run(command, cwd=self.tree, check=True)

    @contextmanager
    def _server(self) -> Iterator[None]:
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.mutation.server", self.part, SOCKET],
            cwd=self.tree,
            env={**os.environ, **ENVIRONMENT},
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stdout is not None
            for line in server.stdout:
                if line == "ready\n":
                    break
                print(line, end="", file=sys.stderr)
            else:
                raise RuntimeError("the server has ended before it was ready")
            yield
        finally:
            server.kill()
            server.wait()


def _copy_repository(tree: Path) -> None:
    """Copy the repository's files, those not yet committed too."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    for name in listed.decode().split("\0"):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)


def _keep_sample(session: Path, size: int | None) -> None:
    """Remove from a session what was filtered out, and all but a random sample of the rest."""
    with closing(sqlite3.connect(session)) as db, db:
        db.execute("DELETE FROM mutation_specs WHERE job_id IN (SELECT job_id FROM work_results)")
        db.execute("DELETE FROM work_results")
        db.execute(
            "CREATE TABLE listed AS SELECT module_path, COUNT(*) AS num_mutants "
            "FROM mutation_specs GROUP BY module_path"
        )
        jobs = db.execute(
            "SELECT job_id FROM mutation_specs ORDER BY module_path, operator_name, occurrence"
        ).fetchall()
        if size is not None and size < len(jobs):
            dropped = random.Random(SEED).sample(jobs, len(jobs) - size)
            db.executemany("DELETE FROM mutation_specs WHERE job_id = ?", dropped)
        db.execute("DELETE FROM work_items WHERE job_id NOT IN (SELECT job_id FROM mutation_specs)")
        print(f"{len(jobs)} mutants, of which {min(size or len(jobs), len(jobs))} will run")


def main() -> None:
    """Do what the module's first lines say."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.run")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument(
        "--again", action="store_true", help="run those that are not judged once more"
    )
    parser.add_argument("--report", action="store_true", help="run none, write down what is known")
    args = parser.parse_args()
    session = Session(args.part)
    if not args.report:
        session.prepare()
        if args.again:
            session.forget_survivors()
        session.execute()
    write_down(session.mutants(), session.num_listed())


if __name__ == "__main__":
    main()
