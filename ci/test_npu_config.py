"""setup() of npu_config: precision, options, one open, clear refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf

from ci import contract, npu_probe
from common import npu_config

NPU = "--device=npu"
CPU = "--device=cpu"
# Legal elsewhere, in inference, in Keras or in precision_mode_v2, or
# nearly legal: what somebody may well give by mistake.
ILLEGAL_MODES = [
    "",
    "force_fp16",
    "FORCE_FP32",
    "mixed_float16",
    "mixed_bfloat16",
    "cube_hif8",
    "fp16",
    "origin",
    "allow_mix_precision ",
    "True",
]


def test_import_opens_nothing() -> None:
    """Importing it loads no collectives and makes no TensorFlow context."""
    program = (
        "import sys; from common import npu_config; "
        "from tensorflow.python.eager import context; "
        "print('horovod' in sys.modules, 'npu_device' in sys.modules, "
        "context.context()._context_handle)"
    )
    # In a process of its own: this one has long imported TensorFlow.
    process = subprocess.run(
        [sys.executable, "-c", program],
        cwd=contract.REPOSITORY,
        env=contract.environment(PYTHONPATH=str(npu_probe.ADAPTER)),
        capture_output=True,
        text=True,
    )
    assert process.stdout.split() == ["False", "False", "None"]


def test_every_precision_mode_on_an_npu() -> None:
    """The adapter gets each mode as given; Keras stays in float32."""
    modes = list(npu_config.PRECISION_MODES)
    answers = npu_probe.ask(
        "try_setup",
        [{"flags": [NPU, f"--precision_mode={mode}"]} for mode in modes],
    )
    for mode, answer in zip(modes, answers):
        assert answer["options"]["precision_mode"] == mode
        assert answer["policy"] == "float32"
        assert mode in answer["described"]
        # The device opens once, and nothing is computed before or by it.
        assert answer["calls"] == ["open", "as_default"]
        assert not answer["had_tensors"]
        assert not answer["has_tensors"]
    # Only float16 has gradients so small that they need a scale.
    scaled = {
        mode for mode, answer in zip(modes, answers) if answer["loss_scale"]
    }
    assert scaled == {
        "allow_mix_precision",
        "allow_mix_precision_fp16",
        "allow_fp32_to_fp16",
    }


@pytest.mark.parametrize(
    ("mode", "gpu", "cpu"),
    [
        ("allow_mix_precision", "mixed_float16", "mixed_bfloat16"),
        ("allow_mix_precision_bf16", "mixed_bfloat16", "mixed_bfloat16"),
        ("allow_fp32_to_fp16", "float32", "float32"),
        ("force_fp32", "float32", "float32"),
        ("must_keep_origin_dtype", "float32", "float32"),
    ],
)
def test_precision_mode_elsewhere(
    mode: str, gpu: str, cpu: str, tmp_path: Path, monkeypatch
) -> None:
    """Each mode has one fixed Keras policy on a GPU and one on a CPU."""
    processor = tmp_path / "cpuinfo"
    # What this machine's processor can do must not decide the test.
    monkeypatch.setattr(npu_config, "CPU_INFO", processor)
    monkeypatch.setattr(npu_config.tf, "__version__", "2.15.0")
    processor.write_text("flags\t\t: fpu sse4_2 avx512_bf16 amx_bf16\n")
    assert npu_config._local_policy("gpu", mode) == (gpu, gpu)
    assert npu_config._local_policy("cpu", mode) == (cpu, cpu)


@pytest.mark.parametrize(
    ("flags", "version", "policy", "reason"),
    [
        ("fpu avx512_bf16", "2.18.1", "mixed_bfloat16", ""),
        ("fpu amx_bf16", "2.15.0", "mixed_bfloat16", ""),
        ("fpu avx512f", "2.18.1", "float32", "no native bfloat16"),
        ("fpu amx_bf16", "2.14.0", "float32", "TensorFlow 2.14.0"),
        (None, "2.18.1", "float32", "no native bfloat16"),
    ],
)
def test_cpu_takes_bfloat16_only_where_it_pays(
    flags, version, policy, reason, tmp_path: Path, monkeypatch
) -> None:
    """Without native bfloat16 a CPU computes in float32 and says why."""
    processor = tmp_path / "cpuinfo"
    if flags:
        processor.write_text(f"flags\t\t: {flags}\n")
    monkeypatch.setattr(npu_config, "CPU_INFO", processor)
    monkeypatch.setattr(npu_config.tf, "__version__", version)
    found = npu_config._local_policy("cpu", "allow_mix_precision")
    assert found[0] == policy
    assert policy in found[1] and reason in found[1]


def test_illegal_precision_modes_are_refused() -> None:
    """One line repeats the value and lists all that are legal."""
    modes = 2 * ILLEGAL_MODES
    devices = [NPU] * len(ILLEGAL_MODES) + [CPU] * len(ILLEGAL_MODES)
    cases = [
        {"flags": [device, f"--precision_mode={mode}"]}
        for device, mode in zip(devices, modes)
    ]
    for mode, answer in zip(modes, npu_probe.ask("try_setup", cases)):
        assert answer["error"].startswith(f"--precision_mode={mode}: ")
        assert "\n" not in answer["error"]
        for legal in npu_config.PRECISION_MODES:
            assert legal in answer["error"]


def options_of_flags(folder: Path) -> list[tuple[list[str], dict]]:
    """Returns command lines, and the options that the adapter gets of each.

    `folder` holds a mixlist and a fusion switch file.
    """
    dump = str(folder / "a b" / "dump")
    mixlist = str(folder / "ops_info.json")
    fusion = str(folder / "fusion_switch.cfg")
    return [
        (
            ["--over_dump=True", f"--over_dump_path={dump}"],
            {
                "enable_dump_debug": "1",
                "enable_dump": "0",
                "dump_path": dump,
            },
        ),
        (
            [
                "--data_dump_flag=True",
                f"--data_dump_path={dump}",
                "--data_dump_step=0|5|10-20",
            ],
            {
                "enable_dump": "1",
                "enable_dump_debug": "0",
                "dump_path": dump,
                "dump_step": "0|5|10-20",
                "dump_mode": "all",
            },
        ),
        (
            ["--profiling=True", f"--profiling_dump_path={dump}"],
            {"enable_profiling": "1"},
        ),
        (
            ["--use_mixlist=True", f"--mixlist_file={mixlist}"],
            {"modify_mixlist": mixlist},
        ),
        (
            ["--fusion_off_flag=True", f"--fusion_off_file={fusion}"],
            {"fusion_switch_file": fusion},
        ),
        # A path without its switch is no demand.
        (
            [
                "--use_mixlist=False",
                "--mixlist_file=none",
                "--profiling=False",
            ],
            {"enable_dump_debug": "0", "enable_profiling": "0"},
        ),
    ]


def test_options_equal_the_flags(tmp_path: Path) -> None:
    """A switch sets just its own options, and makes the folder it needs."""
    (tmp_path / "ops_info.json").write_text(
        '{"black-list": {"to-add": ["ReduceSumD"]}}'
    )
    (tmp_path / "fusion_switch.cfg").write_text("{}")
    rows = options_of_flags(tmp_path)
    cases = [{"flags": [NPU, *flags]} for flags, _ in rows]
    answers = npu_probe.ask("try_setup", cases)
    for answer, (_, options) in zip(answers, rows):
        assert options.items() <= answer["options"].items()
        assert answer["calls"] == ["open", "as_default"]
    profile = json.loads(answers[2]["options"]["profiling_options"])
    assert profile["output"] == rows[2][0][1].partition("=")[2]
    assert (tmp_path / "a b" / "dump").is_dir()
    assert "modify_mixlist" not in answers[5]["options"]


def test_unusable_options_are_one_line(tmp_path: Path) -> None:
    """A path that cannot serve its switch is told before the device opens."""
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    # Below a file there can be no folder, not even for root.
    blocked = broken / "dump"
    here = f"path={tmp_path}"
    expected = {
        ("--over_dump=True",): "--over_dump_path=: ",
        ("--over_dump=True", f"--over_dump_path={blocked}"): str(blocked),
        (
            "--over_dump=True",
            f"--over_dump_{here}",
            "--data_dump_flag=True",
            f"--data_dump_{here}",
        ): "drop it or --data_dump_flag=True",
        ("--profiling=True",): "--profiling_dump_path=: ",
        ("--fusion_off_flag=True",): "--fusion_off_file=: ",
        ("--use_mixlist=True", "--mixlist_file=none"): "--mixlist_file=none: ",
        (
            "--use_mixlist=True",
            f"--mixlist_file={broken}",
            "--precision_mode=force_fp32",
        ): "--precision_mode=force_fp32",
        ("--use_mixlist=True", f"--mixlist_file={broken}"): "is not JSON",
    }
    cases = [{"flags": [NPU, *flags]} for flags in expected]
    answers = npu_probe.ask("try_setup", cases)
    for answer, text in zip(answers, expected.values()):
        assert text in answer["error"]
        assert "\n" not in answer["error"]


def test_without_the_adapter() -> None:
    """`auto` falls back to GPU or CPU; a device asked for never does."""
    horovodless = {"RANK_SIZE": "2"}
    missing, gpu, auto, ranks, switches = npu_probe.ask(
        "try_setup",
        [
            {"flags": [NPU]},
            {"flags": ["--device=gpu"]},
            {"flags": ["--loss_scale=64", "--precision_mode=force_fp32"]},
            {"flags": [CPU], "environment": horovodless},
            {"flags": [CPU, "--profiling=True"]},
        ],
        adapter=None,
    )
    for hint in ("npu_device", "set_env.sh", "npu-smi info"):
        assert hint in missing["error"]
    assert "\n" not in missing["error"]
    # The machine of the test may have a GPU.
    if "error" in gpu:
        assert gpu["error"].startswith("--device=gpu: TensorFlow sees 0 GPUs")
    assert auto["device"] in ("cpu", "gpu")
    assert (auto["rank"], auto["size"], auto["loss_scale"]) == (0, 1, 0)
    assert ranks["error"].startswith("RANK_SIZE=2: ")
    assert "horovodrun -np 2" in ranks["error"]
    assert switches["device"] == "cpu"


def test_no_data_set_has_a_tuning_thread() -> None:
    """That thread may keep an ended program waiting for a minute."""
    tasks = Path("/proc/self/task")
    tuned = tf.data.Dataset.range(99)
    steady = tuned.with_options(npu_config.data_options())
    threads, kept = [], []
    # The first makes pools of threads that the others share.
    for data in (steady, steady, tuned):
        before = len(list(tasks.iterdir()))
        kept.append(iter(data))
        next(kept[-1])
        threads.append(len(list(tasks.iterdir())) - before)
    assert threads[1] < threads[2]


def test_a_broken_adapter_is_no_silent_cpu_run(tmp_path: Path) -> None:
    """Hours on a CPU would be a worse way to learn of a missing library."""
    (tmp_path / "npu_device.py").write_text(
        "raise ImportError('libge_runner.so: cannot open shared object file')"
    )
    (answer,) = npu_probe.ask("try_setup", [{}], adapter=tmp_path)
    assert "libge_runner.so" in answer["error"]
    assert "set_env.sh" in answer["error"]
