"""The double of npu_device refuses what the adapter refuses."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ci import npu_probe

# Messages as the adapter words them, so that the double stays one.
REFUSED_OPTIONS = [
    ("auto_tune_mode", "RL,GA", ValueError, "NpuConfig has no option"),
    ("precision_mode", "fp16", ValueError, "'fp16' not in optional list"),
    ("precision_mode", None, ValueError, "'None' not in optional list"),
    ("deterministic", "1", TypeError, "Expected int, got str"),
    ("hcom_parallel", "True", TypeError, "Expected bool, got str"),
    ("oo_level", "O4", ValueError, "'O4' not in optional list"),
]


@pytest.fixture(name="npu")
def fresh_double(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The double, imported for one test and forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(npu_probe.ADAPTER))
    yield importlib.import_module("npu_device")
    # The double keeps its device in modules: the next test needs a
    # new process, or what looks like one.
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("npu_device", "hccl"):
            del sys.modules[name]


@pytest.mark.parametrize(("name", "value", "kind", "message"), REFUSED_OPTIONS)
def test_options_are_strict(
    name: str, value: object, kind: type, message: str, npu: ModuleType
) -> None:
    """An unknown name, type or value fails at the assignment itself."""
    with pytest.raises(kind, match="^" + message.replace("(", r"\(")):
        setattr(npu.global_options(), name, value)


def test_options_as_the_engine_reads_them(npu: ModuleType, capsys) -> None:
    """Values become strings, and a deprecated option is told."""
    options = npu.global_options()
    # Pins the defaults: an option added by mistake shows here.
    assert len(options.as_dict()) == 34
    options.dump_config.enable_dump = 1
    assert options.dump_config.enable_dump.value == "1"
    options.hcom_parallel = False
    assert options.hcom_parallel.value == "0"
    assert options.precision_mode.value is None
    options.op_debug_level = 2
    assert options.as_dict()["op_debug_level"] == "2"
    assert "Option 'op_debug_level' is deprecated" in capsys.readouterr().out
    with pytest.raises(ValueError, match="^NpuDumpConfig has no option steps"):
        options.dump_config.steps = "10"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK_SIZE": "8", "CM_WORKER_SIZE": "8"}, "RANK_SIZE and CM_WORKER"),
        ({"RANK_SIZE": "8"}, "are all not be configured"),
        (
            {"RANK_SIZE": "8", "RANK_TABLE_FILE": "t", "CM_CHIEF_IP": "i"},
            "cannot be configured at the same time",
        ),
        ({"RANK_SIZE": "8", "RANK_TABLE_FILE": "t"}, "rank id by set env"),
        ({"CM_WORKER_SIZE": "8", "CM_CHIEF_IP": "i"}, "env CM_CHIEF_PORT"),
        (
            {"RANK_SIZE": "8", "RANK_TABLE_FILE": "t", "RANK_ID": "0"},
            "EI0004",
        ),
    ],
)
def test_open_needs_a_whole_cluster(
    environment: dict, message: str, npu: ModuleType, monkeypatch
) -> None:
    """Half a cluster's environment is refused, as the adapter does."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((RuntimeError, ValueError), match=message):
        npu.open()


def test_open_is_for_one_device(npu: ModuleType) -> None:
    """A process keeps its first device, and its options as they were."""
    handle = npu.open(3)
    assert npu.open(3) is handle
    assert handle.name().endswith("device:NPU:3")
    with pytest.raises(RuntimeError, match=r"device 4 as existed .* \[3\]"):
        npu.open(4)
    # An open device has its options: a later one has no effect.
    with pytest.warns(UserWarning, match="after open"):
        npu.global_options().deterministic = 1
    assert npu._opened_with["deterministic"] == "0"
    assert ("late_option", ("deterministic", 1)) in npu._calls


def test_open_checks_dumps_and_files(npu: ModuleType, tmp_path: Path) -> None:
    """Options that only CANN would refuse fail here as well."""
    options = npu.global_options()
    options.dump_config.enable_dump = True
    with pytest.raises(RuntimeError, match="^Failed open npu device 0 : "):
        npu.open()
    options.dump_config.dump_path = str(tmp_path)
    mixlist = tmp_path / "ops_info.json"
    mixlist.write_text(json.dumps({"black": {"to-add": []}}))
    options.modify_mixlist = str(mixlist)
    with pytest.raises(RuntimeError, match="keys other than"):
        npu.open()
    mixlist.write_text(json.dumps({"black-list": {"to-add": []}}))
    with pytest.warns(UserWarning, match="without mixed precision"):
        npu.open()


def test_collectives_of_a_single_device_pass_through(npu: ModuleType) -> None:
    """A lone device gets back the very list, unreduced."""
    npu.open().as_default()
    values = [1.0, None]
    assert npu.distribute.all_reduce(values) is values
    with pytest.raises(ValueError, match="reduction median"):
        npu.distribute.all_reduce(values, "median")
    assert npu.distribute.broadcast([]) is None
