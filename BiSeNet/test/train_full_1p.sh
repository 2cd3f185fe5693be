#!/usr/bin/env bash
# Full training on one device with the numbers of configs/camvid.flags, whose
# crop suits pictures of 480x360; --help lists the options.
CASE_SUFFIX=acc
CASE_FLAGS=(
  --exec_mode=train_and_evaluate
  --batch_size=8
  --train_steps=12000
  --crop_size=352,480
  --learning_rate=0.025
  --schedule=poly
  --lr_warmup_steps=200
  --class_weights=sqrt_freq
  --augment=reference
  --min_scale=0.5
  --max_scale=2.0
  --eval_every=1000
  --save_every=500
)
# shellcheck source=BiSeNet/test/run_case.sh
. "$(dirname "${BASH_SOURCE[0]}")/run_case.sh"
