"""The models under contract, and one small run of each that tests share."""

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
