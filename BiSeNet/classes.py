"""The classes of a data set: names, colours, and what is ignored.

They come from class_dict.csv, as the reference's data has it; a run folder
keeps its own copy, so that its masks get their colours again.
"""

import csv
import os
from collections.abc import Sequence
from typing import NamedTuple, Optional

import numpy as np

from common.npu_config import UserError

FILE = "class_dict.csv"
UNKNOWN = 255  # in memory: a pixel that no class describes
# Ids are bytes, and one of the 256 is UNKNOWN.
MOST_CLASSES = 255
# CamVid in 11 groups and Void, with the numbers of its integer labels.
CAMVID_GROUPS = {
    "Sky": (128, 128, 128),
    "Building": (128, 0, 0),
    "Pole": (192, 192, 128),
    "Road": (128, 64, 128),
    "Sidewalk": (0, 0, 192),
    "Tree": (128, 128, 0),
    "SignSymbol": (192, 128, 128),
    "Fence": (64, 64, 128),
    "Car": (64, 0, 128),
    "Pedestrian": (64, 64, 0),
    "Bicyclist": (0, 128, 192),
    "Void": (0, 0, 0),
}
# CamVid's other classes; whatever is named as a group belongs to it.
# The usual grouping, known as camvidPixelLabelIDs; the reference has none.
CAMVID_MEMBERS = {
    "Building": "Archway Bridge Tunnel Wall",
    "Pole": "Column_Pole TrafficCone",
    "Road": "LaneMkgsDriv LaneMkgsNonDriv",
    "Sidewalk": "ParkingBlock RoadShoulder Pavement",
    "Tree": "VegetationMisc",
    "SignSymbol": "Misc_Text TrafficLight",
    "Car": "OtherMoving SUVPickupTruck Train Truck_Bus",
    "Pedestrian": "Animal CartLuggagePram Child",
    "Bicyclist": "MotorcycleScooter",
}


class Classes(NamedTuple):
    """Names and colours of classes; a class's id is its place.

    Attributes:
      names: of the classes that the network tells apart.
      colours: of them, [count, 3].
      ignored: ids of those that count nowhere.
    """

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    ignored: tuple[int, ...] = ()

    def ignoring(
        self, names: Sequence[str], must_exist: bool = True
    ) -> "Classes":
        """The same classes with those of `names` ignored."""
        unknown = [name for name in names if name not in self.names]
        if unknown and must_exist:
            raise UserError(
                f"--ignore_classes={','.join(unknown)}: classes are "
                f"{', '.join(self.names)}; choose from them"
            )
        ignored = [i for i, name in enumerate(self.names) if name in names]
        if len(ignored) == len(self.names):
            raise UserError(
                f"--ignore_classes={','.join(names)}: leaves no class to "
                "learn; leave one out"
            )
        return self._replace(ignored=tuple(ignored))

    def save(self, path: str) -> None:
        """Writes names and colours as class_dict.csv."""
        with open(path, "w", encoding="utf8", newline="") as file:
            # By itself csv writes DOS line ends.
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("name", "r", "g", "b"))
            for name, colour in zip(self.names, self.colours):
                writer.writerow((name, *colour))


def read(path: str) -> Classes:
    """The classes of a csv file: a header, then name, r, g, b."""
    try:
        with open(path, encoding="utf8", newline="") as file:
            rows = list(csv.reader(file, skipinitialspace=True))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"{path}: cannot be read as csv ({error}); expected the header "
            "name,r,g,b and a row for each class"
        ) from None
    rows = [[cell.strip() for cell in row] for row in rows if any(row)]
    if not rows or [cell.lower() for cell in rows[0]] != ["name", *"rgb"]:
        header = ",".join(rows[0]) if rows else "nothing"
        raise UserError(
            f"{path}: begins with {header}, expected the header name,r,g,b"
        )
    names, colours = [], []
    for row in rows[1:]:
        colour = row[1:]
        if len(row) != 4 or not all(
            cell.isdigit() and int(cell) < 256 for cell in colour
        ):
            raise UserError(
                f"{path}: row {','.join(row)}: expected name,r,g,b with "
                "colours of 0..255"
            )
        names.append(row[0])
        colours.append(tuple(map(int, colour)))
    for values, what in ((names, "name"), (colours, "colour")):
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise UserError(
                f"{path}: {what} {twice[0]} stands for two classes; give "
                "each class its own"
            )
    if not 1 < len(names) <= MOST_CLASSES:
        raise UserError(
            f"{path}: {len(names)} classes; 2..{MOST_CLASSES} are allowed"
        )
    return Classes(tuple(names), tuple(colours))


def numbered(count: int) -> Classes:
    """Classes without names, for integer labels without a csv file."""
    if count == len(CAMVID_GROUPS):
        return groups()
    colours = [
        # Scattered over the cube of colours, black first.
        # Odd factors, so that no two of 256 are alike.
        (67 * i % 256, 139 * i % 256, 211 * i % 256)
        for i in range(count)
    ]
    return Classes(tuple(f"class {i}" for i in range(count)), tuple(colours))


def groups() -> Classes:
    """CamVid's 11 groups and Void."""
    return Classes(tuple(CAMVID_GROUPS), tuple(CAMVID_GROUPS.values()))


def grouping(classes: Classes) -> list[int]:
    """The group's id of each of CamVid's classes."""
    members = {name: name for name in CAMVID_GROUPS}
    for group, names in CAMVID_MEMBERS.items():
        members.update(dict.fromkeys(names.split(), group))
    strange = [name for name in classes.names if name not in members]
    if strange:
        raise UserError(
            f"--group_classes=camvid11: {strange[0]} is no class of CamVid; "
            "use --group_classes=none"
        )
    order = list(CAMVID_GROUPS)
    return [order.index(members[name]) for name in classes.names]


def colour_table(classes: Classes) -> np.ndarray:
    """Class ids by colour r << 16 | g << 8 | b, uint8 [2**24]."""
    # 16 MB, but a lookup is many times faster than comparing colours.
    table = np.full(2**24, UNKNOWN, np.uint8)
    red, green, blue = np.array(classes.colours).T
    table[red << 16 | green << 8 | blue] = range(len(classes.names))
    return table


def nearest(classes: Classes, colour: np.ndarray) -> str:
    """The name of the class whose colour is nearest to another."""
    distances = np.square(np.array(classes.colours) - colour).sum(-1)
    return classes.names[int(distances.argmin())]


def find(data_path: str, given: Optional[str]) -> Optional[str]:
    """The csv file of a data set: the one given, or its own if it has any."""
    path = given or os.path.join(data_path, FILE)
    if given and not os.path.exists(path):
        raise UserError(f"--class_dict={given}: no such file")
    return path if os.path.exists(path) else None
