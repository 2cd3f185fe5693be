"""How a probe lives through its cases: flags, environment, a fresh device."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Callable

from absl import flags

from common import npu_config


@contextmanager
def circumstances(case: dict) -> Iterator[None]:
    """Gives the block the flags, environment and chip of a case."""
    before = dict(os.environ)
    os.environ.update(case.get("environment", {}))
    flags.FLAGS.unparse_flags()
    flags.FLAGS(["probe", *case.get("flags", [])])
    # Reset, because a process could open its device only once.
    if "npu_device" in sys.modules:
        sys.modules["npu_device"]._reset()
        sys.modules["npu_device"]._chip = case.get("chip", "910A")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def answer(respond: Callable[[dict], dict]) -> None:
    """Answers every case on the command line in one line of JSON."""
    npu_config.define_flags()
    answers = []
    for case in json.loads(sys.argv[1]):
        with circumstances(case):
            answers.append(respond(case))
    # One line at the end: what TensorFlow prints comes before it.
    print(json.dumps(answers))
