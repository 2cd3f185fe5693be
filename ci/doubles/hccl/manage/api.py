"""Test double of CANN's `hccl` package: ranks read from the environment."""

import os


def get_rank_id(group="hccl_world_group"):
    """Returns the rank of this process."""
    return int(os.environ.get("RANK_ID") or 0)


def get_rank_size(group="hccl_world_group"):
    """Returns how many ranks there are."""
    named = os.environ.get("RANK_SIZE") or os.environ.get("CM_WORKER_SIZE")
    return int(named or 1)


def get_local_rank_id(group="hccl_world_group"):
    """Returns the rank of this process on its server."""
    return int(os.environ.get("ASCEND_DEVICE_ID") or 0)


def get_local_rank_size(group="hccl_world_group"):
    """Returns how many ranks this server has; the double knows one server."""
    return get_rank_size(group)
