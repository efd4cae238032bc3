#!/usr/bin/env bash
# The tests: bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/setup.sh
export OMP_NUM_THREADS=1  # a worker for each core instead of two threads that wait for each other
exec python -m pytest -q -n 2 --dist loadgroup tests "$@"
