"""
A coefficient for each task: theta_pre + sum_t lambda_t tau_t, searched one coefficient after another.

    python coefficients.py tiny                            # begins at the lambda that merge_eval.py picked

Coordinate search on validation images: each coefficient in turn is set to all values of merge_eval.py's grid
and keeps the best, until a round over all tasks changes none. A vector reaches every task, so that each value
asks for all tasks' images. T tasks have T numbers to fit validation with, where the sum has one: what they
gain there and on test images is said side by side.

Reads   what merge_eval.py reads, and NAME/merge.json
Writes  runs/ENCODER/NAME/coefficients.json; while it searches state/coefficients.json, from which the same
        command goes on
Source  coefficients of tasks are arXiv:2310.02575's, which learns them without labels
"""
import time

from common import PROBES, cached_features, mean, normalized_accuracy, predict
from lib import flags
from lib.files import Refused, read_json
from lib.study import open_study, run
from lib.vectors import load_vector
from merge_eval import paired_difference, summary


def parse_args(argv=None):
    parser = flags.stage_parser(__doc__)
    flags.add_name(parser)
    parser.add_argument("--rounds", type=flags.positive, default=3, help="over all tasks at most (default 3)")
    return parser.parse_args(argv)


def main(args):
    # ---------------------------------------------------- open
    study = open_study(args, __file__, "finetune.json")
    merge = read_json(study.here / "merge.json", f"python merge_eval.py {args.encoder} --name {study.name}")
    names, recipe, lambdas = list(study.sources), study.recipe, merge["lambdas"]
    if merge["rule"] != "sum" or merge["config"]["tasks"] != names:
        raise Refused(f"{study.here / 'merge.json'} is by rule {merge['rule']}, of "
                      f"{', '.join(merge['config']['tasks'])}: coefficients begin at a sum of the same tasks")
    if len(names) < 2:
        raise Refused(f"coefficients of tasks need two tasks or more, there is {names[0]}")
    inputs = {"vectors": study.vectors(), "probes": study.probes(), "data": study.data,
              "single_task": study.single_task, "begins_at": merge["best_lambda"]}
    if any(merge["config"][key] != inputs[key] for key in ("vectors", "data", "single_task")):
        raise Refused(f'{study.here / "merge.json"} is of other vectors or data than there are now: '
                      f'run "{merge["command"]}" first')
    settings = {"recipe": recipe, "tasks": names, "lambdas": lambdas, "rounds": args.rounds,
                "dtype": str(study.dtype)[6:]}
    result = study.result("coefficients.json", settings, inputs)
    if not result.todo:
        return

    # ---------------------------------------------------- the search, a coefficient at a time
    tasks, heads, single = study.tasks, study.heads, study.single_task
    val = {name: task.splits["val"] for name, task in tasks.items()}
    test = [task.splits["test"] for task in tasks.values()]
    per_lambda = sum(map(len, val.values()))
    evaluator = study.evaluator(len(names) * len(lambdas) * per_lambda, recipe["linear"])
    evaluator.use_vectors([load_vector(study.source, name, study.encoder) for name in names])
    state = result.state() or {"coefficients": [merge["best_lambda"]] * len(names), "trail": [],
                               "done": 0, "unchanged": 0, "seconds": 0.0}
    while state["done"] < args.rounds * len(names) and state["unchanged"] < len(names):
        start, place = time.perf_counter(), state["done"] % len(names)
        tried = []
        for lam in lambdas:
            tried.append((*state["coefficients"][:place], lam, *state["coefficients"][place + 1:]))
        accuracies = evaluator.accuracies(val, heads, tried)           # one dict for each lambda
        values = [normalized_accuracy(accuracy, single["val"]) for accuracy in accuracies]
        before = values[lambdas.index(state["coefficients"][place])]
        changes = max(values) > before
        if changes:
            state["coefficients"] = list(tried[values.index(max(values))])
        state["unchanged"] = 0 if changes else state["unchanged"] + 1
        state["trail"].append({"task": names[place], "lambda": state["coefficients"][place],
                               "normalized": max(before, max(values))})
        state["done"] += 1
        state["seconds"] += time.perf_counter() - start
        result.keep(state)
        print(f"coefficients: {names[place]} {state['coefficients'][place]:g}, normalized validation "
              f"{state['trail'][-1]['normalized']:.4f}", flush=True)

    # ---------------------------------------------------- test: at what was found, and at the sum's lambda
    at = [(merge["best_lambda"],) * len(names), tuple(state["coefficients"])]
    predicted = list(zip(*evaluator.predictions(test, list(heads.values()), at), strict=True))
    found = {"test": summary(tasks, predicted[1], single["test"]),
             "minus_sum": paired_difference(tasks, predicted[1], predicted[0])}
    for kind in PROBES:
        probing = []
        for name, task in tasks.items():
            features = cached_features(study.folder, task, evaluator)["test"]
            probing.append(predict(features, study.probed_heads[kind][name]))
        found[f"minus_{kind}"] = paired_difference(tasks, predicted[1], probing)

    # ---------------------------------------------------- save, say
    settings_tried = state["done"] * len(lambdas)
    of_sum = merge["val"]["normalized"][merge["lambdas"].index(merge["best_lambda"])]
    with result.saving():
        result.values = {
            "recipe": recipe, "coefficients": dict(zip(names, state["coefficients"], strict=True)),
            "begins_at": merge["best_lambda"], "trail": state["trail"], "settings_tried": settings_tried,
            "images": settings_tried * per_lambda, "seconds": state["seconds"],
            "val": {"normalized": state["trail"][-1]["normalized"], "sum": of_sum},
            **found}
    sum_of_it, gain = mean(merge["test"]["tasks"].values()), found["minus_sum"]
    print(f"coefficients: {settings_tried} settings, {settings_tried * per_lambda:,} images, "
          f"{state['seconds']:.1f} s; normalized validation {result.values['val']['sum']:.4f} to "
          f"{result.values['val']['normalized']:.4f}")
    print(f"coefficients: test {found['test']['absolute']:.4f}, the sum {sum_of_it:.4f}: {gain['mean']:+.4f} "
          f"+- {gain['standard_error']:.4f}")


if __name__ == "__main__":
    run(main, parse_args)
