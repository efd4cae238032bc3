#!/usr/bin/env bash
# Kill the stages N times at random instants and compare with an undisturbed run:
#   bash tests/soak.sh 200 [--seed 1]
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/setup.sh
python tests/soak.py "$@"
