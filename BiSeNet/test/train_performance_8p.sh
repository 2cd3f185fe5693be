#!/usr/bin/env bash
# train_performance_1p.sh on RANK_SIZE devices, 8 if not set; --rank_size=2 suits a
# small machine.
exec bash "$(dirname "${BASH_SOURCE[0]}")/train_performance_1p.sh" \
  --rank_size="${RANK_SIZE:-8}" "$@"
