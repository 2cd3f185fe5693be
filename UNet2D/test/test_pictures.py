"""Data sets as people have them, and what can be wrong with them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.npu_config import UserError
from UNet2D import pictures, sample_data

CHECKS = (1, 2, -1)  # channels, classes, ignore_label


def save(path: Path, array: np.ndarray) -> None:
    """Writes a picture file, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def grey(side: int = 32, value: int = 90) -> np.ndarray:
    """A flat picture."""
    return np.full((side, side), value, np.uint8)


def folder_set(root: Path) -> Path:
    """Two good pairs in folders, with different kinds of file."""
    save(root / "images" / "10.png", grey())
    save(root / "images" / "9.tif", grey(40))
    save(root / "labels" / "10.png", grey(32, 255))
    save(root / "labels" / "9.png", grey(40, 0))
    return root


def test_volume(tmp_path: Path) -> None:
    """The ISBI layout; labels of 0 and 255 are two classes."""
    sample_data.draw(str(tmp_path), count=3, side=64)
    pairs = pictures.read_pairs(str(tmp_path), *CHECKS)
    assert [pair.pixels.shape for pair in pairs] == [(64, 64, 1)] * 3
    assert set(np.unique(pairs[0].label)) == {0, 1}


def test_folders_pair_by_stem_in_natural_order(tmp_path: Path) -> None:
    """PNG with TIFF, different sizes, and zhixuhao's layout as well."""
    pairs = pictures.read_pairs(str(folder_set(tmp_path)), *CHECKS)
    assert [Path(pair.name).name for pair in pairs] == ["9.tif", "10.png"]
    assert pairs[0].label.shape == (40, 40) and pairs[1].label.max() == 1
    (tmp_path / "train").mkdir()
    (tmp_path / "images").rename(tmp_path / "train" / "image")
    (tmp_path / "labels").rename(tmp_path / "train" / "label")
    assert len(pictures.read_pairs(str(tmp_path), *CHECKS)) == 2


def test_colour_and_classes(tmp_path: Path) -> None:
    """Three channels, palette labels, an ignored value."""
    save(tmp_path / "images" / "a.jpg", np.zeros((32, 32, 3), np.uint8))
    label = Image.fromarray(grey(32, 4))
    label.putpalette(list(range(256)) * 3)
    (tmp_path / "labels").mkdir()
    label.save(tmp_path / "labels" / "a.png")
    pair = pictures.read_pairs(str(tmp_path), 3, 5, -1)[0]
    assert pair.pixels.shape == (32, 32, 3) and (pair.label == 4).all()
    pair = pictures.read_pairs(str(tmp_path), 3, 3, 4)[0]
    assert (pair.label == 4).all()


def test_sixteen_bits_become_eight(tmp_path: Path) -> None:
    """Microscopes write 16-bit grey."""
    wide = np.full((32, 32), 65535, np.uint16)
    save(tmp_path / "a.tif", wide)
    assert (pictures.read_single(str(tmp_path / "a.tif")) == 255).all()


def broken_label_value(root: Path) -> None:
    """A grey of anti-aliasing, which is neither of the two classes."""
    save(root / "labels" / "9.png", grey(40, 150))


def broken_size(root: Path) -> None:
    """A label one pixel larger than its picture on each side."""
    save(root / "labels" / "9.png", grey(41, 0))


def broken_missing_label(root: Path) -> None:
    """A picture to which there is no label."""
    (root / "labels" / "9.png").unlink()


def broken_channels(root: Path) -> None:
    """A colour picture where the network takes one channel."""
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[..., 0] = 1
    save(root / "images" / "9.tif", pixels)


def broken_label_colour(root: Path) -> None:
    """A label painted in red: no palette says which class that is."""
    colour = np.zeros((40, 40, 3), np.uint8)
    colour[..., 0] = 255
    save(root / "labels" / "9.png", colour)


def broken_truncated(root: Path) -> None:
    """A PNG cut off in its pixels; noise, as a flat one is too short."""
    noise = np.random.RandomState(0).randint(0, 256, (99, 99), np.uint8)
    save(root / "images" / "10.png", noise)
    path = root / "images" / "10.png"
    path.write_bytes(path.read_bytes()[:2000])


def broken_tiff(root: Path) -> None:
    """A TIFF of which the first 100 bytes are left."""
    path = root / "images" / "9.tif"
    path.write_bytes(path.read_bytes()[:100])


def broken_small(root: Path) -> None:
    """A pair of 8 pixels a side, where the network needs 16."""
    save(root / "images" / "9.tif", grey(8))
    save(root / "labels" / "9.png", grey(8, 0))


def broken_text(root: Path) -> None:
    """A text file under the name of a picture."""
    (root / "images" / "10.png").write_text("hello")


def broken_pages(root: Path) -> None:
    """A TIFF of two pages, of which a folder would train on one only."""
    sample_data.save_volume(str(root / "images" / "9.tif"), [grey(40)] * 2)


def broken_bomb(root: Path) -> None:
    """A small file of 102 million pixels, which would fill the memory."""
    save(root / "images" / "10.png", np.zeros((10100, 10100), np.uint8))


@pytest.mark.parametrize("name", ["9.png", "9.gif"])
def test_a_grey_picture_may_come_in_colours(tmp_path: Path, name: str) -> None:
    """A palette or three equal channels say no more than one channel."""
    ids = np.tile(np.arange(40, dtype=np.uint8), (40, 1))
    # Falling, so that the indices would be another picture.
    shades = np.repeat(np.arange(200, 0, -5, dtype=np.uint8), 3)
    folder = folder_set(tmp_path) / "images"
    (folder / "9.tif").unlink()
    image = Image.fromarray(ids)
    image.putpalette(shades.tobytes())
    image.save(folder / name)
    pixels = pictures.read_pairs(str(tmp_path), *CHECKS)[0].pixels
    np.testing.assert_array_equal(pixels, 200 - 5 * ids[..., np.newaxis])
    save(folder / "9.png", np.stack([ids] * 3, -1))
    pixels = pictures.read_single(str(folder / "9.png"))
    pixels = pictures.check_picture("9.png", pixels, channels=1)
    np.testing.assert_array_equal(pixels[..., 0], ids)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (broken_label_value, r"labels/9.png: label values \[150\] where 0..1"),
        (broken_size, "9.tif: the picture has 40x40 pixels, its label 41x41"),
        (broken_missing_label, r"9.tif: no label 9\.\* in"),
        (broken_channels, "9.tif: 3 channels where --in_channels=1"),
        (broken_label_colour, "a colour picture; labels hold one class id"),
        (broken_truncated, "10.png: cannot be read.*truncated"),
        (broken_tiff, "9.tif: cannot be read"),
        (broken_small, "9.tif: 8x8 pixels; a tile needs at least 16"),
        (broken_text, "10.png: cannot be read as a picture"),
        (broken_pages, "9.tif: 2 pages; in folders each file holds one"),
        (broken_bomb, "10.png: more than 100000000 pixels"),
    ],
)
def test_bad_data_is_one_line(tmp_path: Path, damage, message: str) -> None:
    """The file, what is wrong with it, and what to do."""
    damage(folder_set(tmp_path))
    with pytest.raises(UserError, match=message) as error:
        pictures.read_pairs(str(tmp_path), *CHECKS)
    assert "\n" not in str(error.value)


def test_volume_without_labels_and_empty_folders(tmp_path: Path) -> None:
    """The message shows the layouts."""
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(UserError, match="--data_path=.*images/"):
            pictures.read_pairs(str(path), *CHECKS)
    sample_data.draw(str(tmp_path), count=2, side=64)
    (tmp_path / "train-labels.tif").unlink()
    with pytest.raises(UserError, match="train-labels.tif: missing"):
        pictures.read_pairs(str(tmp_path), *CHECKS)
