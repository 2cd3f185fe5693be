#!/usr/bin/env bash
# Short training on one device that measures the speed; --help lists the
# options.
CASE_SUFFIX=perf
CASE_FLAGS=(
  --exec_mode=train_and_evaluate
  --batch_size=16
  --train_steps=500
  --x4
  --detect
  --segment
)
# shellcheck source=BlitzNet/test/run_case.sh
. "$(dirname "${BASH_SOURCE[0]}")/run_case.sh"
