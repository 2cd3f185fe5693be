"""Every model folder has the same files, and its flags mean the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ci import contract, npu_probe

FILES = (
    "LICENSE README.md README.zh-CN.md requirements.txt modelzoo_level.txt "
    "train.py evaluate.py predict.py export.py sample_data.py "
    "model.py losses.py metrics.py dataset.py weights.py run_folder.py "
    "configs/rank_table_8p.json test/small.flags test/goldens "
    "test/run_case.sh test/run_rank.sh test/report_case.py "
    "test/train_full_1p.sh test/train_performance_1p.sh "
    "test/train_full_8p.sh test/train_performance_8p.sh"
).split()
FLAGS = (
    "data_path output_path batch_size train_steps learning_rate "
    "weight_decay seed precision_mode device log_every eval_every save_every "
    "keep_checkpoints init_checkpoint overwrite num_classes ignore_label "
    "augment limit_train limit_eval check_data exec_mode warmup_steps "
    "loss_scale over_dump over_dump_path data_dump_flag data_dump_step "
    "data_dump_path profiling profiling_dump_path use_mixlist mixlist_file "
    "fusion_off_flag fusion_off_file"
).split()
# Flags whose help says what this model does: its optimiser, its augmentation.
OWN_WORDS = {"augment", "learning_rate", "weight_decay", "seed"}
# Flags of each script whose help is the same everywhere. Not --run: a model
# that ships weights can do without.
SAME_WORDS = {
    "train": set(FLAGS) - OWN_WORDS,
    "evaluate": {"data_path", "output_path", "limit_eval"},
    "predict": {"input", "output"},
    "export": {"output", "formats", "batch_size"},
}
TOOL_FLAGS = {
    "evaluate": {"run", "data_path", "output_path"},
    "predict": {"run", "input", "output"},
    "export": {"run", "output", "formats"},
    "sample_data": {"output", "count"},
}
LEVEL_KEYS = {"FuncStatus", "PerfStatus", "PrecisionStatus"}


@pytest.fixture(scope="session")
def flag_tables() -> dict[str, dict[str, dict[str, list[str]]]]:
    """Type and help of every flag of every script of every model."""
    tables = {}
    for folder in contract.model_folders():
        # In a process per model: flags of two would collide.
        process = contract.run(
            [sys.executable, npu_probe.PROBES / "list_flags.py", folder.name]
            + ["train", *TOOL_FLAGS],
            PYTHONPATH=str(contract.REPOSITORY),
        )
        assert process.returncode == 0, process.stderr
        tables[folder.name] = json.loads(process.stdout.splitlines()[-1])
    return tables


def test_has_the_same_files(model_folder: Path) -> None:
    """A user of one model finds the way in all others."""
    missing = [name for name in FILES if not (model_folder / name).exists()]
    assert not missing


def test_shared_scripts_are_the_same(model_folder: Path) -> None:
    """Copies in every folder, since each model has to work alone."""
    first = contract.model_folders()[0]
    for name in ("run_case.sh", "run_rank.sh", "report_case.py"):
        text = (model_folder / "test" / name).read_text()
        assert text == (first / "test" / name).read_text(), name


def test_shell_scripts_are_sound(model_folder: Path) -> None:
    """bash can parse them, and no line ends as on Windows."""
    for script in sorted((model_folder / "test").glob("*.sh")):
        assert b"\r" not in script.read_bytes(), script
        # -n parses only: these scripts train for hours.
        subprocess.run(["bash", "-n", script], check=True)


def test_levels_are_spelled_right(model_folder: Path) -> None:
    """The ModelZoo's keys, with values that it knows."""
    text = (model_folder / "modelzoo_level.txt").read_text()
    levels = dict(line.split(":") for line in text.splitlines())
    assert LEVEL_KEYS <= set(levels)
    assert set(levels.values()) <= {"OK", "POK", "NOK", "PERFECT"}


def test_models_do_not_import_each_other(model_folder: Path) -> None:
    """A model and common/ are all that has to be copied out."""
    others = [
        other.name
        for other in contract.model_folders()
        if other != model_folder
    ]
    for source in model_folder.rglob("*.py"):
        # By text, so that an import within a function counts too.
        for line in source.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]):
                assert words[1].split(".")[0] not in others, (
                    f"{source}: {line}"
                )


def test_takes_the_common_flags(
    model_folder: Path, flag_tables: dict[str, dict]
) -> None:
    """No model lacks a flag that the scripts and READMEs name."""
    tables = flag_tables[model_folder.name]
    assert set(FLAGS) <= set(tables["train"])
    for script, names in TOOL_FLAGS.items():
        assert names <= set(tables[script]), script


def test_a_flag_means_the_same_everywhere(
    model_folder: Path, flag_tables: dict[str, dict]
) -> None:
    """Types agree in all shared flags, help texts in the common ones."""
    for script, names in SAME_WORDS.items():
        first = flag_tables[contract.model_folders()[0].name][script]
        table = flag_tables[model_folder.name][script]
        # A flag of one model only has nothing to agree with.
        types = {name: table[name][0] for name in set(table) & set(first)}
        assert types == {name: first[name][0] for name in types}, script
        helps = {name: table[name][1] for name in names}
        assert helps == {name: first[name][1] for name in names}, script


def test_every_flag_is_explained(
    model_folder: Path, flag_tables: dict[str, dict]
) -> None:
    """More than a word of help for each flag."""
    for script, table in flag_tables[model_folder.name].items():
        for name, (_, text) in table.items():
            assert text and len(text.split()) > 1, f"{script} --{name}"


@pytest.mark.parametrize("script", ["train", *TOOL_FLAGS])
def test_help_fits_one_screen(model_folder: Path, script: str) -> None:
    """At most 45 lines of 100 columns hold the flags one needs first."""
    process = contract.run(
        [sys.executable, model_folder / f"{script}.py", "--help"]
    )
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 100
    key_flags = TOOL_FLAGS.get(script) or {
        "data_path",
        "output_path",
        "batch_size",
        "train_steps",
        "learning_rate",
        "precision_mode",
        "device",
        "seed",
    }
    for name in key_flags:
        assert f"--{name}" in process.stdout, name
