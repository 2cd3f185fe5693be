#!/usr/bin/env bash
# Short training on one device that measures the speed; --help lists the
# options.
CASE_SUFFIX=perf
CASE_FLAGS=(
  --exec_mode=train_and_evaluate
  --batch_size=7
  --train_steps=2000
)
# shellcheck source=DeepLabv3plus/test/run_case.sh
. "$(dirname "${BASH_SOURCE[0]}")/run_case.sh"
