# The training case behind the train_*.sh scripts, which set CASE_FLAGS (defaults
# for train.py) and CASE_SUFFIX (acc or perf) and source this file. What belongs
# to one model stands in those scripts; this file is the same for all.
# shellcheck shell=bash
set -euo pipefail

case_script=$(basename "$0")
test_folder=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
room=$(dirname "$test_folder")
output=$test_folder/output
device=${ASCEND_DEVICE_ID:-0}
logs=$output/$device
failed_ranks=$logs/failed_ranks
python=${PYTHON:-$(dirname "$room")/.venv/default/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3

usage() {
  cat <<EOF
usage: bash $case_script [--key=value | --key value]...

  --data_path       the data set; without it sample data is drawn and used
  --output_path     the run folder; default test/output/\$ASCEND_DEVICE_ID
  --batch_size      pictures per device and step
  --train_steps     training steps
  --precision_mode  default allow_mix_precision; README.md lists the values
  --device          auto, npu, gpu or cpu
  --rank_size       number of devices; 1, in the 8p scripts RANK_SIZE or 8
  --over_dump, --data_dump_flag, --data_dump_step, --profiling,
  --use_mixlist, --mixlist_file, --fusion_off_flag, --fusion_off_file
                    options of the NPU adapter

Any other --flag goes to train.py, which by default gets
  ${CASE_FLAGS[*]}
Environment: ASCEND_DEVICE_ID (the first device, default 0); PYTHON; for several
NPUs RANK_TABLE_FILE (default configs/rank_table_8p.json) or the CM_ variables.
Logs and results: $output/\$ASCEND_DEVICE_ID, made anew by every run; the run
before is kept in a folder beside it that ends in .previous.
EOF
}

stop_with() {
  echo "$case_script: $*" >&2
  exit 1
}

# Takes KEY [VALUE]: what the script itself has a use for, the spellings of older
# scripts, and else a flag of train.py.
take_option() {
  local key=$1 value=${2-}
  case $key in
    data_dir) key=data_path ;;
    max_steps) key=train_steps ;;
    model_dir) key=output_path ;;
    ckpt_path) key=init_checkpoint ;;
    Rank_Size | RANK_SIZE) key=rank_size ;;
  esac
  case $key in
    rank_size) rank_size=$value ;;
    output_path) run_folder=$value ;;
    autotune | auto_tune)
      [ "$value" = False ] || stop_with "--$key=$value: the NPU adapter has no" \
        "auto-tuning any more; leave the option out"
      ;;
    *) flags+=("--$key${2+=$value}") ;;
  esac
  case $key=$value in
    device=*) device_kind=$value ;;
    batch_size=*) batch_size=$value ;;
    over_dump=True) path_flags+=("--over_dump_path=$logs/overflow_dump") ;;
    data_dump_flag=True) path_flags+=("--data_dump_path=$logs/data_dump") ;;
    profiling=True) path_flags+=("--profiling_dump_path=$logs/profiling") ;;
    use_mixlist=True) path_flags+=("--mixlist_file=$room/configs/ops_info.json") ;;
  esac
}

take_options() {
  local option
  while (($#)); do
    option=${1#--}
    case $1 in
      -h | --help)
        usage
        exit 0
        ;;
      --*=*) take_option "${option%%=*}" "${option#*=}" ;;
      --*)
        if (($# > 1)) && [[ $2 != --* ]]; then
          take_option "$option" "$2"
          shift
        else
          take_option "$option"
        fi
        ;;
      *) stop_with "'$1' is no option; --help lists them" ;;
    esac
    shift
  done
}

has_module() {
  "$python" -c 'import sys
from importlib.util import find_spec
sys.exit(find_spec(sys.argv[1]) is None)' "$1"
}

on_npu() {
  [ "$device_kind" = npu ] ||
    { [ "$device_kind" = auto ] && has_module npu_device; }
}

# Each child leads a process group of its own, so that a signal reaches all that
# it has started.
start() {
  setsid "$@" &
  children+=($!)
}

signal_ranks() {
  local pid
  for pid in "${children[@]}"; do kill "-$1" -- "-$pid" 2>/dev/null || true; done
}

start_ranks() {
  local command=(bash "$test_folder/run_rank.sh" "$output" "$device"
    "$python" "$room/train.py" "${CASE_FLAGS[@]}"
    ${path_flags[@]+"${path_flags[@]}"} ${flags[@]+"${flags[@]}"}
    "--output_path=$run_folder")
  local rank
  export PYTHONUNBUFFERED=1 JOB_ID=${JOB_ID:-10087}
  export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-1}
  if ((rank_size == 1)); then
    start env RANK_SIZE=1 RANK_ID=0 CASE_RANK=0 ASCEND_DEVICE_ID="$device" \
      "${command[@]}"
  elif ! on_npu; then
    has_module horovod || stop_with "several devices need Horovod, which" \
      "$python has not: 'bash ci/env.sh default' builds it"
    start env -u RANK_SIZE -u RANK_ID "$python" -m horovod.runner.launch \
      --gloo -np "$rank_size" "${command[@]}"
  elif [ -n "${CM_CHIEF_IP:-}" ]; then
    # Without a table the ranks find their numbers themselves.
    for ((rank = 0; rank < rank_size; rank++)); do
      start env -u RANK_SIZE -u RANK_ID -u RANK_TABLE_FILE CASE_RANK="$rank" \
        CM_WORKER_SIZE="$rank_size" ASCEND_DEVICE_ID=$((device + rank)) \
        "${command[@]}"
    done
  else
    if [ -z "${RANK_TABLE_FILE:-}" ]; then
      export RANK_TABLE_FILE=$room/configs/rank_table_8p.json
      echo "RANK_TABLE_FILE is not set: using $RANK_TABLE_FILE, an example" \
        "whose addresses must be replaced by this machine's"
    fi
    for ((rank = 0; rank < rank_size; rank++)); do
      start env RANK_SIZE="$rank_size" RANK_ID="$rank" CASE_RANK="$rank" \
        ASCEND_DEVICE_ID=$((device + rank)) "${command[@]}"
    done
  fi
}

# Waits for all ranks. Where one has failed, the others would wait for it for
# ever: they are asked to end, then ended (horovodrun sees to that itself). It
# polls because a trapped signal would end `wait` before the child has ended.
wait_for_ranks() {
  local pid running deadline=
  while true; do
    running=
    for pid in "${children[@]}"; do
      ! kill -0 "$pid" 2>/dev/null || running=yes
    done
    [ -n "$running" ] || break
    if ((${#children[@]} > 1)) && [ -z "$stopping" ] && [ -s "$failed_ranks" ]
    then
      if [ -z "$deadline" ]; then
        deadline=$((SECONDS + 5))
        signal_ranks TERM
      elif ((SECONDS > deadline)); then
        signal_ranks KILL
      fi
    fi
    sleep 0.2
  done
  for pid in "${children[@]}"; do wait "$pid" || status=$?; done
}

# Says which rank failed first, and the last line of its log that names an error.
explain_failure() {
  local rank=0 log reason="it wrote nothing"
  [ ! -s "$failed_ranks" ] || read -r rank status <"$failed_ranks"
  log=$output/$((device + rank))/train_$((device + rank)).log
  [ ! -s "$log" ] || reason=$(
    awk 'NF { last = $0 } /[Ee]rror|FATAL/ { error = $0; line = NR }
      END { print (line && line > NR - 5) ? error : last }' "$log"
  )
  echo "$case_script: training failed: rank $rank ended with status $status:" \
    "$reason" >&2
}

flags=()
path_flags=()
children=()
batch_size=
rank_size=1
run_folder=$logs
device_kind=auto
status=0
stopping=
begin=$SECONDS

[[ $device =~ ^(0|[1-9][0-9]*)$ ]] ||
  stop_with "ASCEND_DEVICE_ID=$device: must be a number such as 0"
for flag in "${CASE_FLAGS[@]}"; do
  case $flag in --batch_size=*) batch_size=${flag#*=} ;; esac
done
take_options "$@"
[[ $rank_size =~ ^[1-9][0-9]*$ ]] ||
  stop_with "--rank_size=$rank_size: must be a number of devices such as 2"
[ -n "$(command -v "$python")" ] || stop_with "no Python at '$python':" \
  "run 'bash ci/env.sh default' in the repository, or set PYTHON"

# A finished run is not lost to a start that fails: the last one is kept aside.
for ((i = device; i < device + rank_size; i++)); do
  if [ -d "$output/$i/ckpt" ]; then
    rm -rf "${output:?}/$i.previous"
    mv "$output/$i" "$output/$i.previous"
  fi
  rm -rf "${output:?}/$i"
  mkdir -p "$output/$i"
done

# Once, because train.py takes a second signal as 'without saving'.
trap '[ -n "$stopping" ] || signal_ranks TERM; stopping=yes' TERM INT HUP
start_ranks
wait_for_ranks
((status == 0)) || explain_failure
"$python" "$test_folder/report_case.py" "$logs" "$run_folder" \
  "$(basename "$room")" "$CASE_SUFFIX" "$batch_size" "$rank_size" "$status" \
  "$((SECONDS - begin))"
rm -f "$failed_ranks"
exit "$status"
