"""Starts Python scripts in processes that have TensorFlow imported already.

A test that runs a command waits mostly for imports. This process makes them
once and then forks for every command, so that each still runs by itself, from
its first line and with its own environment. One JSON line asks for a command,
one answers with its exit status.
"""

import json
import os
import runpy
import signal
import sys
import time
from typing import Optional

import numpy
import PIL.Image
import scipy.ndimage
import tensorflow as tf

# Keras is loaded when it is first used. No tensor may exist here: a fork does
# not take over TensorFlow's threads.
USED = (numpy, PIL.Image, scipy.ndimage, tf.keras.layers, tf.keras.optimizers)


def become(request: dict) -> list[str]:
    """Makes this child what a shell would have started; returns argv."""
    for stream, flags in (
        ("stdin", os.O_RDONLY),
        ("stdout", os.O_WRONLY | os.O_CREAT),
        ("stderr", os.O_WRONLY | os.O_CREAT),
    ):
        path = request.get(stream, os.devnull)
        number = getattr(sys, f"__{stream}__").fileno()
        os.dup2(os.open(path, flags, 0o600), number)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    script = request["argv"][0]
    # As the interpreter does: the script's folder, then PYTHONPATH.
    sys.path[0:1] = [os.path.dirname(os.path.abspath(script)), *paths]
    sys.path[:] = [path for path in sys.path if path]
    return request["argv"]


def wait(child: int, seconds: float) -> Optional[int]:
    """The child's exit status, minus the signal's number; None: too slow."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid and os.WIFSIGNALED(status):
            return -os.WTERMSIG(status)
        if pid:
            return os.WEXITSTATUS(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def serve() -> Optional[list[str]]:
    """Forks for each request; a child returns its argv, the parent None."""
    # The channel of answers: children print elsewhere.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            return become(request)
        print(wait(child, request["timeout"]), file=answers, flush=True)
    return None


if __name__ == "__main__":
    arguments = serve()
    if arguments:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
