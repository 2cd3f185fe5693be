"""Evaluation over ranks, sizes and regions."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from ROI_FCN import (
    dataset,
    evaluate,
    metrics,
    pictures,
    sample_data,
    visuals,
)
from ROI_FCN.augment import Recipe
from ROI_FCN.model import create_model

CLASSES = 4
RECIPE = Recipe("none", 64, 96, -1, 1.0, 0.0, 0.0, 0.0)


class Recording:
    """A runtime that keeps what it is asked to reduce."""

    rank = 0

    def all_reduce(self, tensors: list) -> list:
        """Adds what another rank might have seen."""
        # HCCL fails or hangs where ranks reduce tensors of unequal shapes.
        self.reduced = [tuple(tensor.shape) for tensor in tensors]
        return [tensor + 1.0 for tensor in tensors]


class Alone:
    """A runtime of one rank."""

    rank = 0

    def all_reduce(self, tensors: list) -> list:
        """The tensors themselves."""
        return tensors


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list:
    """Pictures larger than the canvas."""
    path = str(tmp_path_factory.mktemp("vessels"))
    sample_data.draw(path, count=3, height=96, width=130)
    reader = pictures.Reader(path, "liquid_solid", CLASSES, -1, False)
    return reader.read("Train_Images")


@pytest.fixture(scope="module")
def network() -> tf.keras.Model:
    """A narrow network."""
    return create_model(CLASSES, 4, 8)[0]


def test_a_rank_without_pictures_takes_part_in_the_sum(
    network: tf.keras.Model, pairs: list
) -> None:
    """Four ranks and three pictures: one has none, and nobody waits."""
    step = evaluate.make_evaluation_step(network)
    shapes = []
    for rank, count in ((0, 1), (3, 0)):
        runtime = Recording()
        data = dataset.evaluation_batches(pairs, RECIPE, None, rank, 4)
        _, rows = evaluate.evaluate(step, CLASSES, data, runtime)
        assert len(rows) == count
        shapes.append(runtime.reduced)
    assert shapes[0] == shapes[1] and len(shapes[0]) == 3


def test_figures_refer_to_the_labels_own_size(
    network: tf.keras.Model, pairs: list
) -> None:
    """Every pixel of the files counts, though the network saw fewer."""
    step = evaluate.make_evaluation_step(network)
    for eval_size, pixels in ((None, 96 * 130), ((48, 80), 48 * 80)):
        data = dataset.evaluation_batches(pairs, RECIPE, eval_size)
        confusion = sum(step(batch)[0]["confusion"] for batch in data)
        assert float(tf.reduce_sum(confusion)) == len(pairs) * pixels


def test_the_loss_of_an_evaluation_is_the_mean_over_pictures(
    network: tf.keras.Model, pairs: list
) -> None:
    """Not a half of it, as the reference printed."""
    step = evaluate.make_evaluation_step(network)
    alone = []
    for pair in pairs:
        data = dataset.evaluation_batches([pair], RECIPE)
        table, _ = evaluate.evaluate(step, CLASSES, data, Alone())
        alone.append(table["cross_entropy"])
    data = dataset.evaluation_batches(pairs, RECIPE)
    table, _ = evaluate.evaluate(step, CLASSES, data, Alone())
    assert table["cross_entropy"] == pytest.approx(np.mean(alone), rel=1e-5)


def test_table_names_the_classes() -> None:
    """A row for each class by its name; an absent one is said to be so."""
    table = {"mean_iou": 0.5, "iou_per_class": [0.25, None]}
    shown = metrics.format_table(table, ("BackGround", "Liquid"))
    assert [line.split() for line in shown.splitlines()] == [
        ["mean_iou", "0.5000"],
        ["iou_per_class"],
        ["BackGround", "0.2500"],
        ["Liquid", "absent"],
    ]


def test_sheet_of_pictures_of_different_sizes(
    network: tf.keras.Model, pairs: list, tmp_path: Path
) -> None:
    """Rows are as high as their pictures need."""
    step = evaluate.make_evaluation_step(network)
    rows = []
    for size in (None, (48, 80)):
        data = dataset.evaluation_batches(pairs[:1], RECIPE, size)
        rows += evaluate.evaluate(step, CLASSES, data, Alone())[1]
    assert rows[0][0].shape == (96, 130, 3)
    assert rows[1][0].shape == (48, 80, 3)
    evaluate.save_sheet(str(tmp_path / "a" / "sheet.png"), rows)
    assert (tmp_path / "a" / "sheet.png").stat().st_size > 0


def test_ignored_pixels_are_not_shown_as_wrong() -> None:
    """They are grey, wrong ones are red, and right ones show the label."""
    label = np.array([[0, 1, 255]], np.int32)
    classes, valid = np.array([[0, 0, 1]]), np.array([[1.0, 1.0, 0.0]])
    shown = visuals.difference(classes, label, valid)
    assert shown.dtype == np.uint8
    assert shown.tolist() == [[[255] * 3, [214, 39, 40], [160] * 3]]
