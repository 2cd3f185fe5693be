#!/usr/bin/env bash
# Short training on one device that measures the speed; --help lists the
# options.
CASE_SUFFIX=perf
CASE_FLAGS=(
  --exec_mode=train_and_evaluate
  --batch_size=8
  --train_steps=105
)
# shellcheck source=BiSeNet/test/run_case.sh
. "$(dirname "${BASH_SOURCE[0]}")/run_case.sh"
