"""Writes the ModelZoo's loss file and summary of a case, prints its results.

python report_case.py LOGS RUN NETWORK SUFFIX BATCH_SIZE RANK_SIZE STATUS
SECONDS; run_case.sh calls it. A failed training (STATUS other than 0) leaves
the same lines with empty values, whatever an earlier run has left in RUN.
"""

import json
import os
import platform
import sys


def read_run(run: str) -> tuple[dict[str, object], list[float]]:
    """The result.json of a run folder, and the losses that it logged."""
    with open(os.path.join(run, "result.json"), encoding="utf8") as file:
        result = json.load(file)
    with open(os.path.join(run, "metrics.jsonl"), encoding="utf8") as file:
        losses = [json.loads(line).get("total_loss") for line in file]
    return result, [loss for loss in losses if loss is not None]


def summary(
    case: tuple[str, str, str, str, str],
    result: dict[str, object],
    losses: list[float],
) -> dict[str, str]:
    """The keys of ${CaseName}.log in the ModelZoo's order.

    ActualFPS is in pictures of all ranks per second, TrainingTime in
    milliseconds per step, E2ETrainingTime in seconds.
    """
    network, suffix, batch_size, rank_size, seconds = case
    batch_size = str(result.get("batch_size", batch_size))
    speed = shown(result, "images_per_second")
    milliseconds = ""
    if speed and float(speed) > 0:
        pictures = int(batch_size) * int(rank_size)
        milliseconds = f"{pictures * 1000 / float(speed):.2f}"
    return {
        "Network": network,
        "RankSize": rank_size,
        "BatchSize": batch_size,
        "DeviceType": platform.machine(),
        "CaseName": f"{network}_bs{batch_size}_{rank_size}p_{suffix}",
        "ActualFPS": speed,
        "TrainingTime": milliseconds,
        "TrainAccuracy": shown(result, "metric"),
        "ActualLoss": f"{losses[-1]:.6f}" if losses else "",
        "E2ETrainingTime": seconds,
    }


def shown(result: dict[str, object], name: str) -> str:
    """A number of a result with four digits, or nothing."""
    value = result.get(name)
    return "" if value is None else f"{value:.4f}"


def main() -> None:
    """Reports the case that the command line describes."""
    logs, run, network, suffix, batch_size, rank_size = sys.argv[1:7]
    status, seconds = sys.argv[7:]
    result, losses = read_run(run) if status == "0" else ({}, [])
    case = (network, suffix, batch_size, rank_size, seconds)
    values = summary(case, result, losses)
    name = values["CaseName"]
    with open(os.path.join(logs, f"train_{name}_loss.txt"), "w") as file:
        file.writelines(f"{loss:.6f}\n" for loss in losses)
    with open(os.path.join(logs, f"{name}.log"), "w") as file:
        file.writelines(f"{key} = {value}\n" for key, value in values.items())
    print("------------------ Final result ------------------")
    print(f"Final Performance images/sec : {values['ActualFPS']}")
    print(f"Final Performance sec/step : {shown(result, 'seconds_per_step')}")
    print(f"Final Train Accuracy : {values['TrainAccuracy']}")
    print(f"E2E Training Duration sec : {seconds}")


if __name__ == "__main__":
    main()
