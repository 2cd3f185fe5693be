"""Starts Python scripts in processes that have TensorFlow imported already.

A test that runs a command waits mostly for imports. This process makes them
once and then forks for every command, so that each still runs by itself, from
its first line and with its own environment. One JSON line asks for a command;
one line answers with its process number, a second one with its exit status.
"""

import json
import os
import runpy
import sys
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
    first = "" if script == "-m" else os.path.dirname(script)
    sys.path[0:1] = [os.path.abspath(first), *paths]
    sys.path[:] = [path for path in sys.path if path]
    return request["argv"]


def status_of(child: int) -> int:
    """Waits for the child; returns its exit status or minus its signal."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return -os.WTERMSIG(status)
    return os.WEXITSTATUS(status)


def serve() -> Optional[list[str]]:
    """Forks for each request; a child returns its argv, the parent None."""
    # The channel of answers: children print elsewhere.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            return become(request)
        print(child, file=answers, flush=True)
        print(status_of(child), file=answers, flush=True)
    return None


if __name__ == "__main__":
    arguments = serve()
    if arguments:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(sys.argv[0], run_name="__main__")
