"""Augmentation against numbers of the TF1 reference."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from BlitzNet import augment
from BlitzNet.layers import resize


@pytest.fixture(scope="module")
def golden(goldens: Path) -> dict[str, np.ndarray]:
    """The reference's picture, boxes, and what it made of them."""
    path = goldens / "aug_golden.npz"
    if not path.exists():
        pytest.skip("no aug_golden.npz in --goldens")
    return dict(np.load(path))


def test_zoom_out(golden: dict[str, np.ndarray]) -> None:
    """The canvas's size, which may lack a pixel, its colour and its boxes."""
    size = tf.constant(golden["img"].shape[:2])
    shift = tf.constant(
        [golden["zoom_y_shift"], golden["zoom_x_shift"]], tf.float32
    )
    zoom = tf.constant(golden["zoom_X_out"], tf.float32)
    canvas = augment.make_canvas(size, zoom, shift)
    whole = canvas.before + size + canvas.after
    assert whole.numpy().tolist() == golden["zoom_shape"][:2].tolist()
    fill = tf.constant(augment.CANVAS_RGB)
    image = augment.cut(golden["img"], -canvas.before, whole, fill)
    # The reference's canvas is background in the mask.
    mask = augment.cut(golden["seg"], -canvas.before, whole, tf.zeros([1]))
    both = np.concatenate([image, mask], -1)[::6, ::6]
    np.testing.assert_allclose(both, golden["zoom_img_stride6"], atol=1e-5)
    boxes = augment.zoom_boxes(golden["boxes"], canvas, size)
    np.testing.assert_allclose(boxes, golden["zoom_boxes"], atol=1e-6)


def test_crop(golden: dict[str, np.ndarray]) -> None:
    """Boxes whose centre is left stay, clipped; the picture is cut."""
    begin = tf.constant(golden["crop_begin_yx"])
    extent = tf.constant(golden["crop_size_hw"])
    size = golden["img"].shape[:2]
    shares = tf.cast(tf.stack([begin, extent]), tf.float32) / size
    boxes, labels = augment.crop_boxes(
        golden["boxes"], golden["labels"], shares[0, ::-1], shares[1, ::-1]
    )
    np.testing.assert_allclose(boxes, golden["crop_boxes"], atol=1e-6)
    np.testing.assert_array_equal(labels, golden["crop_labels"])
    both = np.concatenate([golden["img"], golden["seg"]], -1)
    cropped = augment.cut(both, begin, extent, tf.zeros([4])).numpy()
    assert cropped.shape[:2] == tuple(extent.numpy())
    np.testing.assert_allclose(
        cropped[::5, ::5], golden["crop_img"], atol=1e-6
    )


def test_flip_and_final_sizes(golden: dict[str, np.ndarray]) -> None:
    """Mirrored boxes; legacy resizes of picture and mask; small boxes go."""
    np.testing.assert_allclose(
        augment.flip_boxes(golden["boxes"]), golden["flip_boxes"], atol=1e-6
    )
    image = augment.resize_image(golden["img"], 300)
    np.testing.assert_allclose(
        image[::7, ::7], golden["final_img_stride7"], atol=1e-5
    )
    mask = resize(golden["seg"][np.newaxis], [75, 75], "nearest")[0, ..., 0]
    np.testing.assert_array_equal(mask, golden["final_seg"])
    boxes, labels = augment.drop_small(golden["boxes"], golden["labels"], 300)
    np.testing.assert_allclose(boxes, golden["final_boxes"], atol=1e-6)
    np.testing.assert_array_equal(labels, golden["final_labels"])


def test_colours(golden: dict[str, np.ndarray]) -> None:
    """Brightness, saturation, hue and contrast in the first order."""
    key = "colour_order0_b0.1_s1.3_h-0.05_c0.7_stride6"
    changed = augment.change_colours(
        golden["img"], tf.constant(0), 0.1, 1.3, -0.05, 0.7
    )
    np.testing.assert_allclose(changed[::6, ::6], golden[key], atol=2e-5)
