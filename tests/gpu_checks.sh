#!/usr/bin/env bash
# What only a GPU can prove, in one sitting; each part takes less than ten minutes and a finished one is kept:
#   bash tests/gpu_checks.sh                      # all parts; without a GPU those that need one are skipped
#   bash tests/gpu_checks.sh units training       # these parts alone
# Prints one JSON and writes it to gpu_checks.json.
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/setup.sh
python tests/gpu_checks.py "$@"
