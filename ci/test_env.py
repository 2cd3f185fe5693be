"""ci/env.sh with a stand-in for Python: what it makes anew, what it says."""

import os
import subprocess
from pathlib import Path

import pytest

from ci import contract

# Notes every call, and acts as venv and pip as far as ci/env.sh can see.
STAND_IN = """#!/usr/bin/env bash
here=$(dirname "$0")
echo "$*" >>"$CALLS"
case "$*" in
  "- "*) echo "$PROBE" ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip wheel "*)
    [ -z "$BROKEN_HOROVOD" ] || exit 1
    while [ "$1" != --wheel-dir ]; do shift; done
    mkdir -p "$2" && touch "$2/horovod-0.28.1.whl"
    ;;
  "-m pip install --no-deps "*) touch "$here/horovod" ;;
  "-m pip "*)
    echo "ERROR: no network"
    [ -z "$BROKEN_PIP" ]
    ;;
  *find_spec*) [ -e "$here/horovod" ] ;;
  *print*) echo py3.9 ;;
esac
"""


class Machine:
    """A copy of what ci/env.sh reads, and a PATH led by the stand-in."""

    def __init__(self, folder: Path) -> None:
        # Paths with a space break scripts that forget to quote.
        self.root = folder / "a zoo"
        self.calls = folder / "calls"
        (self.root / "ci").mkdir(parents=True)
        for name in (
            "requirements.txt",
            "requirements-ascend.txt",
            "requirements-newest.txt",
            "ci/requirements-test.txt",
            "ci/env.sh",
        ):
            text = (contract.REPOSITORY / name).read_text()
            (self.root / name).write_text(text)
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in ("python3.9", "python3.13"):
            (self.bin / name).write_text(STAND_IN)
            (self.bin / name).chmod(0o755)

    def env(
        self, lane: str = "ascend", **variables: str
    ) -> subprocess.CompletedProcess:
        """Runs ci/env.sh; `calls` then holds the calls of that run."""
        self.calls.write_text("")
        values = {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            # Otherwise the Pythons and settings of this machine take part.
            "PYENV_ROOT": str(self.root),
            "PYTHON": "",
            "CI": "",
            "CALLS": str(self.calls),
            "PROBE": "good",
            "BROKEN_PIP": "",
            "BROKEN_HOROVOD": "",
        }
        return contract.run(
            ["bash", self.root / "ci" / "env.sh", lane],
            cwd=self.root.parent,
            **{**values, **variables},
        )

    def installed(self) -> bool:
        """Whether the last run installed the requirements."""
        return "-m pip install -r" in self.calls.read_text()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine with one suitable Python."""
    return Machine(tmp_path)


def test_installs_once(machine: Machine) -> None:
    """The second call prints the same path and installs nothing."""
    first = machine.env()
    assert first.returncode == 0, first.stderr
    python = machine.root / ".venv" / "ascend" / "bin" / "python"
    assert first.stdout.splitlines() == [str(python)]
    assert machine.installed()
    assert "-m pip wheel" in machine.calls.read_text()
    second = machine.env()
    assert second.stdout == first.stdout
    assert second.stderr == ""
    assert "pip" not in machine.calls.read_text()


def test_changed_requirements_rebuild_but_keep_horovod(
    machine: Machine,
) -> None:
    """Packages are installed anew, but the built wheel is used again."""
    assert machine.env().returncode == 0
    with open(machine.root / "requirements-ascend.txt", "a") as file:
        file.write("six\n")
    assert machine.env().returncode == 0
    assert machine.installed()
    # The build takes minutes, and TensorFlow is still the same.
    assert "-m pip wheel" not in machine.calls.read_text()


def test_interrupted_installation_is_begun_anew(machine: Machine) -> None:
    """A half-made environment is never taken for a whole one."""
    process = machine.env(BROKEN_PIP="yes")
    assert process.returncode == 1
    assert "no network" in process.stderr.splitlines()[-1]
    assert process.stdout == ""
    assert machine.env().returncode == 0
    assert machine.installed()


def test_failed_horovod_is_told_and_not_fatal(machine: Machine) -> None:
    """Single runs do without it and builds are not repeated; CI stops."""
    process = machine.env(BROKEN_HOROVOD="yes")
    assert process.returncode == 0
    assert "several processes" in process.stderr.splitlines()[-1]
    again = machine.env(BROKEN_HOROVOD="yes")
    assert "several processes" in again.stderr
    assert "-m pip wheel" not in machine.calls.read_text()
    # There, tests of several ranks would be skipped unnoticed.
    process = machine.env(BROKEN_HOROVOD="yes", CI="true")
    assert process.returncode == 1
    assert "Horovod" in process.stderr.splitlines()[-1]


def test_newest_lane_does_without_horovod(machine: Machine) -> None:
    """Horovod does not build there, and one device needs none."""
    process = machine.env("newest", CI="true")
    assert process.returncode == 0, process.stderr
    assert machine.installed()
    assert "-m pip wheel" not in machine.calls.read_text()


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"PROBE": "venv"}, "python3-venv"),
        ({"PROBE": ""}, "no Python 3.9 found"),
    ],
)
def test_missing_interpreter_is_one_line(
    machine: Machine, variables: dict[str, str], told: str
) -> None:
    """The line tells what to install, a Python or its venv module."""
    # Both names, or a good Python of this machine would be found.
    for name in ("python3", "python3.9"):
        (machine.bin / name).write_text(STAND_IN)
        (machine.bin / name).chmod(0o755)
    process = machine.env(**variables)
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert told in line


def test_unknown_lane_is_one_line(machine: Machine) -> None:
    """The line names the lanes that exist."""
    process = machine.env("gpu")
    assert process.returncode == 1
    assert "'gpu'" in process.stderr
    assert "default, ascend and newest" in process.stderr
