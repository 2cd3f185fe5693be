"""TensorFlow 1 surface of the adapter."""

from npu_device.compat.v1 import npu_init

__all__ = ["npu_init"]
