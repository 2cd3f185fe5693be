"""Evaluation over ranks, sizes and views, and what is shipped."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from BiSeNet import evaluate, predict, run_folder, visuals
from BiSeNet.classes import UNKNOWN, Classes
from BiSeNet.model import create_model
from common.npu_config import UserError

CLASSES = Classes(
    ("Road", "Car", "Void"), ((128, 64, 128), (64, 0, 128), (0, 0, 0)), (2,)
)
SIZES = ((50, 70), (70, 50), (33, 64))
SHEET = Path(run_folder.__file__).parent / "docs" / "camvid_evaluation.png"


class Recording:
    """A runtime that keeps what it is asked to reduce."""

    rank = 0

    def all_reduce(self, tensors: list) -> list:
        """The tensors themselves; their shapes are noted."""
        self.reduced = [tuple(tensor.shape) for tensor in tensors]
        return tensors


@pytest.fixture(scope="module")
def network() -> tf.keras.Model:
    """A network that has learned nothing."""
    tf.random.set_seed(0)
    return create_model(3)[0]


def batches(count: int) -> list[dict[str, tf.Tensor]]:
    """Pictures of different sizes, each alone in its batch."""
    rng = np.random.RandomState(0)
    return [
        {
            "image": tf.constant(
                rng.uniform(0, 255, (1, *size, 3)), tf.float32
            ),
            "label": tf.constant(
                rng.choice([0, 1, 2, UNKNOWN], (1, *size)), tf.int32
            ),
        }
        for size in SIZES[:count]
    ]


def test_a_rank_without_pictures_takes_part_in_the_sum(
    network: tf.keras.Model,
) -> None:
    """More ranks than pictures: one has none, and nobody waits."""
    step = evaluate.make_evaluation_step(network, CLASSES)
    shapes = []
    for count in (1, 0):
        runtime = Recording()
        _, rows = evaluate.evaluate(step, CLASSES, batches(count), runtime)
        assert len(rows) == count
        shapes.append(runtime.reduced)
    assert shapes[0] == shapes[1] and len(shapes[0]) == 3


def test_every_pixel_counts_once(network: tf.keras.Model) -> None:
    """At the labels' own sizes, over all pictures together."""
    step = evaluate.make_evaluation_step(network, CLASSES)
    known = hits = valid = 0
    for batch in batches(3):
        label = batch["label"].numpy()
        totals, predicted = step(batch)
        known += (label != UNKNOWN).sum()
        valid += (label < 2).sum()
        hits += ((label < 2) & (predicted.numpy() == label)).sum()
        assert float(tf.reduce_sum(totals["confusion"])) == (
            (label != UNKNOWN).sum()
        )
    table, _ = evaluate.evaluate(step, CLASSES, batches(3), Recording())
    assert table["pixel_accuracy"] == pytest.approx(hits / valid)
    assert known > valid


def test_views_are_averaged(network: tf.keras.Model) -> None:
    """Several sizes and the mirror image, each as a probability."""
    images = batches(1)[0]["image"]
    plain = evaluate.predict_scores(network, images)
    np.testing.assert_array_equal(plain, network(images))
    both = evaluate.predict_scores(network, images, (1.0,), flip=True)
    mirrored = network(images[:, :, ::-1])[:, :, ::-1]
    wanted = (tf.nn.softmax(plain) + tf.nn.softmax(mirrored)) / 2
    np.testing.assert_allclose(tf.exp(both), wanted, atol=1e-5)
    # A mirrored picture then gives the mirrored answer.
    other = evaluate.predict_scores(
        network, images[:, :, ::-1], (1.0,), flip=True
    )
    np.testing.assert_allclose(other[:, :, ::-1], both, atol=1e-4)
    several = evaluate.predict_scores(network, images, (0.5, 1.5))
    assert several.shape == plain.shape
    assert np.abs(several - tf.nn.log_softmax(plain)).max() > 1e-4


def test_scales_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag is named."""
    for wrong in (["a"], [], ["9"], ["1", "0"]):
        given = SimpleNamespace(scales=wrong)
        monkeypatch.setattr(evaluate, "FLAGS", given)
        with pytest.raises(UserError, match="--scales=.*: numbers of 0.1..4"):
            evaluate.read_scales()


def test_pictures_of_results(tmp_path: Path, network: tf.keras.Model) -> None:
    """In the data set's own colours; what is ignored is grey."""
    label = np.array([[0, 1], [2, UNKNOWN]])
    shown = visuals.palette(CLASSES)[label]
    assert shown[0, 1].tolist() == [64, 0, 128]
    assert shown[1, 1].tolist() == [0, 0, 0]
    tiles = visuals.difference(np.array([[0, 0], [0, 0]]), label, CLASSES)
    assert tiles[0, 0].min() > 200 and tiles[0, 1].tolist() == [214, 39, 40]
    assert (tiles[1] == 160).all()
    blended = visuals.overlay(np.zeros((2, 2, 3)), label, CLASSES)
    np.testing.assert_array_equal(blended, shown // 2)
    step = evaluate.make_evaluation_step(network, CLASSES)
    _, rows = evaluate.evaluate(step, CLASSES, batches(3), Recording())
    evaluate.save_sheet(str(tmp_path / "a" / "sheet.png"), rows)
    assert (tmp_path / "a" / "sheet.png").stat().st_size > 0


def test_the_run_that_is_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken where none is given; without it one line tells so."""
    monkeypatch.setattr(run_folder, "SHIPPED_RUN", str(tmp_path / "camvid"))
    assert run_folder.find_run("mine") == "mine"
    with pytest.raises(UserError, match="--run: not given"):
        run_folder.find_run(None)
    (tmp_path / "camvid").mkdir()
    assert run_folder.find_run(None) == str(tmp_path / "camvid")


def test_the_weights_that_are_shipped(tmp_path: Path) -> None:
    """Small, and they label what the README's contact sheet shows."""
    weights = Path(run_folder.SHIPPED_RUN) / "weights.npz"
    assert weights.stat().st_size <= 6_000_000
    with Image.open(SHEET) as sheet:
        top = visuals.CAPTION + visuals.GAP
        tile = (visuals.TILE, visuals.TILE * 3 // 4)
        lefts = [visuals.GAP, 2 * visuals.GAP + visuals.TILE]
        picture, label = (
            sheet.crop((left, top, left + tile[0], top + tile[1]))
            for left in lefts
        )
    picture.save(tmp_path / "street.png")
    paths = [str(tmp_path / "street.png")]
    predict.predict_run(run_folder.SHIPPED_RUN, paths, str(tmp_path))
    with Image.open(tmp_path / "street_mask.png") as mask:
        assert mask.size == tile
        colours = np.asarray(mask.convert("RGB"))
    # At half the size that it was trained on; guessing Road gives a third.
    right = (colours == np.asarray(label.convert("RGB"))).all(-1).mean()
    assert right > 0.8
