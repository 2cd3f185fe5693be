"""evaluate.py, predict.py, export.py and sample_data.py on a finished run."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ci import contract

FORMATS = ["savedmodel", "pb", "tflite"]
if importlib.util.find_spec("tf2onnx"):
    FORMATS.append("onnx")


def tool(
    model_folder: Path, script: str, *flags: str, plain: bool = True
) -> str:
    """Runs a tool that must succeed; returns what it printed."""
    process = contract.run(
        [
            sys.executable,
            model_folder / f"{script}.py",
            # sample_data.py computes nothing and has no --device.
            *(contract.PLAIN if plain else ()),
            *flags,
        ]
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_evaluate_repeats_the_best_figure(
    model_folder: Path, tiny_run: Path, tmp_path: Path
) -> None:
    """The best weights give the figure again that training has logged."""
    tool(
        model_folder,
        "evaluate",
        f"--run={tiny_run}",
        f"--output_path={tmp_path / 'a result'}",
    )
    name = contract.result(tiny_run)["metric_name"]
    best = max(
        line["evaluation"][name]
        for line in contract.metrics(tiny_run)
        if "evaluation" in line
    )
    table = json.loads((tmp_path / "a result" / "metrics.json").read_text())
    # Another process may sum in another order.
    assert table[name] == pytest.approx(best, abs=1e-5)
    assert list((tmp_path / "a result").rglob("*.png"))


def test_predict_keeps_the_size_of_pictures(
    model_folder: Path, tiny_run: Path, tmp_path: Path
) -> None:
    """Masks and overlays fit the pictures, in pixels, whatever the network."""
    pictures = tmp_path / "my pictures"
    pictures.mkdir()
    rng = np.random.RandomState(0)
    # Wide and tall, no multiples: swapped or rounded sides show.
    for name, size in (("wide.png", (231, 120)), ("tall.jpg", (97, 260))):
        pixels = rng.randint(0, 255, (size[1], size[0]), np.uint8)
        Image.fromarray(pixels).save(pictures / name)
    output = tmp_path / "masks"
    tool(
        model_folder,
        "predict",
        f"--run={tiny_run}",
        f"--input={pictures}",
        f"--output={output}",
    )
    for name, size in (("wide", (231, 120)), ("tall", (97, 260))):
        written = list(output.rglob(f"*{name}*"))
        assert len(written) >= 2, "a mask and an overlay"
        for path in written:
            with Image.open(path) as picture:
                assert picture.size == size, path
    # With --output the run is left as it is.
    assert not (tiny_run / "predictions").exists()


def test_sample_data(model_folder: Path, tmp_path: Path) -> None:
    """Drawn twice, the data are the same, byte for byte."""
    for name in ("one", "two"):
        output = f"--output={tmp_path / name}"
        tool(model_folder, "sample_data", output, "--count=5", plain=False)
    drawn = contract.tree(tmp_path / "one")
    assert drawn
    assert drawn == contract.tree(tmp_path / "two")


@pytest.fixture(scope="session")
def exports(
    model_folder: Path,
    tiny_run: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder with all exports of the tiny run, and what was printed."""
    output = tmp_path_factory.mktemp("some exports") / "export"
    printed = tool(
        model_folder,
        "export",
        f"--run={tiny_run}",
        f"--output={output}",
        f"--formats={','.join(FORMATS)}",
    )
    (output / "console.txt").write_text(printed)
    return output


def test_export_tells_differences(exports: Path) -> None:
    """A line per format ends in its error; the command for NPUs is told."""
    console = (exports / "console.txt").read_text()
    for name in FORMATS:
        (line,) = (
            line for line in console.splitlines() if line.startswith(name)
        )
        assert float(line.split()[-1]) <= 1e-5
    assert "atc --model=" in console


def test_exports_agree(exports: Path) -> None:
    """Loads each export afresh, in a process that knows no model here."""
    process = contract.run(
        [
            sys.executable,
            contract.REPOSITORY / "ci" / "run_exports.py",
            exports,
        ]
    )
    assert process.returncode == 0, process.stderr
    differences = json.loads(process.stdout.splitlines()[-1])
    assert sorted(differences) == sorted(FORMATS)
    # Float32 through another runtime: rounding, and no more.
    assert max(differences.values()) <= 1e-5


def test_long_work_tells_how_much_is_left(
    model_folder: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A line every few seconds, from one rank, and none for short work."""
    progress = importlib.import_module(f"{model_folder.name}.progress")
    watched = progress.watched
    assert list(watched("abcd", 4, "reading")) == list("abcd")
    assert capsys.readouterr().out == ""
    # Each look at this clock is ten seconds after the last one.
    monkeypatch.setattr(
        progress.time, "perf_counter", itertools.count(0.0, 10.0).__next__
    )
    list(watched("abcd", 4, "reading", rank=1))
    assert capsys.readouterr().out == ""
    list(watched("abcd", 4, "reading"))
    # The first picture's time, with tracing in it, foretells nothing.
    assert capsys.readouterr().out.splitlines()[:2] == [
        "reading 2/4  left 0:20",
        "reading 3/4  left 0:10",
    ]


def test_sheet_shows_the_whole_split(model_folder: Path) -> None:
    """The rows are spread over all pictures, or are all of a few."""
    evaluate = importlib.import_module(f"{model_folder.name}.evaluate")
    assert sorted(evaluate.evenly(101)) == [0, 20, 40, 60, 80, 100]
    assert evaluate.evenly(3) == {0, 1, 2}
