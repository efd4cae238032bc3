"""`torchrun --nproc-per-node 2 tests/two_processes.py RUNS`: the heavy stages in turn, on two processes."""
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from lib import ranks
from lib.study import run

SHARED = ["tiny", "--tasks", "glyphs,signs", "--runs"]
FULL = ["--name", "full"]
STAGES = [("probe", ["--probe-steps", "40", "--overwrite"]),
          ("finetune", ["--steps", "4", "--batch-size", "32", "--recipe", "full"]),
          ("make_vectors", FULL), ("merge_eval", [*FULL, "--lambdas", "8"]),
          ("subsets", [*FULL, "--per-size", "1", "--lambdas", "3", "--images-per-task", "50"]),
          ("disentangle", [*FULL, "--points", "3", "--samples", "100"])]


def main(runs):
    for name, words in STAGES:
        stage = importlib.import_module(name)
        stage.main(stage.parse_args([*SHARED, runs, *words]))
        ranks.wait()                         # as at the end of a torchrun: rank 0 has written everything


if __name__ == "__main__":
    run(main, lambda: sys.argv[1])
