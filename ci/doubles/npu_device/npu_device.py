"""open() and its handle, and the adapter's small functions."""

import contextlib
import functools
import os

import tensorflow as tf

from npu_device import _engine, configs
from npu_device._state import package, record, state

# Read at import, as by the adapter: what is set later has no effect.
_loop_size = int(os.environ.get("NPU_LOOP_SIZE") or 1)


class NpuDeviceHandle:
    """One open device: its name and its place among the workers."""

    def __init__(self, device_id, workers_num, worker_id):
        self.device_id = device_id
        self.workers_num = workers_num
        self.worker_id = worker_id

    def name(self):
        """Returns the TensorFlow name of the device."""
        return f"/job:localhost/replica:0/task:0/device:NPU:{self.device_id}"

    def scope(self):
        """Returns a context manager that places ops; here it does nothing."""
        return contextlib.nullcontext()

    def is_cluster_worker(self):
        """Tells whether there are other workers."""
        return self.workers_num > 1 and 0 <= self.worker_id < self.workers_num

    def as_default(self):
        """Makes this the device of the process and returns it."""
        record("as_default")
        state.is_default = True
        print(f"Npu device instance {self.name()} created")
        return self


def global_options():
    """Returns the options that the next open() takes."""
    if state.options is None:
        state.options = configs.new_options()
    return state.options


def open(device_id=None):  # noqa: A001, the adapter's name
    """Opens the device of this process, once."""
    if device_id is None:
        device_id = int(os.environ.get("ASCEND_DEVICE_ID") or 0)
    record("open", device_id)
    if state.handle is not None:
        if state.handle.device_id == device_id:
            return state.handle
        raise RuntimeError(
            f"Failed create npu instance on device {device_id} "
            f"as existed instance on [{state.handle.device_id}]"
        )
    workers_num, worker_id = _workers()
    # A copy: later assignments come too late for an open device.
    options = global_options().as_dict()
    if package()._strict:
        _engine.check_options(options, device_id)
    package()._opened_with = options
    state.handle = NpuDeviceHandle(device_id, workers_num, worker_id)
    return state.handle


def _workers():
    """Returns how many workers the environment names, and which is this."""
    environment = os.environ
    if "RANK_SIZE" in environment and "CM_WORKER_SIZE" in environment:
        raise ValueError(
            "RANK_SIZE and CM_WORKER_SIZE cannot be configured at the same "
            "time."
        )
    named = environment.get("RANK_SIZE") or environment.get("CM_WORKER_SIZE")
    size = int(named or 1)
    # A single worker needs none of the variables that follow.
    if size <= 1:
        return size, 0
    by_table = "RANK_TABLE_FILE" in environment
    by_chief = "CM_CHIEF_IP" in environment
    if by_table == by_chief:
        fault = "cannot be" if by_table else "are all not be"
        when = " at the same time" if by_table else ""
        raise RuntimeError(
            f"CM_CHIEF_IP and RANK_TABLE_FILE {fault} configured{when}."
        )
    if by_table:
        _demand("RANK_ID", "rank id")
        if package()._strict:
            _engine.check_rank_table(
                environment["RANK_TABLE_FILE"], environment["RANK_ID"], size
            )
    else:
        _demand("CM_CHIEF_PORT", "cm chief port")
        _demand("CM_CHIEF_DEVICE", "cm chief device")
    return size, int(environment.get("RANK_ID") or 0)


def _demand(variable, meaning):
    if variable not in os.environ:
        raise RuntimeError(
            f"You must specify {meaning} by set env {variable} "
            "in distribution mode"
        )


def set_npu_loop_size(loop_size):
    """Sets how many steps one call of a training loop runs on the device."""
    global _loop_size
    if not isinstance(loop_size, int) or loop_size < 1:
        raise ValueError(f"loop_size must be a positive int, got {loop_size}")
    record("set_npu_loop_size", loop_size)
    _loop_size = loop_size


def set_device_sat_mode(mode):
    """Chooses saturation (0) or Inf and NaN (1) for overflowing floats."""
    if mode not in (0, 1):
        raise ValueError(f"mode must be 0 or 1, got {mode}")
    record("set_device_sat_mode", mode)
    state.saturation_mode = mode


def is_inf_nan_enabled():
    """Tells whether an overflow gives Inf or NaN; a 910A saturates."""
    if state.saturation_mode is None:
        return package()._chip != "910A"
    return state.saturation_mode == 1


@contextlib.contextmanager
def npu_run_context(options=None):
    """Runs the block with its own options."""
    wanted = configs.NpuRunContextOptions
    if options is not None and not isinstance(options, wanted):
        raise ValueError("options type must be NpuRunContextOptions")
    record("npu_run_context", options)
    yield


@contextlib.contextmanager
def keep_dtype_scope():
    """Marks ops that keep their dtype under mixed precision."""
    record("keep_dtype_scope")
    yield


@contextlib.contextmanager
def npu_recompute_scope():
    """Marks ops whose results are computed again in the backward pass."""
    record("npu_recompute_scope")
    yield


def npu_compat_function(func=None, **options):
    """Is tf.function without XLA, with or without arguments."""
    if func is None:
        return functools.partial(npu_compat_function, **options)
    options.pop("experimental_compile", None)
    options["jit_compile"] = False
    record("npu_compat_function", func.__name__)
    return tf.function(func, **options)
