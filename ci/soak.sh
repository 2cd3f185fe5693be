#!/usr/bin/env bash
# Trains the models while kills, damaged checkpoints, full disks and dead ranks
# disturb them, and demands the weights of an undisturbed run.
#
#   bash ci/soak.sh [MODEL]... [--minutes=60]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(bash ci/env.sh default | tail -n 1)
exec "$python" ci/soak.py "$@"
