#!/usr/bin/env bash
# Runs a command as one rank: the output goes to the log of the rank's device,
# that of rank 0 to the screen as well, and a failure is noted for run_case.sh.
#
#   CASE_RANK=N run_rank.sh OUTPUT_FOLDER FIRST_DEVICE COMMAND...
set -uo pipefail

output=$1
first_device=$2
shift 2
rank=${HOROVOD_RANK:-$CASE_RANK}
device=$((first_device + rank))
log=$output/$device/train_$device.log

# The command saves and ends at SIGTERM; its output is read until then.
trap : TERM
if ((rank == 0)); then
  "$@" 2>&1 | (
    trap '' TERM
    exec tee "$log"
  )
  status=${PIPESTATUS[0]}
else
  "$@" >"$log" 2>&1
  status=$?
fi
((status == 0)) || echo "$rank $status" >>"$output/$first_device/failed_ranks"
exit "$status"
