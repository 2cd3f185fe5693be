"""The ModelZoo scripts of every model: options, logs, failures, ranks.

Most tests put a stand-in for train.py under a copy of the scripts: they are
about the scripts, and training takes long. test_contract_ranks.py has the
scripts train on two ranks.
"""

import json
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ci import contract

ONE_DEVICE = ("train_full_1p.sh", "train_performance_1p.sh")
EIGHT_DEVICES = ("train_full_8p.sh", "train_performance_8p.sh")
SUFFIXES = {
    "train_full_1p.sh": "acc",
    "train_performance_1p.sh": "perf",
    "train_full_8p.sh": "acc",
    "train_performance_8p.sh": "perf",
}
KEYS = (
    "Network RankSize BatchSize DeviceType CaseName ActualFPS TrainingTime "
    "TrainAccuracy ActualLoss E2ETrainingTime"
).split()
# To the letter: the ModelZoo greps for these very lines.
FINAL_BLOCK = re.compile(
    r"-{18} Final result -{18}\n"
    r"Final Performance images/sec : (?P<speed>[\d.]*)\n"
    r"Final Performance sec/step : (?P<step>[\d.]*)\n"
    r"Final Train Accuracy : (?P<accuracy>[\d.]*)\n"
    r"E2E Training Duration sec : (?P<duration>\d+)\n"
)
# Notes how it was called and leaves what a run leaves. --act=fail:RANK lets
# that rank fail and the others hang, --act=save lets it wait for SIGTERM.
STAND_IN = """
import json, os, signal, sys, time

given = dict(
    (part[2:].split("=", 1) + [None])[:2] for part in sys.argv[1:]
)
rank = os.environ.get("HOROVOD_RANK") or os.environ["CASE_RANK"]
run = given["output_path"]
os.makedirs(run, exist_ok=True)
with open(os.path.join(run, f"seen_{rank}.json"), "w") as file:
    json.dump({"given": given, "environment": dict(os.environ)}, file)
print(f"rank {rank} starts", flush=True)
act, _, who = (given.get("act") or "").partition(":")
if act == "fail":
    if rank != who:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(300)
    print("step 1/2\\nerror: the disk is full", file=sys.stderr)
    sys.exit(3)
if act == "save":
    def save(*_):
        time.sleep(1)
        print("error: stopped, saved", file=sys.stderr)
        sys.exit(143)
    signal.signal(signal.SIGTERM, save)
    open(os.path.join(run, "ready"), "w").close()
    time.sleep(300)
with open(os.path.join(run, "metrics.jsonl"), "w") as file:
    for step, loss in ((1, 1.5), (2, 0.25)):
        file.write(json.dumps({"step": step, "total_loss": loss}) + "\\n")
    file.write(json.dumps({"step": 2, "evaluation": {"dice": 0.5}}) + "\\n")
with open(os.path.join(run, "result.json"), "w") as file:
    batch = int(given["batch_size"])
    json.dump({"batch_size": batch, "metric": 0.5, "seconds_per_step": 0.5,
               "images_per_second": 2.0 * batch}, file)
"""


@pytest.fixture
def scripts(model_folder: Path, tmp_path: Path) -> Path:
    """The test folder of a model over a stand-in, in a path with a space."""
    return over_stand_in(model_folder, tmp_path)


def over_stand_in(model_folder: Path, tmp_path: Path) -> Path:
    """Copies the scripts of a model and puts a stand-in beside them."""
    room = tmp_path / "a zoo" / model_folder.name
    shutil.copytree(
        model_folder / "test",
        room / "test",
        ignore=shutil.ignore_patterns("output", "goldens", "test_*.py"),
    )
    shutil.copytree(model_folder / "configs", room / "configs")
    (room / "train.py").write_text(STAND_IN)
    return room / "test"


def call(
    scripts: Path, name: str, *options: str, **variables: str
) -> subprocess.CompletedProcess:
    """Runs a script from a folder that is not its own."""
    # A stand-in answers at once; a minute is for 8 starts of Python.
    return contract.run(
        ["bash", scripts / name, *options],
        # So that a script that relies on its own folder fails.
        cwd=scripts.parent.parent,
        timeout=60,
        **variables,
    )


def seen(folder: Path, rank: int = 0) -> dict:
    """What the stand-in noted in a run folder."""
    return json.loads((folder / f"seen_{rank}.json").read_text())


@pytest.mark.parametrize("name", ONE_DEVICE)
def test_both_option_forms_mean_the_same(scripts: Path, name: str) -> None:
    """`--key=value` and `--key value` give train.py the same flags."""
    flags = {
        "data_path": "some data",
        "precision_mode": "force_fp32",
        "batch_size": "4",
        "train_steps": "7",
        "over_dump": "False",
        # A value that begins with a dash is no option.
        "learning_rate": "-1",
    }
    options = [f"--{key}={value}" for key, value in flags.items()]
    assert call(scripts, name, *options).returncode == 0
    by_equals = seen(scripts / "output" / "0")["given"]
    options = [part for key in flags for part in (f"--{key}", flags[key])]
    assert call(scripts, name, *options, "--overwrite").returncode == 0
    by_space = seen(scripts / "output" / "0")["given"]
    # A flag at the end, where no value can follow.
    assert by_space.pop("overwrite") is None
    assert by_space == by_equals
    assert flags.items() <= by_equals.items()


@pytest.mark.parametrize("name", SUFFIXES)
def test_help_exits_with_zero(scripts: Path, name: str) -> None:
    """Help names the options, and starts and writes nothing."""
    process = call(scripts, name, "--help")
    assert process.returncode == 0
    assert "--data_path" in process.stdout
    assert not (scripts / "output").exists()


@pytest.mark.parametrize("name", ONE_DEVICE)
def test_logs_of_one_device(scripts: Path, name: str) -> None:
    """Exact content, since the ModelZoo reads these files by program."""
    # An earlier case must not be mistaken for this one.
    stale = scripts / "output" / "0" / "stale"
    stale.mkdir(parents=True)
    process = call(scripts, name, "--batch_size=4")
    assert process.returncode == 0, process.stderr
    folder = stale.parent
    assert not stale.exists()
    case = f"{scripts.parent.name}_bs4_1p_{SUFFIXES[name]}"
    values = contract.case_log(folder)
    assert list(values) == KEYS
    # The only figure that the stand-in cannot fix beforehand.
    assert re.fullmatch(r"\d+", values.pop("E2ETrainingTime"))
    assert values == {
        "Network": scripts.parent.name,
        "RankSize": "1",
        "BatchSize": "4",
        "DeviceType": platform.machine(),
        "CaseName": case,
        "ActualFPS": "8.0000",
        "TrainingTime": "500.00",
        "TrainAccuracy": "0.5000",
        "ActualLoss": "0.250000",
    }
    losses = (folder / f"train_{case}_loss.txt").read_text()
    assert losses == "1.500000\n0.250000\n"
    assert (folder / "train_0.log").read_text() == "rank 0 starts\n"
    assert "rank 0 starts" in process.stdout
    block = FINAL_BLOCK.search(process.stdout)
    assert block["speed"] == values["ActualFPS"]
    assert block["step"] == "0.5000"
    assert block["accuracy"] == values["TrainAccuracy"]


def test_device_and_output_path(scripts: Path, tmp_path: Path) -> None:
    """Logs go by device even where the run folder lies elsewhere."""
    run = tmp_path / "my run"
    process = call(
        scripts,
        "train_full_1p.sh",
        f"--output_path={run}",
        ASCEND_DEVICE_ID="3",
    )
    assert process.returncode == 0, process.stderr
    assert seen(run)["environment"]["ASCEND_DEVICE_ID"] == "3"
    assert seen(run)["environment"]["RANK_SIZE"] == "1"
    assert (scripts / "output" / "3" / "train_3.log").exists()
    assert (
        contract.case_log(scripts / "output" / "3")["ActualLoss"] == "0.250000"
    )
    # The number becomes a folder name, and that folder is removed.
    process = call(scripts, "train_full_1p.sh", ASCEND_DEVICE_ID="../..")
    assert process.returncode == 1
    assert "ASCEND_DEVICE_ID" in process.stderr


def test_older_spellings(scripts: Path) -> None:
    """Command lines of older scripts work; what has no use is dropped."""
    process = call(
        scripts,
        "train_performance_1p.sh",
        *"--data_dir=d --max_steps 9 --ckpt_path=c --autotune=False".split(),
        *"--Rank_Size=1 --model_dir=run --over_dump=True".split(),
        *"--data_dump_flag True --data_dump_step=10 --profiling=True".split(),
    )
    assert process.returncode == 0, process.stderr
    given = seen(scripts.parent.parent / "run")["given"]
    assert given["data_path"] == "d"
    assert given["train_steps"] == "9"
    assert given["init_checkpoint"] == "c"
    # A dump needs a path; older scripts never gave one.
    for name in ("over_dump_path", "data_dump_path", "profiling_dump_path"):
        assert given[name].startswith(str(scripts / "output" / "0")), name
    assert not {"data_dir", "autotune", "Rank_Size"} & set(given)


def test_failed_training(scripts: Path) -> None:
    """The script ends as training did, with empty figures in the log."""
    process = call(scripts, "train_performance_1p.sh", "--act=fail:0")
    assert process.returncode == 3
    assert "error: the disk is full" in process.stderr.splitlines()[-1]
    block = FINAL_BLOCK.search(process.stdout)
    assert block["speed"] == block["accuracy"] == ""
    values = contract.case_log(scripts / "output" / "0")
    assert list(values) == KEYS
    assert values["ActualFPS"] == values["TrainAccuracy"] == ""
    assert values["RankSize"] == "1"


def test_old_result_is_no_success(scripts: Path, tmp_path: Path) -> None:
    """A failure never reports the figures of the run before it."""
    options = ("train_full_1p.sh", f"--output_path={tmp_path / 'run'}")
    # The same run folder twice: result.json of the first stays.
    assert call(scripts, *options).returncode == 0
    assert call(scripts, *options, "--act=fail:0").returncode == 3
    assert contract.case_log(scripts / "output" / "0")["ActualFPS"] == ""


def test_a_start_that_fails_loses_no_run(scripts: Path) -> None:
    """The newest run with checkpoints is kept aside, however often."""
    finished = scripts / "output" / "0" / "ckpt" / "weights"
    finished.parent.mkdir(parents=True)
    finished.write_text("learned for hours")
    for _ in range(2):
        assert call(scripts, "train_full_1p.sh", "--act=fail:0").returncode
    kept = scripts / "output" / "0.previous" / "ckpt" / "weights"
    assert kept.read_text() == "learned for hours"
    assert not finished.exists()


def test_sigterm_reaches_training(scripts: Path) -> None:
    """Training saves and ends with 143, and the results are printed."""
    # A signal before the handler is set would test nothing.
    ready = scripts / "output" / "0" / "ready"
    process = contract.stop_when(
        ["bash", scripts / "train_full_1p.sh", "--act=save"],
        ready.exists,
        signal.SIGTERM,
    )
    assert process.returncode == 143
    assert "stopped, saved" in process.stderr
    assert FINAL_BLOCK.search(process.stdout)


@pytest.mark.parametrize(
    "option", ["--rank_size=0", "--rank_size=many", "data", "--autotune=True"]
)
def test_bad_option_is_named(scripts: Path, option: str) -> None:
    """One line on stderr repeats the option; the status is 1."""
    process = call(scripts, "train_full_1p.sh", option)
    assert process.returncode == 1
    assert option in process.stderr
    assert len(process.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", EIGHT_DEVICES)
def test_eight_npus(scripts: Path, name: str) -> None:
    """Each rank gets its number, device, table and log; speeds add up."""
    process = call(scripts, name, "--device=npu")
    assert process.returncode == 0, process.stderr
    # The table in configs/ has example addresses.
    assert "must be replaced" in process.stdout
    table = scripts.parent / "configs" / "rank_table_8p.json"
    for rank in range(8):
        variables = seen(scripts / "output" / "0", rank)["environment"]
        assert variables["RANK_ID"] == str(rank)
        assert variables["ASCEND_DEVICE_ID"] == str(rank)
        assert variables["RANK_SIZE"] == "8"
        assert variables["RANK_TABLE_FILE"] == str(table)
        log = scripts / "output" / str(rank) / f"train_{rank}.log"
        assert log.read_text() == f"rank {rank} starts\n"
    values = contract.case_log(scripts / "output" / "0")
    assert values["RankSize"] == "8"
    batch = int(values["BatchSize"])
    assert values["CaseName"].endswith(f"_bs{batch}_8p_{SUFFIXES[name]}")
    # ActualFPS counts the pictures of all ranks.
    milliseconds = batch * 8 * 1000 / float(values["ActualFPS"])
    assert values["TrainingTime"] == f"{milliseconds:.2f}"


def test_npus_without_a_rank_table(scripts: Path) -> None:
    """Beside CM_ variables no RANK_ variable is set: HCCL refuses that."""
    process = call(
        scripts,
        "train_full_8p.sh",
        *"--device npu --rank_size 2".split(),
        CM_CHIEF_IP="10.0.0.1",
    )
    assert process.returncode == 0, process.stderr
    variables = seen(scripts / "output" / "0", 1)["environment"]
    assert variables["CM_WORKER_SIZE"] == "2"
    assert not {"RANK_SIZE", "RANK_ID", "RANK_TABLE_FILE"} & set(variables)


@pytest.mark.parametrize("device", ["npu", "cpu"])
def test_a_dead_rank_ends_the_job(tmp_path: Path, device: str) -> None:
    """The others are killed, and the last line says who died of what."""
    if device == "cpu":
        pytest.importorskip("horovod")
    # One model will do: run_case.sh, which sees to it after some seconds, is
    # the same in all.
    scripts = over_stand_in(contract.model_folders()[0], tmp_path)
    begin = time.monotonic()
    process = call(
        scripts,
        "train_performance_8p.sh",
        f"--device={device}",
        "--rank_size=2",
        "--act=fail:1",
    )
    assert process.returncode == 3
    # The rank that is left ignores SIGTERM and sleeps 300 seconds.
    assert time.monotonic() - begin < 45
    last = process.stderr.splitlines()[-1]
    assert "rank 1" in last
    assert "the disk is full" in last
    assert FINAL_BLOCK.search(process.stdout)


def test_trains_for_real(copied_room: Path) -> None:
    """The log repeats the figures of the run; two ranks have a test too."""
    process = contract.run(
        [
            "bash",
            copied_room / "test" / "train_full_1p.sh",
            *contract.small(copied_room),
            *contract.PLAIN,
            "--train_steps=5",
            "--log_every",
            "1",
        ],
        cwd=copied_room.parent,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert "sample data" in process.stdout
    contract.check_case(copied_room / "test" / "output" / "0", 5, 1)


def test_refused_flag_fails_the_script(copied_room: Path) -> None:
    """A flag that train.py refuses is told last, without a traceback."""
    process = contract.run(
        [
            "bash",
            copied_room / "test" / "train_performance_1p.sh",
            "--no_such_flag=1",
        ],
        cwd=copied_room / "test",
    )
    assert process.returncode == 2
    assert "no_such_flag" in process.stderr.splitlines()[-1]
    assert FINAL_BLOCK.search(process.stdout)
    assert sys.executable not in process.stderr
