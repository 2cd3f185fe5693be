"""all_reduce, broadcast and data sharding."""

import functools
import warnings

import tensorflow as tf

from npu_device._state import cluster, package, record, state

_REDUCTIONS = ("mean", "max", "min", "prod", "sum")
# What HCCL has kernels for; a CPU would take any dtype.
_REDUCED = ("int8", "int32", "float16", "float32")
_SENT = (*_REDUCED, "int64", "uint64")
_WORLD = "hccl_world_group"


def all_reduce(values, reduction="mean", fusion=1, fusion_id=-1, group=_WORLD):
    """Reduces a tensor, or each of a list, over all ranks."""
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction {reduction} not in {_REDUCTIONS}")
    record("all_reduce", reduction)
    handle = cluster()
    if handle is None:
        return values
    if not isinstance(values, (list, tuple)):
        return _reduce(values, reduction, handle)
    return [
        None if value is None else _reduce(value, reduction, handle)
        for value in values
    ]


def _reduce(value, reduction, handle):
    value = tf.convert_to_tensor(value)
    _demand_dtype(value, _REDUCED)
    terms = [
        value if rank == handle.worker_id else _value_of(rank, value)
        for rank in range(handle.workers_num)
    ]
    if reduction in ("mean", "sum"):
        total = tf.add_n(terms)
        if reduction == "sum":
            return total
        if value.dtype.is_integer:
            return tf.divide(total, handle.workers_num)
        return total * tf.constant(1.0 / handle.workers_num, value.dtype)
    pair = {"max": tf.maximum, "min": tf.minimum, "prod": tf.multiply}
    return functools.reduce(pair[reduction], terms)


def _value_of(rank, value):
    if state.peers is None:
        return value
    return tf.convert_to_tensor(state.peers(value, rank), value.dtype)


def _demand_dtype(value, names):
    name = getattr(value.dtype, "name", value.dtype)
    if name not in names:
        raise TypeError(f"HCCL does not take {name}, only {names}")


def broadcast(values, root_rank=0, fusion=2, fusion_id=0, group=_WORLD):
    """Assigns the values of `root_rank` to the variables of every rank."""
    if not isinstance(values, (list, tuple)):
        values = [values]
    names = [getattr(value, "path", value.name) for value in values]
    record("broadcast", names, root_rank)
    handle = cluster()
    if handle is None:
        return
    for value in values:
        if not hasattr(value, "assign"):
            raise TypeError(f"{value} is not a variable")
        _demand_dtype(value, _SENT)
        if handle.worker_id != root_rank:
            value.assign(_value_of(root_rank, value))


def shard_and_rebatch_dataset(dataset, global_bs):
    """Returns this rank's share of the elements, and of the batch size."""
    handle = cluster()
    record("shard_and_rebatch_dataset", global_bs)
    if handle is None:
        return dataset, global_bs
    ranks = handle.workers_num
    if global_bs % ranks:
        raise ValueError(f"Batch size must be divisible by num npus: {ranks}")
    # A shard of batches holds whole ones, each of the global size.
    if package()._strict and _looks_batched(dataset):
        warnings.warn("dataset is batched before sharding", stacklevel=2)
    return dataset.shard(ranks, handle.worker_id), global_bs // ranks


def _looks_batched(dataset):
    """Guesses from the first component: a batch of images has rank 4."""
    shape = getattr(tf.nest.flatten(dataset.element_spec)[0], "shape", None)
    return shape is not None and shape.rank is not None and shape.rank >= 4
