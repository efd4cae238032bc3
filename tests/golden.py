"""
Pin what every stage computes on a small study: hits, chosen lambdas and learning rates, xi, and the weights.

    python tests/golden.py            # compare with tests/golden.json; exit code 1 and any differences
    python tests/golden.py --write    # a change is meant to change a number: pin anew, say why in the commit

In fp32 on one CPU thread; the numbers are those of one kind of processor and one version of torch, both named
in the file.
"""
import argparse
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import torch

PINNED = Path(__file__).with_name("golden.json")
SHARED = ["tiny", "--device", "cpu", "--dtype", "fp32", "--compile", "off"]
TASKS = ["--tasks", "glyphs,textures"]
TRAINING = {  # name: how its theta_t are made
    "aligned": ["--steps", "20", "--batch-size", "32", "--lr", "5e-4"],
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
               "probe": {"lr": probe["lr"], "search": probe["search"]["val"], "hits": counts(probe["tasks"])},
               "heads": {path.stem: weights(path)
                         for path in sorted((folder / "heads").glob("*.safetensors"))}}
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


def machine():
    return {"torch": str(torch.__version__), "cpu": torch.backends.cpu.get_cpu_capability()}


def differences(pinned, found, where=""):
    """The paths at which two nested results differ, with both values."""
    if isinstance(pinned, dict) and isinstance(found, dict):
        return [line for key in dict.fromkeys([*pinned, *found])
                for line in differences(pinned.get(key), found.get(key), f"{where}/{key}")]
    return [] if pinned == found else [f"{where}: pinned {str(pinned)[:200]}, found {str(found)[:200]}"]


def study(runs):
    """Run every stage in this process, in a runs folder."""
    torch.set_num_threads(1)
    for stage, words in commands():
        words = [*SHARED, "--runs", str(runs), *words]
        sys.argv = [f"{stage}.py", *words]
        module = importlib.import_module(stage)
        module.main(module.parse_args(words))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="pin today's numbers")
    parser.add_argument("--runs", type=Path, help="keep the study in this folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = args.runs or Path(folder)
        study(runs)
        numbers = collect(runs)
    if args.write:
        PINNED.write_text(json.dumps({"machine": machine(), "numbers": numbers}, indent=1) + "\n")
        return 0
    pinned = json.loads(PINNED.read_text())
    lines = differences(pinned["numbers"], numbers)
    print("\n".join(lines) or "golden: every number is as pinned")
    if pinned["machine"] != machine():
        print(f"golden: pinned on {pinned['machine']}, this is {machine()}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
