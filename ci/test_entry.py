"""The exit code and last line of ci/test.sh, with stand-ins for its tools."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ci import contract

# Stands for a lane's Python: writes the report that pytest would, and runs
# what ci/test.sh gives it as a program.
STAND_IN = """#!/usr/bin/env bash
case "$*" in
  "- "*) exec {python} "$@" ;;
  "-m pytest "*)
    for argument in "$@"; do
      case "$argument" in
        --junitxml=*) printf '%s' "$REPORT" >"${{argument#*=}}" ;;
      esac
    done
    exit "$STATUS"
    ;;
esac
"""
REPORT = (
    '<testsuites><testsuite tests="{tests}" failures="{failures}" '
    'errors="0" skipped="0"/></testsuites>'
)


def run_entry(
    folder: Path,
    tests: int,
    failures: int,
    environment: str = "echo ./python",
    python: str = sys.executable,
) -> subprocess.CompletedProcess:
    """Runs a copy of ci/test.sh whose two lanes report the given counts."""
    (folder / "ci").mkdir()
    script = (contract.REPOSITORY / "ci" / "test.sh").read_text()
    (folder / "ci" / "test.sh").write_text(script)
    (folder / "ci" / "env.sh").write_text(environment)
    # Quoted, since a checkout may lie in a path with a space.
    stand_in = STAND_IN.format(python=shlex.quote(python))
    (folder / "python").write_text(stand_in)
    (folder / "python").chmod(0o755)
    return contract.run(
        ["bash", folder / "ci" / "test.sh"],
        cwd=folder,
        REPORT=REPORT.format(tests=tests, failures=failures),
        STATUS=str(int(failures > 0 or not tests)),
        CI="true",
    )


@pytest.mark.parametrize(
    "tests, failures, code, last",
    [
        # Two lanes, the READMEs, and the two calls of the linter.
        (3, 0, 0, "11 passed, 0 failed, 0 skipped"),
        (3, 1, 1, "8 passed, 3 failed, 0 skipped"),
        (0, 0, 1, "2 passed, 3 failed, 0 skipped"),
    ],
)
def test_exit_code(
    tmp_path: Path, tests: int, failures: int, code: int, last: str
) -> None:
    """Only a run that has tests and no failure ends with 0."""
    done = run_entry(tmp_path, tests, failures)
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == last


def test_no_environment(tmp_path: Path) -> None:
    """With CI=true a lane without its Python is a failure."""
    done = run_entry(tmp_path, 3, 0, environment="exit 1")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "0 passed, 2 failed, 0 skipped"


def test_a_report_that_cannot_be_read(tmp_path: Path) -> None:
    """A lane whose counts are lost has failed, whatever came of it."""
    done = run_entry(tmp_path, 3, 0, python="false")
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "2 passed, 3 failed, 0 skipped"
