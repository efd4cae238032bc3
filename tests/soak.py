"""
Kill the stages with SIGKILL at random instants, start them again until they finish, and compare every file
with those of an undisturbed run.

    python tests/soak.py 50                # 50 kills, in a temporary folder
    python tests/soak.py 50 --seed 3 --folder DIR          # a new folder, which is kept

Each stage is a fork of this process, which has imported everything, so that a kill costs no start-up. Ends in
exit code 1 and the names of the files that differ. Prints its figures as one line of JSON.
"""
import contextlib
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
from two_processes import STAGES, draw_folders, shared_words

from lib import encoders, generated
from lib.flags import flag_parser
from lib.study import run
from pretrain import ARCHITECTURE

AT_START = 0.3  # seconds
TRAINING_SAVED = ["--save-minutes", "1e-9"]  # at every step, so that a kill meets every state
OF_THE_MOMENT = ("machine", "command", "seconds", "merging_seconds", "merging_peak_bytes",
                 "seconds_per_step", "feature_seconds", "images_per_second", "peak_memory_bytes", "source",
                 "checksum")


def parse_args():
    parser = flag_parser(__doc__)
    parser.add_argument("kills", type=int, help="how often to kill in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work, kept (default: a temporary place)")
    return parser.parse_args()


def main(args):
    place = contextlib.nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory()
    with place as folder:
        clean, rough = Path(folder) / "clean", Path(folder) / "rough"
        draw_folders(Path(folder) / "data")
        random_encoder(clean / "tiny/pretrained.safetensors")
        shutil.copytree(clean, rough)
        seconds = undisturbed(clean)
        figures = disturbed(rough, seconds, args.kills, random.Random(args.seed))
        names, there = files_below(clean), files_below(rough)
        differ = [str(name) for name in names if not same(clean / name, rough / name)]
        differ += [str(name) for name in there if name not in names and name.suffix != ".tmp"]
        torn = [str(name) for name in there if name.suffix == ".tmp"]
    print(json.dumps(figures | {"files": len(names), "differ": differ, "temporary_files_left": torn}))
    return 1 if differ or torn else 0


def random_encoder(path):
    """The encoder tiny with random weights: no number here depends on what it knows."""
    torch.manual_seed(0)
    module = encoders.build_architecture(ARCHITECTURE)
    description = encoders.describe(module, ARCHITECTURE, generated.SIDE, (0.5,) * 3, (0.25,) * 3, 1.0,
                                    encoder="tiny")
    path.parent.mkdir(parents=True)
    encoders.save_encoder(path, module, description)


def undisturbed(runs):
    """Run every stage; returns the seconds of each."""
    seconds = []
    for stage in STAGES:
        start = time.perf_counter()
        status = begin(*command(stage, runs))
        assert status == 0, f"{stage} undisturbed: exit {status}"
        seconds.append(time.perf_counter() - start)
    return seconds


def disturbed(runs, seconds, kills, rng):
    """Run every stage until it finishes, killed so many times in all, longer ones more often: the counts.

    A third of the kills come while a stage starts. Every other finished stage is begun again with --overwrite
    and another seed, killed, and made anew as it was: nothing of the other seed may be believed.
    """
    counts = {"kills": 0, "starts": 0, "rounds": 0, "overwritten": 0}

    def run_until_finished(stage, index, share, *more):
        status = None
        while status != 0:
            instant = rng.uniform(0, rng.choice([seconds[index], seconds[index], AT_START]))
            kill_after = instant if share > 0 and counts["kills"] < kills else None
            status = begin(*command(stage, runs, *more), kill_after)
            assert status in (0, -signal.SIGKILL), f"{stage} {more}: exit {status}"
            counts["starts"] += 1
            counts["kills"] += status != 0
            share -= 1

    while counts["kills"] < kills:
        if counts["rounds"]:
            # again from the heads on, with other instants
            shutil.rmtree(runs / "tiny/full", ignore_errors=True)
        for index, stage in enumerate(STAGES):
            share = max(1, round(kills * seconds[index] / sum(seconds)))
            run_until_finished(stage, index, share)
            if (index + counts["rounds"]) % 2 and counts["kills"] < kills:
                other = command(stage, runs, "--overwrite", "--seed", "1")
                status = begin(*other, rng.uniform(0, seconds[index]))
                assert status in (0, -signal.SIGKILL), f"{stage} of another seed: exit {status}"
                counts["kills"] += status != 0
                counts["overwritten"] += 1
                run_until_finished(stage, index, 1, "--overwrite")
        counts["rounds"] += 1
    return counts


def command(stage, runs, *more):
    name, words = stage
    words = [word for word in words if word != "--overwrite"]
    return name, [*shared_words(runs), *words, *(TRAINING_SAVED if name == "finetune" else []), *more]


def begin(name, words, kill_after=None):
    """Exit status of a stage in a process of its own, killed after so many seconds (negative: the signal)."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        sys.argv = [f"{name}.py", *words]
        sys.stdout = open(os.devnull, "w")
        stage = importlib.import_module(name)
        status = 1
        try:
            run(stage.main, stage.parse_args)
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


def files_below(folder):
    """Every file but the locks, relative to the folder."""
    found = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [path for path in found if path.suffix != ".lock"]


def same(one, two):
    """Whether two files are equal; results but for where, when and how fast they were made."""
    if not two.exists():
        return False
    if one.suffix == ".json":
        return numbers(one) == numbers(two)
    return one.read_bytes() == two.read_bytes()


def numbers(path):
    """A result without what may differ between two runs of the same commands."""
    return strip(json.loads(path.read_text()))


def strip(value):
    if isinstance(value, list):
        return [strip(inner) for inner in value]
    if isinstance(value, dict):
        return {key: strip(inner) for key, inner in value.items() if key not in OF_THE_MOMENT}
    return value


if __name__ == "__main__":
    for name in {name for name, _ in STAGES} | {"pretrain", "timm", "torchvision", "matplotlib.pyplot"}:
        importlib.import_module(name)
    sys.exit(main(parse_args()))
