"""Two real processes under horovodrun learn as one."""

import re
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

from ci import contract, npu_probe

pytest.importorskip("horovod")


def run_two(*flags: str) -> subprocess.CompletedProcess:
    """Runs the probe on two ranks."""
    return contract.run(
        [
            sys.executable,
            # As a module: horovodrun need not be on the PATH of a test.
            *("-m", "horovod.runner.launch", "--gloo", "-np", "2"),
            *(sys.executable, npu_probe.PROBES / "horovod_training.py"),
            *("--device=cpu", "--precision_mode=force_fp32", *flags),
        ],
        timeout=300,
        PYTHONPATH=str(contract.REPOSITORY),
    )


@pytest.fixture(name="ranks", scope="module")
def both_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two ranks has found."""
    # One job for all tests of the module: it takes many seconds.
    folder = tmp_path_factory.mktemp("horovod")
    process = run_two(f"--output={folder}")
    assert process.returncode == 0, process.stdout + process.stderr
    for rank in range(2):
        assert f"device cpu, rank {rank} of 2" in process.stdout
    found = []
    for rank in range(2):
        with np.load(folder / f"rank{rank}.npz") as arrays:
            found.append(dict(arrays))
    return found


def test_broadcast_gives_all_state_of_rank_0(ranks: list[dict]) -> None:
    """Ranks seeded apart are equal afterwards, slots included."""
    first, second = ranks
    # Otherwise the equality below would prove nothing.
    assert not np.array_equal(first["seeded"], second["seeded"])
    np.testing.assert_array_equal(first["broadcast"], second["broadcast"])
    size = first["seeded"].size
    np.testing.assert_array_equal(first["broadcast"][:size], first["seeded"])


def test_gradients_are_averaged(ranks: list[dict]) -> None:
    """Each rank steps along the mean of both ranks' gradients."""
    own = [rank["gradients"] for rank in ranks]
    assert not np.allclose(*own)
    for rank in ranks:
        np.testing.assert_allclose(rank["means"], np.mean(own, 0), rtol=1e-5)
        step = rank["before"] - rank["after"]
        # Absolute, because a difference of weights loses small digits.
        np.testing.assert_allclose(step, rank["means"], atol=1e-6)


def test_weights_are_equal_after_five_steps(ranks: list[dict]) -> None:
    """Bit for bit: a difference, however small, would grow."""
    first, second = ranks
    assert not np.array_equal(first["trained"], first["after"])
    np.testing.assert_array_equal(first["trained"], second["trained"])
    np.testing.assert_array_equal(first["slots"], second["slots"])


def test_statistics_are_local_until_reduced(ranks: list[dict]) -> None:
    """Moving averages differ by rank; all_reduce gives their mean."""
    own = [rank["statistics"] for rank in ranks]
    assert not np.allclose(*own)
    for rank in ranks:
        mean = rank["mean_statistics"]
        np.testing.assert_allclose(mean, np.mean(own, 0), rtol=1e-5)


@pytest.mark.parametrize("mode", ["eager", "traced"])
def test_lists_are_reduced_in_order(mode: str, ranks: list[dict]) -> None:
    """A None in a list shifts nothing, in a traced function neither."""
    for rank in ranks:
        np.testing.assert_allclose(rank[mode], [0.5, 0.5, 1.0])


def test_batch_norm_takes_the_moments_of_all_ranks(ranks: list[dict]) -> None:
    """Outputs, moments and gradients of TensorFlow's kernel for both."""
    features, weights = (
        tf.constant(
            np.concatenate([rank[f"norm_{name}"] for rank in ranks]),
            tf.float32,
        )
        for name in ("inputs", "weights")
    )
    sources = [features, tf.linspace(0.5, 2.0, 5), tf.linspace(-1.0, 1.0, 5)]
    with tf.GradientTape() as tape:
        tape.watch(sources)
        outputs, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            *sources, epsilon=1e-3
        )
        # Each rank has a loss of its own, and gradients are averaged.
        loss = tf.reduce_sum(tf.sin(outputs) * weights) / 2
    expected = [outputs, *tape.gradient(loss, sources), mean, variance]
    names = ["outputs", "features", "gamma", "beta", "mean", "variance"]
    first, second = (
        {name: rank[f"norm_{name}"] for name in names} for rank in ranks
    )
    found = [
        np.concatenate([first["outputs"], second["outputs"]]),
        # A rank's own features have no share in the other's average.
        np.concatenate([first["features"], second["features"]]) / 2,
        *((first[name] + second[name]) / 2 for name in names[2:]),
    ]
    for name, ours, theirs in zip(names, found, expected):
        np.testing.assert_allclose(
            ours, theirs, rtol=1e-4, atol=1e-5, err_msg=name
        )
    for name in ("mean", "variance"):
        np.testing.assert_array_equal(first[name], second[name])


def test_an_overflow_on_one_rank_skips_the_step_on_all(
    ranks: list[dict],
) -> None:
    """A rank that stepped alone would part from the others for good."""
    for rank in ranks:
        before, after = rank["before_overflow"], rank["after_overflow"]
        np.testing.assert_array_equal(before, after)
        assert rank["scale"] == 32


@pytest.mark.parametrize(
    ("end", "message"),
    [("error", "rank 1 cannot go on"), ("kill", "Process name: 1")],
)
def test_a_rank_that_dies_ends_the_job(end: str, message: str) -> None:
    """Within a minute: idle ranks would wait for it without end."""
    process = run_two(f"--end={end}")
    # From the death on; starting TensorFlow twice is no part of it.
    died = float(re.search(r"rank 1 ends at (\S+)", process.stdout).group(1))
    assert time.time() - died < 60
    assert process.returncode != 0
    assert message in process.stderr
    assert "causing the job to be terminated" in process.stderr
