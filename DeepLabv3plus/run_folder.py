"""What a run leaves on disk, and how it is found again.

A run folder explains itself: flags.json holds the network's shape, so that a
checkpoint never needs its flags repeated. The same command continues it.
"""

import glob
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence

import tensorflow as tf
from absl import flags

from common import npu_config
from common.npu_config import UserError

FLAGS = flags.FLAGS
# Everything that --overwrite removes: ours, and nothing else in the folder.
OWN_FILES = (
    "flags.json",
    "metrics.jsonl",
    "events.out.tfevents*",
    "ckpt",
    "best",
    "weights.npz",
    "images",
    "result.json",
)
# How TensorFlow tells, depending on where a checkpoint is cut off.
UNREADABLE = (
    tf.errors.OpError,
    AssertionError,
    ValueError,
    IndexError,
    RuntimeError,
)


def write_json(path: str, value: object) -> None:
    """Writes JSON; a reader sees the old file or the whole new one."""
    # In the same folder: renaming is atomic within one file system only.
    with tempfile.NamedTemporaryFile(
        "w", dir=os.path.dirname(path), suffix=".part", delete=False
    ) as file:
        json.dump(value, file, indent=1)
        file.write("\n")
    # Temporary files are private; a run is to be read by others too.
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def read_flags(run: str) -> dict[str, object]:
    """The flags of the run in folder `run`."""
    path = os.path.join(run, "flags.json")
    try:
        with open(path, encoding="utf8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--run={run}: no readable flags.json ({error}); give the "
            "--output_path of a training run"
        ) from None


def read_json(path: str) -> dict[str, object]:
    """The object in a JSON file, empty if there is no such file."""
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf8") as file:
        return json.load(file)


def last_step(run: str) -> int:
    """Steps done by the run, as its result.json says."""
    return int(read_json(os.path.join(run, "result.json")).get("step", 0))


def all_flags() -> str:
    """Two lines: the flags that were given, and those of this script left."""
    given = [
        flag
        for module in FLAGS.flags_by_module_dict().values()
        for flag in module
        if flag.present
    ]
    own = FLAGS.get_key_flags_for_module(sys.argv[0])
    common = FLAGS.flags_by_module_dict().get(npu_config.__name__, [])
    left = [
        flag
        for flag in (*own, *common)
        if not flag.present and not flag.help.startswith("Alias for")
    ]
    return f"flags: {_as_given(given)}\ndefaults: {_as_given(left)}"


def _as_given(some: Sequence[flags.Flag]) -> str:
    """Flags as they could be given, each once."""
    words = {
        f"--{each.name}={each.value}" for each in some if is_plain(each.value)
    }
    return " ".join(sorted(words))


def open_run(
    path: str,
    model: str,
    shape_flags: Sequence[str],
    overwrite: bool,
) -> None:
    """Makes the run folder, or checks that it holds this very run.

    Args:
      path: the folder.
      model: name of the model.
      shape_flags: names of the flags that must not change within a run.
      overwrite: remove what an earlier run left.
    """
    values = {
        name: value
        for name, value in FLAGS.flag_values_dict().items()
        if is_plain(value)
    }
    values.update(model=model)
    # By name and never the folder itself: somebody's home may be in it.
    if overwrite:
        for pattern in OWN_FILES:
            for name in glob.glob(os.path.join(glob.escape(path), pattern)):
                (shutil.rmtree if os.path.isdir(name) else os.remove)(name)
    if os.path.exists(os.path.join(path, "flags.json")):
        before = read_flags(path)
        # Other flags may change: a longer run, another rate, more ranks.
        for name in ("model", *shape_flags):
            if before.get(name) != values[name]:
                raise UserError(
                    f"--output_path={path} holds a run with {name}="
                    f"{before.get(name)}, now {values[name]}; choose "
                    "another folder, or start anew with --overwrite"
                )
    os.makedirs(os.path.join(path, "images"), exist_ok=True)
    write_json(os.path.join(path, "flags.json"), values)


def is_plain(value: object) -> bool:
    """True if JSON keeps the value."""
    return value is None or isinstance(value, (bool, int, float, str, list))


class MetricsLog:
    """metrics.jsonl and TensorBoard events of one run.

    Events go through the TF1 writer, which needs no tensorboard package in
    any version of TensorFlow.
    """

    def __init__(self, path: str, first_step: int) -> None:
        """Opens the log of a run that continues after `first_step`."""
        self.path = os.path.join(path, "metrics.jsonl")
        # Lines after the checkpoint will be written again by its resumption.
        kept = [line for line in self.read() if line["step"] <= first_step]
        with open(self.path + ".part", "w", encoding="utf8") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
        os.replace(self.path + ".part", self.path)
        # The TF1 writer refuses to be made in eager mode.
        with tf.Graph().as_default():
            self.events = tf.compat.v1.summary.FileWriter(path)

    def read(self) -> list[dict[str, object]]:
        """All lines so far; a line cut off by a kill is left out."""
        if not os.path.exists(self.path):
            return []
        lines = []
        with open(self.path, encoding="utf8") as file:
            for line in file:
                if line.endswith("}\n"):
                    lines.append(json.loads(line))
        return lines

    def write(self, step: int, values: dict[str, object]) -> None:
        """Appends one line, and its numbers to the events."""
        with open(self.path, "a", encoding="utf8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        numbers = {**values, **values.get("evaluation", {})}
        # Figures per class are lists; the events keep their means.
        summary = tf.compat.v1.Summary()
        for name, value in numbers.items():
            if isinstance(value, (int, float)):
                summary.value.add(tag=name, simple_value=value)
        self.events.add_summary(summary, step)
        # A killed run should show its curve up to the last line.
        self.events.flush()

    def write_image(self, step: int, name: str, path: str) -> None:
        """Adds a PNG file to the events."""
        with open(path, "rb") as file:
            image = tf.compat.v1.Summary.Image(
                encoded_image_string=file.read()
            )
        summary = tf.compat.v1.Summary()
        summary.value.add(tag=name, image=image)
        self.events.add_summary(summary, step)
        self.events.flush()

    def curve(self, *names: str) -> list[tuple]:
        """(step, value) pairs of a nested value such as
        ("evaluation", "mean_iou")."""
        pairs = []
        for line in self.read():
            value = line
            for name in names:
                value = value.get(name) if isinstance(value, dict) else None
            if value is not None:
                pairs.append((line["step"], value))
        return pairs


class Checkpoints:
    """Resumable state under <run>/ckpt; survives a damaged newest file."""

    def __init__(
        self,
        path: str,
        keep: int,
        network: tf.keras.Model,
        optimizer: tf.keras.optimizers.Optimizer,
    ) -> None:
        self.step = tf.Variable(0, dtype=tf.int64, trainable=False)
        # Below any figure, so that the first evaluation is the best so far.
        self.best = tf.Variable(-1.0, dtype=tf.float32, trainable=False)
        self.network, self.optimizer = network, optimizer
        weights = {"model": network, "step": self.step, "best": self.best}
        # prepare_optimizer has made the slots: restoring fills what is there,
        # and assert_consumed would fail on the rest.
        self.checkpoint = tf.train.Checkpoint(optimizer=optimizer, **weights)
        self.latest = tf.train.CheckpointManager(
            self.checkpoint, os.path.join(path, "ckpt"), max_to_keep=keep
        )
        # Without velocities, which are half of it.
        self.best_manager = tf.train.CheckpointManager(
            tf.train.Checkpoint(**weights),
            os.path.join(path, "best"),
            max_to_keep=1,
        )

    def variables(self) -> list[tf.Variable]:
        """All state, for ranks that did not read it themselves."""
        slots = npu_config.optimizer_variables(self.optimizer)
        return [*self.network.variables, *slots, self.step, self.best]

    def restore(self) -> None:
        """Restores the newest readable checkpoint, if there is any."""
        known = self.latest.checkpoints[::-1]
        for path in known:
            try:
                # Without the assertion a checkpoint of the other Keras would
                # restore nothing and say nothing.
                self.checkpoint.restore(path).assert_consumed()
                print(f"resuming from {path}")
                return
            except UNREADABLE as error:
                reason = " ".join(str(error).split())[:160]
                print(f"{path} is damaged ({reason}); trying the one before")
        if known:
            raise UserError(
                f"none of the checkpoints in {self.latest.directory} can be "
                "read; start anew with --overwrite"
            )

    def save(self, step: int) -> None:
        """Saves the state after `step` steps."""
        self._save(self.latest, step)

    def save_best(self, step: int) -> None:
        """Saves the weights as the best so far, beside the newest state."""
        self._save(self.best_manager, step)

    def _save(self, manager: tf.train.CheckpointManager, step: int) -> None:
        """Saves; where that fails, an incomplete file is removed again."""
        self.step.assign(step)
        try:
            manager.save(checkpoint_number=step)
        except (OSError, tf.errors.OpError):
            # On a full disk the half-written file would block the next try.
            prefix = os.path.join(manager.directory, f"ckpt-{step}.")
            for name in glob.glob(glob.escape(prefix) + "*"):
                os.remove(name)
            raise
