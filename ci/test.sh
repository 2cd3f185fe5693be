#!/usr/bin/env bash
# Runs the linter and all tests, set-up included.
#
#   bash ci/test.sh [default|ascend|newest]... [-- PYTEST ARGUMENTS]
#
# Without a lane it takes default and ascend. A lane whose Python is missing is left out, but
# with CI=true it fails. The last line is 'N passed, N failed, N skipped'.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

lanes=()
while (($#)) && [ "$1" != -- ]; do
  lanes+=("$1")
  shift
done
(($# == 0)) || shift
[ ${#lanes[@]} -gt 0 ] || lanes=(default ascend)
targets=(common ci)
for script in */train.py; do targets+=("$(dirname "$script")"); done
for argument in "$@"; do
  # Paths among the arguments stand in for the whole suite.
  [ ! -e "${argument%%::*}" ] || targets=()
done

passed=0 failed=0 skipped=0
summary=()
note() {
  summary+=("$1")
  passed=$((passed + $2))
  failed=$((failed + $3))
  skipped=$((skipped + $4))
}

lint() {
  if "$python" -m ruff "$@"; then
    note "ruff $1: clean" 1 0 0
  else
    note "ruff $1: findings, see above" 0 1 0
  fi
}

# Prints passed, failed and skipped of a pytest report; a lane without a test
# counts as a failure.
count() {
  "$1" - "$2" "$3" <<'EOF'
import os
import sys
import xml.etree.ElementTree as xml

path, status = sys.argv[1:]
total = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
if os.path.getsize(path):
    suite = xml.parse(path).getroot().find("testsuite")
    total = {name: int(suite.get(name)) for name in total}
bad = total["failures"] + total["errors"]
passed = total["tests"] - bad - total["skipped"]
if not bad and (status != "0" or not passed):
    bad = 1
print(passed, bad, total["skipped"])
EOF
}

# Tests one lane, or the READMEs, and leaves their counts and seconds.
run_lane() {
  local lane=$1 python=$2 report counts status=0 begin=$SECONDS
  local tests=(${targets[@]+"${targets[@]}"})
  shift 2
  case $#,$lane in
    0,readmes) tests=(ci/test_readme.py) ;;
    0,*) tests+=(--ignore=ci/test_readme.py) ;;
  esac
  report=$(mktemp)
  echo "== $lane: $("$python" --version), $python"
  "$python" -m pytest --junitxml="$report" -o junit_family=xunit2 \
    ${tests[@]+"${tests[@]}"} "$@" || status=$?
  counts=$(count "$python" "$report" "$status") || counts="0 1 0"
  echo "$counts $((SECONDS - begin))" >"$reports/$lane"
  rm -f "$report"
}

linted=
ready=()
reports=$(mktemp -d)
# Ctrl-C does not reach what runs in the background.
trap 'kill $(jobs -p) 2>/dev/null || :; rm -rf "$reports"' EXIT
# Environments are made side by side too: one compiler, one download each.
makers=()
for lane in "${lanes[@]}"; do
  bash ci/env.sh "$lane" >"$reports/$lane.env" &
  makers+=($!)
done
for ((i = 0; i < ${#lanes[@]}; i++)); do
  lane=${lanes[i]}
  if ! wait "${makers[i]}"; then
    if [ "${CI:-}" = true ]; then
      note "$lane: no environment, see above" 0 1 0
    else
      note "$lane: left out, no environment, see above" 0 0 0
    fi
    continue
  fi
  python=$(tail -n 1 "$reports/$lane.env")
  if [ -z "$linted" ]; then
    lint check
    lint format --check
    linted=yes
  fi
  ready+=("$lane" "$python")
  # Their commands take a third of the default lane's time. Where pytest has
  # arguments of its own they choose among all tests.
  [ "$#,$lane" != 0,default ] || ready+=(readmes "$python")
done

# All are tested side by side, since most of a test is one thread that imports
# or traces. The first is shown at once, the others when it is done.
for ((i = 2; i < ${#ready[@]}; i += 2)); do
  run_lane "${ready[@]:i:2}" "$@" >"$reports/${ready[i]}.log" 2>&1 &
done
((${#ready[@]} == 0)) || run_lane "${ready[@]:0:2}" "$@"
wait
for ((i = 0; i < ${#ready[@]}; i += 2)); do
  lane=${ready[i]}
  ((i == 0)) || cat "$reports/$lane.log"
  # Without the file the lane was killed.
  read -r good bad left seconds <"$reports/$lane" || bad=1
  note "$lane: ${good:-0} passed, $bad failed, ${left:-0} skipped in\
 ${seconds:-?} s" "${good:-0}" "$bad" "${left:-0}"
done

[ -n "$linted" ] || ((failed)) || note "no lane has an environment" 0 1 0
printf '%s\n' "" "${summary[@]}"
echo "$passed passed, $failed failed, $skipped skipped"
((failed == 0))
