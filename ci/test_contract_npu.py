"""Every model trains on the double of an NPU, alone and as one of eight."""

import os
import subprocess
from pathlib import Path

import pytest
import tensorflow as tf

from ci import contract, npu_probe

pytestmark = pytest.mark.skipif(
    not tf.__version__.startswith("2.6."),
    reason="the adapter takes TensorFlow 2.6 alone; its parts are tested in"
    " all lanes",
)


def train_on_npu(
    model_folder: Path, output: Path, *flags: str, **variables: str
) -> subprocess.CompletedProcess:
    """Two steps of a model's smallest form with the double's adapter."""
    command = contract.train_command(
        model_folder,
        output,
        # The later flag wins over the one for the CPU.
        "--device=npu",
        "--precision_mode=allow_mix_precision",
        "--train_steps=2",
        "--log_every=1",
        *flags,
    )
    variables["PYTHONPATH"] = str(npu_probe.ADAPTER)
    return contract.run(command, **variables)


def test_trains_on_one_npu(
    model_folder: Path, sample_data: str, tmp_path: Path
) -> None:
    """Opened, scaled, trained, evaluated and saved, without a fall-back."""
    process = train_on_npu(model_folder, tmp_path / "run", sample_data)
    assert process.returncode == 0, process.stdout + process.stderr
    result = contract.result(tmp_path / "run")
    assert result["device"] == "npu"
    assert result["step"] == 2 and result["metric"] is not None
    assert (tmp_path / "run" / "weights.npz").exists()


def test_trains_as_one_of_eight_npus(
    model_folder: Path, sample_data: str, tmp_path: Path
) -> None:
    """A rank goes through all steps, and leaves the writing to rank 0."""
    table = tmp_path / "ranks.json"
    npu_probe.write_rank_table(table)
    process = train_on_npu(
        model_folder,
        tmp_path / "run",
        sample_data,
        "--batch_size=1",
        "--exec_mode=train",
        RANK_TABLE_FILE=os.fspath(table),
        RANK_SIZE="8",
        RANK_ID="5",
        ASCEND_DEVICE_ID="5",
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert not (tmp_path / "run").exists()
