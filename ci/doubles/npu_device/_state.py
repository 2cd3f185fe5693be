"""What the double remembers: its options, its handle and every call."""

import sys

calls = []


class _State:
    """What one process has asked of its device."""

    def __init__(self):
        self.options = None
        self.handle = None
        self.is_default = False
        self.saturation_mode = None
        self.peers = None


state = _State()


def package():
    """Returns npu_device itself, where tests change the settings."""
    return sys.modules["npu_device"]


def record(name, *arguments):
    """Adds one call to `calls`."""
    calls.append((name, arguments))


def reset():
    """Forgets handle, options and calls, as a new process would."""
    calls.clear()
    package()._opened_with = None
    state.__init__()


def set_peers(values_of):
    """Gives the other ranks their values.

    Args:
      values_of: called as `values_of(value, rank)` with this rank's value;
        returns that of `rank`. None makes all ranks identical again.
    """
    state.peers = values_of


def cluster():
    """Returns the handle if collectives reach other ranks, else None."""
    if state.is_default and state.handle.is_cluster_worker():
        return state.handle
    return None
