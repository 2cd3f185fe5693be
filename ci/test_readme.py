"""Runs the commands of the READMEs, block by block, in a copy of the tree.

Every ```bash block is run from the repository's root, unless the line before
it is `<!-- not run: REASON -->`. The blocks of one README follow each other in
one copy, as they do for a reader.
"""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import tensorflow as tf

from ci import contract

BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n+)?```bash\n(?P<text>.*?)^```",
    re.MULTILINE | re.DOTALL,
)
READMES = [
    contract.REPOSITORY / "README.md",
    *(folder / "README.md" for folder in contract.model_folders()),
    *sorted(contract.REPOSITORY.glob("docs/*.md")),
]


def blocks(text: str) -> list[str]:
    """The bash blocks of a README that are to be run."""
    return [
        match["text"]
        for match in BLOCK.finditer(text)
        if match["reason"] is None
    ]


def test_blocks_are_found() -> None:
    """Only bash blocks are run, and none that is marked as not run."""
    text = (
        "```bash\nls\npwd\n```\ntext\n<!-- not run: needs an NPU -->\n"
        "```bash\nnpu-smi\n```\n```text\nls: no\n```\n```bash\nwho\n```\n"
    )
    assert blocks(text) == ["ls\npwd\n", "who\n"]


@pytest.mark.parametrize(
    "readme",
    sorted(
        path.with_suffix(".zh-CN.md")
        for path in READMES
        if path.with_suffix(".zh-CN.md").exists()
    ),
    ids=lambda path: path.parent.name,
)
def test_chinese_commands_are_the_english_ones(readme: Path) -> None:
    """Those that run are tested in English; the others are equal as well."""
    english = (readme.parent / "README.md").read_text()
    commands = [match[0] for match in BLOCK.finditer(readme.read_text())]
    assert commands
    assert commands == [match[0] for match in BLOCK.finditer(english)]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the repository with its environments, to work in."""
    copy = tmp_path / "checkout"
    shutil.copytree(
        contract.REPOSITORY,
        copy,
        # What a reader has made already would be in the commands' way.
        ignore=shutil.ignore_patterns(
            ".*", "output", "runs", "data", "__pycache__"
        ),
    )
    environments = contract.REPOSITORY / ".venv"
    if environments.exists():
        # A link, because installing anew takes minutes.
        (copy / ".venv").symlink_to(environments)
    return copy


@pytest.mark.skipif(
    not tf.__version__.startswith("2.18."),
    reason="the READMEs are written for the default lane",
)
@pytest.mark.parametrize(
    "readme",
    READMES,
    ids=[str(path.relative_to(contract.REPOSITORY)) for path in READMES],
)
def test_commands_of_a_readme(readme: Path, checkout: Path) -> None:
    """A reader's commands work in order, from a fresh checkout."""
    # `python` in a README is the one that runs the tests.
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for text in blocks(readme.read_text()):
        # As strict as a script, so that no failed line is passed over.
        process = contract.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=checkout,
            timeout=600,
            PATH=binaries,
        )
        # The ends, because an error comes after much progress.
        told = f"{text}\n{process.stdout[-4000:]}\n{process.stderr[-4000:]}"
        assert process.returncode == 0, told


def test_promises_name_tests_that_exist() -> None:
    """docs/promises.md points at files and tests, all of them there."""
    text = (contract.REPOSITORY / "docs" / "promises.md").read_text()
    named = re.findall(r"`(\w+/[\w./]+?)(?:::(\w+))?`", text)
    assert len(named) > 30
    for path, test in named:
        place = contract.REPOSITORY / path
        assert place.exists(), path
        assert not test or f"def {test}(" in place.read_text(), test
