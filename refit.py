"""
Heads fitted again on the merged encoder: how much of what adding loses is only a head that no longer fits?

    python refit.py tiny
    python refit.py tiny --name full --lambda-max 0.6
    python refit.py tiny --rule tsv-m                      # of another merge; results in aligned-tsv-m

theta_pre + lambda * sum_t tau_t gives features on which each task's head is obtained anew, for each lambda:

    frozen      the head as it was: task addition
    all         converged, as probe.py fits it, on the labels of all training images
    few         likewise on ten training labels a class; penalty and lambda still by all of validation
    unlabelled  likewise on what theta_t, under its own head, says of the training images
    rotated     the head as it was, behind the orthogonal map that takes training features to theta_t's

Each picks its lambda on validation images with the fitting inside, `unlabelled` and `rotated` by agreement
with theta_t, without a label. Each stands beside itself at lambda = 0, which of `all` is converged probing:
else probing would be credited to merging.

Reads   what merge_eval.py reads
Writes  runs/ENCODER/NAME/refit.json, refit.png; while it runs state/refit.json
Source  left open by arXiv:2511.14569; the map is the solution of the orthogonal Procrustes problem
        (Schoenemann, 1966)
"""
import time

import numpy as np
import torch
import torch.nn.functional as F

from common import Head, Split, cached_features, count_hits, mean, normalized_accuracy, predict
from lib import flags, merging, plots, ranks
from lib.study import open_study, run
from lib.vectors import load_vector
from merge_eval import paired_difference, summary
from probe import fit_head

WAYS = ("frozen", "all", "few", "unlabelled", "rotated")


def parse_args(argv=None):
    parser = flags.stage_parser(__doc__)
    flags.add_name(parser)
    flags.add_rule(parser, merging.RULES)
    add = parser.add_argument
    add("--lambda-max", type=flags.positive_float,
        help="largest lambda of the grid (default half of merge_eval.py's, of the sum .5)")
    add("--lambdas", type=flags.positive, default=6, help="values from 0 to the largest (default 6)")
    add("--a-class", type=flags.positive, default=10, help="labels of each class for `few` (default 10)")
    return parser.parse_args(argv)


def main(args):
    # ---------------------------------------------------- open
    study = open_study(args, __file__, "finetune.json")
    names, recipe = list(study.sources), study.recipe
    lambda_max = args.lambda_max or merging.RULES[args.rule].largest / 2
    lambdas = flags.even_grid("--lambda-max", 0, lambda_max, args.lambdas).tolist()
    merging.require_several(args.rule, names)
    single = study.single_task
    inputs = {"vectors": study.vectors(), "data": study.data, "single_task": single}
    settings = {"recipe": recipe, "tasks": names, "rule": args.rule, "lambdas": lambdas,
                "a_class": args.a_class, "dtype": str(study.dtype)[6:]}
    picture = study.here / "refit.png"
    result = study.result("refit.json", settings, inputs, files=lambda row: [picture])
    if not result.todo:
        return

    # ---------------------------------------------------- what theta_t says of training and validation images
    tasks, heads = study.tasks, study.heads
    images = sum(len(split) for task in tasks.values() for split in task.splits.values())
    evaluator = study.evaluator(len(lambdas) * images, recipe["linear"])
    teachers = {}
    for name, task in tasks.items():
        evaluator.use_vectors([load_vector(study.source, name, study.encoder)])
        teachers[name] = features_at(evaluator, task, (1.0,), ["train", "val"])

    def fitted(way, name, features):
        """A task's Head on features {"train", "val"} of the merged encoder."""
        task, head, teacher = tasks[name], heads[name], teachers[name]
        if way == "frozen":
            return head
        if way == "rotated":
            return rotated(head, features["train"], teacher["train"])
        if way == "unlabelled":
            task = labelled_by(teacher, head, task)
        if way == "few":
            rows = few(task.splits["train"].labels, args.a_class, study.seed)
            features = features | {"train": features["train"][rows]}
            task = with_train(task, rows)
        return fit_head(features, task)[0]

    # ---------------------------------------------------- validation: every lambda
    merged = merging.merge(args.rule, study.source, names, study.encoder, study.seed, study.device)
    evaluator.use_vectors([merged])
    state = result.state() or {"rates": [], "seconds": 0.0}            # {way: {task: rate}} of each lambda
    fits = {}                                              # heads; a run that goes on has its own only
    for k in range(len(state["rates"]), len(lambdas)):
        start, lam, rates = time.perf_counter(), lambdas[k], {way: {} for way in WAYS}
        for name, task in tasks.items():
            features = merged_features(study, evaluator, task, lam, ["train", "val"])
            without = labelled_by(teachers[name], heads[name], task)
            for way in WAYS:
                judged = without if way in ("unlabelled", "rotated") else task
                fits[way, k, name] = fitted(way, name, features)
                hits = count_hits(features["val"], fits[way, k, name], judged.splits["val"])
                rates[way][name] = hits / len(features["val"])
        state["rates"].append(rates)
        state["seconds"] += time.perf_counter() - start
        result.keep(state)
        said = ", ".join(f"{way} {mean(rates[way].values()):.4f}" for way in WAYS)
        print(f"refit: lambda {lam:g}: validation {said}", flush=True)
    [state["rates"], *_] = ranks.gather(state["rates"])    # fits on other processors may differ by an image
    best, curves = {}, {}
    for way in WAYS:
        rates = [of_lambda[way] for of_lambda in state["rates"]]
        if way in ("unlabelled", "rotated"):               # agreement
            curves[way] = [mean(rate.values()) for rate in rates]
        else:
            curves[way] = [normalized_accuracy(rate, single["val"]) for rate in rates]
        best[way] = int(np.argmax(curves[way]))

    # ---------------------------------------------------- test: at 0 and at each pick
    predicted = {}
    for k in sorted({0, *best.values()}):
        wanted = [way for way in WAYS if k in (0, best[way])]
        for name, task in tasks.items():
            there = (WAYS[0], k, name) in fits
            splits = ["test"] if there else list(task.splits)
            features = merged_features(study, evaluator, task, lambdas[k], splits)
            for way in wanted:
                head = fits[way, k, name] if there else fitted(way, name, features)
                predicted.setdefault((way, k), []).append(predict(features["test"], head))
    ways = {}
    for way in WAYS:
        at_zero, at_best = predicted[way, 0], predicted[way, best[way]]
        ways[way] = {"val": curves[way], "best_lambda": lambdas[best[way]],
                     "test_lambda0": summary(tasks, at_zero, single["test"]),
                     "test": summary(tasks, at_best, single["test"]),
                     "gain": paired_difference(tasks, at_best, at_zero),
                     "minus_probing": paired_difference(tasks, at_best, predicted["all", 0])}

    # ---------------------------------------------------- save, say
    with result.saving():
        result.values = {"recipe": recipe, "lambdas": lambdas, "ways": ways, "single_task": single["test"],
                         "single_task_mean": mean(single["test"].values()), "seconds": state["seconds"]}
        plots.refit(picture, lambdas, {way: row["val"] for way, row in ways.items()},
                    f"{args.encoder}, {study.name}, {len(tasks)} tasks")
    for way, row in ways.items():
        zero, minus = row["test_lambda0"]["absolute"], row["minus_probing"]
        print(f"refit {way}: test {zero:.4f} at 0, {row['test']['absolute']:.4f} at {row['best_lambda']:g}"
              f"{flags.at_the_end(best[way], lambdas)}; minus probing {minus['mean']:+.4f} "
              f"+- {minus['standard_error']:.4f}")


# --------------------------------------------------------------------------------------- features


def features_at(evaluator, task, setting, splits):
    """{split: (N, D)} of a task under one weight setting of the evaluator's vectors."""
    found = evaluator.features([task.splits[split] for split in splits], [setting])
    return {split: rows[0] for split, rows in zip(splits, found, strict=True)}


def merged_features(study, evaluator, task, lam, splits):
    """{split: (N, D)} of the merged encoder; at 0 those that probe.py has kept."""
    if lam == 0:
        return cached_features(study.folder, task, evaluator)
    return features_at(evaluator, task, (lam,), splits)


# --------------------------------------------------------------------------------------- heads


def rotated(head, features, teacher):
    """The Head that first maps features to a teacher's, (N, D) both of the same images, by a rotation.

    R minimises |(features - mean) R - (teacher - mean)| among orthogonal matrices; for a head that acts on
    features of unit length these are mapped, and no mean is taken.
    """
    features, teacher = features.float(), teacher.float()
    if head.normalise:
        features, teacher = F.normalize(features, dim=1), F.normalize(teacher, dim=1)
        middle, target = torch.zeros(2, features.shape[1], device=features.device)
    else:
        middle, target = features.mean(0), teacher.mean(0)
    left, _, right = torch.linalg.svd((features - middle).T @ (teacher - target))
    weight = head.weight @ (left @ right).T                # of (feature - middle)
    if head.normalise:
        return Head(weight, head.bias, True)
    bias = 0 if head.bias is None else head.bias           # of a T5's head from text
    return Head(weight, bias + head.weight @ target - weight @ middle, False)


def labelled_by(teacher, head, task):
    """A Task whose training and validation labels are a head's predictions on a teacher's features."""
    splits = dict(task.splits)
    for split in ("train", "val"):
        labels = predict(teacher[split], head).cpu().numpy()
        splits[split] = Split(task.splits[split].inputs, task.splits[split].indices, labels)
    return task._replace(splits=splits)


def with_train(task, rows):
    """A Task with some of its training images."""
    train = task.splits["train"]
    some = Split(train.inputs, train.indices[rows], train.labels[rows])
    return task._replace(splits=task.splits | {"train": some})


def few(labels, a_class, seed):
    """Rows of at most `a_class` of each class of (N,) labels, drawn at random."""
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = [order[labels[order] == number][:a_class] for number in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


if __name__ == "__main__":
    run(main, parse_args)
