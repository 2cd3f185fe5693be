#!/usr/bin/env bash
# Full training on one device with the recipe for CamVid at 480x360; --help
# lists the options.
CASE_SUFFIX=acc
CASE_FLAGS=(
  --exec_mode=train_and_evaluate
  --flagfile="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/configs/camvid.flags"
  --batch_size=8
  --train_steps=4200
)
# shellcheck source=BiSeNet/test/run_case.sh
. "$(dirname "${BASH_SOURCE[0]}")/run_case.sh"
