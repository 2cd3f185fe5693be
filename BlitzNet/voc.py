"""Data sets in the layout of Pascal VOC: image sets, annotations, masks.

VOCdevkit/VOC2007 and VOC2012 as they are published, with the masks of SBD
where they are at hand, and folders of one's own in the same layout.
"""

import os
import xml.etree.ElementTree
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Optional

import numpy as np
import scipy.io
from absl import flags

from BlitzNet import pictures, progress, records
from BlitzNet.pictures import Objects, Picture
from common.npu_config import UserError

# In VOC's order, which fixes the ids in masks and in checkpoints.
CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow "
    "diningtable dog horse motorbike person pottedplant sheep sofa train "
    "tvmonitor"
).split()
CLASSES_FILE = "classes.txt"  # of one's own data: a name per line
# Our choice; annotations and masks are read in full in any case.
CHECKED_PICTURES = 32  # pictures that are decoded unless all are asked for
READERS = 4  # threads; Pillow lets go of Python's lock while it decodes
# The first counts: VOC's own masks have void borders, SBD's have none.
MASK_FOLDERS = ("SegmentationClass", "SegmentationClassAug")
SBD_LISTS = ("train.txt", "val.txt")
LAYOUT_HELP = (
    "expected VOCdevkit/VOC2007 or VOC2012, TFRecords of make_records.py, or "
    "in the folder itself JPEGImages/, Annotations/ and ImageSets/Main/*.txt"
)


class Part(NamedTuple):
    """A list of pictures.

    Attributes:
      year: folder of the devkit; empty for data of one's own.
      split: name of the list.
      kinds: folders of ImageSets in which it may be; the first counts.
      records: names that a TFRecord with it may have.
    """

    year: str
    split: str
    kinds: tuple[str, ...]
    records: tuple[str, ...]


def _part(year: str, split: str, segmented: bool = False) -> Part:
    """A list of the devkit, with all names that its TFRecord has had."""
    short = f"voc{year[-2:]}"
    # The reference writes hyphens but reads underscores; -seg is the port's.
    names = [f"{short}-{split}", f"{short}_{split}"]
    kinds = ("Main",)
    if segmented:
        names = [f"{names[0]}-segmentation", f"{names[0]}-seg"]
        # VOC 2007 lists few pictures for segmentation: masks are optional.
        if year == "VOC2012":
            kinds = ("SegmentationAug", "Segmentation")
    return Part(year, split, kinds, tuple(names))


VOC07, VOC12 = "VOC2007", "VOC2012"
# The seed's figures are on the 1449 pictures of VAL_SEG, not on val's 5823.
TRAIN_AUG, VAL_SEG = _part(VOC12, "train", True), _part(VOC12, "val", True)
TEST_07 = _part(VOC07, "test")
# Parts to train on, and the part to evaluate on.
# They have the reference's names; its choices with COCO are left out.
DATASETS = {
    "voc07": ([_part(VOC07, "trainval")], TEST_07),
    "voc12-train": ([TRAIN_AUG], VAL_SEG),
    "voc12-val": ([VAL_SEG], VAL_SEG),
    "voc12-trainval": ([TRAIN_AUG, _part(VOC12, "val")], VAL_SEG),
    "voc07+12": (
        [
            _part(VOC07, "trainval"),
            _part(VOC12, "train"),
            _part(VOC12, "val"),
        ],
        TEST_07,
    ),
    "voc07+12-segmentation": (
        [_part(VOC07, "trainval", True), TRAIN_AUG],
        VAL_SEG,
    ),
    "voc07+12-segfull": (
        [_part(VOC07, "trainval", True), TRAIN_AUG, _part(VOC12, "val")],
        TEST_07,
    ),
}


def define_flags() -> None:
    """Defines the flags that say what is read, and with which classes."""
    text, whole = flags.DEFINE_string, flags.DEFINE_integer
    flags.DEFINE_enum(
        "dataset",
        "auto",
        ["auto", "own", *DATASETS],
        "What of data_path to use; auto: what is there.",
    )
    text("train_split", "train", "Own data: list to train on.")
    text("test_split", "val", "Own data: list to evaluate on.")
    flags.DEFINE_list(
        "classes", None, "Names but for background; none: see README."
    )
    # Class ids are bytes, and one value stays free to be ignored.
    whole("num_classes", None, "Classes of the labels.", 2, 255)
    whole("ignore_label", 255, "Label value that does not count.")


def parts_of(values: dict[str, object]) -> tuple[list[Part], Part]:
    """The parts to train on, and the part to evaluate on, by the flags."""
    train, test = (
        Part("", split, ("Main", "Segmentation"), (f"own-{split}",))
        for split in (values["train_split"], values["test_split"])
    )
    dataset, path = values["dataset"], values["data_path"]
    if dataset in DATASETS:
        return DATASETS[dataset]
    # Only `auto` looks what there is.
    for name in ("voc07", "voc12-train") if dataset == "auto" else ():
        parts, held_out = DATASETS[name]
        if _find_record(path, parts[0]) or _root(path, parts[0]):
            return parts, held_out
    return [train], test


def class_names(
    data_path: str, classes: Optional[list[str]], count: Optional[int]
) -> list[str]:
    """Names of the classes, background first.

    Args:
      data_path: may hold CLASSES_FILE.
      classes: names without background, which have the first say.
      count: how many there are; what has no name gets its number.
    """
    path = os.path.join(data_path, CLASSES_FILE)
    names = list(CLASSES)
    if classes:
        names[1:] = classes
    elif os.path.exists(path):
        with open(path, encoding="utf8") as file:
            own = [line.strip() for line in file if line.strip()]
        names[1:] = [name for name in own if name != names[0]]
    count = count or len(names)
    return names[:count] + [f"class {id_}" for id_ in range(len(names), count)]


def _root(data_path: str, part: Part) -> Optional[str]:
    """The folder with JPEGImages of a part, if there is one."""
    # The seed's scripts look into Datasets/ of their data_path.
    for place in (("VOCdevkit",), (), ("Datasets", "VOCdevkit")):
        root = os.path.join(data_path, *place, part.year)
        if os.path.isdir(os.path.join(root, "JPEGImages")):
            return root
    return None


def _find_record(data_path: str, part: Part) -> Optional[str]:
    """The TFRecord of a part, if there is one."""
    for name in part.records:
        for place in ((), ("Datasets",)):
            path = os.path.join(data_path, *place, name)
            if os.path.isfile(path):
                return path
    return None


class Reader:
    """Reads parts of one data set under one choice of classes."""

    def __init__(
        self,
        data_path: str,
        names: list[str],
        ignore_label: int,
        sbd: Optional[str] = None,
    ) -> None:
        """`names`: of the classes; `sbd`: a folder of SBD's masks."""
        if not os.path.isdir(data_path):
            raise UserError(
                f"--data_path={data_path}: no such folder; {LAYOUT_HELP}"
            )
        self.data_path, self.ignore_label = data_path, ignore_label
        self.names, self.sbd = names, sbd

    @classmethod
    def of(
        cls, values: dict[str, object], sbd: Optional[str] = None
    ) -> "Reader":
        """The reader that the flags of a run describe."""
        path = values["data_path"]
        names = class_names(path, values["classes"], values["num_classes"])
        return cls(path, names, values["ignore_label"], sbd)

    def read(self, part: Part, check_all: bool = False) -> list[Picture]:
        """The pictures of a part, with objects and masks.

        All annotations and masks are read and checked, and of the pictures a
        sample, or all of them.
        """
        record = _find_record(self.data_path, part)
        if record:
            found = records.read(record, len(self.names), self.ignore_label)
        else:
            found = self._read_devkit(part, check_all)
        if not any(pair.mask or len(pair.objects.labels) for pair in found):
            raise UserError(
                f"{self.data_path}: {part.split} has neither boxes nor masks; "
                f"{LAYOUT_HELP}"
            )
        return found

    def _read_devkit(self, part: Part, check_all: bool) -> list[Picture]:
        """The pictures of a part from the files of a devkit."""
        root = _root(self.data_path, part)
        if root is None:
            raise UserError(
                f"{self.data_path}: no {part.year or 'JPEGImages'} in it; "
                f"{LAYOUT_HELP}; --dataset says which"
            )
        stems = self._stems(root, part)
        step = 1 if check_all else -(-len(stems) // CHECKED_PICTURES)
        decode = [number % step == 0 for number in range(len(stems))]
        # In order, so that the first mistake told is the first there is.
        with ThreadPoolExecutor(READERS) as pool:
            read = pool.map(
                lambda stem, whole: self._read_one(root, stem, whole),
                stems,
                decode,
            )
            return list(progress.watched(read, len(stems), "reading picture"))

    def _stems(self, root: str, part: Part) -> list[str]:
        """Names of the pictures in a part."""
        sets = os.path.join(root, "ImageSets")
        # Before the original list: SBD knows masks of seven times as many.
        if self.sbd and "SegmentationAug" in part.kinds:
            if part.split == "train":
                return augmented_list(sets, self.sbd)
        for kind in part.kinds:
            path = os.path.join(sets, kind, f"{part.split}.txt")
            if os.path.exists(path):
                stems = read_list(path)
                if stems:
                    return stems
        raise UserError(
            f"{sets}: no {' or '.join(part.kinds)}/{part.split}.txt with "
            "names of pictures; write one per line, without extension, or "
            "choose other --train_split and --test_split"
        )

    def _read_one(self, root: str, stem: str, decode: bool) -> Picture:
        """Reads what belongs to a picture, and checks that it fits."""
        path = find_picture(os.path.join(root, "JPEGImages"), stem)
        image = pictures.open_picture(path, decode=False)
        width, height = image.size
        kind, content = pictures.JPEG, b""
        # What is packed has to be decoded anyway, and only once.
        if (
            image.format != pictures.GRAPH_FORMAT
            or image.mode not in pictures.GRAPH_MODES
        ):
            kind = pictures.PACKED
            content = pictures.pack(pictures.read_picture(path))
        elif decode:
            pictures.open_picture(path)
        else:
            pictures.check_end(path)
        size = (height, width)
        annotation = os.path.join(root, "Annotations", f"{stem}.xml")
        objects = pictures.no_objects()
        if os.path.exists(annotation):
            objects = read_annotation(annotation, size, self.names)
        mask = self.read_mask(root, stem, size)
        span = (0, os.path.getsize(path))
        return Picture(stem, path, span, kind, content, mask, objects, size)

    def read_mask(self, root: str, stem: str, size: tuple[int, int]) -> bytes:
        """The packed mask of a picture of `size`; empty if it has none."""
        for folder in MASK_FOLDERS:
            path = os.path.join(root, folder, f"{stem}.png")
            if os.path.exists(path):
                ids = pictures.read_ids(path, size)
                return self.packed(path, ids)
        path = os.path.join(self.sbd or "", "cls", f"{stem}.mat")
        if self.sbd and os.path.exists(path):
            ids = read_sbd(path)
            pictures.check_size(path, ids.shape, size)
            return self.packed(path, ids)
        return b""

    def packed(self, path: str, ids: np.ndarray) -> bytes:
        """Checks and packs the class ids of a mask."""
        return pictures.pack_mask(
            path, ids, len(self.names), self.ignore_label
        )


def find_picture(folder: str, stem: str) -> str:
    """The file of a picture, whatever its format."""
    for extension in pictures.EXTENSIONS:
        path = os.path.join(folder, stem + extension)
        if os.path.exists(path):
            return path
    raise UserError(
        f"{os.path.join(folder, stem)}.jpg: no such picture; add it, or take "
        "its name off the list in ImageSets"
    )


def read_annotation(
    path: str, size: tuple[int, int], names: list[str]
) -> Objects:
    """The objects of an annotation for a picture of `size`."""
    try:
        root = xml.etree.ElementTree.parse(path).getroot()
        objects = [_read_object(each) for each in root.iter("object")]
        stated = [
            int(float(root.findtext(f"size/{side}", "0")))
            for side in ("height", "width")
        ]
    except (xml.etree.ElementTree.ParseError, ValueError, OSError) as error:
        raise UserError(
            f"{path}: cannot be read as an annotation ({error}); it must be "
            "XML as Pascal VOC has it"
        ) from None
    # Some tools leave the size out, or write 0.
    if any(stated) and tuple(stated) != tuple(size):
        raise UserError(
            f"{path}: says {stated[1]}x{stated[0]} pixels, its picture has "
            f"{size[1]}x{size[0]}; they must be equal"
        )
    if not objects:
        return pictures.no_objects()
    _check_names(path, {name for name, _, _ in objects}, names)
    height, width = size
    corners = np.array([box for _, box, _ in objects])
    pictures.check_boxes(path, corners, (width, height))
    # VOC counts from 1 and includes the end; the reference adjusts neither.
    boxes = np.concatenate(
        [corners[:, :2], corners[:, 2:] - corners[:, :2]], 1
    )
    return Objects(
        (boxes / [width, height, width, height]).astype(np.float32),
        np.array([names.index(name) for name, _, _ in objects], np.int32),
        np.array([difficult for _, _, difficult in objects], bool),
    )


def _check_names(path: str, used: set[str], names: list[str]) -> None:
    """Raises UserError for classes that nobody has named."""
    unknown = sorted(used - set(names[1:]))
    if unknown:
        raise UserError(
            f"{path}: unknown class {', '.join(map(repr, unknown[:4]))}; "
            f"known are {', '.join(names[1:])}; name your own in "
            f"{CLASSES_FILE}"
        )


def _read_object(
    element: xml.etree.ElementTree.Element,
) -> tuple[str, list[float], bool]:
    """Name, corners and difficulty; VOC's persons have parts with boxes."""
    corners = []
    for side in ("xmin", "ymin", "xmax", "ymax"):
        text = element.findtext(f"bndbox/{side}")
        if text is None:
            raise ValueError(f"an object without bndbox/{side}")
        corners.append(float(text))
    name = (element.findtext("name") or "").strip()
    difficult = int(element.findtext("difficult") or 0)
    return name, corners, bool(difficult)


def read_list(path: str) -> list[str]:
    """Names in a list of ImageSets; Main's may have a second column."""
    with open(path, encoding="utf8") as file:
        return [line.split()[0] for line in file if line.strip()]


def augmented_list(sets: str, sbd: str) -> list[str]:
    """The pictures with a mask in VOC 2012 or SBD that val has not."""
    own, held_out = (
        read_list(os.path.join(sets, "Segmentation", f"{split}.txt"))
        for split in ("train", "val")
    )
    more = set()
    for name in SBD_LISTS:
        path = os.path.join(sbd, name)
        if not os.path.exists(path):
            raise UserError(
                f"--sbd={sbd}: no {name}; give SBD's folder dataset/, with "
                "cls/, train.txt and val.txt"
            )
        more.update(read_list(path))
    # 10582 pictures with the published lists. Sorted, because a set's order
    # changes from run to run.
    return own + sorted(more - set(own) - set(held_out))


def read_sbd(path: str) -> np.ndarray:
    """Class ids [h, w] uint8 of a .mat file of SBD."""
    try:
        # loadmat keeps the fields' order: boundaries, segmentation, classes.
        return scipy.io.loadmat(path)["GTcls"][0][0][1].astype(np.uint8)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read as a mask of SBD ({error}); unpack its "
            "archive again"
        ) from None
