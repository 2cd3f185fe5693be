"""Preprocessing, augmentation and the stream of samples."""

from pathlib import Path
from typing import Callable

import numpy as np
import pytest
import tensorflow as tf

from common.npu_config import UserError
from UNet2D import augment, dataset, sample_data
from UNet2D.pictures import Picture

GEOMETRY = dataset.Geometry(252, 1, 2, "mirror", "half_pixel", -1)


def make_pairs(count: int, side: int = 96) -> list:
    """Labelled pictures as read from disk."""
    rng = np.random.RandomState(3)
    pairs = []
    for number in range(count):
        pixels, label = sample_data.draw_picture(rng, side, 1, 2)
        pairs.append(Picture(str(number), pixels[..., None], "label", label))
    return pairs


def preprocessing_goldens(folder: Path) -> list:
    """(resize rule, file) of the preprocessing goldens."""
    return [
        ("legacy" if "tf1" in path.name else "half_pixel", dict(np.load(path)))
        for path in sorted(folder.glob("golden_preproc*.npz"))
    ]


def unpack(golden: dict, key: str) -> np.ndarray:
    """One-hot labels [388, 388, 2] of a golden file."""
    return np.unpackbits(golden[key]).reshape(388, 388, 2)


def reference_augment(sample: tf.Tensor, case: np.ndarray) -> tf.Tensor:
    """The reference's steps with the draws that a golden case forced."""
    draws = tf.constant(case[1:7], tf.float32)
    sample = augment.random_box(augment.flip(sample, draws[:2]), draws[2:])
    draw = (case[7] / augment.BRIGHTNESS + 1.0) / 2.0
    image = augment.brighten(sample[..., :1], draw)
    return tf.concat([image, sample[..., 1:]], -1)


def test_augmented_labels_equal_the_reference(
    goldens: Path, found: Callable[[list], list]
) -> None:
    """Flips and boxes move every label pixel as the reference does.

    The files hold the whole label before and after, but only every fourth
    pixel of the image, which the next test uses. Where the reference's two
    thresholds set both classes of a pixel, either is right.
    """
    files = found(preprocessing_goldens(goldens))
    for _, golden in files:
        for number, case in enumerate(golden["cases"]):
            before = unpack(golden, f"eval{number}_lab")[..., 1]
            after = unpack(golden, f"aug{number}_lab")
            sample = augment.stack_sample(
                tf.zeros([388, 388, 1]), before, np.ones_like(before), 2
            )
            sample = augment.add_border(sample, 92, "zero")
            # The reference labels its padding as class 0.
            padding = 1.0 - sample[..., -1:]
            sample = tf.concat(
                [sample[..., :1], sample[..., 1:2] + padding, sample[..., 2:]],
                -1,
            )
            moved = augment.split_sample(
                reference_augment(sample, case), 2, 92
            )["label"].numpy()
            clear = after.sum(-1) == 1
            assert (moved == after[..., 1])[clear].all()
            assert clear.mean() > 0.99


def test_augmented_images_follow_the_reference(
    goldens: Path, found: Callable[[list], list]
) -> None:
    """The grey border ends up where the reference has it, as bright.

    The files lack the picture itself; its outline tests flips, boxes and
    brightness all the same.
    """
    visible = []
    for _, golden in found(preprocessing_goldens(goldens)):
        for number, case in enumerate(golden["cases"]):
            picture = tf.ones([388, 388, 1])
            sample = tf.pad(picture, [[92, 92], [92, 92], [0, 0]])
            sample = tf.concat([sample, sample], -1)
            moved = reference_augment(sample, case)[::4, ::4, 0].numpy()
            theirs = np.abs(golden[f"aug{number}_in"] - case[7]) < 1e-5
            ours = np.abs(moved - case[7]) < 1e-5
            assert (ours == theirs).mean() > 0.995
            visible.append(ours.mean())
    # Boxes that cut all borders off would compare nothing.
    assert 0.05 < max(visible) < 0.7


def test_normalisation_and_resize_rules(
    goldens: Path, found: Callable[[list], list]
) -> None:
    """Both rules by their formula; borders of the goldens are mid grey."""
    picture = np.random.RandomState(0).randint(0, 256, (512, 512, 1))
    label = (picture[..., 0] > 99).astype(np.uint8)
    for rule, offset in (("legacy", 0.0), ("half_pixel", 0.5)):
        image, hard, valid = augment.prepare(
            tf.constant(picture, tf.uint8), label, 388, 2, rule, -1
        )
        position = (np.arange(388) + offset) * 512 / 388 - offset
        low = np.floor(position).astype(int)
        share = (position - low).astype(np.float32)
        maps = [picture[..., 0] / 127.5 - 1.0, label.astype(np.float32)]
        for map_index, plane in enumerate(maps):
            rows = plane[low] * (1 - share)[:, None]
            rows = rows + plane[np.minimum(low + 1, 511)] * share[:, None]
            both = rows[:, low] * (1 - share)
            both = both + rows[:, np.minimum(low + 1, 511)] * share
            if map_index == 0:
                np.testing.assert_allclose(image[..., 0], both, atol=1e-4)
            else:
                sure = np.abs(both - 0.5) > 1e-4
                assert (hard.numpy() == (both >= 0.5))[sure].all()
        assert valid.numpy().all()
    for _, golden in found(preprocessing_goldens(goldens)):
        assert (golden["eval0_in"][:23] == 0.0).all()


def test_folds_equal_the_reference_s_and_ours_are_a_partition(
    goldens: Path, found: Callable[[list], list]
) -> None:
    """The published split overlaps; ours covers every picture once."""
    for _, golden in found(preprocessing_goldens(goldens)):
        for fold in range(5):
            if f"val_idx_{fold}" not in golden:
                continue
            seen, held_out = dataset.split_fold(30, str(fold), "reference", 0)
            assert list(seen) == list(golden[f"train_idx_{fold}"])
            assert list(held_out) == list(golden[f"val_idx_{fold}"])
    parts = [dataset.split_fold(32, str(f), "partition", 7) for f in range(5)]
    everything = np.sort(np.concatenate([held_out for _, held_out in parts]))
    np.testing.assert_array_equal(everything, np.arange(32))
    for seen, held_out in parts:
        assert sorted([*seen, *held_out]) == list(range(32))
    with pytest.raises(UserError, match="at least 5"):
        dataset.split_fold(4, "0", "partition", 0)


def stream(start: int, take: int, rank: int = 0, size: int = 1) -> list:
    """(position, index) pairs of a stream over seven pictures."""
    data = dataset.index_stream(7, 5, start, rank, size).take(take)
    return [(int(position), int(index)) for position, index in data]


def test_stream_is_a_function_of_seed_and_position() -> None:
    """It resumes anywhere, and each epoch is a permutation of its own."""
    whole = stream(0, 28)
    assert [position for position, _ in whole] == list(range(28))
    assert stream(11, 17) == whole[11:]
    epochs = [
        [index for _, index in whole[first : first + 7]]
        for first in range(0, 28, 7)
    ]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_ranks_share_one_stream() -> None:
    """Eight ranks see disjoint samples that together are the stream."""
    # More ranks than pictures, so that one step crosses an epoch's end.
    parts = [stream(16, 3, rank, 8) for rank in range(8)]
    assert sorted(sum(parts, [])) == stream(16, 24)


@pytest.mark.parametrize("kind", ["none", "reference", "paper"])
@pytest.mark.parametrize("border", ["mirror", "zero"])
def test_batches_are_static_and_repeatable(kind: str, border: str) -> None:
    """The same numbers from any start, for any number of ranks."""
    geometry = GEOMETRY._replace(border=border)
    prepared = dataset.prepare_pictures(make_pairs(5), geometry)

    def batches(batch_size, start, rank=0, size=1):
        data = dataset.training_batches(
            prepared,
            geometry,
            kind,
            (8, 8, 32),
            0.5,
            batch_size,
            3,
            start,
            rank,
            size,
        )
        assert data.element_spec["image"].shape == (batch_size, 252, 252, 1)
        assert data.element_spec["label"].shape == (batch_size, 68, 68)
        return next(iter(data))

    whole = batches(4, 8)
    halves = [batches(2, 8, rank, 2) for rank in range(2)]
    for name, value in whole.items():
        for rank, half in enumerate(halves):
            np.testing.assert_array_equal(half[name], value[rank::2])
    assert np.abs(whole["image"]).max() <= 1.0
    assert set(np.unique(whole["dropout_mask"])) == {0.0, 2.0}
    if border == "mirror":
        assert whole["valid"].numpy().all()


def test_augmentation_is_the_same_eager_and_in_tf_data() -> None:
    """What is tested eagerly is what training sees."""
    pairs = make_pairs(1)
    prepared = dataset.prepare_pictures(pairs, GEOMETRY)
    sample = augment.stack_sample(
        *(prepared[name][0] for name in ("image", "label", "valid")), 2
    )
    sample = augment.add_border(sample, 92, "mirror")
    for kind in ("none", "reference", "paper"):
        key = tf.constant([1, 2], tf.int64)
        eager = augment.augment(sample, 1, kind, key)
        data = tf.data.Dataset.from_tensors(sample)
        graph = next(
            iter(data.map(lambda each: augment.augment(each, 1, kind, key)))  # noqa: B023
        )
        np.testing.assert_allclose(graph, eager, atol=2e-5)


def test_image_and_label_move_together() -> None:
    """An image that shows its own label still does after augmentation."""
    label = make_pairs(1, side=252)[0].label
    image = label[..., None].astype(np.float32) * 2.0 - 1.0
    sample = augment.stack_sample(
        tf.constant(image), label, np.ones_like(label), 2
    )
    for seed in range(4):
        key = tf.constant([seed, 9], tf.int64)
        draws = tf.random.stateless_uniform([augment.DRAWS], key)
        moved = augment.augment(sample, 1, "paper", key)
        shift = float(2.0 * draws[6] - 1.0) * augment.BRIGHTNESS
        bright = moved[..., 0].numpy() > shift
        agree = bright == augment.harden(moved[..., 1:3]).numpy()
        assert agree.mean() > 0.99


def test_elastic_without_displacement_is_the_identity() -> None:
    """And a uniform displacement shifts by whole pixels."""
    sample = tf.random.stateless_uniform([30, 40, 3], [0, 1])
    still = augment.elastic(sample, tf.zeros([3, 3, 2]))
    np.testing.assert_allclose(still, sample, atol=1e-6)
    shift = tf.ones([3, 3, 2]) * 3.0 / augment.ELASTIC_SIGMA_PIXELS
    moved = augment.elastic(sample, shift)
    np.testing.assert_allclose(moved[:26, :36], sample[3:29, 3:39], atol=1e-4)


def test_evaluation_takes_every_picture_once() -> None:
    """Over two ranks together."""
    prepared = dataset.prepare_pictures(make_pairs(5), GEOMETRY)
    seen = []
    for rank in range(2):
        data = dataset.evaluation_batches(prepared, GEOMETRY, rank, 2)
        seen += [batch["image"].numpy().sum() for batch in data]
    alone = [
        batch["image"].numpy().sum()
        for batch in dataset.evaluation_batches(prepared, GEOMETRY)
    ]
    assert sorted(seen) == sorted(alone) and len(alone) == 5


def test_ignored_pixels_do_not_count() -> None:
    """Their neighbourhood keeps its classes."""
    label = np.ones((64, 64), np.uint8)
    label[:32] = 255
    _, hard, valid = augment.prepare(
        tf.zeros([64, 64, 1], tf.uint8), label, 68, 2, "half_pixel", 255
    )
    assert not valid[:33].numpy().any() and valid[35:].numpy().all()
    assert (hard[35:].numpy() == 1).all()


@pytest.mark.parametrize("count", [1, 2, 5, 300])
def test_mirror_indices_reflect(count: int) -> None:
    """As numpy's reflect mode, and constant for a single pixel."""
    ours = augment.mirror_indices(-92, count + 92, count)
    mode = "reflect" if count > 1 else "edge"
    expected = np.pad(np.arange(count), 92, mode=mode)
    np.testing.assert_array_equal(ours, expected)
