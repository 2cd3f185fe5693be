#!/usr/bin/env bash
# Full training on one device with the seed's numbers; --help lists the
# options.
CASE_SUFFIX=acc
CASE_FLAGS=(
  --exec_mode=train_and_evaluate
  --batch_size=4
  --train_steps=100000
  --learning_rate=1e-5
  --weight_decay=5e-4
  --augment=paper
  --canvas=480,854
)
# shellcheck source=ROI_FCN/test/run_case.sh
. "$(dirname "${BASH_SOURCE[0]}")/run_case.sh"
