"""
Kill the stages with SIGKILL at random instants, start them again until they finish, and compare every file with an undisturbed run.

    python tests/soak.py 50                # 50 kills; RUNS folders are made in a temporary place
    python tests/soak.py 50 --seed 3

Each stage is a fork of this process, which has imported everything, so that a kill costs no start-up. Ends in exit code 1 and the
names of the files that differ. Prints its figures as one line of JSON.
"""
import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from two_processes import SHARED, STAGES

import files

TRAINING_SAVED = ["--save-minutes", "1e-9"]  # at every step, so that a kill meets every state


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, help="how often to kill in all")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main(args):
    rng, killed, started = random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        clean, rough = Path(folder) / "clean", Path(folder) / "rough"
        begin("pretrain", ["tiny", "--runs", str(clean), "--pretrain-steps", "10"])
        shutil.copytree(clean, rough)
        seconds = {}
        for index, stage in enumerate(STAGES):
            start = time.perf_counter()
            status = begin(*command(stage, clean))
            assert status == 0, f"{stage} undisturbed: exit {status}"
            seconds[index] = time.perf_counter() - start
        rounds = 0
        while killed < args.kills:
            if rounds:
                shutil.rmtree(rough / "tiny/full", ignore_errors=True)     # once more from the heads on, with other instants
            for index, stage in enumerate(STAGES):
                share = max(1, round(args.kills * seconds[index] / sum(seconds.values())))
                while True:
                    started += 1
                    status = begin(*command(stage, rough), rng.uniform(0, seconds[index]) if share > 0 and killed < args.kills else None)
                    if status == 0:
                        break
                    assert status == -signal.SIGKILL, f"{stage}: exit {status}"
                    killed, share = killed + 1, share - 1
            rounds += 1
        names = sorted(path.relative_to(clean) for path in clean.rglob("*") if path.is_file() and path.suffix != ".lock")
        differ = [str(name) for name in names if not same(clean / name, rough / name)]
        differ += [str(path.relative_to(rough)) for path in rough.rglob("*") if path.is_file() and path.suffix not in (".lock", ".tmp") and path.relative_to(rough) not in names]
        torn = [str(path.relative_to(rough)) for path in rough.rglob("*.tmp")]
    print(json.dumps({"kills": killed, "starts": started, "rounds": rounds, "files": len(names), "differ": differ, "temporary_files_left": torn}))
    return 1 if differ or torn else 0


def command(stage, runs):
    name, words = stage
    return name, [*SHARED, str(runs), *[word for word in words if word != "--overwrite"], *(TRAINING_SAVED if name == "finetune" else [])]


def begin(name, words, kill_after=None):
    """Exit status of a stage in a process of its own, killed after so many seconds if it is still there (negative: the signal)."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        sys.argv = [f"{name}.py", *words]
        sys.stdout = open(os.devnull, "w")
        stage = importlib.import_module(name)
        status = 1
        try:
            files.run(stage.main, stage.parse_args)
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    deadline = time.perf_counter() + (kill_after if kill_after is not None else 1e9)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.perf_counter() > deadline:
            os.kill(child, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.002)


def same(one, two):
    """Whether two files are equal; results but for where, when and how fast they were made."""
    if not two.exists():
        return False
    if one.suffix == ".json":
        return numbers(one) == numbers(two)
    return one.read_bytes() == two.read_bytes()


def numbers(path):
    """A result without what may differ between two runs of the same commands."""
    def strip(value):
        if isinstance(value, list):
            return [strip(inner) for inner in value]
        if isinstance(value, dict):
            return {key: strip(inner) for key, inner in value.items() if key not in
                    ("machine", "command", "seconds", "feature_seconds", "images_per_second", "peak_memory_bytes", "source", "checksum")}
        return value
    return strip(json.loads(path.read_text()))


if __name__ == "__main__":
    for name in {name for name, _ in STAGES} | {"pretrain", "timm", "torchvision", "matplotlib.pyplot"}:
        importlib.import_module(name)
    sys.exit(main(parse_args()))
