"""Data sets as people have them, and what can be wrong with them."""

import os
from pathlib import Path
from typing import Callable, Optional

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from common.npu_config import UserError
from DeepLabv3plus import (
    build_tfrecords,
    convert_camvid,
    dataset,
    layouts,
    pictures,
    visuals,
)

LISTS = Path("ImageSets") / "Segmentation"


def save(path: Path, array: np.ndarray) -> None:
    """Writes a picture file, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def save_label(path: Path, ids: np.ndarray) -> None:
    """Writes a label as VOC has it: indices with a palette."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(ids)
    image.putpalette(visuals.palette(256).ravel().tolist())
    image.save(path)


def colour(height: int = 32, width: int = 40) -> np.ndarray:
    """A picture of noise."""
    rng = np.random.RandomState(0)
    return rng.randint(0, 256, (height, width, 3), np.uint8)


def label(height: int = 32, width: int = 40) -> np.ndarray:
    """Background, a person and void."""
    ids = np.zeros((height, width), np.uint8)
    ids[4:20, 4:20], ids[0] = 15, 255
    return ids


def voc(root: Path) -> Path:
    """A devkit of three pictures, two of which are for training."""
    for stem, size in (("a", (32, 40)), ("b", (48, 64)), ("c", (32, 40))):
        save(root / "JPEGImages" / f"{stem}.jpg", colour(*size))
        save_label(root / "SegmentationClass" / f"{stem}.png", label(*size))
    (root / LISTS).mkdir(parents=True)
    (root / LISTS / "train.txt").write_text("b\na\n\n")
    (root / LISTS / "val.txt").write_text("c\n")
    (root / LISTS / "trainaug.txt").write_text("a\nb\n")
    return root


def read(
    root: Path, split: str = "train", folder: Optional[str] = None
) -> list[pictures.Picture]:
    """A split with VOC's classes."""
    sources = layouts.find_sources(str(root), split, folder)
    return pictures.read_all(sources, 21, 255, check_all=True)


def decoded(pair: pictures.Picture) -> tuple[np.ndarray, np.ndarray]:
    """Image and label as the input pipeline gets them."""
    image, ids = dataset.Files([pair]).read(0)
    return image.numpy(), ids.numpy()[..., 0]


def names(pairs: list[pictures.Picture]) -> list[str]:
    """File names of pictures."""
    return [os.path.basename(pair.name) for pair in pairs]


@pytest.mark.parametrize("below", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc_by_its_lists(tmp_path: Path, below: str) -> None:
    """In the list's order, from any folder above; indices stay indices."""
    voc(tmp_path / below)
    pairs = read(tmp_path)
    assert names(pairs) == ["b.jpg", "a.jpg"]
    assert names(read(tmp_path, "train_aug")) == ["a.jpg", "b.jpg"]
    assert names(read(tmp_path, "val")) == ["c.jpg"]
    image, ids = decoded(pairs[1])
    assert image.shape == (32, 40, 3)
    np.testing.assert_array_equal(ids, label())


def test_labels_without_colours_come_first(tmp_path: Path) -> None:
    """As the reference's own folder; another one can be named."""
    voc(tmp_path)
    for stem, size in (("a", (32, 40)), ("b", (48, 64))):
        for folder, value in (("SegmentationClassRaw", 7), ("Aug", 9)):
            ids = np.full(size, value, np.uint8)
            save(tmp_path / folder / f"{stem}.png", ids)
    assert (decoded(read(tmp_path)[0])[1] == 7).all()
    assert (decoded(read(tmp_path, folder="Aug")[0])[1] == 9).all()
    with pytest.raises(UserError, match="no folder Other with labels"):
        read(tmp_path, folder="Other")


def test_records_hold_what_the_devkit_holds(tmp_path: Path) -> None:
    """The reference's shards, schema and bytes, and back again."""
    root, output = voc(tmp_path / "voc"), tmp_path / "out" / "tfrecord"
    output.mkdir(parents=True)
    for split in ("train", "val"):
        sources = layouts.find_sources(str(root), split)
        build_tfrecords.write_split(sources, str(output), split)
    shards = sorted(path.name for path in output.glob("train-*"))
    assert shards == [
        f"train-{number:05d}-of-00004.tfrecord" for number in range(4)
    ]
    (record, *_) = tf.data.TFRecordDataset(str(output / shards[0]))
    features = tf.train.Example.FromString(record.numpy()).features.feature
    content = (root / "JPEGImages" / "b.jpg").read_bytes()
    assert features["image/encoded"].bytes_list.value == [content]
    assert features["image/filename"].bytes_list.value == [b"b"]
    assert features["image/format"].bytes_list.value == [b"jpeg"]
    for name, value in (("height", 48), ("width", 64), ("channels", 3)):
        assert features[f"image/{name}"].int64_list.value == [value]
    # The folder above tfrecord/ does too, as in the seed's scripts.
    for folder in (output, output.parent):
        for ours, theirs in zip(read(folder), read(root)):
            for one, other in zip(decoded(ours), decoded(theirs)):
                np.testing.assert_array_equal(one, other)
    assert len(read(output, "val")) == 1


def test_own_folders(tmp_path: Path) -> None:
    """Pictures of any kind and size, with labels of the same stems."""
    for stem in ("10.png", "9.jpg", "11.tif", "12.bmp"):
        save(tmp_path / "train" / stem, colour())
        ids = f"{Path(stem).stem}.png"
        save(tmp_path / "train_labels" / ids, label())
    pairs = read(tmp_path)
    assert names(pairs) == ["9.jpg", "10.png", "11.tif", "12.bmp"]
    for pair in pairs[1:]:
        image, ids = decoded(pair)
        np.testing.assert_array_equal(image, colour())
        np.testing.assert_array_equal(ids, label())


def test_grey_wide_and_transparent_pictures(tmp_path: Path) -> None:
    """One channel, 16 bits or four channels become RGB."""
    path = tmp_path / "train" / "a.png"
    save(tmp_path / "train_labels" / "a.png", label())
    grey = np.full((32, 40), 77, np.uint8)
    alpha = np.concatenate([colour(), grey[..., None]], -1)
    for array, expected in (
        (grey, np.repeat(grey[..., None], 3, -1)),
        (np.full((32, 40), 65535, np.uint16), np.full((32, 40, 3), 255)),
        (alpha, colour()),
    ):
        save(path, array)
        np.testing.assert_array_equal(decoded(read(tmp_path)[0])[0], expected)


def test_class_names(tmp_path: Path) -> None:
    """VOC's, or those beside the data; further classes are numbers."""
    assert len(pictures.read_class_names(str(tmp_path))) == 21
    (tmp_path / "class_names.txt").write_text("sky\nroad\n\n")
    given = pictures.read_class_names(str(tmp_path))
    assert pictures.fit_names(given, 3) == ("sky", "road", "class 2")
    told = pictures.describe(read(voc(tmp_path)), 255, ("a", "b"))
    assert told.startswith("2 pictures; of their pixels: a 8")


def broken_value(root: Path) -> None:
    """A class that VOC does not have."""
    ids = np.full((48, 64), 33, np.uint8)
    save(root / "SegmentationClass" / "b.png", ids)


def broken_size(root: Path) -> None:
    """A label one pixel larger than its picture on each side."""
    save_label(root / "SegmentationClass" / "b.png", label(49, 65))


def broken_missing_label(root: Path) -> None:
    """A picture to which there is no label."""
    (root / "SegmentationClass" / "b.png").unlink()


def broken_missing_picture(root: Path) -> None:
    """A line of the list that names nothing."""
    (root / "JPEGImages" / "b.jpg").unlink()


def broken_colours(root: Path) -> None:
    """A label whose palette was flattened into colours."""
    save(root / "SegmentationClass" / "b.png", colour(48, 64))


def broken_truncated(root: Path) -> None:
    """A JPEG cut off in its pixels."""
    path = root / "JPEGImages" / "b.jpg"
    path.write_bytes(path.read_bytes()[:900])


def broken_text(root: Path) -> None:
    """A text file under the name of a picture."""
    (root / "JPEGImages" / "b.jpg").write_text("hello")


def broken_list(root: Path) -> None:
    """No list of the split, and none of the other layouts."""
    (root / LISTS / "train.txt").unlink()


def broken_bomb(root: Path) -> None:
    """A small file of 102 million pixels, which would fill the memory."""
    (root / "JPEGImages" / "b.jpg").unlink()
    # Between once and twice the limit, where Pillow itself only warns.
    save(root / "JPEGImages" / "b.png", np.zeros((10100, 10100), np.uint8))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (broken_value, r"b.png: label values \[33\] where 0..20 and ignore"),
        (broken_size, "b.png: 65x49 pixels, its picture has 64x48"),
        (broken_missing_label, "b.jpg: no label .*b.png; add it"),
        (broken_missing_picture, "train.txt: names b, which is not in JPEG"),
        (broken_colours, "b.png: a colour picture; labels hold one"),
        (broken_truncated, "b.jpg: cannot be read.*truncated"),
        (broken_text, "b.jpg: cannot be read as a picture"),
        (broken_list, "no pictures of split train found; expected JPEGImag"),
        (broken_bomb, "b.png: more than 100000000 pixels"),
    ],
)
def test_bad_data_is_one_line(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    """The file, what is wrong with it, and what to do."""
    damage(voc(tmp_path))
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


def test_a_cut_jpeg_is_found_without_decoding_it(tmp_path: Path) -> None:
    """Large sets are decoded while training runs, which is too late."""
    (source, _) = layouts.find_sources(str(voc(tmp_path)), "train")
    pictures._read_one(source, 21, 255, decode=False)
    broken_truncated(tmp_path)
    with pytest.raises(UserError, match="b.jpg: .*it ends too early"):
        pictures._read_one(source, 21, 255, decode=False)


def test_damaged_and_foreign_records(tmp_path: Path) -> None:
    """The file is named, whatever is in it."""
    path = tmp_path / "train-00000-of-00001.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        writer.write(b"no example")
    with pytest.raises(UserError, match="train-00000.*cannot be read"):
        read(tmp_path)
    with tf.io.TFRecordWriter(str(path)) as writer:
        writer.write(tf.train.Example().SerializeToString())
    with pytest.raises(UserError, match="a record without picture"):
        read(tmp_path)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="after 0 records .*truncated"):
        read(tmp_path)


def test_missing_folder() -> None:
    """The flag is named."""
    with pytest.raises(UserError, match="--data_path=nowhere: no such"):
        layouts.find_sources("nowhere", "train")


def camvid(root: Path, form: str) -> None:
    """Two pictures of CamVid in one of the forms in which it goes round."""
    ids = np.zeros((32, 40), np.uint8)
    ids[:, 10:20], ids[:, 20:] = 3, 11
    for split in ("train", "val"):
        save(root / split / "a.png", colour())
        if form == "segnet":
            save(root / f"{split}annot" / "a.png", ids)
            continue
        table = np.zeros((12, 3), np.uint8)
        # The last colour stays black, which is CamVid's Void.
        table[:11] = np.arange(33).reshape(11, 3) + 100
        save(root / f"{split}_labels" / "a_L.png", table[ids])
        rows = [
            f"{name},{','.join(map(str, colours))}"
            for name, colours in zip(
                [*convert_camvid.SEGNET_NAMES, "Void"], table
            )
        ]
        text = "\n".join(["name,r,g,b", *rows])
        (root / "class_dict.csv").write_text(text + "\n")


@pytest.mark.parametrize("form", ["segnet", "colours"])
def test_camvid_becomes_voc(tmp_path: Path, form: str) -> None:
    """Eleven classes with their names, Void as 255."""
    camvid(tmp_path / "in", form)
    found, ending, convert = convert_camvid.find_form(str(tmp_path / "in"))
    assert found == convert_camvid.SEGNET_NAMES
    output = tmp_path / "out"
    for folder in ("JPEGImages", "SegmentationClass", LISTS):
        (output / folder).mkdir(parents=True)
    for split in ("train", "val"):
        arguments = (str(tmp_path / "in"), str(output), split)
        assert convert_camvid.convert_split(*arguments, ending, convert) == 1
    image, ids = decoded(read(output, "val")[0])
    np.testing.assert_array_equal(image, colour())
    assert (ids[:, :10] == 0).all() and (ids[:, 10:20] == 3).all()
    assert (ids[:, 20:] == 255).all()


def test_unknown_colour_of_camvid_is_named(tmp_path: Path) -> None:
    """With the file and the colour."""
    camvid(tmp_path, "colours")
    save(tmp_path / "train_labels" / "a_L.png", colour())
    _, _, convert = convert_camvid.find_form(str(tmp_path))
    with pytest.raises(UserError, match="a_L.png: colour .* is not in class"):
        convert(str(tmp_path / "train_labels" / "a_L.png"))
    with pytest.raises(UserError, match="neither class_dict.csv"):
        convert_camvid.find_form(str(tmp_path / "train"))
