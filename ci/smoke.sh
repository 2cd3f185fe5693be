#!/usr/bin/env bash
# Trains every model, or those named, for a moment on sample data that it draws
# itself, set-up included, and prints one table.
#
#   bash ci/smoke.sh [MODEL]...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

models=("$@")
if [ ${#models[@]} = 0 ]; then
  for script in */train.py; do models+=("$(dirname "$script")"); done
fi
for model in "${models[@]}"; do
  [ -f "$model/train.py" ] || {
    echo "ci/smoke.sh: '$model' is no model; there are:" \
      "$(dirname -- */train.py | paste -sd ' ')" >&2
    exit 1
  }
done

PYTHON=$(bash ci/env.sh default | tail -n 1)
export PYTHON
unset ASCEND_DEVICE_ID
failed=()
for model in "${models[@]}"; do
  echo "== $model"
  bash "$model/test/train_performance_1p.sh" \
    --flagfile="$model/test/small.flags" || failed+=("$model")
done

echo
"$PYTHON" - "${models[@]}" <<'EOF'
import json
import os
import sys

row = "{:<14} {:>9} {:>8} {:>10} {:>9}  {:<26} {}".format
print(row("model", "images/s", "s/step", "loss first", "loss last",
          "metric", "pictures"))
for model in sys.argv[1:]:
    run = os.path.join(model, "test", "output", "0")
    try:
        with open(os.path.join(run, "result.json")) as file:
            result = json.load(file)
    except OSError:
        log = os.path.join(run, "train_0.log")
        print(row(model, *["-"] * 4, "failed", f"see {log}"))
        continue
    print(row(
        model,
        f"{result['images_per_second']:.2f}",
        f"{result['seconds_per_step']:.3f}",
        f"{result['loss_first']:.4f}",
        f"{result['loss_last']:.4f}",
        f"{result['metric_name']} {result['metric']:.4f}",
        os.path.join(run, "images"),
    ))
EOF
[ ${#failed[@]} = 0 ] || {
  echo "ci/smoke.sh: failed: ${failed[*]}" >&2
  exit 1
}
