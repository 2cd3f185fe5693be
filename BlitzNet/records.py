"""TFRecords of pictures with boxes and masks, read and written.

Reads the reference's records (JPEG and PNG inside) and the Ascend port's (raw
pixels); writes the former. Pictures stay in the file: what is kept is where
in it they lie.
"""

import io
import os

import numpy as np
import tensorflow as tf
from PIL import Image

from BlitzNet import pictures, progress
from BlitzNet.augment import UNLABELLED
from BlitzNet.pictures import Objects, Picture
from common.npu_config import UserError

# TFRecord's framing: the length and its checksum, then the content's.
RECORD_HEAD, RECORD_TAIL = 12, 4  # bytes around the content of a record
# Our choice: above float32's rounding, below a pixel of a VOC picture.
ROUNDING = 1e-3  # by how much a box may leave the picture
# In the order of the corners that pictures.check_boxes takes.
BOX = ("xmin", "ymin", "xmax", "ymax")


def read(path: str, num_classes: int, ignore_label: int) -> list[Picture]:
    """All pictures of a TFRecord; every record is checked."""
    found, offset = [], 0
    try:
        for record in tf.data.TFRecordDataset(path):
            content = record.numpy()
            where = f"{path}, record {len(found) + 1}"
            found.append(
                _parse(
                    where,
                    path,
                    offset + RECORD_HEAD,
                    content,
                    num_classes,
                    ignore_label,
                )
            )
            # TFRecordDataset does not tell where it is. It refuses compressed
            # files here, of which this would not hold.
            offset += RECORD_HEAD + len(content) + RECORD_TAIL
    except tf.errors.OpError as error:
        raise UserError(
            f"{path}: damaged after record {len(found)} "
            f"({error.message.strip()}); is the file truncated?"
        ) from None
    if not found:
        raise UserError(f"{path}: no records in it; write it again")
    return found


def _parse(
    where: str,
    path: str,
    offset: int,
    content: bytes,
    num_classes: int,
    ignore_label: int,
) -> Picture:
    """The picture in a record that begins at `offset` of its file."""
    try:
        features = tf.train.Example.FromString(content).features.feature
        size = tuple(
            features[f"image/{side}"].int64_list.value[0]
            for side in ("height", "width")
        )
        # IndexError where it is missing: protobuf's map makes features up.
        encoded = features["image/encoded"].bytes_list.value[0]
    except Exception as error:  # protobuf's own, in each of its versions
        raise UserError(
            f"{where}: no picture in it ({error!r}); expected image/encoded, "
            "image/height and image/width"
        ) from None
    kind = _kind(where, encoded, size)
    names = features["image/filename"].bytes_list.value
    stem = names[0].decode("utf8", "replace") if names else ""
    return Picture(
        os.path.splitext(stem)[0] or f"{os.path.basename(path)}-{offset}",
        path,
        # Should a copy come earlier in the record, it has the same bytes.
        (offset + content.find(encoded), len(encoded)),
        kind,
        b"",
        _mask(where, features, size, num_classes, ignore_label),
        _objects(where, features, num_classes),
        size,
    )


def _kind(where: str, encoded: bytes, size: tuple[int, int]) -> int:
    """How a record holds its picture of `size`: RAW or JPEG."""
    # The port's reader knows no image/format: only the length tells.
    if len(encoded) == 3 * np.prod(size):
        return pictures.RAW
    image = pictures.open_picture(where, source=io.BytesIO(encoded))
    if image.format != pictures.GRAPH_FORMAT:
        raise UserError(
            f"{where}: a picture in {image.format}; records hold JPEG, or raw "
            "pixels of the height and width that they state"
        )
    pictures.check_size(where, image.size[::-1], size)
    return pictures.JPEG


def _mask(
    where: str,
    features: dict,
    size: tuple[int, int],
    num_classes: int,
    ignore_label: int,
) -> bytes:
    """The packed mask of a record; empty if it has none."""
    values = features["image/segmentation/encoded"].bytes_list.value
    if not values:
        return b""
    if len(values[0]) == np.prod(size):
        ids = np.frombuffer(values[0], np.uint8).reshape(size)
    else:
        ids = pictures.read_ids(where, size, io.BytesIO(values[0]))
    # The reference's way to say that a picture has no mask.
    if (ids == UNLABELLED).all():
        return b""
    return pictures.pack_mask(where, ids, num_classes, ignore_label)


def _objects(where: str, features: dict, num_classes: int) -> Objects:
    """The objects of a record, within the picture."""
    labels = np.array(
        features["image/object/class/label"].int64_list.value, np.int32
    )
    columns = [
        features[f"image/object/bbox/{side}"].float_list.value for side in BOX
    ]
    difficult = features["image/object/difficulty"].int64_list.value
    if not len(labels) and not any(map(len, columns)):
        return pictures.no_objects()
    if {len(column) for column in columns} != {len(labels)}:
        raise UserError(
            f"{where}: {len(labels)} labels for "
            f"{', '.join(str(len(column)) for column in columns)} values of "
            f"{', '.join(BOX)}; there must be as many"
        )
    if labels.min() < 1 or labels.max() >= num_classes:
        raise UserError(
            f"{where}: labels {sorted(set(labels.tolist()))[:8]} where 1.."
            f"{num_classes - 1} are allowed; set --num_classes"
        )
    corners = np.array(columns, np.float32).T
    outside = (corners < -ROUNDING) | (corners > 1.0 + ROUNDING)
    if not outside.any():
        corners = np.clip(corners, 0.0, 1.0)
    pictures.check_boxes(where, corners, (1, 1))
    sizes = corners[:, 2:] - corners[:, :2]
    # The port's records do not say what is difficult.
    hard = np.zeros(len(labels), bool)
    if len(difficult) == len(labels):
        hard = np.array(difficult, bool)
    return Objects(np.concatenate([corners[:, :2], sizes], 1), labels, hard)


def _feature(value: object) -> tf.train.Feature:
    """Bytes, or numbers, as a feature of an Example."""
    if isinstance(value, bytes):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
    value = np.atleast_1d(value)
    if value.dtype.kind == "f":
        return tf.train.Feature(float_list=tf.train.FloatList(value=value))
    return tf.train.Feature(int64_list=tf.train.Int64List(value=value))


def _jpeg(pair: Picture) -> bytes:
    """A picture's file, or its pixels as JPEG where that is something else."""
    if pair.kind == pictures.JPEG:
        with open(pair.path, "rb") as file:
            file.seek(pair.span[0])
            return file.read(pair.span[1])
    file = io.BytesIO()
    pixels = pictures.read_picture(pair.path)
    # Pillow advises against more than 95.
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def example(pair: Picture) -> bytes:
    """A picture with objects and mask as the reference writes it."""
    height, width = pair.size
    mask = np.full(pair.size, UNLABELLED, np.uint8)
    if pair.mask:
        mask = pictures.unpack(pair.mask, pair.size)
    png = io.BytesIO()
    Image.fromarray(mask).save(png, "PNG")
    boxes = pair.objects.boxes
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    values = {
        "image/height": height,
        "image/width": width,
        "image/encoded": _jpeg(pair),
        "image/format": b"JPEG",
        "image/filename": f"{pair.name}.jpg".encode(),
        "image/segmentation/encoded": png.getvalue(),
        "image/segmentation/format": b"PNG",
        "image/object/class/label": pair.objects.labels,
        "image/object/difficulty": pair.objects.difficult.astype(np.int64),
    }
    for side, column in zip(BOX, corners.T):
        values[f"image/object/bbox/{side}"] = column
    features = {name: _feature(value) for name, value in values.items()}
    return tf.train.Example(
        features=tf.train.Features(feature=features)
    ).SerializeToString()


def write(path: str, pairs: list[Picture]) -> None:
    """Writes a TFRecord; a reader sees the whole file or none."""
    with tf.io.TFRecordWriter(path + ".part") as writer:
        for pair in progress.watched(pairs, len(pairs), "writing picture"):
            writer.write(example(pair))
    os.replace(path + ".part", path)
