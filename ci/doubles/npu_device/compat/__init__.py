"""The way back to TensorFlow 1 sessions, recorded but not walked."""

from npu_device._state import record
from npu_device.compat import v1

__all__ = ["enable_v1", "v1"]


def enable_v1():
    """Would switch the process to TensorFlow 1 behaviour."""
    record("enable_v1")
