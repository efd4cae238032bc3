"""`torchrun --nproc-per-node 2 tests/two_processes.py RUNS`: the heavy stages, one after another, dealt out to two processes."""
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import files
import ranks

SHARED = ["tiny", "--tasks", "glyphs,signs", "--runs"]
STAGES = [("probe", ["--probe-steps", "40", "--overwrite"]), ("finetune", ["--steps", "8", "--batch-size", "32", "--recipe", "full"]),
          ("make_vectors", ["--recipe", "full"]), ("merge_eval", ["--recipe", "full", "--lambdas", "8"]), ("merge_eval", ["--recipe", "full", "--subsets", "1", "--lambdas", "3", "--images-per-task", "50"]),
          ("disentangle", ["--recipe", "full", "--points", "3", "--samples", "100"])]


def main(runs):
    for name, words in STAGES:
        stage = importlib.import_module(name)
        stage.main(stage.parse_args([*SHARED, runs, *words]))
        ranks.wait()                                                       # as at the end of a torchrun: rank 0 has written everything


if __name__ == "__main__":
    files.run(main, lambda: sys.argv[1])
