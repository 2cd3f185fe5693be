"""What a training run reports and keeps as it goes.

Rank 0 writes; every rank takes part in what is collective, so that no rank
waits for another that has nothing to say.
"""

import os
from typing import Callable

import tensorflow as tf
from absl import flags

from BiSeNet import evaluate, progress, run_folder, visuals, weights
from BiSeNet.classes import Classes
from BiSeNet.launch import Stopped
from common import npu_config

FLAGS = flags.FLAGS


class Recorder:
    """Logs, evaluations and checkpoints of one run folder."""

    def __init__(
        self,
        runtime: npu_config.Runtime,
        path: str,
        models: tuple[tf.keras.Model, tf.keras.Model],
        classes: Classes,
        checkpoints: run_folder.Checkpoints,
        schedule: Callable[[int], tf.Tensor],
    ) -> None:
        self.runtime, self.path, self.schedule = runtime, path, schedule
        network, self.trainer = models
        self.classes, self.checkpoints = classes, checkpoints
        self.evaluation_step = evaluate.make_evaluation_step(network, classes)
        self.clock = progress.Clock(FLAGS.warmup_steps)
        self.window: list[dict[str, tf.Tensor]] = []
        self.writes = runtime.rank == 0
        if self.writes:
            self.log = run_folder.MetricsLog(path, int(checkpoints.step))

    def step_done(self, terms: dict[str, tf.Tensor]) -> None:
        """Takes the loss terms of a step, which may still be computed."""
        self.window.append(terms)
        self.clock.step_done(terms["total_loss"])

    def record(self, step: int) -> None:
        """Logs the window of steps that ends with `step`."""
        # In this order: reading the losses waits for the device, closing the
        # window does not.
        terms = progress.mean_terms(step, self.window)
        seconds = self.clock.close_window()
        self.window = []
        values = {
            **terms,
            "learning_rate": float(self.schedule(step)),
            "images_per_second": self.pictures_per_step() / seconds,
            "seconds_per_step": seconds,
        }
        if self.writes:
            self.log.write(step, values)
            print(progress.line(step, FLAGS.train_steps, values), flush=True)

    def pictures_per_step(self) -> int:
        """Pictures that all ranks see in one step."""
        return FLAGS.batch_size * self.runtime.size

    def evaluate(self, step: int, batches: tf.data.Dataset) -> None:
        """Evaluates on all ranks; keeps the best weights apart."""
        table, rows = evaluate.evaluate(
            self.evaluation_step, self.classes, batches, self.runtime
        )
        metric = table[evaluate.METRIC]
        # Only one rank writes, but all have computed the table together.
        if self.writes:
            sheet = f"{self.path}/images/step_{step:06d}.png"
            evaluate.save_sheet(sheet, rows)
            self.log.write(step, {"evaluation": table})
            self.log.write_image(step, "evaluation", sheet)
            print(f"evaluation at step {step}: {evaluate.METRIC} {metric:.4f}")
            if metric > float(self.checkpoints.best):
                self.checkpoints.best.assign(metric)
                self.checkpoints.save_best(step)
                # What the other scripts load: either Keras can read it.
                best = os.path.join(self.path, "best", "weights.npz")
                self.save_weights(best)
        self.clock.restart()

    def save(self, step: int) -> None:
        """Saves what resuming needs, and the weights by TF1 name."""
        if self.writes:
            self.checkpoints.save(step)
            self.save_weights(os.path.join(self.path, "weights.npz"))
        self.clock.restart()

    def save_weights(self, path: str) -> None:
        """Writes the weights of all heads by TF1 name."""
        weights.save_npz(self.trainer, path, (FLAGS.frontend, FLAGS.compat))

    def stop_requested(self) -> bool:
        """True on all ranks once any of them has been asked to stop."""
        # A signal may reach one rank alone; if it left the loop by itself, the
        # others would wait for its gradients for ever.
        asked = float(Stopped.received is not None)
        if self.runtime.size > 1:
            asked = float(self.runtime.all_reduce([tf.constant(asked)])[0])
        return asked > 0.0

    def finish(self, model: str) -> dict[str, object]:
        """Draws the curves and writes result.json, which it returns."""
        if not self.writes:
            return {"metric": None}
        losses = self.log.curve("total_loss")
        metric = self.log.curve("evaluation", evaluate.METRIC)
        curves = {"total_loss": losses, evaluate.METRIC: metric}
        visuals.draw_curves(curves).save(f"{self.path}/images/curves.png")
        # The last evaluation, not the best: choosing the best on the held-out
        # pictures would flatter the run.
        path = f"{self.path}/result.json"
        result = {
            "model": model,
            "step": int(self.checkpoints.step),
            "metric_name": evaluate.METRIC,
            "metric": metric[-1][1] if metric else None,
            "best_metric": max((value for _, value in metric), default=None),
            "loss_first": losses[0][1] if losses else None,
            "loss_last": losses[-1][1] if losses else None,
            **self.speed(run_folder.read_json(path)),
            "peak_memory_mb": progress.peak_memory_mb(),
            "device": self.runtime.device,
            "precision": self.runtime.policy,
            "tensorflow": tf.__version__,
            "train_steps": FLAGS.train_steps,
            "batch_size": FLAGS.batch_size,
            "rank_size": self.runtime.size,
        }
        run_folder.write_json(path, result)
        print(f"wrote {path}")
        return result

    def speed(self, earlier: dict[str, object]) -> dict[str, object]:
        """Speed of this session, or the earlier one's if it did no step."""
        names = ("images_per_second", "seconds_per_step", "first_step_seconds")
        if not self.clock.first_step:
            return {name: earlier.get(name) for name in names}
        seconds = self.clock.seconds_per_step()
        values = (self.pictures_per_step() / seconds, seconds)
        return dict(zip(names, (*values, self.clock.first_step)))
