"""
The heavy stages in turn, on two processes; with "cut" one once more on a head that was cut.

    torchrun --nproc-per-node 2 tests/two_processes.py RUNS [cut]
"""
import importlib
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from lib import generated, ranks
from lib.study import run

FULL = ["--name", "full"]
STAGES = [("probe", ["--probe-steps", "40", "--overwrite"]),
          ("finetune", ["--steps", "10", "--batch-size", "32", "--recipe", "full"]),
          ("make_vectors", FULL), ("merge_eval", [*FULL, "--lambdas", "8"]),
          ("subsets", [*FULL, "--per-size", "1", "--lambdas", "3", "--images-per-task", "50"]),
          ("disentangle", [*FULL, "--points", "3", "--samples", "100"]),
          ("merge_eval", [*FULL, "--rule", "tsv-m", "--lambdas", "2"]),
          ("refit", [*FULL, "--lambdas", "2"]), ("negate", [*FULL, "--lambdas", "2"])]


def shared_words(runs):
    """The flags of every stage; the data of draw_folders lie beside the runs folder."""
    data = str(runs.parent / "data")
    return ["tiny", "--data", data, "--tasks", "digits,boards", "--runs", str(runs)]


def draw_folders(data):
    """Two small tasks as image folders: a study on them takes seconds."""
    for name, drawn_as in (("digits", "glyphs"), ("boards", "signs")):
        _, classes, draw_pictures = generated.GENERATED[drawn_as]
        for split, n in (("train", 400), ("test", 150)):
            labels = np.arange(n) % len(classes)
            pictures = draw_pictures(np.random.default_rng(n), labels)
            for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
                path = data / name / split / classes[label] / f"{index:03}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture.transpose(1, 2, 0)).save(path)


def main(asked):
    runs = Path(asked[0])
    for name, words in STAGES:
        stage = importlib.import_module(name)
        stage.main(stage.parse_args([*shared_words(runs), *words]))
        ranks.wait()                         # as at the end of a torchrun: rank 0 has written everything
    if "cut" not in asked:
        return
    head = runs / "tiny/heads/paper/boards.safetensors"
    if ranks.rank() == 0:
        head.rename(runs / "whole")
        head.write_bytes(b"cut")
    ranks.wait()
    stage = importlib.import_module("merge_eval")
    stage.main(stage.parse_args([*shared_words(runs), *FULL, "--overwrite"]))


if __name__ == "__main__":
    run(main, lambda: sys.argv[1:])
