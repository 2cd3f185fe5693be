"""Layouts, annotations, records and the stream of samples."""

from pathlib import Path

import numpy as np
import pytest
import scipy.io
import tensorflow as tf
from PIL import Image

from BlitzNet import (
    anchors,
    augment,
    dataset,
    pictures,
    records,
    sample_data,
    voc,
)
from BlitzNet.augment import Recipe, Sample
from BlitzNet.model import Architecture
from common.npu_config import UserError

ARCHITECTURE = Architecture(96, num_classes=7)
RECIPE = Recipe("paper", 96, ARCHITECTURE.map_sizes()[0], 0.5, False)
PRIORS = anchors.priors(ARCHITECTURE)
FLAGS = {
    "dataset": "auto",
    "train_split": "train",
    "test_split": "val",
    "classes": None,
    "num_classes": None,
    "ignore_label": 255,
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of five pictures to train on."""
    path = tmp_path_factory.mktemp("scenes")
    sample_data.draw(str(path), count=5, height=70, width=90)
    return path


def read(path: Path, split: int = 0, **changes) -> list:
    """The pictures of a split (0 train, 1 test) as flags would read them."""
    values = {**FLAGS, "data_path": str(path), **changes}
    parts, held_out = voc.parts_of(values)
    reader = voc.Reader.of(values)
    if split:
        return reader.read(held_out)
    return [pair for part in parts for pair in reader.read(part, True)]


@pytest.fixture(scope="module")
def pairs(drawn: Path) -> list:
    """The training pictures."""
    return read(drawn)


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
    parts = [stream(16, 3, rank, 8) for rank in range(8)]
    assert sorted(sum(parts, [])) == stream(16, 24)


@pytest.mark.parametrize("kind", ["none", "paper"])
def test_batches_are_static_and_repeatable(pairs: list, kind: str) -> None:
    """The same numbers from any start, for any number of ranks."""

    def batch(batch_size, start, rank=0, size=1):
        data = dataset.training_batches(
            pairs,
            RECIPE._replace(kind=kind),
            PRIORS,
            batch_size,
            3,
            start,
            rank,
            size,
        )
        for name, spec in data.element_spec.items():
            assert spec.shape.is_fully_defined(), name
        return next(iter(data))

    whole = batch(4, 8)
    halves = [batch(2, 8, rank, 2) for rank in range(2)]
    for name, value in whole.items():
        for rank, half in enumerate(halves):
            np.testing.assert_array_equal(half[name], value[rank::2])
    assert whole["image"].shape == (4, 96, 96, 3)
    assert 0.0 <= np.min(whole["image"]) and np.max(whole["image"]) <= 1.0
    assert (whole["classes"].numpy() > 0).any()
    assert not whole["label"].numpy()[whole["valid"].numpy() == 0].any()


def test_objects_and_masks_agree(pairs: list) -> None:
    """The box of an object holds pixels of its class up to its edges."""
    for pair in pairs:
        mask = pictures.unpack(pair.mask, pair.size)
        scale = [*pair.size[::-1]] * 2
        for box, label in zip(pair.objects.boxes, pair.objects.labels):
            left, top, width, height = np.round(box * scale).astype(int)
            own = mask[top : top + height, left : left + width] == label
            assert own[0].any() and own[-1].any()
            assert own[:, 0].any() and own[:, -1].any()


def marked_sample() -> Sample:
    """A picture that shows its own mask and box in its colours."""
    mask = np.zeros((60, 80, 1), np.uint8)
    mask[10:40, 20:60] = 3
    image = np.repeat(mask > 0, 3, -1).astype(np.float32)
    box = np.array([[20 / 80, 10 / 60, 40 / 80, 30 / 60]], np.float32)
    return Sample(*map(tf.constant, (image, mask, box, np.array([3]))))


def test_image_mask_and_box_move_together() -> None:
    """After zooms and crops of all kinds."""
    shown = 0
    for seed in range(30):
        key = tf.constant([seed, 9], tf.int64)
        draws = tf.random.stateless_uniform([5], key)
        sample = augment.zoom_and_crop(marked_sample(), draws, RECIPE, key)
        inside = sample.mask.numpy()[..., 0] == 3
        bright = sample.image.numpy().min(-1) > 0.9
        np.testing.assert_array_equal(inside, bright)
        for box in sample.boxes.numpy():
            shown += 1
            scale = [inside.shape[1], inside.shape[0]] * 2
            left, top, width, height = box * scale
            rows, columns = np.nonzero(inside)
            np.testing.assert_allclose(
                [columns.min(), rows.min(), np.ptp(columns), np.ptp(rows)],
                [left, top, width, height],
                # np.ptp counts a pixel less, and canvases are rounded.
                atol=2.01,
            )
    assert shown > 15


def test_canvas_around_an_unlabelled_picture_does_not_count() -> None:
    """Unless the reference's way is asked for, which makes up background."""
    sample = marked_sample()
    sample = sample._replace(mask=tf.zeros_like(sample.mask) + 255)
    draws = tf.constant([0.9, 0.0, 0.5, 0.5, 0.0])
    key = tf.constant([1, 1], tf.int64)
    mended = augment.zoom_and_crop(sample, draws, RECIPE, key)
    assert (mended.mask.numpy() == 255).all()
    recipe = RECIPE._replace(zero_canvas=True)
    theirs = augment.zoom_and_crop(sample, draws, recipe, key)
    assert (theirs.mask.numpy() == 0).any()


def test_a_picture_without_objects_is_augmented() -> None:
    """Its crops are free, and it has no positives."""
    sample = marked_sample()._replace(
        boxes=tf.zeros([0, 4]), labels=tf.zeros([0], tf.int64)
    )
    for seed in range(4):
        key = tf.constant([seed, 1], tf.int64)
        changed = augment.augment(sample, RECIPE, key)
        batch = augment.finish_sample(changed, RECIPE, tf.constant(PRIORS))
        assert not batch["classes"].numpy().any()


def test_augmentation_is_the_same_eager_and_in_tf_data() -> None:
    """What is tested eagerly is what training sees."""
    sample = marked_sample()
    key = tf.constant([1, 2], tf.int64)
    eager = augment.augment(sample, RECIPE, key)
    data = tf.data.Dataset.from_tensors(tuple(sample))
    data = data.map(lambda *each: augment.augment(Sample(*each), RECIPE, key))
    graph = next(iter(data))
    for ours, wanted in zip(graph, eager):
        np.testing.assert_allclose(ours, wanted, atol=1e-5)


def test_evaluation_takes_every_picture_once(pairs: list) -> None:
    """Over two ranks together, at the masks' own sizes."""
    seen = []
    for rank in range(2):
        data = dataset.evaluation_batches(pairs, 96, rank, 2)
        for batch in data:
            seen.append(int(batch["index"][0]))
            assert batch["image"].shape == (1, 96, 96, 3)
            assert batch["mask"].shape == (1, 70, 90)
    assert sorted(seen) == list(range(len(pairs)))


def test_records_of_the_reference(goldens: Path) -> None:
    """JPEG and PNG inside; boxes and labels as the reference read them."""
    path = goldens / "sample_original.tfrecord"
    if not path.exists():
        pytest.skip("no sample_original.tfrecord in --goldens")
    golden = dict(np.load(goldens / "sample_original_expected.npz"))
    found = records.read(str(path), 21, 255)
    files = dataset.Files(found)
    assert len(found) == 2
    for number, pair in enumerate(found):
        sample = files.read(number)
        image = golden[f"image_{number}"]
        assert sample.image.shape == image.shape
        # The expected picture is from before it was compressed.
        error = np.abs(255.0 * sample.image - image)
        assert error.mean() < 8.0
        np.testing.assert_array_equal(
            sample.mask[..., 0], golden[f"seg_{number}"]
        )
        np.testing.assert_allclose(
            pair.objects.boxes, golden[f"boxes_xywh_{number}"], atol=1e-6
        )
        np.testing.assert_array_equal(
            pair.objects.labels, golden[f"labels_{number}"]
        )


def raw_record(pair: pictures.Picture, image: np.ndarray) -> bytes:
    """A record in the Ascend port's form: pixels as they are."""
    example = tf.train.Example.FromString(records.example(pair))
    feature = example.features.feature
    mask = pictures.unpack(pair.mask, pair.size)
    for name, pixels in (("", image), ("segmentation/", mask)):
        values = feature[f"image/{name}encoded"].bytes_list.value
        values[0] = pixels.tobytes()
    del feature["image/object/difficulty"]
    return example.SerializeToString()


def test_what_we_write_reads_back(
    drawn: Path, pairs: list, tmp_path: Path
) -> None:
    """As our own records, and in the port's raw form."""
    for name in ("own-train", "own-val"):
        records.write(str(tmp_path / name), pairs)
    (tmp_path / "classes.txt").write_text((drawn / "classes.txt").read_text())
    again = read(tmp_path)
    plain, files = dataset.Files(pairs), dataset.Files(again)
    for number, (pair, other) in enumerate(zip(pairs, again)):
        assert other.name == pair.name and other.size == pair.size
        for ours, theirs in zip(pair.objects, other.objects):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)
        for ours, theirs in zip(plain.read(number), files.read(number)):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)
    path = str(tmp_path / "raw")
    images = [
        (255.0 * plain.read(number).image.numpy()).round().astype(np.uint8)
        for number in range(len(pairs))
    ]
    with tf.io.TFRecordWriter(path) as writer:
        for pair, image in zip(pairs, images):
            writer.write(raw_record(pair, image))
    raw = records.read(path, 7, 255)
    files = dataset.Files(raw)
    for number, image in enumerate(images):
        assert raw[number].kind == pictures.RAW
        np.testing.assert_allclose(
            255.0 * files.read(number).image, image, atol=1e-3
        )


def test_a_truncated_record_is_told(pairs: list, tmp_path: Path) -> None:
    """With the number of the last good one."""
    path = tmp_path / "own-train"
    records.write(str(path), pairs)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 100])
    with pytest.raises(UserError, match="own-train: damaged after record 4"):
        records.read(str(path), 7, 255)


OBJECT = (
    "<annotation><object><name>{}</name><bndbox><xmin>{}</xmin>"
    "<ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
    "</annotation>"
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (OBJECT.format("disc", 5, 5, 95, 20), "leaves the picture of 90x70"),
        (OBJECT.format("disc", -3, 5, 9, 20), "leaves the picture"),
        (OBJECT.format("disc", 20, 5, 10, 20), "has no area"),
        (OBJECT.format("disc", 20, 5, 20, 20), "has no area"),
        (OBJECT.format("disc", "nan", 5, 20, 20), "has no area"),
        (OBJECT.format("dog", 1, 5, 20, 20), "unknown class 'dog'"),
        (OBJECT.format("disc", "one", 5, 20, 20), "cannot be read as an"),
        ("<annotation><object></annotation>", "cannot be read as an"),
        ("<annotation><object/></annotation>", "without bndbox/xmin"),
        (
            "<annotation><size><width>9</width><height>9</height></size>"
            "</annotation>",
            "says 9x9 pixels, its picture has 90x70",
        ),
    ],
)
def test_wrong_annotations_are_told(
    tmp_path: Path, text: str, told: str
) -> None:
    """In one line that names the file."""
    path = tmp_path / "a.xml"
    path.write_text(text)
    names = ["background", *sample_data.CLASSES]
    with pytest.raises(UserError, match=told) as error:
        voc.read_annotation(str(path), (70, 90), names)
    assert str(path) in str(error.value)


def test_what_a_picture_may_lack(tmp_path: Path) -> None:
    """Annotation, mask, or both; but not all pictures everything."""
    sample_data.draw(str(tmp_path), count=3, height=64, width=64)
    (tmp_path / "Annotations" / "train_00000.xml").unlink()
    (tmp_path / "SegmentationClass" / "train_00001.png").unlink()
    found = read(tmp_path)
    assert [len(pair.objects.labels) > 0 for pair in found] == [
        False,
        True,
        True,
    ]
    assert [bool(pair.mask) for pair in found] == [True, False, True]
    mask = dataset.Files(found).read_mask(1)
    assert mask.shape == (64, 64, 1) and (mask.numpy() == 255).all()
    for folder in ("Annotations", "SegmentationClass"):
        for path in (tmp_path / folder).iterdir():
            path.unlink()
    with pytest.raises(UserError, match="neither boxes nor masks"):
        read(tmp_path)


def test_wrong_files_are_told(tmp_path: Path) -> None:
    """Pictures, masks and lists, before the first step."""
    sample_data.draw(str(tmp_path), count=2, height=64, width=64)
    picture = tmp_path / "JPEGImages" / "train_00000.jpg"
    mask = tmp_path / "SegmentationClass" / "train_00001.png"
    names = tmp_path / "ImageSets" / "Main" / "train.txt"
    content = picture.read_bytes()
    picture.write_bytes(content[:600])
    with pytest.raises(UserError, match="train_00000.jpg: cannot be read"):
        read(tmp_path)
    picture.write_bytes(content)
    content = mask.read_bytes()
    Image.fromarray(np.full((64, 64), 9, np.uint8)).save(mask)
    with pytest.raises(UserError, match=r"mask values \[9\] where 0..6"):
        read(tmp_path)
    Image.fromarray(np.zeros((64, 60), np.uint8)).save(mask)
    with pytest.raises(UserError, match="60x64 pixels, its picture has 64x64"):
        read(tmp_path)
    mask.write_bytes(content)
    names.write_text("train_00000\nmissing\n")
    with pytest.raises(UserError, match="missing.jpg: no such picture"):
        read(tmp_path)
    names.write_text("\n")
    with pytest.raises(UserError, match="train.txt with names"):
        read(tmp_path)


def test_devkits_and_masks_of_sbd(tmp_path: Path) -> None:
    """The augmented list is VOC's and SBD's without what val has."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    sample_data.draw(str(root), count=4, height=64, width=64)
    (root / "classes.txt").rename(tmp_path / "classes.txt")
    sets, sbd = root / "ImageSets" / "Segmentation", tmp_path / "dataset"
    (sbd / "cls").mkdir(parents=True)
    sets.mkdir()
    (sets / "train.txt").write_text("train_00000\n")
    (sets / "val.txt").write_text("val_00000\n")
    (sbd / "train.txt").write_text("train_00000\ntrain_00002\n")
    (sbd / "val.txt").write_text("train_00001\nval_00000\n")
    (root / "SegmentationClass" / "train_00002.png").unlink()
    ids = np.full((64, 64), 4, np.uint8)
    scipy.io.savemat(
        sbd / "cls" / "train_00002.mat",
        {"GTcls": {"Boundaries": 0, "Segmentation": ids, "Categories": 0}},
    )
    found = read(tmp_path)
    assert [pair.name for pair in found] == ["train_00000"]
    values = {**FLAGS, "data_path": str(tmp_path)}
    reader = voc.Reader.of(values, str(sbd))
    found = reader.read(voc.DATASETS["voc12-train"][0][0])
    names = ["train_00000", "train_00001", "train_00002"]
    assert [pair.name for pair in found] == names
    assert (pictures.unpack(found[2].mask, (64, 64)) == 4).all()


def test_sample_data_is_made_of_whole_scenes() -> None:
    """All classes occur, at several scales, and hide parts of each other."""
    rng = np.random.RandomState(0)
    names, sides, hidden = set(), [], 0
    for _ in range(30):
        scene = sample_data.draw_scene(rng, 96, 128)
        for name, box, hard in scene.objects:
            names.add(name)
            sides.append((box[2] - box[0]) / 128)
            hidden += hard
    assert names == set(sample_data.CLASSES)
    assert min(sides) < 0.15 and max(sides) > 0.35
    assert hidden > 0
