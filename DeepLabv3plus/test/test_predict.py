"""What prediction reads and writes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.npu_config import UserError
from DeepLabv3plus import predict, visuals


def test_inputs_by_file_folder_and_glob(tmp_path: Path) -> None:
    """Natural order, pictures only."""
    for name in ("10.png", "9.png", "notes.txt", "a b.TIF"):
        (tmp_path / name).write_bytes(b"")
    names = [Path(path).name for path in predict.find_inputs(str(tmp_path))]
    assert names == ["9.png", "10.png", "a b.TIF"]
    found = predict.find_inputs(str(tmp_path / "*.png"))
    assert [Path(path).name for path in found] == ["9.png", "10.png"]
    with pytest.raises(UserError, match="no pictures found"):
        predict.find_inputs(str(tmp_path / "none*"))
    (tmp_path / "10.jpg").touch()
    with pytest.raises(UserError, match=r"10.jpg and .*10.png: the results"):
        predict.find_inputs(str(tmp_path))


def test_masks_keep_class_ids(tmp_path: Path) -> None:
    """Indices with VOC's palette; overlays leave the background as it is."""
    picture = np.full((20, 30, 3), 100, np.uint8)
    classes = np.zeros((20, 30), np.uint8)
    classes[5:10] = 15
    predict._save("x/a.jpg", str(tmp_path), picture, classes, 21)
    with Image.open(tmp_path / "a_mask.png") as mask:
        assert mask.mode == "P"
        np.testing.assert_array_equal(np.asarray(mask), classes)
        assert mask.getpalette()[45:48] == [192, 128, 128]
    overlay = np.asarray(Image.open(tmp_path / "a_overlay.png"))
    assert (overlay[classes == 0] == 100).all()
    share = visuals.OVERLAY_SHARE
    assert abs(overlay[5, 0, 0] - (share * 192 + (1 - share) * 100)) <= 1
