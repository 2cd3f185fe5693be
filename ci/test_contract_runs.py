"""What a run leaves, and that it goes on after whatever stopped it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import pytest
from PIL import Image

from ci import contract
from ci.contract import LONG, STEPS

RESULT_KEYS = {
    "model": str,
    "step": int,
    "metric_name": str,
    "metric": float,
    "loss_first": float,
    "loss_last": float,
    "images_per_second": float,
    "seconds_per_step": float,
    "first_step_seconds": float,
    "peak_memory_mb": (int, float),
    "device": str,
    "precision": str,
    "tensorflow": str,
    "train_steps": int,
    "batch_size": int,
    "rank_size": int,
}
LINE_KEYS = {
    "step",
    "total_loss",
    "images_per_second",
    "seconds_per_step",
    "learning_rate",
}


class Interrupted(NamedTuple):
    """A run that was stopped and killed, whose checkpoint was damaged.

    Attributes:
      folder: the run, in the end as complete as if nothing had happened.
      stopped: the process that SIGTERM ended.
      saved: files that it left, with the step that it reached.
      early: its weights.
      killed: the process that went on and that SIGKILL ended.
      damaged: step of the checkpoint that was cut off then.
      resumed: the process that went on to the end.
    """

    folder: Path
    stopped: subprocess.CompletedProcess
    saved: tuple[int, list[str]]
    early: dict[str, np.ndarray]
    killed: subprocess.CompletedProcess
    damaged: int
    resumed: subprocess.CompletedProcess


def test_run_folder(model_folder: Path, tiny_run: Path) -> None:
    """Every promised file is there, result.json has its keys and types."""
    flags = json.loads((tiny_run / "flags.json").read_text())
    assert flags["model"] == model_folder.name
    assert flags["train_steps"] == STEPS
    result = contract.result(tiny_run)
    for key, kind in RESULT_KEYS.items():
        assert isinstance(result[key], kind), key
    assert result["model"] == model_folder.name
    assert (result["step"], result["train_steps"]) == (STEPS, STEPS)
    assert (result["device"], result["precision"]) == ("cpu", "float32")
    assert result["rank_size"] == 1
    assert result["images_per_second"] == pytest.approx(
        result["batch_size"] / result["seconds_per_step"]
    )
    for name in ("ckpt/checkpoint", "best/checkpoint", "weights.npz"):
        assert (tiny_run / name).stat().st_size > 0, name
    assert list(tiny_run.glob("events.out.tfevents*"))
    # Files are written aside and moved; none may be left half way.
    assert not list(tiny_run.rglob("*.part"))


def test_metrics_lines(tiny_run: Path) -> None:
    """A line for each step, all finite; result.json agrees with them."""
    lines = contract.metrics(tiny_run)
    training = [line for line in lines if "total_loss" in line]
    assert [line["step"] for line in training] == list(range(1, STEPS + 1))
    for line in training:
        # A model may log more, such as the parts of its loss.
        assert set(line) >= LINE_KEYS
        assert np.isfinite(list(line.values())).all()
    evaluations = {
        line["step"]: line["evaluation"]
        for line in lines
        if "evaluation" in line
    }
    result = contract.result(tiny_run)
    assert set(evaluations) == {10, STEPS}
    assert evaluations[STEPS][result["metric_name"]] == result["metric"]
    assert result["loss_first"] == training[0]["total_loss"]
    assert result["loss_last"] == training[-1]["total_loss"]


def test_pictures(tiny_run: Path) -> None:
    """Training leaves PNG files that open, over 50 pixels a side."""
    pictures = list((tiny_run / "images").glob("*.png"))
    assert pictures
    for path in pictures:
        with Image.open(path) as picture:
            # open() reads the header alone.
            picture.load()
            assert min(picture.size) > 50, path


def test_console(tiny_run: Path) -> None:
    """The user is told of data, precision and steps, and of no warning."""
    console = (tiny_run / "console.txt").read_text()
    assert f"sample data in {tiny_run}" in console
    assert "force_fp32" in console
    assert f"step {STEPS}/{STEPS}" in console
    assert "Warning" not in console


@pytest.fixture(scope="session")
def interrupted(
    model_folder: Path,
    sample_data: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Interrupted:
    """The steps of `tiny_run` once more, with everything in their way.

    The script is started in three ways, because each must find the same run.
    """
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    command = contract.train_command(model_folder, folder, *LONG, sample_data)

    def reached(step: int) -> Callable[[], bool]:
        """Tells whether the run has logged a step."""
        return lambda: max(contract.losses(folder), default=0) >= step

    # Past the checkpoint at 5, so that stopping has to save its own.
    stopped = contract.stop_when(command, reached(6), signal.SIGTERM)
    left = [os.fspath(path.relative_to(folder)) for path in folder.rglob("*")]
    saved = max(contract.losses(folder)), left
    with np.load(folder / "weights.npz") as arrays:
        early = {name: arrays[name] for name in arrays.files}
    killed = contract.stop_when(
        [sys.executable, "train.py", *command[2:]],
        # Past the checkpoint at 10, so that lines must be taken back.
        reached(12),
        signal.SIGKILL,
        cwd=model_folder,
    )
    assert not (folder / "result.json").exists(), "killed too late"
    *_, (damaged, data) = sorted(
        (int(re.findall(r"\d+", path.name)[0]), path)
        for path in (folder / "ckpt").glob("ckpt-*.data*")
    )
    # As a full disk or a lost connection leaves it.
    os.truncate(data, data.stat().st_size // 2)
    as_module = [sys.executable, "-m", f"{model_folder.name}.train"]
    resumed = contract.run([*as_module, *command[2:]])
    return Interrupted(folder, stopped, saved, early, killed, damaged, resumed)


def test_sigterm_saves(interrupted: Interrupted) -> None:
    """Status 143, one line, and a checkpoint of the very last step."""
    contract.error_line(interrupted.stopped, 143)
    last, left = interrupted.saved
    assert 6 <= last < STEPS
    assert f"ckpt/ckpt-{last}.index" in left
    assert "result.json" not in left


def test_damaged_checkpoint_is_named_and_passed_over(
    interrupted: Interrupted,
) -> None:
    """The one before is used, which is not the beginning."""
    output = interrupted.resumed.stdout
    assert interrupted.damaged >= 10
    told = [line for line in output.splitlines() if "is damaged" in line]
    assert len(told) == 1
    assert f"ckpt-{interrupted.damaged} " in told[0]
    assert f"step 1/{STEPS}" not in output


def test_interrupted_run_goes_on_bit_for_bit(
    interrupted: Interrupted, tiny_run: Path
) -> None:
    """In the end losses and weights are those of the run left alone."""
    assert interrupted.killed.returncode == -signal.SIGKILL
    process = interrupted.resumed
    assert process.returncode == 0, process.stdout + process.stderr
    folder = interrupted.folder
    assert contract.losses(folder) == contract.losses(tiny_run)
    with np.load(folder / "weights.npz") as resumed:
        with np.load(tiny_run / "weights.npz") as straight:
            assert set(resumed.files) == set(straight.files)
            for name in straight.files:
                np.testing.assert_array_equal(
                    resumed[name], straight[name], name
                )


def test_every_weight_learns(interrupted: Interrupted, tiny_run: Path) -> None:
    """What is equal at the stop and at the end of the run is stuck."""
    with np.load(tiny_run / "weights.npz") as late:
        stuck = [
            name
            for name, early in interrupted.early.items()
            # Facts of the network lie beside its weights, and boxes of a size
            # that no object has met have nothing to learn from.
            if not name.startswith(("facts/", "ssd/location/"))
            and np.array_equal(early, late[name])
        ]
    assert not stuck
    losses = contract.losses(tiny_run)
    first, last = (
        np.mean([losses[step] for step in steps])
        for steps in (range(1, 6), range(STEPS - 4, STEPS + 1))
    )
    assert last < first


@pytest.fixture(scope="session")
def begun_anew(
    model_folder: Path,
    sample_data: str,
    tiny_run: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess]:
    """A finished run that was begun anew, so that it diverges."""
    output = tmp_path_factory.mktemp("anew") / "run"
    shutil.copytree(tiny_run, output)
    (output / "notes.txt").write_text("mine")
    process = contract.train(
        model_folder,
        output,
        sample_data,
        "--overwrite",
        f"--train_steps={STEPS}",
        "--log_every=1",
        "--exec_mode=train",
        # So far that the squares of weights leave float32.
        "--learning_rate=1e38",
    )
    return output, process


def test_overwrite_starts_anew(
    begun_anew: tuple[Path, subprocess.CompletedProcess],
) -> None:
    """The old run is gone, but no file that is the user's own."""
    output, _ = begun_anew
    steps = contract.losses(output)
    assert 1 in steps and STEPS not in steps
    # TensorBoard would draw both runs as one curve.
    assert len(list(output.glob("events.out.tfevents*"))) == 1
    assert not list((output / "ckpt").glob(f"ckpt-{STEPS}.*"))
    assert (output / "notes.txt").read_text() == "mine"


def test_a_loss_that_is_not_finite_ends_the_run(
    begun_anew: tuple[Path, subprocess.CompletedProcess],
) -> None:
    """Status 3, and one line with the step and every term."""
    _, process = begun_anew
    told = contract.error_line(process, 3)
    assert re.search(r"diverged at step \d+: .*\b(nan|inf)\b", told)
    assert "total_loss" in told


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own; `resize` sets its size."""
    disk = tmp_path / "small disk"
    disk.mkdir()
    # A real one: a disk fills up inside TensorFlow, beyond any mock.
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk],
        capture_output=True,
        text=True,
    )
    if mount.returncode:
        pytest.skip(f"needs the right to mount: {mount.stderr.strip()}")
    yield disk
    # Lazily, or a process that hangs would keep the mount.
    subprocess.run(["umount", "-l", disk], check=True)


def resize(disk: Path, size: int) -> None:
    """Gives the small disk another size in bytes."""
    option = f"remount,size={size}"
    subprocess.run(["mount", "-o", option, disk], check=True)


def test_full_disk(
    model_folder: Path, sample_data: str, tiny_run: Path, small_disk: Path
) -> None:
    """One line; with room again the run goes on from its last checkpoint."""
    weights = (tiny_run / "weights.npz").stat().st_size
    checkpoint = sum(
        path.stat().st_size
        for path in (tiny_run / "ckpt").glob(f"ckpt-{STEPS}.*")
    )
    # Room to begin, but not for six checkpoints: sizes come from a
    # finished run, so that the disk fills up in every model.
    resize(small_disk, 2 * (checkpoint + weights) + checkpoint + 2**19)
    output = small_disk / "run"
    flags = (
        sample_data,
        "--train_steps=12",
        "--save_every=2",
        "--log_every=1",
        "--keep_checkpoints=9",
        "--exec_mode=train",
    )
    process = contract.train(model_folder, output, *flags)
    assert "disk is full" in contract.error_line(process)
    stopped = max(contract.losses(output))
    assert stopped < 12
    resize(small_disk, 20 * (checkpoint + weights) + 2**22)
    process = contract.train(model_folder, output, *flags)
    assert process.returncode == 0, process.stderr
    # The checkpoint that did not fit must not look like one.
    assert "damaged" not in process.stdout
    assert "step 1/12" not in process.stdout
    assert sorted(contract.losses(output)) == list(range(1, 13))
