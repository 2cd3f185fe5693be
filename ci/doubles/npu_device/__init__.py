"""Test double of Ascend's TensorFlow 2 adapter, on sys.path in tests only.

It takes the same options, reads the same environment and fails in the same
places as the adapter, and records what it was asked; it computes on the CPU.
Names with an underscore are for tests; the adapter does not have them.
"""

from npu_device import compat, configs, distribute, npu_device, ops, train
from npu_device._state import calls as _calls
from npu_device._state import reset as _reset
from npu_device._state import set_peers as _peers
from npu_device.npu_device import (
    global_options,
    is_inf_nan_enabled,
    keep_dtype_scope,
    npu_compat_function,
    npu_recompute_scope,
    npu_run_context,
    open,  # noqa: A004, the adapter's name
    set_device_sat_mode,
    set_npu_loop_size,
)

__all__ = [
    "compat",
    "configs",
    "distribute",
    "global_options",
    "is_inf_nan_enabled",
    "keep_dtype_scope",
    "npu_compat_function",
    "npu_device",
    "npu_recompute_scope",
    "npu_run_context",
    "open",
    "ops",
    "set_device_sat_mode",
    "set_npu_loop_size",
    "train",
    "_calls",
    "_peers",
    "_reset",
]

# What a test may change: the chip ("910A" saturates on overflow, "A2" gives
# Inf and NaN), CANN's checks at open(), and the wrapper's needs in 2.6.5.
_chip = "910A"
_strict = True
_emulate_265 = False

# The options as open() found them.
_opened_with = None
