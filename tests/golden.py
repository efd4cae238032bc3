"""
What every stage computes on a small study, hits, chosen lambdas and learning rates, xi and the weights, by
the code of an earlier commit and by today's: a change not meant to change a number changes none of them.

    python tests/golden.py HEAD            # before committing; exit code 1 and the numbers that differ
    python tests/golden.py --numbers       # today's, as JSON

Both run here, in fp32 on one CPU thread, since the last bits differ between kinds of processors and versions
of torch. Each commit's own tests/golden.py says what its study is.
"""
import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import torch

ROOT = Path(__file__).parent.parent
SHARED = ["tiny", "--device", "cpu", "--dtype", "fp32", "--compile", "off"]
TASKS = ["--tasks", "glyphs,textures"]
TRAINING = {  # name: how its theta_t are made
    "aligned": ["--steps", "20", "--batch-size", "32", "--lr", "1e-3"],
    "full": ["--steps", "20", "--batch-size", "32"],
    "attention": ["--steps", "20", "--batch-size", "32", "--lr", "1e-3"],
    "linearized": ["--steps", "6", "--batch-size", "32", "--lr", "1e-3"],
}


def commands():
    """[(stage, words)] in the order in which they run."""
    chosen = [("pretrain", ["--pretrain-steps", "200"]), ("probe", [*TASKS, "--probe-steps", "200"])]
    for name, words in TRAINING.items():
        shared = [*TASKS, "--name", name]
        chosen += [("finetune", [*shared, *words]), ("make_vectors", shared),
                   ("merge_eval", [*shared, "--lambdas", "6"]),
                   ("disentangle", [*shared, "--metric", "both", "--points", "5", "--samples", "60"])]
        if name == "attention":
            chosen.append(("posthoc", [*shared, "--images-per-task", "200"]))
        if name in ("aligned", "full"):
            chosen.append(("subsets", [*shared, "--lambdas", "5", "--per-size", "1",
                                       "--images-per-task", "40"]))
    return chosen


def collect(runs):
    """Every number that the study stands on, from the files of its stages."""
    folder = runs / "tiny"

    def read(*parts):
        return json.loads(folder.joinpath(*parts).read_text())

    probe = read("probe.json")
    numbers = {"pretrain": {"hits": read("pretrain.json")["hits"],
                            "weights": weights(folder / "pretrained.safetensors")},
               "probe": {"lr": probe["lr"], "search": probe["search"]["val"],
                         "hits": {kind: counts({task: row[kind] for task, row in probe["tasks"].items()})
                                  for kind in ("paper", "converged")}},
               "heads": {str(path.relative_to(folder)): weights(path)
                         for path in sorted((folder / "heads").rglob("*.safetensors"))}}
    for name in TRAINING:
        finetune, vectors, merge = (read(name, f"{stage}.json") for stage in ("finetune", "vectors", "merge"))
        found = {
            "finetune": {"lr": finetune["lr"], "search": finetune.get("search", {}).get("val"),
                         "hits": counts(finetune["tasks"]),
                         "weights": {path.stem: weights(path) for path
                                     in sorted((folder / name / "finetuned").glob("*.safetensors"))}},
            "vectors": {"cosine": rounded(vectors["cosine"]), "norm": rounded(list(vectors["norm"].values())),
                        "overlap": rounded(vectors["subspace_overlap"]),
                        "weights": {path.stem: weights(path) for path
                                    in sorted((folder / name / "vectors").glob("*.safetensors"))}},
            "merge": {"best_lambda": merge["best_lambda"], "val": merge["val"]["tasks"],
                      "normalized": rounded(merge["val"]["normalized"]),
                      "hits": merge["test"]["hits"], "hits_lambda0": merge["test_lambda0"]["hits"]}}
        for stem in ("disentangle", "representation"):
            found[stem] = {path.stem: rounded(np.load(path)["xi"].tolist())
                           for path in sorted((folder / name / stem).glob("*.npz"))}
        if (folder / name / "posthoc.json").exists():
            found["posthoc"] = {task: [row["hits_nonlinear"], row["hits_linearized"]]
                                for task, row in read(name, "posthoc.json")["tasks"].items()}
        if (folder / name / "scaling.json").exists():
            rows = read(name, "scaling.json")["subsets"].items()
            found["subsets"] = {
                key: [row["best_lambda"], rounded(row["absolute"]), rounded(row["normalized"])]
                for key, row in rows}
        if (folder / name / "merged.safetensors").exists():
            found["merged"] = weights(folder / name / "merged.safetensors")
        numbers[name] = found
    return json.loads(json.dumps(numbers))


def counts(rows):
    return {task: [row["hits_val"], row["hits_test"]] for task, row in rows.items()}


def rounded(values):
    return np.round(values, 6).tolist()


def weights(path):
    """SHA-256 of a file's tensors, as hashed when it was written."""
    from safetensors import safe_open
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["about"])["sha256"]


def differences(before, now, where=""):
    """The paths at which two nested results differ, with both values."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [f"{where}: {str(before)[:200]} before, {str(now)[:200]} now"]
    found = []
    for key in before | now:
        found += differences(before.get(key), now.get(key), f"{where}/{key}")
    return found


def numbers_of_today():
    """Run every stage in this process, its output on stderr, and collect."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as runs, contextlib.redirect_stdout(sys.stderr):
        for stage, words in commands():
            words = [*SHARED, "--runs", runs, *words]
            sys.argv = [f"{stage}.py", *words]
            module = importlib.import_module(stage)
            module.main(module.parse_args(words))
        return collect(Path(runs))


def numbers_of(commit):
    """The same by a commit's own code, in a worktree of its own."""
    git = ["git", "-C", ROOT, "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run([*git, "add", "--quiet", "--detach", tree, commit], check=True)
        try:
            command = [sys.executable, tree / "tests/golden.py", "--numbers"]
            return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        finally:
            subprocess.run([*git, "remove", "--force", tree], check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", default="HEAD", help="compare with its code (default HEAD)")
    parser.add_argument("--numbers", action="store_true", help="only print today's numbers")
    args = parser.parse_args()
    if args.numbers:
        print(json.dumps(numbers_of_today()))
        return 0
    lines = differences(numbers_of(args.commit), numbers_of_today())
    print("\n".join(lines) or f"golden: every number is that of {args.commit}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
