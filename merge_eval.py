"""
Task addition: theta_pre + lambda * sum_t tau_t, lambda picked on validation, test run at 0 and at the pick.
Or another merging rule in place of the sum.

    python merge_eval.py tiny
    python merge_eval.py tiny --lambda-max 0.2                # 21 values again, but on a finer grid
    python merge_eval.py tiny --tasks glyphs,signs            # two of the tasks
    python merge_eval.py tiny --of aligned --name fine --lambda-max 0.2    # the same vectors, other results
    python merge_eval.py tiny --rule ties                     # vectors of aligned, results in aligned-ties
    python merge_eval.py tiny --search fine                   # lambda to a fifth of the step, by fewer images

Reads   runs/ENCODER/pretrained.safetensors, features/, heads/ (probe.py), NAME/finetune.json (finetune.py),
        NAME/vectors/TASK.safetensors (make_vectors.py)
Writes  runs/ENCODER/NAME/merge.json, merge.png, merged.safetensors (the encoder at the picked lambda, as timm
        loads it); while it searches state/merge.json, from which the same command goes on
Source  arXiv:2511.14569 sections 3.2 and 4.2, appendix E; the rules' are in lib/merging.py
"""
import time

import numpy as np
import torch

from common import PROBES, cached_features, mean, normalized_accuracy, predict
from lib import devices, flags, merging, plots, race, ranks
from lib.encoders import separate_weights
from lib.files import Refused, save_tensors
from lib.study import open_study, run


def parse_args(argv=None):
    parser = flags.stage_parser(__doc__)
    flags.add_name(parser)
    add = parser.add_argument
    flags.add_rule(parser, merging.RULES)
    add("--lambda-max", type=flags.positive_float,
        help="largest lambda of the grid (default the rule's own, in lib/merging.py; of the sum 1)")
    add("--lambdas", type=flags.positive, default=21,
        help="values of lambda from 0 to the largest (default 21)")
    add("--search", choices=["grid", "fine"], default="grid",
        help="grid: every lambda on all validation images; fine: lambdas are dropped as soon as others are "
             "better, finer ones are tried around the best (lib/race.py)")
    add("--error", type=flags.share,
        help="of --search fine: chance that the best is dropped, at most (default .01; 0: only what is sure)")
    return parser.parse_args(argv)


def main(args):
    # ---------------------------------------------------- open
    study = open_study(args, __file__, "finetune.json")
    encoder, names, recipe = study.encoder, list(study.sources), study.recipe
    lambda_max = args.lambda_max or merging.RULES[args.rule].largest
    lambdas = flags.even_grid("--lambda-max", 0, lambda_max, args.lambdas).tolist()
    merging.require_several(args.rule, names)
    single = study.single_task
    inputs = {"vectors": study.vectors(), "probes": study.probes(), "data": study.data, "single_task": single}
    settings = {"recipe": recipe, "tasks": names, "rule": args.rule, "lambdas": lambdas,
                "dtype": str(study.dtype)[6:], "search": args.search}
    if args.search == "fine":
        settings["error"] = error = 0.01 if args.error is None else args.error
    elif args.error is not None:
        raise Refused("--error is of --search fine")
    files = [study.here / file for file in ("merge.png", "merged.safetensors")]
    result = study.result("merge.json", settings, inputs, files=lambda row: files)
    if not result.todo:
        return

    # ---------------------------------------------------- one vector of all, by the rule
    merged, merging_seconds, merging_bytes = devices.cost_of(
        lambda: merging.merge(args.rule, study.source, names, encoder, study.seed, study.device),
        study.device)

    # ---------------------------------------------------- lambda = 0 and probing, from cached features
    tasks, heads = study.tasks, study.heads
    val = {name: task.splits["val"] for name, task in tasks.items()}
    test = [task.splits["test"] for task in tasks.values()]
    n = {"val": {name: len(split) for name, split in val.items()},
         "test": {name: len(task.splits["test"]) for name, task in tasks.items()}}
    images = (len(lambdas) - 1) * sum(n["val"].values()) + sum(n["test"].values())
    evaluator = study.evaluator(images, recipe["linear"])
    at_zero, predicted_at_zero, probing = {}, [], {kind: [] for kind in PROBES}
    for name, task in tasks.items():
        features = cached_features(study.folder, task, evaluator)
        at_zero[name] = predict(features["val"], heads[name]).cpu().numpy() == val[name].labels
        predicted_at_zero.append(predict(features["test"], heads[name]))
        for kind in PROBES:
            probing[kind].append(predict(features["test"], study.probed_heads[kind][name]))

    # ---------------------------------------------------- validation
    evaluator.use_vectors([merged])
    if args.search == "grid":
        search = search_grid(evaluator, val, heads, lambdas, at_zero, result)
    else:
        search = search_fine(evaluator, val, heads, lambdas, at_zero, result, single["val"], error)
    lambdas, accuracies, seen = search["lambdas"], search["accuracies"], search["seen"]
    normalized = [normalized_accuracy(accuracy, single["val"]) for accuracy in accuracies]
    whole = [k for k in range(len(lambdas)) if seen[k] == sum(n["val"].values())]
    best = max(whole, key=normalized.__getitem__)              # the smallest of equals
    curves = {}
    for name in names:
        curves[name] = [accuracy[name] for accuracy in accuracies]
    near_best = None                                           # not known of lambdas that saw fewer images
    if len(whole) == len(lambdas):
        near = [lambdas[k] for k in whole if normalized[k] > normalized[best] - 0.02]
        near_best = [min(near), max(near)]

    # ---------------------------------------------------- test: at 0 and at the chosen lambda, only
    predicted = predicted_at_zero
    if best > 0:
        rows = evaluator.predictions(test, list(heads.values()), [(lambdas[best],)])
        predicted = [row[0] for row in rows]
    at_best = summary(tasks, predicted, single["test"])
    at_zero = summary(tasks, predicted_at_zero, single["test"])
    gain = paired_difference(tasks, predicted, predicted_at_zero)
    probed = {kind: summary(tasks, probing[kind], single["test"]) for kind in PROBES}
    for kind in PROBES:
        probed[kind]["addition_minus"] = paired_difference(tasks, predicted, probing[kind])

    # ---------------------------------------------------- save
    zero = {"probed": "probing (lambda = 0)", "text": "zero-shot (lambda = 0)",
            "random": "lambda = 0"}[recipe["head"]]
    with result.saving():
        result.values = {
            "recipe": recipe, "rule": args.rule, "lambdas": lambdas, "best_lambda": lambdas[best],
            "lambdas_within_2_points": near_best,
            "val": {"absolute": [mean(accuracy.values()) for accuracy in accuracies],
                    "normalized": normalized, "tasks": curves, "n": n["val"], "seen": seen},
            "images": search["images"],
            "test": at_best, "test_lambda0": at_zero, "gain": gain, "probing": probed,
            "single_task": single["test"], "single_task_mean": mean(single["test"].values()),
            "seconds": search["seconds"], "merging_seconds": merging_seconds,
            "merging_peak_bytes": merging_bytes,
            "images_per_second": search["images"] / max(search["seconds"], 1e-9)}
        if not recipe["linear"]:             # whose merge is no set of weights for the encoder as it is
            weights = separate_weights(encoder.module) | dict(evaluator.merged((lambdas[best],)))
            save_tensors(files[1], weights, theta_pre=encoder.fingerprint, recipe=recipe, tasks=list(tasks),
                         best_lambda=lambdas[best])
        plots.lambda_curve(files[0], result.values, f"{args.encoder}, {study.name}, {len(tasks)} tasks", zero)

    # ---------------------------------------------------- say
    print(f"merge_eval: search of {len(lambdas)} lambdas {search['seconds']:.1f} s, {search['images']} "
          f"{encoder.unit}, {result.values['images_per_second']:.0f} {encoder.unit}/s (compiling included)")
    what = "addition" if args.rule == "sum" else args.rule
    chosen = f"lambda = {lambdas[best]:g}{flags.at_the_end(best, lambdas)}"
    for label, row in ((zero, at_zero), (f"{what} ({chosen})", at_best)):
        print(f"merge_eval: {label}: test absolute {row['absolute']:.4f}, "
              f"normalized {row['normalized']:.4f}, n = {sum(n['test'].values())}")
    for kind, row in probed.items():
        difference = row["addition_minus"]
        print(f"merge_eval: {what} minus probing ({kind}, {row['absolute']:.4f}): "
              f"{difference['mean']:+.4f} +- {difference['standard_error']:.4f}")


def summary(tasks, predicted, single_task):
    """{"absolute", "normalized", "tasks", "hits", "n"} of test predictions, one (N,) tensor per task."""
    hits, n = {}, {}
    for (name, task), classes in zip(tasks.items(), predicted, strict=True):
        labels = torch.from_numpy(task.splits["test"].labels).to(classes.device)
        hits[name], n[name] = int((classes == labels).sum()), len(labels)
    accuracy = {name: hits[name] / n[name] for name in tasks}
    return {"absolute": mean(accuracy.values()), "normalized": normalized_accuracy(accuracy, single_task),
            "tasks": accuracy, "hits": hits, "n": n}


def paired_difference(tasks, predicted, reference):
    """What addition gains on the same test images, with its paired standard error.

    predicted, reference   one (N,) tensor of classes per task
    Returns  {"mean": mean over tasks of the difference of accuracies, "standard_error": of that mean, from
             the images that only one of the two gets right, "tasks": differences, "tasks_won": how many are
             above 0}
    """
    gains, variance = {}, 0.0
    for (name, task), ours, theirs in zip(tasks.items(), predicted, reference, strict=True):
        labels = torch.from_numpy(task.splits["test"].labels).to(ours.device)
        difference = (ours == labels).double() - (theirs == labels).double()       # (N,) of -1, 0, 1
        gains[name] = difference.mean().item()
        variance += difference.var(correction=0).item() / len(difference)
    return {"mean": mean(gains.values()), "standard_error": variance ** 0.5 / len(gains), "tasks": gains,
            "tasks_won": sum(gain > 0 for gain in gains.values())}


# --------------------------------------------------------------------------------------- the search


def search_grid(evaluator, val, heads, lambdas, at_zero, result):
    """Every lambda on all validation images.

    val, heads  {task: Split}, {task: Head}
    at_zero     {task: (N_t,) bool, which of its images are right under lambda = 0}
    Returns     {"lambdas", "accuracies": of each {task: fraction}, "seen": images of each, "images": forward
                passes, "seconds"}
    """
    zero = {name: int(right.sum()) / len(right) for name, right in at_zero.items()}
    state = result.state() or {"accuracies": [zero], "seconds": 0.0}
    accuracies, block = state["accuracies"], -(-5 // ranks.world()) * ranks.world()
    while len(accuracies) < len(lambdas):
        start, done = time.perf_counter(), len(accuracies)
        accuracies += evaluator.accuracies(val, heads, [(lam,) for lam in lambdas[done:done + block]])
        state["seconds"] += time.perf_counter() - start
        result.keep(state)
    n = sum(map(len, val.values()))
    return state | {"lambdas": lambdas, "seen": [n] * len(lambdas), "images": n * (len(lambdas) - 1)}


def search_fine(evaluator, val, heads, lambdas, at_zero, result, single, error):
    """As search_grid, but with finer lambdas around the best, and none on more images than it takes to see
    that it is not the best (lib/race.py). Accuracies are those of the images seen.
    """
    state = result.state() or {"right": {}, "seconds": 0.0}
    right = {float(lam): np.array(list(hits)) == "1" for lam, hits in state["right"].items()}
    start = time.perf_counter() - state["seconds"]

    def look(splits, some):
        predicted = evaluator.predictions(splits, list(heads.values()), [(lam,) for lam in some])
        return [rows.cpu().numpy() == split.labels for rows, split in zip(predicted, splits, strict=True)]

    def keep():
        result.keep({"right": {f"{lam}": "".join(map(str, hits.astype(int))) for lam, hits in right.items()},
                     "seconds": time.perf_counter() - start})

    race.fine_search(look, val, single, lambdas, error, at_zero, right, keep)
    found = {"lambdas": sorted(right), "accuracies": [], "seen": [], "seconds": time.perf_counter() - start}
    for lam in found["lambdas"]:
        found["accuracies"].append(race.accuracies(right[lam], val))
        found["seen"].append(len(right[lam]))
    return found | {"images": sum(found["seen"]) - len(right[0.0])}


if __name__ == "__main__":
    run(main, parse_args)
