"""Settings of every test: imports from the repository, golden files."""

import sys
from pathlib import Path
from typing import Callable

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --goldens=DIR."""
    parser.addoption(
        "--goldens",
        metavar="DIR",
        help="folder of golden*.npz files; default: each model's own",
    )


@pytest.fixture(scope="module")
def goldens(request: pytest.FixtureRequest) -> Path:
    """The folder of golden files that belongs to the test's module."""
    folder = request.config.getoption("--goldens")
    return Path(folder) if folder else request.path.parent / "goldens"


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> Callable[[list], list]:
    """Passes golden files on; no test may pass because there are none.

    A folder given by hand may hold one kind only; a model's own holds all.
    """

    def check(files: list) -> list:
        if not files and request.config.getoption("--goldens"):
            pytest.skip("no golden files of this kind in --goldens")
        assert files, "golden files of this kind are missing"
        return files

    return check
