#!/usr/bin/env bash
# Full training on one device with the seed's numbers; --help lists the
# options.
CASE_SUFFIX=acc
CASE_FLAGS=(
  --exec_mode=train_and_evaluate
  --batch_size=16
  --train_steps=40000
  --learning_rate=1e-4
  --lr_decay=25000,35000
  --x4
  --detect
  --segment
)
# shellcheck source=BlitzNet/test/run_case.sh
. "$(dirname "${BASH_SOURCE[0]}")/run_case.sh"
