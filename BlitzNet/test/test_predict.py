"""Evaluation and prediction: ranks, sizes, offline outputs, drawings."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from BlitzNet import (
    boxes_from_masks,
    evaluate,
    metrics,
    offline,
    predict,
    sample_data,
    visuals,
    voc,
)
from BlitzNet.detection import Limits
from BlitzNet.model import Architecture, create_model
from common.npu_config import UserError

ARCHITECTURE = Architecture(96, True, 7, 4, n_base_channels=8)
VALUES = {
    **ARCHITECTURE._asdict(),
    **Limits()._asdict(),
    "voc_iou_thresh": 0.5,
    "classes": list(sample_data.CLASSES),
    "dataset": "own",
    "train_split": "train",
    "test_split": "val",
    "ignore_label": 255,
    "limit_eval": 0,
}


class Recording:
    """A runtime that keeps what it is asked to reduce."""

    rank, size = 0, 1

    def all_reduce(self, tensors: list) -> list:
        """The tensors themselves."""
        self.shapes = [tuple(tensor.shape) for tensor in tensors]
        return tensors


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Flags of a run on a small data set."""
    path = str(tmp_path_factory.mktemp("scenes"))
    sample_data.draw(path, count=8, height=70, width=90)
    return {**VALUES, "data_path": path}


@pytest.fixture(scope="module")
def judge() -> evaluate.Judge:
    """Of a narrow network with random weights."""
    network = create_model(ARCHITECTURE)
    # Scores about 1/7 each are none at all.
    kernel = network.get_layer("ssd.detection.ssd.pool6").confidence_kernel
    kernel.assign(50.0 * kernel)
    return evaluate.Judge(network, ARCHITECTURE, Limits())


def perfect(pair: evaluate.pictures.Picture) -> dict[str, np.ndarray]:
    """The results of somebody who knows the truth."""
    boxes = pair.objects.boxes
    near, far = boxes[:, 1::-1], (boxes[:, :2] + boxes[:, 2:])[:, ::-1]
    mask = evaluate.pictures.unpack(pair.mask, pair.size).astype(np.int32)
    return {
        "boxes": np.concatenate([near, far], 1),
        "classes": pair.objects.labels,
        "scores": np.linspace(1.0, 0.9, len(boxes)),
        "confusion": metrics.confusion(mask, tf.constant(mask), 7).numpy(),
    }


def test_the_truth_gets_full_marks(values: dict) -> None:
    """All measures are 1 for perfect results, however they are shared."""
    pairs = evaluate.read_pictures(values)
    tally = evaluate.Tally(pairs, 7)
    for index, pair in enumerate(pairs):
        tally.add(index, perfect(pair), 0.5)
    table = tally.figures(values, Recording())
    for name in ("map_area", "map_11_point", "map_coco", "mean_iou"):
        assert table[name] == pytest.approx(1.0), name


def test_ranks_bring_their_pictures_together(values: dict) -> None:
    """A rank without pictures reduces what the others do."""
    pairs = evaluate.read_pictures(values)
    shapes = []
    for count in (0, 1):
        tally, runtime = evaluate.Tally(pairs, 7), Recording()
        for index in range(count):
            tally.add(index, perfect(pairs[index]), 0.5)
        tally.figures(values, runtime)
        shapes.append(runtime.shapes)
    # HCCL fails or hangs where ranks reduce tensors of unequal shapes.
    assert shapes[0] == shapes[1]


def test_offline_scores_are_those_of_the_live_network(
    values: dict, judge: evaluate.Judge, tmp_path: Path
) -> None:
    """From text and from binary outputs, digit for digit or nearly so."""
    pairs = evaluate.read_pictures(values)
    live, rows = evaluate.evaluate(judge, values, pairs, Recording())
    assert len(rows) == len(pairs)
    inputs = tmp_path / "inputs"
    assert offline.write_inputs(values, str(inputs)) == len(pairs)
    for suffix in (".bin", ".txt"):
        folder = tmp_path / suffix[1:]
        folder.mkdir()
        for path in sorted(inputs.iterdir()):
            image = np.fromfile(path, np.float32).reshape(1, 96, 96, 3)
            assert 0.0 <= image.min() and image.max() <= 1.0
            outputs = judge.network(image)
            for number, name in enumerate(
                ("confidence", "location", "segmentation")
            ):
                array = outputs[name].numpy()
                to = folder / f"{path.stem}_output_{number}{suffix}"
                if suffix == ".bin":
                    array.tofile(to)
                else:
                    np.savetxt(to, array.reshape(-1, array.shape[-1]))
        again = offline.OfflineJudge(str(folder), ARCHITECTURE, Limits())
        table, _ = evaluate.evaluate(again, values, pairs, Recording())
        for name in ("map_area", "map_11_point", "mean_iou"):
            assert table[name] == pytest.approx(live[name], abs=1e-4)
    with pytest.raises(UserError, match="00007_output_0.txt: cannot be"):
        offline.read_output(str(tmp_path / "00007_output_0"), (1,))
    with pytest.raises(UserError, match="numbers where"):
        offline.read_output(str(tmp_path / "bin" / "00000_output_0"), (1, 2))


def test_results_have_the_picture_s_own_size(judge: evaluate.Judge) -> None:
    """Masks in pixels, boxes in pixels of that picture."""
    infer = predict.make_inference(judge, 96)
    rng = np.random.RandomState(0)
    for size in ((50, 70), (200, 90)):
        results = infer(rng.randint(0, 256, (*size, 3), np.uint8))
        assert results["predicted"].shape == size
        names = ["background", *sample_data.CLASSES]
        found = predict.confident(results, 0.3)
        for box in predict.as_json(found, size, names):
            assert box["score"] >= 0.3
            assert 0 <= box["xmin"] <= box["xmax"] <= size[1]
            assert 0 <= box["ymin"] <= box["ymax"] <= size[0]


def test_boxes_are_drawn_where_they_are() -> None:
    """In the class's colour, on a copy."""
    picture = np.zeros((80, 100, 3), np.uint8)
    boxes = np.array([[0.25, 0.2, 0.75, 0.9]])
    drawn = visuals.draw_boxes(
        picture, boxes, np.array([1]), ["none", "thing"], np.array([0.5])
    )
    assert not picture.any()
    rows, columns = np.nonzero((drawn == visuals.palette(2)[1]).all(-1))
    assert (rows.min(), rows.max()) == (20, 59)
    assert (columns.min(), columns.max()) == (20, 89)


def test_palette_is_that_of_pascal_voc() -> None:
    """Some of its colours by class id."""
    colours = visuals.palette(256)
    for number, colour in (
        (0, "000000"),
        (1, "800000"),
        (7, "808080"),
        (8, "400000"),
        (15, "c08080"),
        (20, "004080"),
        (255, "e0e0c0"),
    ):
        assert bytes(colours[number]).hex() == colour, number


def test_boxes_from_masks() -> None:
    """Regions that touch at a corner are one; small ones are none."""
    names = ["car", "road"]
    mask = np.zeros((40, 60), np.uint8)
    mask[5:15, 5:20] = 1
    mask[15:25, 20:30] = 1
    mask[30:33, 40:43] = 1
    mask[30:40, 45:60] = 2
    found = boxes_from_masks.find_objects(mask, names, ["car"], 20)
    assert found == [("car", (5, 5, 30, 25), False)]


def test_names_of_classes(tmp_path: Path) -> None:
    """VOC's, those of a file, or those given; numbers fill up."""
    path = str(tmp_path)
    assert voc.class_names(path, None, None)[15] == "person"
    (tmp_path / "classes.txt").write_text("cat\n\ndog\n")
    assert voc.class_names(path, None, None) == ["background", "cat", "dog"]
    given = voc.class_names(path, ["owl"], 3)
    assert given == ["background", "owl", "class 2"]


def test_inputs_by_file_folder_and_glob(tmp_path: Path) -> None:
    """Natural order, pictures only."""
    for name in ("10.png", "9.png", "notes.txt", "a b.JPG"):
        (tmp_path / name).write_bytes(b"")
    names = [Path(path).name for path in predict.find_inputs(str(tmp_path))]
    assert names == ["9.png", "10.png", "a b.JPG"]
    found = predict.find_inputs(str(tmp_path / "*.png"))
    assert [Path(path).name for path in found] == ["9.png", "10.png"]
    with pytest.raises(UserError, match="no pictures found"):
        predict.find_inputs(str(tmp_path / "none*"))
    (tmp_path / "10.jpg").touch()
    with pytest.raises(UserError, match=r"10.jpg and .*10.png: the results"):
        predict.find_inputs(str(tmp_path))
