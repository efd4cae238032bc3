"""
Addition against the number of tasks: a lambda search and a test for every chosen subset of the tasks.

    python subsets.py tiny                    # 1, 2, ... tasks: all pairs, five subsets of each larger size
    python subsets.py tiny --lambdas 11 --images-per-task 40
    python subsets.py tiny --rule ties                   # from two tasks on; results in aligned-ties
    python subsets.py vit_b16_dino --per-size 10 --images-per-task 500

Reads   runs/ENCODER/pretrained.safetensors, heads/ (probe.py), NAME/finetune.json,
        NAME/vectors/TASK.safetensors (make_vectors.py)
Writes  runs/ENCODER/NAME/scaling.json, scaling.png
Source  arXiv:2511.14569 appendix I
"""
import itertools
import time

import numpy as np

from common import mean, normalized_accuracy, sample
from lib import flags, merging, plots
from lib.files import Refused
from lib.study import open_study, run
from lib.vectors import load_vector

DEFAULTS = {"images_per_task": None}                        # an encoder's own settings come before these


def parse_args(argv=None):
    parser = flags.stage_parser(__doc__)
    flags.add_name(parser)
    add = parser.add_argument
    add("--per-size", type=flags.positive, default=5,
        help="subsets of each size above two, at most (default 5)")
    flags.add_rule(parser, merging.RULES)
    add("--lambda-max", type=flags.positive_float,
        help="largest lambda of the grid (default the rule's own, in lib/merging.py; of the sum 1)")
    add("--lambdas", type=flags.positive, default=21,
        help="values of lambda from 0 to the largest (default 21)")
    add("--images-per-task", type=flags.positive,
        help="random validation and test images per task at most (default all; tiny 60)")
    return parser.parse_args(argv)


def main(args):
    # ---------------------------------------------------- open
    study = open_study(args, __file__, "finetune.json")
    names, settings = list(study.sources), study.settings("subsets", args, DEFAULTS)
    lambda_max = args.lambda_max or merging.RULES[args.rule].largest
    lambdas = flags.even_grid("--lambda-max", 0, lambda_max, args.lambdas).tolist()
    chosen = {}
    for subset in choose_subsets(names, args.per_size, args.seed):
        if args.rule == "sum" or len(subset) > 1:          # a rule is one for several
            chosen["+".join(subset)] = subset
    picture = study.here / "scaling.png"
    settings |= {"rule": args.rule, "per_size": args.per_size, "lambdas": lambdas}
    result = open_result(study, chosen, picture, settings)
    if not result.todo:
        return

    # ---------------------------------------------------- the images, and what evaluating them costs
    splits, n = {}, {}
    for name, task in study.tasks.items():
        for split in ("val", "test"):
            splits[name, split] = sample(task.splits[split], settings["images_per_task"], args.seed)
            n[name, split] = len(splits[name, split])
    images = 0
    for key in result.todo:
        images += sum((len(lambdas) - 1) * n[name, "val"] + 2 * n[name, "test"] for name in chosen[key])
    print(f"subsets: {len(result.todo)} subsets of {len(names)} tasks, {images} forward passes, at most "
          f"{settings['images_per_task'] or 'all'} validation and test inputs per task", flush=True)

    # ---------------------------------------------------- lambda = 0 and the single tasks, on the same images
    evaluator = study.evaluator(images, study.recipe["linear"])
    # on the device from here on
    evaluator.use_vectors([load_vector(study.source, name, study.encoder) for name in names])
    heads, at_zero, single = study.heads, {}, {}
    for name in names:
        own = tuple(float(name == other) for other in names)
        for split in ("val", "test"):
            [[zero, one]] = evaluator.hits([splits[name, split]], [heads[name]], [(0.0,) * len(names), own])
            at_zero[name, split], single[name, split] = zero / n[name, split], one / n[name, split]

    # ---------------------------------------------------- every subset
    for key in result.todo:
        start, subset = time.perf_counter(), chosen[key]
        alone = {"val": {name: single[name, "val"] for name in subset},
                 "test": {name: single[name, "test"] for name in subset}}
        direction = np.array([float(name in subset) for name in names])
        if args.rule != "sum":
            merged = merging.merge(args.rule, study.source, subset, study.encoder, study.seed, study.device)
            evaluator.use_vectors([merged])
            direction = np.ones(1)
        accuracies = [{name: at_zero[name, "val"] for name in subset}]    # one dict for each lambda
        val = {name: splits[name, "val"] for name in subset}
        test = {name: splits[name, "test"] for name in subset}
        accuracies += evaluator.accuracies(val, heads, [tuple(lam * direction) for lam in lambdas[1:]])
        curve = [normalized_accuracy(accuracy, alone["val"]) for accuracy in accuracies]
        best = int(np.argmax(curve))
        tested = {name: at_zero[name, "test"] for name in subset}
        if best > 0:
            [tested] = evaluator.accuracies(test, heads, [tuple(lambdas[best] * direction)])
        with result.saving(key):
            result.rows[key] = {"tasks": list(subset), "best_lambda": lambdas[best],
                                "absolute": mean(tested.values()),
                                "normalized": normalized_accuracy(tested, alone["test"]),
                                "seconds": time.perf_counter() - start}
            counted = {name: {"val": n[name, "val"], "test": n[name, "test"]} for name in names}
            result.values["images_per_task"] = counted
            if key == result.todo[-1]:       # before the file that says all is done
                plots.scaling(picture, {study.name: list(result.rows.values())}, f"{args.encoder}")

    # ---------------------------------------------------- say
    for size in sorted({len(row["tasks"]) for row in result.rows.values()}):
        of_size = [row["normalized"] for row in result.rows.values() if len(row["tasks"]) == size]
        print(f"subsets: {size} tasks: mean normalized accuracy {mean(of_size):.4f} "
              f"over {len(of_size)} subsets")


def open_result(study, chosen, picture, settings):
    """scaling.json, a row for each chosen subset."""
    names, made_of = list(study.sources), {}
    if len(names) < 2:
        raise Refused(f"subsets need two tasks or more, --tasks names {', '.join(names)}")
    fingerprints = study.vectors()
    for key, subset in chosen.items():
        made_of[key] = {"vectors": [fingerprints[name] for name in subset],
                        "data": [study.data[name] for name in subset]}
    settings = settings | {"recipe": study.recipe, "tasks": names, "dtype": str(study.dtype)[6:]}
    return study.result("scaling.json", settings, made_of, key="subsets", files=lambda row: [picture])


def choose_subsets(names, per_size, seed):
    """Every single task and pair (pairs are also compared by their vectors' angle), and of each larger size
    every subset, or `per_size` of them drawn without replacement where there are more."""
    rng, chosen = np.random.default_rng(seed), []
    for size in range(1, len(names) + 1):
        every = list(itertools.combinations(names, size))
        if size > 2 and len(every) > per_size:
            every = [every[i] for i in sorted(rng.choice(len(every), per_size, replace=False))]
        chosen += every
    return chosen


if __name__ == "__main__":
    run(main, parse_args)
