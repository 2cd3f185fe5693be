"""Evaluation over ranks and over folds."""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from absl import flags

from common.npu_config import UserError
from UNet2D import dataset, evaluate, train, visuals
from UNet2D.model import create_model

SIDE, CLASSES = 188, 2


class Recording:
    """A runtime that keeps what it is asked to reduce."""

    rank = 0

    def describe(self) -> str:
        """One line for the log."""
        return "none"

    def all_reduce(self, tensors: list) -> list:
        """Adds what another rank might have seen."""
        # HCCL fails or hangs where ranks reduce tensors of unequal shapes.
        self.reduced = [tuple(tensor.shape) for tensor in tensors]
        return [tensor + 1.0 for tensor in tensors]


def batches(count: int) -> tf.data.Dataset:
    """`count` pictures, one a batch."""
    output = SIDE - 184
    data = tf.data.Dataset.range(count).map(
        lambda index: {
            "image": tf.fill([SIDE, SIDE, 1], tf.cast(index, tf.float32)),
            "label": tf.ones([output, output], tf.int32),
            "valid": tf.ones([output, output]),
        }
    )
    return data.batch(1, drop_remainder=True)


def test_a_rank_without_pictures_takes_part_in_the_sum() -> None:
    """Eight ranks and six pictures: two have none, and nobody waits."""
    step = evaluate.make_evaluation_step(create_model(CLASSES, 1, 4)[0])
    shapes = []
    for count in (2, 0):
        runtime = Recording()
        table, rows = evaluate.evaluate(step, CLASSES, batches(count), runtime)
        assert len(rows) == count
        shapes.append(runtime.reduced)
    assert shapes[0] == shapes[1] and len(shapes[0]) == 4


def test_mean_over_folds_leaves_absent_classes_out() -> None:
    """A class counts in the folds that have it, and may be in none."""
    tables = [
        {"mean_iou": 0.5, "iou_per_class": [0.4, None, None]},
        {"mean_iou": 0.7, "iou_per_class": [0.6, 0.2, None]},
    ]
    mean = evaluate.mean_tables(tables)
    assert mean["mean_iou"] == pytest.approx(0.6)
    np.testing.assert_allclose(mean["iou_per_class"][:2], [0.5, 0.2])
    assert mean["iou_per_class"][2] is None
    assert evaluate.mean_tables(tables[:1]) == tables[0]


def test_folds_and_their_folders() -> None:
    """`all` is five runs; anything else but a fold is refused."""
    assert dataset.fold_runs("3", "run") == [("3", "run")]
    assert [fold for fold, _ in dataset.fold_runs("all", "run")] == list(
        "01234"
    )
    for wrong in ("7", "one"):
        with pytest.raises(UserError, match=f"--fold={wrong}: one of 0, 1"):
            dataset.fold_runs(wrong, "run")


def test_a_finished_run_is_judged_on_what_it_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """train.py --exec_mode=evaluate without --fold takes the run's own."""
    # A set of its own: flags of two models would collide in one process.
    own = flags.FlagValues()
    monkeypatch.setattr(train, "FLAGS", own)
    for name, value in (
        ("exec_mode", "evaluate"),
        ("output_path", str(tmp_path)),
        ("data_path", None),
        ("fold", "0"),
    ):
        flags.DEFINE_string(name, value, "As in train.py.", own)
    for name, value in (("image_size", 572), ("limit_eval", 0)):
        flags.DEFINE_integer(name, value, "As in train.py.", flag_values=own)
    values = {"fold": "3", "data_path": "data"}
    (tmp_path / "flags.json").write_text(json.dumps(values))
    monkeypatch.setattr(train.npu_config, "setup", Recording)
    monkeypatch.setattr(train.run_folder, "all_flags", str)
    monkeypatch.setattr(evaluate, "restore", lambda _: (dict(values), None))
    judged = []
    monkeypatch.setattr(
        evaluate,
        "evaluate_run",
        lambda values, *_: judged.append(values["fold"]) or ({}, []),
    )
    monkeypatch.setattr(evaluate, "save_results", lambda *_: None)
    for given in ([], ["--fold=1"]):
        own(["train.py", *given])
        train.main()
    assert judged == ["3", "1"]
    # Nothing was held out by a run that learned all pictures.
    (tmp_path / "flags.json").write_text(json.dumps({"fold": "none"}))
    own.unparse_flags()
    own(["train.py"])
    with pytest.raises(UserError, match="--fold=none leaves nothing"):
        train.main()


def test_ignored_pixels_are_not_shown_as_wrong() -> None:
    """They are grey, wrong ones are red, and right ones show the label."""
    label = np.array([[0, 1, 255]], np.int32)
    classes, valid = np.array([[0, 0, 1]]), np.array([[1.0, 1.0, 0.0]])
    shown = visuals.difference(classes, label, valid)
    assert shown.dtype == np.uint8
    assert shown.tolist() == [[[255] * 3, [214, 39, 40], [160] * 3]]
