# Sourced by run_all.sh and tests/run.sh: leaves a `python` on the PATH that has what requirements.txt lists.
# An active Python that has it all is used as it is; else .venv is made in this folder and filled once.
has_packages() {
  command -v "$1" >/dev/null && "$1" - 2>/dev/null <<'PYTHON'
import sys, importlib.util
packages = ["datasets", "filelock", "matplotlib", "numpy", "open_clip", "pandas", "PIL", "pytest",
            "safetensors", "sklearn", "timm", "torch", "torchvision", "tqdm", "transformers", "xdist"]
sys.exit(sys.version_info < (3, 11) or not all(map(importlib.util.find_spec, packages)))
PYTHON
}
if ! has_packages python; then
  export PATH="$PWD/.venv/bin:$PATH"
  if ! has_packages .venv/bin/python; then
    echo "set-up: the active Python lacks packages of requirements.txt; they go into .venv (about 6 GB, once)"
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      echo "set-up: Python 3.11 or newer is needed, python3 is $(python3 --version 2>&1)" >&2
      exit 2
    fi
    [ -x .venv/bin/python ] || python3 -m venv .venv
    python -m pip install --quiet --requirement requirements.txt
  fi
fi
