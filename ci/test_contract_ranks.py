"""Two ranks learn what one rank with twice the batch learns."""

import sys
from pathlib import Path

import numpy as np
import pytest

from ci import contract

pytest.importorskip("horovod")

BATCH, STEPS = 3, 3  # pictures of each of two ranks; their training
# Stands in for Python and has a training keep what each rank has learned: the
# run folder has the weights of rank 0 only.
KEEPER = """#!/usr/bin/env bash
case $1 in
  */train.py) exec "{python}" "{ci}/keep_weights.py" "{folder}" "$@" ;;
  *) exec "{python}" "$@" ;;
esac
"""


def learned(folder: Path, ranks: int) -> list[np.ndarray]:
    """All weights of each rank, as one array."""
    weights = []
    for rank in range(ranks):
        with np.load(folder / f"rank{rank}.npz") as arrays:
            weights.append(
                np.concatenate([arrays[name].ravel() for name in arrays.files])
            )
    return weights


def test_two_ranks_are_one_with_twice_the_batch(
    model_folder: Path, copied_room: Path, sample_data: str, tmp_path: Path
) -> None:
    """Ranks split a batch: equal weights on both, close to those of one."""
    # A model may say what keeps its rounding small, and why, in a file.
    own = model_folder / "test" / "ranks.flags"
    flags = [
        sample_data,
        f"--train_steps={STEPS}",
        "--log_every=1",
        # Small, so that rounding is not blown up within a few steps.
        "--learning_rate=1e-4",
        *([f"--flagfile={own}"] if own.exists() else []),
    ]
    keeper = tmp_path / "python"
    keeper.write_text(
        KEEPER.format(
            python=sys.executable,
            ci=contract.REPOSITORY / "ci",
            folder=tmp_path,
        )
    )
    keeper.chmod(0o755)
    process = contract.run(
        [
            "bash",
            copied_room / "test" / "train_performance_8p.sh",
            *contract.small(copied_room),
            *contract.PLAIN,
            *flags,
            "--rank_size=2",
            f"--batch_size={BATCH}",
        ],
        cwd=copied_room.parent,
        PYTHON=str(keeper),
    )
    assert process.returncode == 0, process.stdout + process.stderr
    first, second = learned(tmp_path, 2)
    # Exactly, because both apply the same mean to the same weights.
    np.testing.assert_array_equal(first, second)
    # As the ModelZoo reads it.
    contract.check_case(copied_room / "test" / "output" / "0", STEPS, 2)
    one = contract.train_command(
        model_folder,
        tmp_path / "one",
        *flags,
        "--exec_mode=train",
        f"--batch_size={2 * BATCH}",
    )
    process = contract.run([keeper, *one[1:]])
    assert process.returncode == 0, process.stdout + process.stderr
    (alone,) = learned(tmp_path, 1)
    # Adam turns the rounding of a gradient near zero into a visible step, so
    # single weights tell nothing.
    distance = np.linalg.norm(first - alone) / np.linalg.norm(alone)
    assert distance < 1e-5
    result = contract.result(tmp_path / "one")
    assert (result["rank_size"], result["batch_size"]) == (1, 2 * BATCH)
