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

import numpy as np
import pytest
from PIL import Image

from ci import contract

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
STEPS = 20
# Long enough to be stopped between two checkpoints.
LONG = (
    f"--train_steps={STEPS}",
    "--log_every=1",
    "--save_every=5",
    "--eval_every=10",
    "--keep_checkpoints=3",
)


def test_run_folder(model_folder: Path, tiny_run: Path) -> None:
    """Every promised file is there, result.json has its keys and types."""
    flags = json.loads((tiny_run / "flags.json").read_text())
    assert flags["model"] == model_folder.name
    assert flags["train_steps"] == 6
    result = contract.result(tiny_run)
    for key, kind in RESULT_KEYS.items():
        assert isinstance(result[key], kind), key
    assert result["model"] == model_folder.name
    assert (result["step"], result["train_steps"]) == (6, 6)
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
    assert [line["step"] for line in training] == list(range(1, 7))
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
    assert set(evaluations) == {3, 6}
    assert evaluations[6][result["metric_name"]] == result["metric"]
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
    assert "step 6/6" in console
    assert "Warning" not in console


@pytest.fixture(scope="session")
def straight_run(
    model_folder: Path,
    sample_data: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run of STEPS steps without interruption."""
    output = tmp_path_factory.mktemp("straight") / "run"
    process = contract.train(model_folder, output, *LONG, sample_data)
    assert process.returncode == 0, process.stdout + process.stderr
    return output


def test_every_weight_learns(tiny_run: Path, straight_run: Path) -> None:
    """Runs of one seed: what is equal after 6 and after 20 steps is stuck."""
    with np.load(tiny_run / "weights.npz") as early:
        with np.load(straight_run / "weights.npz") as late:
            stuck = [
                name
                for name in late.files
                # Facts of the network lie beside its weights, and boxes of a
                # size that no object has met have nothing to learn from.
                if not name.startswith(("facts/", "ssd/location/"))
                and np.array_equal(early[name], late[name])
            ]
    assert not stuck
    losses = contract.losses(straight_run)
    first, last = (
        np.mean([losses[step] for step in steps])
        for steps in (range(1, 6), range(STEPS - 4, STEPS + 1))
    )
    assert last < first


def test_a_loss_that_is_not_finite_ends_the_run(
    model_folder: Path, sample_data: str, tmp_path: Path
) -> None:
    """Status 3, and one line with the step and every term."""
    process = contract.train(
        model_folder,
        tmp_path / "run",
        sample_data,
        "--train_steps=20",
        "--log_every=1",
        "--exec_mode=train",
        # So far that the squares of weights leave float32.
        "--learning_rate=1e38",
    )
    told = contract.error_line(process, 3)
    assert re.search(r"diverged at step \d+: .*\b(nan|inf)\b", told)
    assert "total_loss" in told


def test_killed_run_goes_on_bit_for_bit(
    model_folder: Path, sample_data: str, straight_run: Path, tmp_path: Path
) -> None:
    """Three ways to start a script, because each must find the same run."""
    output = tmp_path / "run"
    command = contract.train_command(model_folder, output, *LONG, sample_data)
    in_folder = [sys.executable, "train.py", *command[2:]]
    as_module = [
        sys.executable,
        "-m",
        f"{model_folder.name}.train",
        *command[2:],
    ]
    process = contract.stop_when(
        in_folder,
        # Past the checkpoint at 10, so that lines must be taken back.
        lambda: max(contract.losses(output), default=0) >= 12,
        signal.SIGKILL,
        cwd=model_folder,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    # Otherwise the kill came too late and proves nothing.
    assert not (output / "result.json").exists()
    process = contract.run(as_module)
    assert process.returncode == 0, process.stderr
    assert f"step {STEPS}/{STEPS}" in process.stdout
    # It went on from a checkpoint, and did not just start again.
    assert "step 10/" not in process.stdout
    assert contract.losses(output) == contract.losses(straight_run)
    with np.load(output / "weights.npz") as resumed:
        with np.load(straight_run / "weights.npz") as straight:
            assert set(resumed.files) == set(straight.files)
            for name in straight.files:
                np.testing.assert_array_equal(
                    resumed[name], straight[name], name
                )


@pytest.fixture(scope="session")
def stopped_run(
    model_folder: Path,
    sample_data: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess]:
    """A run that SIGTERM stopped after step 6 or later, and how it ended."""
    output = tmp_path_factory.mktemp("stopped") / "run"
    process = contract.stop_when(
        contract.train_command(model_folder, output, *LONG, sample_data),
        # Past the checkpoint at 5, so that stopping has to save its own.
        lambda: max(contract.losses(output), default=0) >= 6,
        signal.SIGTERM,
    )
    return output, process


def test_sigterm_saves(
    stopped_run: tuple[Path, subprocess.CompletedProcess],
) -> None:
    """Status 143, one line, and a checkpoint of the very last step."""
    output, process = stopped_run
    contract.error_line(process, 143)
    last = max(contract.losses(output))
    assert 6 <= last < STEPS
    assert (output / "ckpt" / f"ckpt-{last}.index").exists()
    assert not (output / "result.json").exists()


def test_damaged_checkpoint_is_named_and_passed_over(
    model_folder: Path,
    sample_data: str,
    stopped_run: tuple[Path, subprocess.CompletedProcess],
    straight_run: Path,
    tmp_path: Path,
) -> None:
    """The one before is used, and the run ends as if never stopped."""
    output = tmp_path / "run"
    # A copy, since the stopped run is shared.
    shutil.copytree(stopped_run[0], output)
    last = max(contract.losses(output))
    (data,) = (output / "ckpt").glob(f"ckpt-{last}.data*")
    # As a full disk or a lost connection leaves it.
    os.truncate(data, data.stat().st_size // 2)
    process = contract.train(model_folder, output, *LONG, sample_data)
    assert process.returncode == 0, process.stderr
    told = [
        line for line in process.stdout.splitlines() if "is damaged" in line
    ]
    assert len(told) == 1
    assert f"ckpt-{last}" in told[0]
    assert contract.losses(output) == contract.losses(straight_run)


def test_overwrite_starts_anew(
    model_folder: Path, sample_data: str, tiny_run: Path, tmp_path: Path
) -> None:
    """The old run is gone, but no file that is the user's own."""
    output = tmp_path / "run"
    shutil.copytree(tiny_run, output)
    (output / "notes.txt").write_text("mine")
    process = contract.train(
        model_folder,
        output,
        sample_data,
        "--overwrite",
        "--train_steps=2",
        "--log_every=1",
        "--exec_mode=train",
    )
    assert process.returncode == 0, process.stderr
    assert sorted(contract.losses(output)) == [1, 2]
    # TensorBoard would draw both runs as one curve.
    assert len(list(output.glob("events.out.tfevents*"))) == 1
    assert (output / "notes.txt").read_text() == "mine"


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
        path.stat().st_size for path in (tiny_run / "ckpt").glob("ckpt-6.*")
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
