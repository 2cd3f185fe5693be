"""HCCL collectives; other ranks are copies of this one unless _peers says."""

from npu_device.distribute.collectives import (
    all_reduce,
    broadcast,
    shard_and_rebatch_dataset,
)
from npu_device.distribute.optimizer import (
    npu_distributed_keras_optimizer_wrapper,
)

__all__ = [
    "all_reduce",
    "broadcast",
    "npu_distributed_keras_optimizer_wrapper",
    "shard_and_rebatch_dataset",
]
