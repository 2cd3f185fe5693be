"""Steps of the optimiser on the NPU's double, and in float16 elsewhere."""

from pathlib import Path

import numpy as np
import pytest

from ci import npu_probe

NPU = "--device=npu"
FLOAT32 = "--precision_mode=force_fp32"


def train(*cases: dict) -> list[dict]:
    """Returns what the probe `npu_training` answers to some cases."""
    return npu_probe.ask("npu_training", list(cases))


def weights(answer: dict, step: int) -> list[np.ndarray]:
    """Returns the trained variables after a step."""
    return [np.array(each) for each in answer["history"][step]["weights"]]


def is_skipped(answer: dict, step: int) -> bool:
    """Tells whether a step changed no variable and halved the scale."""
    before, after = answer["history"][step - 1], answer["history"][step]
    same = all(
        np.array_equal(*pair)
        for pair in zip(weights(answer, step - 1), weights(answer, step))
    )
    return same and after["scale"] == before["scale"] / 2


@pytest.fixture(name="eight")
def eight_ranks(tmp_path: Path) -> dict:
    """The environment of rank 3 of 8."""
    # The other ranks are copies of this one, which the double plays.
    table = tmp_path / "8p.json"
    npu_probe.write_rank_table(table)
    return {
        "RANK_TABLE_FILE": str(table),
        "RANK_ID": "3",
        "RANK_SIZE": "8",
    }


def test_eight_replicas_train_like_one_device(eight: dict) -> None:
    """The mean of eight equal gradients is the gradient of one device."""
    steps = ["good"] * 3
    one, all_ranks, scaled = train(
        {"flags": [NPU, FLOAT32], "steps": steps},
        {"flags": [NPU, FLOAT32], "steps": steps, "environment": eight},
        {"flags": [NPU], "steps": steps, "environment": eight},
    )
    for step in range(3):
        for single, replica in zip(
            weights(one, step), weights(all_ranks, step)
        ):
            np.testing.assert_allclose(single, replica, rtol=1e-5)
        # Scaling rounds small gradients, and Adam divides by their size:
        # hence the wider tolerance, and an absolute one near zero.
        for single, replica in zip(weights(one, step), weights(scaled, step)):
            np.testing.assert_allclose(single, replica, rtol=1e-4, atol=1e-5)
    assert one["calls"].count("npu_distributed_keras_optimizer_wrapper") == 0
    for answer in (all_ranks, scaled):
        assert answer["calls"][:2] == ["open", "as_default"]
        assert answer["calls"].count("open") == 1
        # Once in the optimizer's traced step, and nowhere else.
        assert answer["calls"].count("all_reduce") == 1


def test_wrapper_is_outermost_and_single(eight: dict) -> None:
    """Wrapped twice, gradients would be reduced twice."""
    on_910, on_a2, plain = train(
        {"flags": [NPU], "environment": eight},
        {"flags": [NPU], "environment": eight, "chip": "A2"},
        {"flags": [NPU, "--loss_scale=0"], "environment": eight},
    )
    assert "NpuLossScaleOptimizer" in on_910["calls"]
    assert "NpuLossScaleOptimizer" not in on_a2["calls"]
    assert on_a2["optimizer"] == "LossScaleOptimizer"
    assert plain["optimizer"] == "Adam"
    for answer in (on_910, on_a2, plain):
        assert answer["wrapped"] == [True]
        assert "double_wrap" not in answer["calls"]


def test_broadcast_covers_statistics_and_slots(eight: dict) -> None:
    """Every rank starts from rank 0's values of all variables."""
    received, root = train(
        {"flags": [NPU], "environment": eight, "sent": 7},
        {
            "flags": [NPU],
            "environment": {**eight, "RANK_ID": "0"},
            "sent": 7,
        },
    )
    for value in received["received"]:
        assert np.all(np.array(value) == 7)
    # Rank 0 is the source, so its own values have to stay.
    assert not np.all(np.array(root["received"][0]) == 7)
    (names,) = received["broadcast"]
    for part in ("kernel", "moving_mean", "moving_variance", "iter"):
        assert any(part in name for name in names), names
    # 4 + 6 trained and moving values and twice 6 moments of Adam at least.
    assert len(names) > 8 + 12


def test_overflow_on_an_npu_skips_the_step(eight: dict) -> None:
    """No variable moves and the scale is halved, on either kind of chip."""
    npu = {"flags": [NPU], "steps": ["good", "forced", "good", "data"]}
    answers = train(
        npu,
        {**npu, "environment": eight},
        # A newer chip does not saturate, so Keras sees its overflows.
        {**npu, "chip": "A2", "steps": ["good", "data", "good", "data"]},
        {**npu, "flags": [NPU, "--npu_loss_scale=64"]},
    )
    for answer, first in zip(answers, [2.0**15] * 3 + [64.0]):
        assert answer["history"][0]["scale"] == first
        assert is_skipped(answer, 1)
        assert not is_skipped(answer, 2)
        assert is_skipped(answer, 3)
    # Schedules go by this count, and the adapter counts skipped steps.
    iterations = [each["iterations"] for each in answers[0]["history"]]
    assert iterations == [1, 2, 3, 4]


def test_overflow_in_float16_on_a_gpu_skips_the_step() -> None:
    """A scale, dynamic or fixed, is halved; without one weights are lost."""
    steps = ["good", "data", "good", "good"]
    gpu = {"device": "gpu", "steps": steps}
    dynamic, fixed, none = train(
        {**gpu, "loss_scale": 1},
        {**gpu, "loss_scale": 1024},
        {"device": "gpu", "steps": ["good", "data"], "loss_scale": 0},
    )
    for answer, first in ((dynamic, 2.0**15), (fixed, 1024)):
        assert answer["optimizer"] == "LossScaleOptimizer"
        assert answer["history"][0]["scale"] == first
        assert is_skipped(answer, 1)
        for step in (2, 3):
            assert not is_skipped(answer, step)
            assert answer["history"][step]["scale"] == first / 2
            assert all(
                np.isfinite(each).all() for each in weights(answer, step)
            )
    assert none["optimizer"] == "Adam"
    # Shows that the overflow is real, and not skipped by luck.
    assert not all(np.isfinite(each).all() for each in weights(none, 1))
