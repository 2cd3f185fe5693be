"""Device, precision and ranks: the one module that all models share.

`setup()` turns flags and environment into a Runtime before any tensor exists:
an Ascend NPU with HCCL, or a GPU or CPU with Horovod. Where Keras 2.6, which
the NPU adapter needs, and Keras 3 differ, the difference ends here.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import sys
from typing import Any

import tensorflow as tf
from absl import flags, logging

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from common import hccl_ranks, rank_norm

FLAGS = flags.FLAGS
CPU_INFO = pathlib.Path("/proc/cpuinfo")

# The adapter's values, but for force_fp16, which is for inference only: the
# Keras policy on a GPU, that on a CPU, and whether an NPU uses float16.
PRECISION_MODES = {
    "allow_mix_precision": ("mixed_float16", "mixed_bfloat16", True),
    "allow_mix_precision_fp16": ("mixed_float16", "mixed_bfloat16", True),
    "allow_mix_precision_bf16": ("mixed_bfloat16", "mixed_bfloat16", False),
    "allow_fp32_to_fp16": ("float32", "float32", True),
    "allow_fp32_to_bf16": ("float32", "float32", False),
    "force_fp32": ("float32", "float32", False),
    "cube_fp16in_fp32out": ("float32", "float32", False),
    "must_keep_origin_dtype": ("float32", "float32", False),
}

# The ModelZoo's switches for an NPU, and the flag of the path each one needs.
SWITCHES = {
    "over_dump": "over_dump_path",
    "data_dump_flag": "data_dump_path",
    "profiling": "profiling_dump_path",
    "use_mixlist": "mixlist_file",
    "fusion_off_flag": "fusion_off_file",
}


class UserError(Exception):
    """A mistake of the user's, told in one line and without a traceback."""


def define_flags() -> None:
    """Defines the flags of device and precision."""
    flags.DEFINE_enum(
        "device",
        "auto",
        ["auto", "npu", "gpu", "cpu"],
        "Where to compute; auto: an NPU with adapter, else a GPU, else a CPU.",
    )
    flags.DEFINE_string(
        "precision_mode",
        "allow_mix_precision",
        f"Arithmetic, one of {', '.join(PRECISION_MODES)}.",
    )
    flags.DEFINE_integer(
        "loss_scale",
        1,
        "Scale of the loss where gradients are float16: below 1 none, 1 "
        "dynamic, above 1 that scale, halved only by a step that overflows.",
    )
    flags.DEFINE_alias("npu_loss_scale", "loss_scale")
    flags.DEFINE_string(
        "data_dump_step", "10", "NPU: the steps to dump, such as 0|5|10-20."
    )
    for switch, path_flag in SWITCHES.items():
        flags.DEFINE_boolean(switch, False, f"NPU: needs --{path_flag}.")
        flags.DEFINE_string(path_flag, "", f"NPU: path of --{switch}.")


def setup() -> "Runtime":
    """Opens the device and joins the ranks; call it before any tensor.

    Raises:
      UserError: a flag or an environment variable has to be mended.
    """
    mode, device = FLAGS.precision_mode, FLAGS.device
    if mode not in PRECISION_MODES:
        legal = ", ".join(PRECISION_MODES)
        raise UserError(f"--precision_mode={mode}: give one of {legal}")
    if device == "auto" and importlib.util.find_spec("npu_device"):
        device = "npu"
    elif device == "auto":
        device = "gpu" if tf.config.list_physical_devices("GPU") else "cpu"
    if device == "npu":
        ranks = _open_npu(mode)
        # The graph engine casts by itself; Keras must not cast as well.
        policy, note = "float32", "passed to the adapter"
        float16 = PRECISION_MODES[mode][2]
    else:
        for switch in SWITCHES:
            if FLAGS[switch].value:
                logging.warning("--%s is for an NPU, not a %s", switch, device)
        ranks = _open_local(device)
        policy, note = _local_policy(device, mode)
        float16 = policy == "mixed_float16"
    tf.keras.mixed_precision.set_global_policy(policy)
    scale = max(FLAGS.loss_scale, 0) if float16 else 0
    return Runtime(device, policy, f"{mode} ({note})", scale, **ranks)


@dataclasses.dataclass
class Runtime:
    """Device, precision and ranks of this process.

    Attributes:
      device: "npu", "gpu" or "cpu".
      policy: Keras policy: "float32", "mixed_float16" or "mixed_bfloat16".
      precision: the precision_mode and what it means here.
      loss_scale: the flag where gradients are float16, else 0.
      rank: number of this process among `size`, from 0.
      npu, horovod: the modules of the collectives, None if not in use.
    """

    device: str
    policy: str
    precision: str
    loss_scale: int = 0
    rank: int = 0
    size: int = 1
    npu: Any = None
    horovod: Any = None

    def describe(self) -> str:
        """Returns one line for the start of the log."""
        scale = {0: "none", 1: "dynamic"}.get(self.loss_scale, self.loss_scale)
        return (
            f"device {self.device}, rank {self.rank} of {self.size}, "
            f"precision_mode {self.precision}, loss scale {scale}"
        )

    def all_reduce(self, tensors: list) -> list:
        """Returns each float tensor's mean over the ranks; None stays None."""
        if self.npu:
            return self.npu.distribute.all_reduce(list(tensors), "mean")
        if not self.horovod:
            return list(tensors)
        mean = self.horovod.Average
        # Horovod takes no None; the gaps are the same on every rank.
        present = [tensor for tensor in tensors if tensor is not None]
        means = iter(self.horovod.grouped_allreduce(present, op=mean))
        return [None if tensor is None else next(means) for tensor in tensors]

    def batch_norm(
        self,
        features: tf.Tensor,
        gamma: tf.Tensor,
        beta: tf.Tensor,
        about: tf.Tensor,
        epsilon: float,
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns features normalised over all ranks, mean and variance.

        `about` is roughly the mean, see rank_norm.batch_norm.
        """
        return rank_norm.batch_norm(
            features, gamma, beta, about, epsilon, self.all_reduce, self.size
        )

    def broadcast(self, variables: list) -> None:
        """Assigns rank 0's values to all variables that are not booleans."""
        # A variable of Keras 3 is a shell around one of TensorFlow.
        raw = [
            each if callable(getattr(each, "value", None)) else each.value
            for each in variables
        ]
        # HCCL sends no booleans.
        numbers = [each for each in raw if each.dtype != tf.bool]
        if self.npu:
            self.npu.distribute.broadcast(numbers, root_rank=0)
        elif self.horovod:
            # Horovod's own loop takes seconds of AutoGraph.
            def assign_all() -> None:
                for variable in numbers:
                    value = tf.convert_to_tensor(variable)
                    variable.assign(self.horovod.broadcast(value, 0))

            tf.function(assign_all, autograph=False)()

    def prepare_optimizer(self, optimizer: Any, variables: list) -> Any:
        """Returns the optimizer with its slots made, wrapped as needed."""
        if self.loss_scale:
            optimizer = self._scale_losses(optimizer)
        # Slots have to exist before they are broadcast or restored.
        build = getattr(optimizer, "_create_all_weights", None)
        (build or optimizer.build)(variables)
        if self.npu and self.size > 1:
            # Outermost, so that a rank that overflows still reduces: the
            # others would wait for it.
            wrap = self.npu.distribute.npu_distributed_keras_optimizer_wrapper
            optimizer = wrap(optimizer, "mean")
        return optimizer

    def _scale_losses(self, optimizer: Any) -> Any:
        wrap = tf.keras.mixed_precision.LossScaleOptimizer
        if self.npu and not self.npu.is_inf_nan_enabled():
            # A 910A saturates: only the adapter's wrapper sees an overflow.
            wrap = self.npu.train.optimizer.NpuLossScaleOptimizer
        if self.loss_scale == 1:
            return wrap(optimizer)
        # Keras 3 offers no fixed scale, but one that never grows.
        never = 2**31 - 1
        scale = float(self.loss_scale)
        return wrap(optimizer, initial_scale=scale, dynamic_growth_steps=never)

    def scale_loss(self, optimizer: Any, loss: tf.Tensor) -> tf.Tensor:
        """Returns the loss to differentiate."""
        for method in ("scale_loss", "get_scaled_loss"):
            if hasattr(optimizer, method):
                return getattr(optimizer, method)(loss)
        return loss

    def apply_gradients(
        self, optimizer: Any, gradients: list, variables: list
    ) -> None:
        """Steps along the mean over the ranks of the scaled gradients.

        An overflow skips the step and halves the scale. Keras 2.6 counts such
        a step in `optimizer.iterations`, Keras 3 does not.
        """
        # Before the scale is taken off: so one rank's Inf reaches all,
        # and all skip the step. On NPUs the wrapper reduces instead.
        if self.horovod:
            gradients = self.all_reduce(gradients)
        if hasattr(optimizer, "get_unscaled_gradients"):
            gradients = optimizer.get_unscaled_gradients(gradients)
        optimizer.apply_gradients(zip(gradients, variables))


def data_options() -> tf.data.Options:
    """Returns options for every data set: no thread that tunes it.

    That thread sleeps for up to a minute, and the program waits for it when
    the data set goes: TensorFlow wakes it just before it sets the sign to end.
    """
    options = tf.data.Options()
    if hasattr(options, "autotune"):
        options.autotune.enabled = False
    else:
        options.experimental_optimization.autotune = False
    return options


def optimizer_variables(optimizer: Any) -> list:
    """Returns all variables of an optimizer: step, slots and loss scale."""
    if not callable(optimizer.variables):
        return list(optimizer.variables)
    # Keras 2.6 keeps the loss scale apart from the other variables.
    scale = getattr(optimizer, "_loss_scale", None)
    own = [scale.current_loss_scale, scale.counter] if scale else []
    return own + optimizer.variables()


def _local_policy(device: str, mode: str) -> tuple[str, str]:
    """Returns the Keras policy of a CPU or GPU, and a note on it."""
    policy = PRECISION_MODES[mode][device == "cpu"]
    if policy != "mixed_bfloat16" or device == "gpu":
        return policy, policy
    version = tf.__version__
    if tuple(map(int, version.split(".")[:2])) < (2, 15):
        return "float32", f"float32, no bfloat16 in TensorFlow {version}"
    # Emulated bfloat16 is slower than float32, so it must be asked for.
    native = CPU_INFO.exists() and {"avx512_bf16", "amx_bf16"}.intersection(
        CPU_INFO.read_text().split()
    )
    if not native and mode != "allow_mix_precision_bf16":
        return "float32", "float32, this processor has no native bfloat16"
    return policy, policy


def _open_local(device: str) -> dict[str, Any]:
    """Joins the ranks of horovodrun and takes this rank's GPU, if any."""
    started = os.environ.get("HOROVOD_SIZE", "1")
    wanted = os.environ.get("RANK_SIZE", started)
    if wanted != started:
        raise UserError(
            f"RANK_SIZE={wanted}: processes of this job: {started}; start "
            f"`horovodrun -np {wanted} python ...`, or unset RANK_SIZE"
        )
    ranks, place = {}, 0
    if started != "1":
        import horovod.tensorflow as horovod

        horovod.init()
        ranks = {"rank": horovod.rank(), "size": horovod.size()}
        ranks["horovod"] = horovod
        place = horovod.local_rank()
    gpus = tf.config.list_physical_devices("GPU")
    shown = gpus[place : place + 1] if device == "gpu" else []
    if device == "gpu" and not shown:
        raise UserError(
            f"--device=gpu: TensorFlow sees {len(gpus)} GPUs, process {place} "
            "of this machine has none; see nvidia-smi, or take --device=cpu"
        )
    for gpu in shown:
        tf.config.experimental.set_memory_growth(gpu, True)
    tf.config.set_visible_devices(shown, "GPU")
    return ranks


def _open_npu(mode: str) -> dict[str, Any]:
    """Opens the NPU with the options that the flags name."""
    try:
        import npu_device as npu
    except (ImportError, OSError, tf.errors.OpError) as error:
        raise UserError(
            f"--device=npu: no adapter npu_device ({_one_line(error)}); "
            "install npu_device-2.6.5-*.whl of your CANN release, run `source "
            "/usr/local/Ascend/cann/set_env.sh` and `npu-smi info`, or take "
            "--device=cpu"
        ) from error
    try:
        # Before open(), where HCCL waits for minutes and tells less.
        hccl_ranks.check(os.environ)
    except ValueError as error:
        raise UserError(str(error)) from error
    try:
        for name, value in _adapter_options(mode).items():
            *groups, field = name.split(".")
            group = functools.reduce(getattr, groups, npu.global_options())
            setattr(group, field, value)
        handle = npu.open().as_default()
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"--device=npu: {_one_line(error)}; see `npu-smi info`"
        ) from error
    return {"rank": handle.worker_id, "size": handle.workers_num, "npu": npu}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _adapter_options(mode: str) -> dict[str, Any]:
    """Returns the fields of npu.global_options() for the flags that are on."""
    fields = {
        "over_dump": {
            "dump_config.enable_dump_debug": True,
            "dump_config.dump_path": FLAGS.over_dump_path,
        },
        "data_dump_flag": {
            "dump_config.enable_dump": True,
            "dump_config.dump_mode": "all",
            "dump_config.dump_step": FLAGS.data_dump_step,
            "dump_config.dump_path": FLAGS.data_dump_path,
        },
        "profiling": {
            "profiling_config.enable_profiling": True,
            "profiling_config.profiling_options": json.dumps(
                {
                    "output": FLAGS.profiling_dump_path,
                    "training_trace": "on",
                    "task_time": "on",
                }
            ),
        },
        "use_mixlist": {"modify_mixlist": FLAGS.mixlist_file},
        "fusion_off_flag": {"fusion_switch_file": FLAGS.fusion_off_file},
    }
    switches = [switch for switch in SWITCHES if FLAGS[switch].value]
    if {"over_dump", "data_dump_flag"} <= set(switches):
        raise UserError("--over_dump=True: drop it or --data_dump_flag=True")
    if FLAGS.use_mixlist and not mode.startswith("allow_mix_precision"):
        raise UserError(
            f"--use_mixlist=True: not with --precision_mode={mode}; give "
            "allow_mix_precision"
        )
    options = {"precision_mode": mode}
    for switch in switches:
        _check_path(switch)
        options.update(fields[switch])
    return options


def _check_path(switch: str) -> None:
    """Makes the folder, or opens the file, that a switch needs."""
    flag = SWITCHES[switch]
    path = FLAGS[flag].value
    try:
        if flag.endswith("_file"):
            # Opened, because a file may exist and still be unreadable.
            open(path, "rb").close()
        else:
            os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--{flag}={path}: {error.strerror}; --{switch} needs it"
        ) from error


def _write_rank_table(arguments: list[str]) -> None:
    """Prints the rank table of the servers on the command line."""
    if arguments[:1] != ["rank_table"]:
        sys.exit("usage: npu_config.py rank_table SERVER=DEVICE_IP,... ...")
    try:
        print(hccl_ranks.rank_table(arguments[1:]))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {_one_line(error)}")


if __name__ == "__main__":
    _write_rank_table(sys.argv[1:])
