"""Two ranks learn what one rank with twice the batch learns."""

import sys
from pathlib import Path

import numpy as np
import pytest

from ci import contract

pytest.importorskip("horovod")

BATCH = 3  # of each of two ranks


def learned(
    model_folder: Path, folder: Path, sample_data: str, ranks: int, batch: int
) -> list[list[np.ndarray]]:
    """Trains on several ranks; returns the weights of each of them."""
    folder.mkdir()
    # A model may say what keeps its rounding small, and why, in a file.
    own = model_folder / "test" / "ranks.flags"
    command = contract.train_command(
        model_folder,
        folder / "run",
        sample_data,
        "--train_steps=3",
        "--log_every=1",
        "--exec_mode=train",
        # Small, so that rounding is not blown up within three steps.
        "--learning_rate=1e-4",
        f"--batch_size={batch}",
        *([f"--flagfile={own}"] if own.exists() else []),
    )
    launcher = [sys.executable, "-m", "horovod.runner.launch", "--gloo"]
    # The run folder has the weights of rank 0 only.
    watched = [
        sys.executable,
        contract.REPOSITORY / "ci" / "keep_weights.py",
        folder,
    ]
    process = contract.run(
        [*(launcher if ranks > 1 else ()), *(("-np", ranks) * (ranks > 1))]
        + [*watched, *command[1:]]
    )
    assert process.returncode == 0, process.stdout + process.stderr
    weights = []
    for rank in range(ranks):
        with np.load(folder / f"rank{rank}.npz") as arrays:
            weights.append([arrays[name] for name in arrays.files])
    return weights


def test_two_ranks_are_one_with_twice_the_batch(
    model_folder: Path, sample_data: str, tmp_path: Path
) -> None:
    """Ranks split a batch: equal weights on both, close to those of one."""
    both = learned(model_folder, tmp_path / "two", sample_data, 2, BATCH)
    (alone,) = learned(
        model_folder, tmp_path / "one", sample_data, 1, 2 * BATCH
    )
    first, second, alone = (
        np.concatenate([array.ravel() for array in arrays])
        for arrays in (*both, alone)
    )
    # Exactly, because both apply the same mean to the same weights.
    np.testing.assert_array_equal(first, second)
    # Adam turns the rounding of a gradient near zero into a visible step, so
    # single weights tell nothing.
    distance = np.linalg.norm(first - alone) / np.linalg.norm(alone)
    assert distance < 1e-5
    speeds = [
        contract.result(tmp_path / name / "run") for name in ("two", "one")
    ]
    assert [result["rank_size"] for result in speeds] == [2, 1]
    assert [result["batch_size"] for result in speeds] == [BATCH, 2 * BATCH]
