#!/usr/bin/env bash
# The tests: bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/setup.sh
exec python -m pytest -q tests "$@"
