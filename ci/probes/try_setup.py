"""Calls setup() with the flags and environment of each case.

Answers with the UserError, or with the Runtime and what the adapter saw.
"""

import warnings

from cases import answer
from tensorflow.python.eager import context

from common import npu_config


def has_tensors() -> bool:
    """Tells whether TensorFlow has started, which the first tensor does."""
    return context.context()._context_handle is not None


def watch_open() -> list[bool]:
    """Notes at each open() of the adapter whether there were tensors."""
    try:
        import npu_device
    except ImportError:
        return []
    opened, real_open = [], npu_device.open

    def noted_open(device_id=None):
        """Opens the device after a look at whether it comes too late."""
        opened.append(has_tensors())
        return real_open(device_id)

    npu_device.open = noted_open
    return opened


def respond(case: dict) -> dict:
    """Runs one setup(); for an NPU, reports what the double has seen."""
    try:
        runtime = npu_config.setup()
    except npu_config.UserError as error:
        return {"error": str(error)}
    names = ("device", "policy", "loss_scale", "rank", "size")
    found = {name: getattr(runtime, name) for name in names}
    found.update(described=runtime.describe(), has_tensors=has_tensors())
    if runtime.npu:
        found["options"] = runtime.npu._opened_with
        found["calls"] = [name for name, _ in runtime.npu._calls]
        found["had_tensors"] = opened[-1]
    return found


if __name__ == "__main__":
    # The double warns of what the adapter would silently ignore.
    warnings.simplefilter("error")
    opened = watch_open()
    answer(respond)
