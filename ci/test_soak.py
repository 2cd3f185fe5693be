"""A short soak of one model: faults at random moments cost no result."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from ci import contract, soak


def test_faults_leave_the_result_as_it_is() -> None:
    """A few faults; `ci/soak.sh` goes on for an hour."""
    # The others are under the same contract, each with its own kill,
    # SIGTERM, damaged checkpoint and full disk.
    process = contract.run(
        [sys.executable, contract.REPOSITORY / "ci" / "soak.py", "UNet2D"]
        + ["--minutes=0.2", "--steps=12", "--series=2"],
    )
    assert process.returncode == 0, process.stdout + process.stderr
    last = process.stdout.splitlines()[-1]
    faults = re.match(r"(\d+) faults survived", last)
    assert faults and int(faults[1]) >= 2, process.stdout
    assert "equal bit for bit" in process.stdout


class Finished:
    """A run folder with one loss and one weight."""

    def __init__(self, folder: Path, loss: float, weight: float) -> None:
        self.run = folder
        folder.mkdir()
        line = json.dumps({"step": 1, "total_loss": loss})
        (folder / "metrics.jsonl").write_text(line + "\n")
        np.savez(folder / "weights.npz", kernel=np.float32([weight]))


@pytest.mark.parametrize(
    ("loss", "weight"),
    [(1.0, np.nextafter(np.float32(2), np.float32(3))), (1 + 2**-52, 2.0)],
)
def test_the_last_bit_counts(
    loss: float, weight: float, tmp_path: Path
) -> None:
    """The smallest difference of a weight or a loss is a fault that showed."""
    straight = Finished(tmp_path / "straight", 1.0, 2.0)
    soak.compare(Finished(tmp_path / "equal", 1.0, 2.0), straight)
    with pytest.raises(soak.Lost):
        soak.compare(Finished(tmp_path / "other", loss, weight), straight)
