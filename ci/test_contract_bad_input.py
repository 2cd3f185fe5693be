"""Mistakes of a user's: one line, exit status 1, nothing written."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ci import contract

# What each mistake's one line must mention.
MISTAKES = {
    # With the layout that it should have.
    "missing data folder": "no such data: no such folder; expected ",
    "empty data folder": "empty data",
    "batch larger than the data": "--batch_size",
    "enum value": "exec_mode",
    "precision mode": "precision_mode",
    "not a number": "batch_size",
    "pickled objects": "pickled.npz",
    "another network": "other network",
    "missing weights": "no such weights",
    "another model's run": "AnotherModel",
    "output below a file": "a file",
    "stray argument": "stray",
}


class Boom:
    """Leaves a trace if somebody unpickles it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.trace),))


def save_other_network(prefix: Path) -> None:
    """Writes a TF1 checkpoint with a variable that no model here has."""
    # Only here, as the import takes seconds.
    import tensorflow as tf

    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=["tower/weights"],
        shape_and_slices=[""],
        tensors=[tf.zeros([3, 3])],
    )


def mistaken_flags(folder: Path) -> dict[str, list[str]]:
    """The flags of each mistake; what they name is made in `folder`."""
    (folder / "empty data").mkdir()
    (folder / "a file").write_text("")
    # Loading it would run code of whoever made the file.
    pickled = np.empty(1, object)
    pickled[0] = Boom(folder / "unpickled")
    np.savez(folder / "pickled.npz", **{"conv2d/kernel": pickled})
    save_other_network(folder / "other network")
    return {
        "missing data folder": [f"--data_path={folder / 'no such data'}"],
        "empty data folder": [f"--data_path={folder / 'empty data'}"],
        # So large that no set of sample data can fill it.
        "batch larger than the data": ["--batch_size=100000"],
        "enum value": ["--exec_mode=dance"],
        "precision mode": ["--precision_mode=fp64"],
        "not a number": ["--batch_size=two"],
        "pickled objects": [f"--init_checkpoint={folder / 'pickled.npz'}"],
        "another network": [f"--init_checkpoint={folder / 'other network'}"],
        "missing weights": [f"--init_checkpoint={folder / 'no such weights'}"],
        "another model's run": [],
        "output below a file": [f"--output_path={folder / 'a file' / 'run'}"],
        "stray argument": ["stray"],
    }


def copy_run(tiny_run: Path, output: Path, mistake: str) -> None:
    """Copies a finished run; for one mistake it is another model's."""
    shutil.copytree(tiny_run, output)
    if mistake == "another model's run":
        path = output / "flags.json"
        values = json.loads(path.read_text())
        path.write_text(json.dumps({**values, "model": "AnotherModel"}))


@pytest.fixture(scope="session")
def attempts(
    model_folder: Path,
    tiny_run: Path,
    sample_data: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[subprocess.CompletedProcess, set[str]]]:
    """How each mistake ended, and the files that it changed in a run."""
    folder = tmp_path_factory.mktemp("mistakes")

    def attempt(
        mistake: str, flags: list[str]
    ) -> tuple[subprocess.CompletedProcess, set[str]]:
        """Returns how training ended, and what it changed in the run."""
        output = folder / f"run {mistake}"
        # A run each, so that a mistake cannot hide behind another.
        copy_run(tiny_run, output, mistake)
        if "--init_checkpoint" in "".join(flags):
            # Initial weights only matter to a run that begins.
            shutil.rmtree(output / "ckpt")
        before = contract.tree(output)
        process = contract.train(
            model_folder, output, sample_data, "--train_steps=40", *flags
        )
        after = contract.tree(output)
        return process, set(before.items()) ^ set(after.items())

    flags = mistaken_flags(folder)
    # A mistake with no message to expect would go untested.
    assert set(flags) == set(MISTAKES)
    attempts = {name: attempt(name, own) for name, own in flags.items()}
    assert not (folder / "unpickled").exists()
    return attempts


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line(
    attempts: dict[str, tuple[subprocess.CompletedProcess, set[str]]],
    mistake: str,
) -> None:
    """The line names the mistake, and the run folder keeps every byte."""
    process, changed = attempts[mistake]
    assert MISTAKES[mistake] in contract.error_line(process)
    assert not changed


def test_unknown_flag_is_refused(model_folder: Path) -> None:
    """A misspelt flag ends every script with status 2; none ignores it."""
    for script in ("train", "evaluate", "predict", "export", "sample_data"):
        process = contract.run(
            [sys.executable, model_folder / f"{script}.py", "--batch_sise=2"]
        )
        assert "batch_sise" in contract.error_line(process, 2)


@pytest.mark.parametrize(
    ("script", "flags", "told"),
    [
        ("evaluate", "--run=nowhere", "nowhere"),
        (
            "predict",
            "--run=nowhere --input={run}/images --output={out}",
            "nowhere",
        ),
        ("predict", "--run={run} --input=none.png --output={out}", "none.png"),
        ("export", "--run={run} --output={out} --formats=exe", "exe"),
        ("sample_data", "--output={out} --count=none", "count"),
    ],
)
def test_mistake_in_a_tool_is_one_line(
    model_folder: Path,
    tiny_run: Path,
    tmp_path: Path,
    script: str,
    flags: str,
    told: str,
) -> None:
    """The line names the mistake, and no output folder is begun."""
    output = tmp_path / "out"
    before = contract.tree(tiny_run)
    process = contract.run(
        [sys.executable, model_folder / f"{script}.py"]
        + [part.format(run=tiny_run, out=output) for part in flags.split()]
    )
    assert told in contract.error_line(process)
    assert contract.tree(tiny_run) == before
    assert not output.exists()


def test_full_memory_names_what_saves_some(
    model_folder: Path, tmp_path: Path
) -> None:
    """One line, and the flags that it names are flags of train.py."""
    script = tmp_path / "full.py"
    # Really filling the memory would take the machine along.
    script.write_text(
        "import tensorflow as tf\n"
        f"from {model_folder.name}.launch import launch\n"
        "def main():\n"
        "    raise tf.errors.ResourceExhaustedError(None, None, 'OOM')\n"
        "launch(main)\n"
    )
    process = contract.run(
        [sys.executable, script], PYTHONPATH=str(contract.REPOSITORY)
    )
    told = contract.error_line(process)
    assert "out of memory" in told
    named = re.findall(r"--(\w+)", told)
    assert "batch_size" in named
    train = contract.run(
        [sys.executable, model_folder / "train.py", "--helpfull"]
    )
    for name in named:
        assert f"--{name}:" in train.stdout, name
