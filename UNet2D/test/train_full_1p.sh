#!/usr/bin/env bash
# Full training on one device, to the accuracy that README.md states; --help
# lists the options.
CASE_SUFFIX=acc
CASE_FLAGS=(
  --exec_mode=train_and_evaluate
  --batch_size=1
  --train_steps=600
  --learning_rate=3e-4
  --schedule=cosine
  --weight_decay=0
  --augment=turns
  --border=mirror
  --initializer=he_normal
)
# shellcheck source=UNet2D/test/run_case.sh
. "$(dirname "${BASH_SOURCE[0]}")/run_case.sh"
