"""The models under contract, and one small run of each that tests share."""

import shutil
from pathlib import Path

import pytest

from ci import contract


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs every test that asks for `model_folder` once per model."""
    if "model_folder" in metafunc.fixturenames:
        # Found, not listed: a new model is under contract at once.
        folders = contract.model_folders()
        metafunc.parametrize(
            "model_folder",
            folders,
            ids=[folder.name for folder in folders],
            scope="session",
        )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests of one model together, after those of none."""
    # pytest's own order comes back to a model again and again in some
    # versions, and makes its runs anew each time.
    items.sort(key=_model_of)


def _model_of(item: pytest.Item) -> str:
    """The model that a test is about; rooms' own tests keep their place."""
    parameters = getattr(item, "callspec", None)
    folder = parameters and parameters.params.get("model_folder")
    return folder.name if folder else ""


@pytest.fixture(scope="session")
def tiny_run(
    model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run on sample data, in a path with a space.

    Tests read it or copy it; none may write into it.
    """
    output = tmp_path_factory.mktemp("a run") / model_folder.name
    process = contract.train(model_folder, output, *contract.LONG)
    assert process.returncode == 0, process.stdout + process.stderr
    # Kept, because the run is shared and its process is gone.
    (output / "console.txt").write_text(process.stdout + process.stderr)
    return output


@pytest.fixture(scope="session")
def sample_data(tiny_run: Path) -> str:
    """The flag for the data that the tiny run has drawn."""
    return f"--data_path={tiny_run / 'sample_data'}"


@pytest.fixture(scope="session")
def copied_room(
    model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model folder copied out with common/, in a path with a space."""
    root = tmp_path_factory.mktemp("copied out")
    # What a user copies; another model must not be needed.
    for folder in (model_folder, contract.REPOSITORY / "common"):
        shutil.copytree(
            folder,
            root / folder.name,
            ignore=shutil.ignore_patterns("output", "goldens", "__pycache__"),
        )
    return root / model_folder.name
