"""Data sets as people have them, and what can be wrong with them."""

from pathlib import Path
from typing import Optional

import numpy as np
import pytest
from PIL import Image

from BiSeNet import classes, dataset, pictures
from BiSeNet.classes import UNKNOWN
from common.npu_config import UserError

COLOURS = {"Road": (128, 64, 128), "Car": (64, 0, 128), "Void": (0, 0, 0)}
CAMVID_32 = (
    "Animal Archway Bicyclist Bridge Building Car CartLuggagePram Child "
    "Column_Pole Fence LaneMkgsDriv LaneMkgsNonDriv Misc_Text "
    "MotorcycleScooter OtherMoving ParkingBlock Pedestrian Road RoadShoulder "
    "Sidewalk SignSymbol Sky SUVPickupTruck TrafficCone TrafficLight Train "
    "Tree Truck_Bus Tunnel VegetationMisc Void Wall"
).split()


def save(path: Path, array: np.ndarray) -> None:
    """Writes a picture file, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def picture(height: int = 32, width: int = 40) -> np.ndarray:
    """A picture of noise."""
    rng = np.random.RandomState(0)
    return rng.randint(0, 256, (height, width, 3)).astype(np.uint8)


def ids(height: int = 32, width: int = 40) -> np.ndarray:
    """Ids of a road with a car and some Void."""
    label = np.zeros((height, width), np.uint8)
    label[4:20, 4:20] = 1
    label[-2:] = 2
    return label


def painted(label: np.ndarray) -> np.ndarray:
    """A label in the colours of the data set."""
    return np.array(list(COLOURS.values()), np.uint8)[label]


def write_csv(root: Path, text: Optional[str] = None) -> None:
    """class_dict.csv, with spaces after commas as people have it."""
    rows = [f"{name}, {r}, {g}, {b}" for name, (r, g, b) in COLOURS.items()]
    text = text or "\n".join(["name, r, g, b", *rows, ""])
    (root / "class_dict.csv").write_text(text)


def data_set(root: Path) -> Path:
    """Two good pictures of different kinds and sizes in the seed's layout."""
    write_csv(root)
    save(root / "train" / "10.png", picture())
    save(root / "train" / "9.jpg", picture(48, 64))
    save(root / "train_labels" / "10.png", painted(ids()))
    save(root / "train_labels" / "9_L.png", painted(ids(48, 64)))
    return root


def reader(root: Path, **changes) -> pictures.Reader:
    """A reader with the default flags but for `changes`."""
    values = {
        "data_path": str(root),
        "ignore_label": -1,
        "unknown_colour": "error",
        "class_dict": None,
        "num_classes": None,
        "group_classes": "none",
        "ignore_classes": ["Void"],
    }
    return pictures.Reader({**values, **changes})


def test_pairs_by_stem_in_natural_order(tmp_path: Path) -> None:
    """x.png belongs to x.png or x_L.png; colours become rows of the csv."""
    read = reader(data_set(tmp_path))
    assert read.classes.names == tuple(COLOURS)
    assert read.classes.ignored == (2,)
    pairs = read.read("train")
    assert [Path(pair.name).name for pair in pairs] == ["9.jpg", "10.png"]
    np.testing.assert_array_equal(pictures.unpack_label(pairs[1]), ids())
    image, label = dataset.Files(pairs).read(1)
    np.testing.assert_array_equal(image, picture())
    np.testing.assert_array_equal(label[..., 0], ids())


def test_integer_labels_beside_a_list_file(tmp_path: Path) -> None:
    """SegNet's form: folders train and trainannot, or a list of pairs."""
    save(tmp_path / "train" / "a.png", picture())
    save(tmp_path / "trainannot" / "a.png", ids())
    (pair,) = reader(tmp_path, num_classes=3).read("train")
    np.testing.assert_array_equal(pictures.unpack_label(pair), ids())
    save(tmp_path / "CamVid" / "test" / "b.png", picture())
    save(tmp_path / "CamVid" / "testannot" / "b.png", ids())
    row = "/SegNet/CamVid/test/b.png /SegNet/CamVid/testannot/b.png\n"
    (tmp_path / "test.txt").write_text(row)
    read = reader(tmp_path, num_classes=3, ignore_label=2)
    (pair,) = read.read("test")
    wanted = np.where(ids() == 2, UNKNOWN, ids())
    np.testing.assert_array_equal(pictures.unpack_label(pair), wanted)
    # Without a number the labels are taken for SegNet's twelve.
    named = reader(tmp_path).classes
    assert named.names[3] == "Road" and named.ignored == (11,)
    (tmp_path / "test.txt").write_text("/elsewhere/c.png /elsewhere/d.png")
    with pytest.raises(UserError, match="test.txt: /elsewhere/c.png: no such"):
        read.read("test")


def test_labels_as_palette_and_as_equal_channels(tmp_path: Path) -> None:
    """Indices stay indices; three equal channels are one."""
    save(tmp_path / "train" / "a.png", picture())
    path, opaque = tmp_path / "trainannot" / "a.png", np.full_like(ids(), 255)
    read = reader(tmp_path, num_classes=3)
    for form in (
        [ids()] * 3,
        [*[ids()] * 3, opaque],
        [ids(), opaque],
    ):
        save(path, np.stack(form, -1))
        (pair,) = read.read("train")
        np.testing.assert_array_equal(pictures.unpack_label(pair), ids())
    label = Image.fromarray(ids())
    label.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0] + [0] * 759)
    label.save(path)
    (pair,) = read.read("train")
    np.testing.assert_array_equal(pictures.unpack_label(pair), ids())
    save(path, painted(ids()))
    with pytest.raises(UserError, match="a.png: a colour picture"):
        read.read("train")


def test_grouping_camvid(tmp_path: Path) -> None:
    """The 32 classes in 11 groups; nothing is left over."""
    assert len(CAMVID_32) == 32
    table = classes.Classes(
        tuple(CAMVID_32), tuple((i, 0, 0) for i in range(32))
    )
    table.save(str(tmp_path / "class_dict.csv"))
    label = np.arange(32, dtype=np.uint8).reshape(4, 8)
    save(tmp_path / "train" / "a.png", picture(4, 8))
    colours = np.array(table.colours, np.uint8)[label]
    save(tmp_path / "train_labels" / "a.png", colours)
    read = reader(tmp_path, group_classes="camvid11")
    assert len(read.classes.names) == 12 and read.classes.ignored == (11,)
    (pair,) = read.read("train")
    groups = pictures.unpack_label(pair).ravel()
    by_name = {
        name: read.classes.names[group]
        for name, group in zip(CAMVID_32, groups)
    }
    assert by_name["Truck_Bus"] == by_name["Train"] == "Car"
    assert by_name["LaneMkgsDriv"] == "Road"
    assert by_name["Child"] == by_name["Animal"] == "Pedestrian"
    assert by_name["TrafficCone"] == "Pole"
    assert by_name["Void"] == "Void"
    counts = np.bincount(groups, minlength=12)
    # Sky, Building, Pole, Road, Sidewalk, Tree, Sign, Fence, Car, ...
    assert counts.tolist() == [1, 5, 2, 3, 3, 2, 3, 1, 5, 4, 2, 1]
    write_csv(tmp_path, "name,r,g,b\nRoad,1,2,3\nCow,4,5,6\n")
    with pytest.raises(UserError, match="Cow is no class of CamVid"):
        reader(tmp_path, group_classes="camvid11")


def test_unknown_colours(tmp_path: Path) -> None:
    """An error that names file, colour and nearest class; or ignored."""
    data_set(tmp_path)
    colours = painted(ids())
    colours[0, 0] = (66, 1, 127)
    save(tmp_path / "train_labels" / "10.png", colours)
    told = r"10.png: 1 pixels .*\(66, 1, 127\), nearest to Car"
    with pytest.raises(UserError, match=told):
        reader(tmp_path).read("train")
    pairs = reader(tmp_path, unknown_colour="ignore").read("train")
    label = pictures.unpack_label(pairs[1])
    assert label[0, 0] == UNKNOWN
    assert (label == UNKNOWN).sum() == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("label,r,g,b\nRoad,1,2,3\n", "begins with label,r,g,b"),
        ("name,r,g,b\nRoad,1,2\n", "row Road,1,2: expected"),
        ("name,r,g,b\nRoad,1,2,256\nCar,0,0,0\n", "colours of 0..255"),
        ("name,r,g,b\nRoad,1,2,3\nRoad,2,2,3\n", "name Road stands for two"),
        ("name,r,g,b\nRoad,1,2,3\nCar,1,2,3\n", "stands for two classes"),
        ("name,r,g,b\nRoad,1,2,3\n", "1 classes; 2..255"),
        ("\n", "begins with nothing"),
    ],
)
def test_mistakes_in_the_csv(tmp_path: Path, text: str, told: str) -> None:
    """One line with the file and what is wrong."""
    data_set(tmp_path)
    write_csv(tmp_path, text)
    with pytest.raises(UserError, match=f"class_dict.csv: .*{told}"):
        reader(tmp_path)


def test_mistakes_in_the_layout(tmp_path: Path) -> None:
    """What is missing is named, with what was expected."""
    data_set(tmp_path)
    with pytest.raises(UserError, match="val: no pictures.*expected folders"):
        reader(tmp_path).read("val")
    save(tmp_path / "val" / "a.png", picture())
    with pytest.raises(UserError, match="val_labels: no such folder"):
        reader(tmp_path).read("val")
    save(tmp_path / "val_labels" / "b.png", painted(ids()))
    with pytest.raises(UserError, match="a.png: no .*a.png nor a_L.png"):
        reader(tmp_path).read("val")
    save(tmp_path / "val_labels" / "a.png", painted(ids(32, 41)))
    with pytest.raises(UserError, match="41x32 pixels, its picture has 40x32"):
        reader(tmp_path).read("val")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        reader(tmp_path / "nowhere")


def test_mistakes_in_files(tmp_path: Path) -> None:
    """Truncated files, values that are no class, other classes."""
    data_set(tmp_path)
    path = tmp_path / "train" / "10.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="10.png: cannot be read"):
        reader(tmp_path).read("train")
    path.write_bytes(whole)
    save(tmp_path / "train_labels" / "10.png", ids() + 5)
    with pytest.raises(UserError, match=r"values \[5, 6, 7\] where 0..2"):
        reader(tmp_path).read("train")
    with pytest.raises(UserError, match="--num_classes=7: .* has 3 classes"):
        reader(tmp_path, num_classes=7)
    with pytest.raises(UserError, match="--ignore_classes=Cow: classes are"):
        reader(tmp_path, ignore_classes=["Cow"])
    with pytest.raises(UserError, match="leaves no class"):
        reader(tmp_path, ignore_classes=list(COLOURS))
    with pytest.raises(UserError, match="--class_dict=.*no such file"):
        reader(tmp_path, class_dict=str(tmp_path / "other.csv"))


@pytest.mark.parametrize("extension", ["gif", "tif", "bmp", "jpeg", "PNG"])
def test_every_kind_of_picture(tmp_path: Path, extension: str) -> None:
    """All are RGB in memory."""
    data_set(tmp_path)
    (tmp_path / "train" / "10.png").unlink()
    flat = np.zeros((32, 40, 3), np.uint8) + np.uint8(90)
    save(tmp_path / "train" / f"10.{extension}", flat)
    image, _ = dataset.Files(reader(tmp_path).read("train")).read(1)
    np.testing.assert_allclose(image, flat, atol=1)


def test_grey_wide_and_transparent_pictures(tmp_path: Path) -> None:
    """One channel, 16 bits or four channels become RGB."""
    grey = np.full((32, 40), 77, np.uint8)
    alpha = np.concatenate([picture(), grey[..., np.newaxis]], -1)
    for array, expected in (
        (grey, np.full((32, 40, 3), 77)),
        (np.full((32, 40), 65535, np.uint16), np.full((32, 40, 3), 255)),
        (alpha, picture()),
    ):
        save(tmp_path / "a.png", array)
        read = pictures.read_picture(str(tmp_path / "a.png"))
        np.testing.assert_array_equal(read, expected)


def test_class_weights(tmp_path: Path) -> None:
    """Median frequency by hand, its root, a list, and what is refused."""
    read = reader(data_set(tmp_path))
    pairs = read.read("train")
    pixels = [ids(), ids(48, 64)]
    shares = [
        sum((label == i).sum() for label in pixels)
        / sum(label.size for label in pixels)
        for i in range(2)
    ]
    wanted = np.median(shares) / np.array(shares)
    for kind, power in (("median_freq", 1.0), ("sqrt_freq", 0.5)):
        weights = pictures.class_weights(kind, pairs, read.classes)
        np.testing.assert_allclose(weights[:2], wanted**power)
        assert len(weights) == 256 and not any(weights[2:])
    plain = pictures.class_weights("none", pairs, read.classes)
    assert plain[:3] == [1.0, 1.0, 0.0]
    given = pictures.class_weights("1,2.5,3", pairs, read.classes)
    assert given[:3] == [1.0, 2.5, 0.0]
    for wrong in ("1,2", "a,b,c", "1,-1,2", "median"):
        with pytest.raises(UserError, match="3 numbers of 0 or more"):
            pictures.class_weights(wrong, pairs, read.classes)


def test_description_names_classes_and_shares(tmp_path: Path) -> None:
    """Of the pixels that count."""
    read = reader(data_set(tmp_path))
    told = pictures.describe(read.read("train"), read.classes)
    assert told.startswith("2 pictures; of their pixels: Road 8")
    assert "Car 1" in told and "Void" not in told
