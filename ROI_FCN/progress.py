"""What training shows while it runs: speed, loss terms, time left."""

import resource
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
import tensorflow as tf

from ROI_FCN.launch import Diverged

REPORT_SECONDS = 10.0  # between two lines about work other than training
Item = TypeVar("Item")


class Clock:
    """Time of whole training steps; evaluation and saving do not count."""

    def __init__(self, warmup_steps: int) -> None:
        self.warmup_steps = warmup_steps
        self.first_step = 0.0  # seconds, tracing included
        self.steps, self.seconds = 0, 0.0
        self.restart()

    def restart(self) -> None:
        """Begins a window of steps now."""
        self.window_steps, self.window_start = 0, time.perf_counter()

    def step_done(self, loss: tf.Tensor) -> None:
        """Counts a step whose loss may still be on its way."""
        self.window_steps += 1
        if not self.first_step:
            # Read apart: tracing would spoil the mean of any window.
            float(loss)
            self.first_step = time.perf_counter() - self.window_start
        if self.warmup_steps > 0:
            self.warmup_steps -= 1
            float(loss)
            self.restart()

    def close_window(self) -> float:
        """Ends a window; returns its seconds per step.

        The caller has read the window's losses, so the device is done.
        """
        seconds, steps = (
            time.perf_counter() - self.window_start,
            self.window_steps,
        )
        self.steps += steps
        self.seconds += seconds
        self.restart()
        return seconds / steps if steps else self.first_step

    def seconds_per_step(self) -> float:
        """Mean over all steps after the warm-up."""
        return self.seconds / self.steps if self.steps else self.first_step


def mean_terms(
    last_step: int, window: list[dict[str, tf.Tensor]]
) -> dict[str, float]:
    """Means of the loss terms over a window of steps; raises Diverged."""
    # Read here, once per window: reading each step would make a GPU or NPU
    # wait for Python.
    values = [
        {name: float(value) for name, value in terms.items()}
        for terms in window
    ]
    for step, terms in enumerate(values, last_step - len(values) + 1):
        if not np.isfinite(list(terms.values())).all():
            shown = ", ".join(f"{name} {terms[name]}" for name in terms)
            raise Diverged(
                f"diverged at step {step}: {shown}; lower --learning_rate, "
                "or check the data"
            )
    return {
        name: float(np.mean([terms[name] for terms in values]))
        for name in values[0]
    }


def line(step: int, total: int, values: dict[str, float]) -> str:
    """A line for the console, with the time left."""
    shown = "  ".join(f"{name} {value:.5g}" for name, value in values.items())
    left = _clock_time((total - step) * values["seconds_per_step"])
    return f"step {step}/{total}  {shown}  left {left}"


def watched(
    items: Iterable[Item], total: int, task: str, rank: int = 0
) -> Iterator[Item]:
    """Yields the items; of long work rank 0 tells how much is left."""
    start = told = time.perf_counter()
    for done, item in enumerate(items):
        yield item
        now = time.perf_counter()
        if done == 0:
            # Tracing is in the first: it says little of the others.
            start = now
        elif rank == 0 and now - told >= REPORT_SECONDS:
            told = now
            left = _clock_time((now - start) / done * (total - done - 1))
            print(f"{task} {done + 1}/{total}  left {left}", flush=True)


def _clock_time(seconds: float) -> str:
    """Minutes and seconds as 3:07."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"


def peak_memory_mb() -> int:
    """Largest resident memory of this process so far, in MB."""
    # Linux counts in kilobytes; macOS would give bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
