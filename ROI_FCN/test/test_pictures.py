"""Data sets as people have them, and what can be wrong with them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.npu_config import UserError
from ROI_FCN import dataset, pictures

FOLDER = "Train_Images"


def save(path: Path, array: np.ndarray) -> None:
    """Writes a picture file, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def grey(height: int = 32, width: int = 40, value: int = 0) -> np.ndarray:
    """A flat picture."""
    return np.full((height, width), value, np.uint8)


def colour(height: int = 32, width: int = 40) -> np.ndarray:
    """A picture of noise."""
    rng = np.random.RandomState(0)
    return rng.randint(0, 256, (height, width, 3), np.uint8)


def data_set(root: Path) -> Path:
    """Two good pictures of different kinds and sizes, with their masks."""
    save(root / FOLDER / "10.png", colour())
    save(root / FOLDER / "9.jpg", colour(48, 64))
    for stem, size in (("10", (32, 40)), ("9", (48, 64))):
        label = grey(*size, 0)
        label[4:20, 4:20] = 2
        save(root / "LiquidSolidLabels" / f"{stem}.png", label)
        save(root / "VesselLabels" / f"{stem}.png", (label > 0) * np.uint8(1))
    return root


def read(root: Path, no_roi: bool = False, check_all: bool = False) -> list:
    """Reads the data set with four classes."""
    reader = pictures.Reader(str(root), "liquid_solid", 4, 255, no_roi)
    return reader.read(FOLDER, check_all)


def decoded(pair: pictures.Picture) -> tuple:
    """Image, label and region as the input pipeline gets them."""
    image, masks = dataset.Files([pair]).read(0)
    label, roi = masks.numpy()[..., 0]
    return image.numpy(), label, roi


def test_pictures_pair_by_stem_in_natural_order(tmp_path: Path) -> None:
    """Each with its label and region, whatever the extension."""
    pairs = read(data_set(tmp_path))
    assert [Path(pair.name).name for pair in pairs] == ["9.jpg", "10.png"]
    assert pairs[1].size == (32, 40)
    image, label, roi = decoded(pairs[1])
    np.testing.assert_array_equal(image, colour())
    assert set(np.unique(label)) == {0, 2}
    np.testing.assert_array_equal(roi, label > 0)


@pytest.mark.parametrize("extension", ["gif", "tif", "bmp", "TIFF", "PNG"])
def test_every_kind_of_picture(tmp_path: Path, extension: str) -> None:
    """Those that TensorFlow does not decode are decoded at the start."""
    data_set(tmp_path)
    (tmp_path / FOLDER / "10.png").unlink()
    flat = np.zeros((32, 40, 3), np.uint8) + np.uint8(90)
    save(tmp_path / FOLDER / f"10.{extension}", flat)
    image, _, _ = decoded(read(tmp_path)[1])
    np.testing.assert_array_equal(image, flat)


def test_grey_wide_and_transparent_pictures(tmp_path: Path) -> None:
    """One channel, 16 bits or four channels become RGB."""
    data_set(tmp_path)
    path = tmp_path / FOLDER / "10.png"
    alpha = np.concatenate([colour(), grey()[..., None]], -1)
    for array, expected in (
        (grey(value=77), np.repeat(grey(value=77)[..., None], 3, -1)),
        (np.full((32, 40), 65535, np.uint16), np.full((32, 40, 3), 255)),
        (alpha, colour()),
    ):
        save(path, array)
        np.testing.assert_array_equal(decoded(read(tmp_path)[1])[0], expected)
        np.testing.assert_array_equal(
            pictures.read_picture(str(path)), expected
        )


def test_regions_are_binarised(tmp_path: Path) -> None:
    """0 and 255 mean what 0 and 1 mean."""
    data_set(tmp_path)
    roi = grey()
    roi[:, 20:] = 255
    save(tmp_path / "VesselLabels" / "10.png", roi)
    np.testing.assert_array_equal(decoded(read(tmp_path)[1])[2], roi > 0)


def test_labels_as_palette_and_as_equal_channels(tmp_path: Path) -> None:
    """Indices stay indices; three equal channels are one."""
    data_set(tmp_path)
    path = tmp_path / "LiquidSolidLabels" / "10.png"
    label = Image.fromarray(grey(value=3))
    label.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 9, 9, 9] + [0] * 756)
    label.save(path)
    assert (decoded(read(tmp_path)[1])[1] == 3).all()
    save(path, np.repeat(grey(value=1)[..., None], 3, -1))
    assert (decoded(read(tmp_path)[1])[1] == 1).all()
    save(path, np.stack([grey(value=1)] * 3 + [grey(value=255)], -1))
    assert (decoded(read(tmp_path)[1])[1] == 1).all()


def test_without_regions_no_maps_are_needed(tmp_path: Path) -> None:
    """--no_roi: the whole picture is the region."""
    data_set(tmp_path)
    for path in (tmp_path / "VesselLabels").iterdir():
        path.unlink()
    assert (decoded(read(tmp_path, no_roi=True)[0])[2] == 1).all()
    with pytest.raises(UserError, match="VesselLabels/9.png.*--no_roi"):
        read(tmp_path)


def broken_label_value(root: Path) -> None:
    """A class that the label set does not have."""
    save(root / "LiquidSolidLabels" / "9.png", grey(48, 64, 7))


def broken_label_size(root: Path) -> None:
    """A label one pixel larger than its picture on each side."""
    save(root / "LiquidSolidLabels" / "9.png", grey(49, 65))


def broken_roi_size(root: Path) -> None:
    """A region of another size."""
    save(root / "VesselLabels" / "9.png", grey(48, 60))


def broken_missing_label(root: Path) -> None:
    """A picture to which there is no label."""
    (root / "LiquidSolidLabels" / "9.png").unlink()


def broken_label_colour(root: Path) -> None:
    """A label painted in colours: no palette says which class that is."""
    save(root / "LiquidSolidLabels" / "9.png", colour(48, 64))


def broken_label_wide(root: Path) -> None:
    """A 16-bit label."""
    wide = np.full((48, 64), 4000, np.uint16)
    save(root / "LiquidSolidLabels" / "9.png", wide)


def broken_truncated(root: Path) -> None:
    """A PNG cut off in its pixels."""
    path = root / FOLDER / "10.png"
    path.write_bytes(path.read_bytes()[:2000])


def broken_label_truncated(root: Path) -> None:
    """A label of which the first bytes are left."""
    path = root / "LiquidSolidLabels" / "10.png"
    path.write_bytes(path.read_bytes()[:40])


def broken_text(root: Path) -> None:
    """A text file under the name of a picture."""
    (root / FOLDER / "10.png").write_text("hello")


def broken_bomb(root: Path) -> None:
    """A small file of 102 million pixels, which would fill the memory."""
    save(root / FOLDER / "10.png", np.zeros((10100, 10100), np.uint8))


def broken_empty(root: Path) -> None:
    """No picture at all."""
    for path in (root / FOLDER).iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (broken_label_value, r"Labels/9.png: label values \[7\] where 0..3"),
        (broken_label_size, "9.png: 65x49 pixels, its picture has 64x48"),
        (broken_roi_size, "VesselLabels/9.png: 60x48 pixels, its picture"),
        (broken_missing_label, "9.jpg: no .*LiquidSolidLabels/9.png; add"),
        (broken_label_colour, "9.png: a colour picture; labels hold one"),
        (broken_label_wide, "9.png: label values up to 4000"),
        (broken_truncated, "10.png: cannot be read.*truncated"),
        (broken_label_truncated, "Labels/10.png: cannot be read"),
        (broken_text, "10.png: cannot be read as a picture"),
        (broken_bomb, "10.png: more than 100000000 pixels"),
        (broken_empty, "Train_Images: no pictures found; expected folders"),
    ],
)
def test_bad_data_is_one_line(tmp_path: Path, damage, message: str) -> None:
    """The file, what is wrong with it, and what to do."""
    damage(data_set(tmp_path))
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, check_all=True)
    assert "\n" not in str(error.value)


def test_a_cut_jpeg_is_found_without_decoding_it(tmp_path: Path) -> None:
    """Large sets are decoded while training runs, which is too late."""
    data_set(tmp_path)
    path = tmp_path / FOLDER / "9.jpg"
    reader = pictures.Reader(str(tmp_path), "liquid_solid", 4, 255, False)
    reader._read_one(str(path), decode=False)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="9.jpg: .*it ends too early"):
        reader._read_one(str(path), decode=False)


def test_missing_folder() -> None:
    """The flag is named."""
    with pytest.raises(UserError, match="--data_path=nowhere: no such"):
        pictures.Reader("nowhere", "liquid_solid", 4, 255, False)


def test_class_names_and_shares(tmp_path: Path) -> None:
    """The reference's names; further classes are numbers."""
    names = pictures.class_names("liquid_solid", 4)
    assert names == ("BackGround", "Empty Vessel", "Liquid", "Solid")
    assert pictures.class_names("fill_level", 5)[2:] == (
        "Filled",
        "class 3",
        "class 4",
    )
    assert len(pictures.class_names("exact_phase", 15)) == 15
    told = pictures.describe(read(data_set(tmp_path)), 255, names)
    assert told.startswith("2 pictures; of their pixels: BackGround 88.")
    assert "Liquid 11." in told and "Solid 0.0%" in told
