#!/usr/bin/env bash
# Makes the virtual environment of a lane if it is not there or if its
# requirements have changed, and prints the path of its python as the last line.
#
#   bash ci/env.sh [default|ascend|newest]
#
# default: TensorFlow 2.18.1, Python 3.9-3.12. ascend: TensorFlow 2.6.5, Python
# 3.9. newest: TensorFlow 2.21, Python 3.11-3.13, no Horovod. Progress goes to
# stderr. PYTHON names the interpreter to start from.
set -euo pipefail

lane=${1:-default}
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=$repository/.venv/$lane
python=$folder/bin/python
log=$repository/.venv/$lane.log
wheels=$repository/.venv/wheels

say() { echo "ci/env.sh $lane: $*" >&2; }
fail() {
  say "$@"
  exit 1
}

case $lane in
  default)
    versions="3.11 3.12 3.10 3.9"
    requirements=$repository/requirements.txt
    ;;
  ascend)
    versions="3.9"
    requirements=$repository/requirements-ascend.txt
    ;;
  newest)
    versions="3.13 3.12 3.11"
    requirements=$repository/requirements-newest.txt
    ;;
  *) fail "unknown lane '$lane'; the lanes are default, ascend and newest" ;;
esac

# The TensorFlow package that fits the machine. On arm64 there is no
# tensorflow-cpu; the Ascend lane's GPU build would need CUDA 11.2.
tensorflow_package() {
  if [ "$lane" != ascend ] && nvidia-smi >/dev/null 2>&1; then
    echo "tensorflow[and-cuda]"
  elif [ "$(uname -m)" = x86_64 ]; then
    echo tensorflow-cpu
  else
    echo tensorflow
  fi
}

resolved_requirements() {
  sed "s/^tensorflow==/$(tensorflow_package)==/" "$requirements"
  cat "$repository/ci/requirements-test.txt"
}

# Says 'good', 'venv' (it cannot make environments) or nothing.
probe() {
  "$1" - "$versions" 2>/dev/null <<'EOF' || true
import sys

if "%d.%d" % sys.version_info[:2] in sys.argv[1].split():
    try:
        import ensurepip, venv

        print("good")
    except ImportError:
        print("venv")
EOF
}

# A name on the PATH may be a version manager's shim that only prints an error,
# so each candidate is tried.
find_interpreter() {
  local version candidate without_venv=
  for version in $versions ""; do
    for candidate in ${PYTHON:+"$PYTHON"} "python3${version#3}" \
      "${PYENV_ROOT:-$HOME/.pyenv}/versions/${version:-3}"*/bin/python; do
      case $(probe "$candidate") in
        good) command -v "$candidate" && return ;;
        venv) without_venv=$candidate ;;
      esac
    done
  done
  [ -z "$without_venv" ] || fail "$without_venv has no venv module:" \
    "install it (Debian: apt-get install python3-venv)"
  fail "no Python ${versions// /, } found: install one of them," \
    "or name it with PYTHON=/path/to/python"
}

install_packages() {
  local interpreter list
  interpreter=$(find_interpreter)
  say "$("$interpreter" --version) at $interpreter"
  rm -rf "$folder"
  "$interpreter" -m venv "$folder" >>"$log" 2>&1 ||
    fail "could not make $folder: $(tail -n 1 "$log")"
  list=$folder/requirements.txt
  resolved_requirements >"$list"
  say "installing $(grep '^tensorflow' "$list") and what goes with it" \
    "(a few minutes the first time)"
  # Horovod builds without isolation and needs its tools beforehand.
  pip_install --upgrade "pip>=23" "setuptools<70" wheel "cmake<4" packaging \
    psutil cloudpickle pyyaml cffi
  pip_install -r "$list"
}

pip_install() {
  "$python" -m pip install "$@" >>"$log" 2>&1 ||
    fail "pip failed: $(grep '^ERROR' "$log" | tail -n 1); see $log"
}

# Prints why Horovod could not be built. The wheel is kept because the build
# takes minutes; pip's own cache may hold one built for another TensorFlow.
build_horovod() {
  local kept link status=0
  kept=$wheels/$(grep -m 1 '^tensorflow' "$folder/requirements.txt")
  kept+=-$("$python" -c 'import sys; print("py%d.%d" % sys.version_info[:2])')
  if ! ls "$kept"/horovod-*.whl >/dev/null 2>&1; then
    if ! { command -v c++ && command -v make; } >/dev/null; then
      echo "no C++ compiler (Debian: apt-get install g++ make)"
      return 1
    fi
    say "building Horovod (two to five minutes)"
    # Through a link, since Horovod's build breaks on paths with spaces.
    link=$(mktemp -d)
    ln -s "$folder" "$link/env"
    HOROVOD_WITH_TENSORFLOW=1 HOROVOD_WITHOUT_PYTORCH=1 \
      HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1 \
      PATH="$link/env/bin:$PATH" "$link/env/bin/python" -m pip wheel --no-deps \
      --no-build-isolation --no-cache-dir --wheel-dir "$kept" \
      horovod==0.28.1 >>"$log" 2>&1 || status=$?
    rm -rf "$link"
    if ((status)); then
      echo "its build failed, see $log"
      return 1
    fi
  fi
  "$python" -m pip install --no-deps "$kept"/horovod-*.whl >>"$log" 2>&1 || {
    echo "its wheel does not install, see $log"
    return 1
  }
}

has_horovod() {
  "$python" -c 'from importlib.util import find_spec as f; assert f("horovod")' \
    2>/dev/null
}

add_horovod() {
  local reason
  # Horovod 0.28.1 does not build with TensorFlow 2.20 or newer.
  [ "$lane" != newest ] || return 0
  has_horovod && return
  # Elsewhere than in CI a failed build is not tried again at every call.
  if [ -s "$folder/no-horovod" ] && [ "${CI:-}" != true ]; then
    reason=$(cat "$folder/no-horovod")
  elif reason=$(build_horovod); then
    rm -f "$folder/no-horovod"
    return
  fi
  [ "${CI:-}" != true ] || fail "no Horovod: $reason"
  say "no Horovod: $reason. Only runs of several processes need it;" \
    "to try again: rm '$folder/no-horovod'"
  case $reason in "no C++"*) ;; *) echo "$reason" >"$folder/no-horovod" ;; esac
}

# What was asked for and how it is installed; written last, so an interrupted
# installation is begun anew.
stamp=$({
  resolved_requirements
  declare -f install_packages
} | sha256sum)

mkdir -p "$repository/.venv"
exec 9>"$repository/.venv/$lane.lock"
if command -v flock >/dev/null && ! flock -n 9; then
  say "another process is making this environment; waiting for it"
  flock 9
fi
if ! { [ "$(cat "$folder/stamp" 2>/dev/null)" = "$stamp" ] &&
  "$python" -c '' 2>/dev/null; }; then
  : >"$log"
  install_packages
  echo "$stamp" >"$folder/stamp"
fi
add_horovod
echo "$python"
