"""What the contract tests share: starting a model's scripts, reading runs."""

import atexit
import functools
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Optional, Union

REPOSITORY = Path(__file__).resolve().parent.parent
# Every run of a test is reproducible and independent of the machine's GPU.
PLAIN = ("--device=cpu", "--precision_mode=force_fp32")
STEPS = 20
# Long enough to be stopped between two checkpoints, of which one is removed.
LONG = (
    f"--train_steps={STEPS}",
    "--log_every=1",
    "--save_every=5",
    "--eval_every=10",
    "--keep_checkpoints=3",
)
# What TensorFlow 2.21 says of itself on import, whatever its log level.
NOTICE = re.compile(r"I0000 |WARNING: All log messages before absl::Init")
# Set by launchers; a test that wants one sets it.
RANK_VARIABLES = (
    "ASCEND_DEVICE_ID",
    "RANK_ID",
    "RANK_SIZE",
    "RANK_TABLE_FILE",
    "CM_CHIEF_IP",
)


def model_folders() -> list[Path]:
    """The model folders of the repository: those that hold a train.py."""
    return sorted(path.parent for path in REPOSITORY.glob("*/train.py"))


def environment(**changes: str) -> dict[str, str]:
    """The environment for a script, without what a launcher would set."""
    values = {
        name: value
        for name, value in os.environ.items()
        if name not in RANK_VARIABLES
    }
    # Warnings and above; the errors that matter come from the project itself.
    values.update(PYTHON=sys.executable, TF_CPP_MIN_LOG_LEVEL="3")
    values.update(changes)
    return values


class Forked:
    """A Python script in a child of the zygote, used like a Popen."""

    def __init__(
        self, words: list[str], cwd: Path, variables: dict[str, str]
    ) -> None:
        self.args, self.returncode = words, None
        self.folder = tempfile.TemporaryDirectory()
        streams = ("stdout", "stderr")
        self.paths = [Path(self.folder.name, name) for name in streams]
        request = {
            "argv": words[1:],
            "cwd": str(cwd),
            "environment": environment(**variables),
            **dict(zip(streams, map(str, self.paths))),
        }
        print(json.dumps(request), file=zygote().stdin, flush=True)
        # One script at a time: the next line is its exit status.
        self.pid = int(zygote().stdout.readline())

    def poll(self) -> Optional[int]:
        """The exit status, once there is one."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return self.wait()
        return None

    def wait(self) -> int:
        """Waits for the end; returns the exit status."""
        if self.returncode is None:
            self.returncode = int(zygote().stdout.readline())
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless the script has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it at once."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float) -> list[str]:
        """Waits for the end; returns what was printed, errors apart."""
        deadline = time.monotonic() + timeout
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        printed = [path.read_text() for path in self.paths]
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout, *printed)
        self.folder.cleanup()
        return printed


def start(
    command: list[object], cwd: Optional[Path], variables: dict[str, str]
) -> Union[Forked, subprocess.Popen]:
    """Starts a command; scripts and modules of ours without their imports."""
    words = [str(part) for part in command]
    cwd = cwd or REPOSITORY
    named = words[2].replace(".", "/") if words[1] == "-m" else words[1]
    ours = Path(cwd, named.removesuffix(".py") + ".py")
    if words[0] == sys.executable and ours.exists():
        return Forked(words, cwd, variables)
    return subprocess.Popen(
        words,
        cwd=cwd,
        env=environment(**variables),
        # A script that asks for input would wait for ever.
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(
    process: Union[Forked, subprocess.Popen], timeout: float
) -> subprocess.CompletedProcess:
    """Waits for the end of a command; kills one that takes too long."""
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
    return subprocess.CompletedProcess(
        process.args, process.returncode, output, errors
    )


def run(
    command: list[object],
    cwd: Optional[Path] = None,
    timeout: float = 300,
    **variables: str,
) -> subprocess.CompletedProcess:
    """Runs a command to its end and keeps its output as text."""
    # A hung training fails its own test and does not hold up the rest.
    return finish(start(command, cwd, variables), timeout)


@functools.lru_cache(None)
def zygote() -> subprocess.Popen:
    """The process that has imported TensorFlow for all scripts to come."""
    process = subprocess.Popen(
        [sys.executable, REPOSITORY / "ci" / "zygote.py"],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # What TensorFlow says on import belongs to no script.
        stderr=subprocess.DEVNULL,
        text=True,
    )
    # It ends by itself when nobody can ask it any more.
    atexit.register(process.communicate)
    return process


def small(room: Path) -> list[str]:
    """The flags that make training of a model as small as is useful."""
    # A model may say here what tracing takes least time for: most tests are
    # about what every network has in common.
    lighter = room / "test" / "contract.flags"
    paths = [room / "test" / "small.flags", lighter]
    return [f"--flagfile={path}" for path in paths if path.exists()]


def train_command(room: Path, output: Path, *flags: str) -> list[object]:
    """The command that trains a model's smallest form into `output`."""
    return [
        sys.executable,
        room / "train.py",
        *small(room),
        *PLAIN,
        f"--output_path={output}",
        *flags,
    ]


def train(
    room: Path, output: Path, *flags: str
) -> subprocess.CompletedProcess:
    """Trains a model's smallest form into `output`."""
    return run(train_command(room, output, *flags))


def stop_when(
    command: list[object],
    ready: Callable[[], bool],
    number: int,
    cwd: Optional[Path] = None,
) -> subprocess.CompletedProcess:
    """Starts a command, sends a signal once `ready()`, waits for the end."""
    process = start(command, cwd, {})
    # The first step of a model compiles, which can take a minute.
    deadline = time.monotonic() + 200
    while process.poll() is None and not ready():
        if time.monotonic() > deadline:
            process.kill()
        # Short: a small network takes a step in milliseconds, and the
        # signal has to meet a certain one.
        time.sleep(0.005)
    process.send_signal(number)
    # Long enough to save a checkpoint, short enough to show a hang.
    return finish(process, 100)


def metrics(run_folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl; an unfinished last one is left."""
    path = run_folder / "metrics.jsonl"
    if not path.exists():
        return []
    # SIGKILL may have cut off the last line while it was written.
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(run_folder: Path) -> dict[int, float]:
    """The total loss of every logged step of a run."""
    return {
        line["step"]: line["total_loss"]
        for line in metrics(run_folder)
        if "total_loss" in line
    }


def result(run_folder: Path) -> dict:
    """A run's result.json."""
    return json.loads((run_folder / "result.json").read_text())


def case_log(folder: Path) -> dict[str, str]:
    """The pairs of ${CaseName}.log, in the file's order."""
    # Exactly one; train_*.log beside it is the console of a rank.
    (path,) = (
        path
        for path in folder.glob("*p_*.log")
        if not path.name.startswith("train_")
    )
    lines = path.read_text().splitlines()
    values = dict(line.split(" = ", 1) for line in lines)
    assert path.stem == values["CaseName"]
    return values


def check_case(folder: Path, steps: int, ranks: int) -> None:
    """Compares ${CaseName}.log with the figures of the run beside it."""
    values, found = case_log(folder), result(folder)
    assert values["RankSize"] == str(ranks) == str(found["rank_size"])
    speed, last = float(values["ActualFPS"]), losses(folder)[steps]
    assert speed > 0
    # The log has four decimals, which is few for a slow machine.
    pictures = int(values["BatchSize"]) * ranks
    assert math.isclose(
        speed, pictures / found["seconds_per_step"], rel_tol=0.01
    )
    accuracy = float(values["TrainAccuracy"])
    assert math.isclose(accuracy, found["metric"], abs_tol=1e-4)
    assert math.isclose(float(values["ActualLoss"]), last, abs_tol=1e-5)


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with a digest of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def error_line(process: subprocess.CompletedProcess, status: int = 1) -> str:
    """The one line of a run that ended with a user's mistake."""
    shown = f"{process.args}\n{process.stdout}\n{process.stderr}"
    assert process.returncode == status, shown
    # One line means no traceback, and no warning around it either.
    lines = [
        line
        for line in process.stderr.splitlines()
        if line.strip() and not NOTICE.match(line)
    ]
    assert len(lines) == 1, shown
    assert lines[0].startswith("error: "), shown
    return lines[0]
