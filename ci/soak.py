"""Disturbs training runs at random moments and compares what they learn.

python ci/soak.py [MODEL]... --minutes=60
Each series is a run that goes on after every fault until it is done; then its
weights must equal, bit for bit, those of a run that nothing disturbed. Every
second series has two ranks. Exit status 1 if a fault was not survived.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ci import contract

FLAGS = flags.FLAGS
SAVE_EVERY = 4
# How long a stopped or broken run may take to end, and a whole run.
END_SECONDS, RUN_SECONDS = 120, 1800
# The process may be told before it listens for signals.
TERMINATED = (143, 128 + signal.SIGTERM, -signal.SIGTERM)


class Lost(Exception):
    """A fault was not survived."""


class Job:
    """A training that can be started again and again into one folder."""

    def __init__(self, model: str, folder: Path, ranks: int) -> None:
        """Keeps the command; `folder` takes the run and its log."""
        self.run = folder / "run"
        self.log = folder / "log.txt"
        self.ranks = ranks
        train = contract.train_command(
            contract.REPOSITORY / model,
            self.run,
            f"--data_path={folder.parent / 'data'}",
            f"--train_steps={FLAGS.steps}",
            "--log_every=1",
            f"--save_every={SAVE_EVERY}",
            f"--eval_every={5 * SAVE_EVERY}",
            "--keep_checkpoints=3",
        )
        launcher = [sys.executable, "-m", "horovod.runner.launch", "--gloo"]
        launcher += ["-np", str(ranks)]
        self.command = [
            str(part) for part in [*(launcher if ranks > 1 else []), *train]
        ]

    def start(self) -> subprocess.Popen:
        """Starts it; the log takes what it prints."""
        with open(self.log, "a") as log:
            return subprocess.Popen(
                self.command,
                cwd=contract.REPOSITORY,
                env=contract.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def step(self) -> int:
        """The last step that the run has told of."""
        return max(contract.losses(self.run), default=0)

    def last_lines(self) -> str:
        """What the job said last."""
        return "\n".join(self.log.read_text().splitlines()[-15:])

    def finish(self) -> None:
        """Runs to the end without a fault."""
        process = self.start()
        try:
            status = process.wait(timeout=RUN_SECONDS)
        finally:
            if process.poll() is None:
                send(descendants(process.pid), signal.SIGKILL)
        if status:
            raise Lost(f"a run without faults failed\n{self.last_lines()}")


def descendants(pid: int) -> list[int]:
    """A process and all that it has started, itself first."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in brackets, may hold spaces.
            parent = path.read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue  # it has ended meanwhile
        children.setdefault(int(parent), []).append(int(path.parent.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def rank_processes(pid: int) -> list[int]:
    """The processes among the descendants that train."""
    found = []
    for each in descendants(pid):
        try:
            words = Path(f"/proc/{each}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if len(words) > 1 and words[1].endswith(b"train.py"):
            found.append(each)
    return found


def send(pids: list[int], number: int) -> None:
    """Sends a signal to processes that may have ended."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def end(job: Job, process: subprocess.Popen, statuses: tuple) -> None:
    """Waits for a job to end by itself, with one of the statuses."""
    try:
        status = process.wait(timeout=END_SECONDS)
    except subprocess.TimeoutExpired:
        send(descendants(process.pid), signal.SIGKILL)
        raise Lost(f"it hangs\n{job.last_lines()}") from None
    # The launcher of several ranks has statuses of its own.
    if job.ranks == 1 and status not in (0, *statuses):
        raise Lost(f"it ended with status {status}\n{job.last_lines()}")


def kill(job: Job, process: subprocess.Popen, _: random.Random) -> None:
    """As a power cut does it: everything at once, nothing is saved."""
    send(descendants(process.pid), signal.SIGKILL)
    process.wait()


def terminate(job: Job, process: subprocess.Popen, _: random.Random) -> None:
    """As a batch system does it before it takes the machine away."""
    send(rank_processes(process.pid), signal.SIGTERM)
    end(job, process, TERMINATED)


def damage(job: Job, process: subprocess.Popen, rng: random.Random) -> None:
    """A crash that leaves the newest checkpoint cut off or altered."""
    kill(job, process, rng)
    indices = (job.run / "ckpt").glob("ckpt-*.index")
    steps = sorted(int(path.stem.partition("-")[2]) for path in indices)
    # With one checkpoint alone there is none to fall back on.
    if len(steps) < 2:
        return
    newest = list((job.run / "ckpt").glob(f"ckpt-{steps[-1]}.*"))
    victim = rng.choice(sorted(newest))
    size = victim.stat().st_size
    if rng.random() < 0.5:
        os.truncate(victim, rng.randrange(size))
        return
    with open(victim, "r+b") as file:
        file.seek(rng.randrange(size))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0xFF]))


def rank(job: Job, process: subprocess.Popen, rng: random.Random) -> None:
    """One of several ranks dies; the others must not wait for ever."""
    ranks = rank_processes(process.pid)
    # None has started yet: the launcher is what can die.
    send([rng.choice(ranks or [process.pid])], signal.SIGKILL)
    end(job, process, ())


def disk(job: Job, process: subprocess.Popen, _: random.Random) -> None:
    """The disk is full for a while; the run ends and says so."""
    folder = job.run.parent
    used = shutil.disk_usage(folder).used
    resize(folder, used + 2**16)
    try:
        end(job, process, (1,))
    finally:
        resize(folder, FLAGS.disk_mb * 2**20)


def resize(folder: Path, size: int) -> None:
    """Gives the small disk another size in bytes."""
    option = f"remount,size={size}"
    subprocess.run(["mount", "-o", option, folder], check=True)


def mount(folder: Path) -> bool:
    """Makes the folder a small disk; False without the right to do so."""
    option = f"size={FLAGS.disk_mb}m"
    command = ["mount", "-t", "tmpfs", "-o", option, "tmpfs", folder]
    return not subprocess.run(command, capture_output=True).returncode


def wait_for_moment(
    process: subprocess.Popen, job: Job, rng: random.Random, seconds: float
) -> bool:
    """Waits for a random moment; False if the run ended before it.

    Half of all moments lie in start-up, the others after a new step: else a
    slow start would leave no fault for the training itself.
    """
    begun, first = time.monotonic(), job.step()
    if rng.random() < 0.5:
        while process.poll() is None and job.step() == first:
            if time.monotonic() - begun > END_SECONDS:
                raise Lost(f"no step for {END_SECONDS} s\n{job.last_lines()}")
            time.sleep(0.02)
        begun = time.monotonic()
    moment = begun + rng.uniform(0, seconds)
    while process.poll() is None and time.monotonic() < moment:
        time.sleep(0.02)
    return process.poll() is None


def compare(job: Job, straight: Job) -> None:
    """Raises Lost unless both runs have the same losses and weights."""
    if contract.losses(job.run) != contract.losses(straight.run):
        raise Lost("the losses differ from an undisturbed run's")
    with np.load(job.run / "weights.npz") as ours:
        with np.load(straight.run / "weights.npz") as theirs:
            for name in theirs.files:
                if not np.array_equal(ours[name], theirs[name]):
                    raise Lost(f"{name} differs from an undisturbed run's")


def disturb(
    job: Job, rng: random.Random, seconds: float, deadline: float
) -> Counter:
    """Runs the job to its end with faults until then; counts the faults."""
    acts = {act.__name__: act for act in (kill, terminate, damage)}
    if job.ranks > 1:
        acts["rank"] = rank
    elif os.path.ismount(job.run.parent):
        acts["disk"] = disk
    counts: Counter = Counter()
    while True:
        if time.monotonic() > deadline:
            job.finish()
            return counts
        process = job.start()
        try:
            running = wait_for_moment(process, job, rng, seconds)
        except BaseException:
            kill(job, process, rng)
            raise
        if not running:
            if process.returncode:
                raise Lost(
                    f"it ended with status {process.returncode} though "
                    f"nothing disturbed it\n{job.last_lines()}"
                )
            return counts
        kind = rng.choice(list(acts))
        print(f"  step {job.step()}: {kind}", flush=True)
        acts[kind](job, process, rng)
        counts[kind] += 1


def undisturbed(model: str, folder: Path, ranks: int) -> tuple[Job, float]:
    """A run without faults, and the seconds it took."""
    job = Job(model, folder / f"straight{ranks}", ranks)
    job.run.parent.mkdir(parents=True)
    if not (folder / "data").exists():
        draw = contract.REPOSITORY / model / "sample_data.py"
        contract.run([sys.executable, draw, f"--output={folder / 'data'}"])
    begun = time.monotonic()
    job.finish()
    return job, time.monotonic() - begun


def soak(folder: Path, models: list[str]) -> Counter:
    """Series after series until the time is over; counts the faults."""
    deadline = time.monotonic() + 60 * FLAGS.minutes
    straight: dict[tuple, tuple[Job, float]] = {}
    total: Counter = Counter()
    most_ranks = 2 if find_spec("horovod") else 1
    for series in range(FLAGS.series):
        if time.monotonic() > deadline:
            break
        model = models[series // most_ranks % len(models)]
        ranks = 1 + series % most_ranks
        if (model, ranks) not in straight:
            begun = time.monotonic()
            straight[model, ranks] = undisturbed(model, folder / model, ranks)
            # The minutes are for faults; on a slow machine none would be left.
            deadline += time.monotonic() - begun
        expected, seconds = straight[model, ranks]
        # Each series can be repeated alone, by its number.
        rng = random.Random(FLAGS.seed + series)
        job = Job(model, folder / model / f"series{series}", ranks)
        job.run.parent.mkdir()
        print(f"series {series}: {model}, {ranks} ranks", flush=True)
        mounted = mount(job.run.parent)
        try:
            counts = disturb(job, rng, seconds / 3, deadline)
            compare(job, expected)
        finally:
            if mounted:
                subprocess.run(["umount", "-l", job.run.parent], check=True)
        shutil.rmtree(job.run.parent)
        total += counts
        print(f"  equal bit for bit after {sum(counts.values())} faults")
    return total


def main(arguments: list[str]) -> None:
    """Soaks the models named, or all there are, and prints the faults."""
    models = arguments[1:] or [path.name for path in contract.model_folders()]
    # So that what is mounted and running goes with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: stopped"))
    with tempfile.TemporaryDirectory(prefix="soak ") as folder:
        try:
            total = soak(Path(folder), models)
        except Lost as error:
            sys.exit(f"error: {error}")
    kinds = ", ".join(f"{total[kind]} {kind}" for kind in sorted(total))
    print(f"{sum(total.values())} faults survived ({kinds})")


if __name__ == "__main__":
    flags.DEFINE_float("minutes", 60, "After this no fault is added.", 0.0)
    flags.DEFINE_integer("series", 10**6, "Most series to run.", 1)
    flags.DEFINE_integer("steps", 40, "Steps of every run.", 1)
    flags.DEFINE_integer("seed", 0, "Of moments and faults.")
    flags.DEFINE_integer("disk_mb", 4096, "Size of the disk that fills up.", 1)
    app.run(main)
