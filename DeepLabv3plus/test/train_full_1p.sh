#!/usr/bin/env bash
# Full training on one device with the seed's numbers; --help lists the
# options.
CASE_SUFFIX=acc
CASE_FLAGS=(
  --exec_mode=train_and_evaluate
  --batch_size=7
  --train_steps=300000
  --learning_rate=1e-4
  --weight_decay=4e-5
  --train_crop_size=513,513
)
# shellcheck source=DeepLabv3plus/test/run_case.sh
. "$(dirname "${BASH_SOURCE[0]}")/run_case.sh"
