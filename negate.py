"""
Negation: does theta_pre - lambda * tau_t forget task t and keep the others?

    python negate.py tiny
    python negate.py tiny --lambda-max 1                   # 11 values again, but further
    python negate.py tiny --name full --floor 0.9
    python negate.py vit_b16_clip_laion2b --tasks cars,dtd --control sun397

Target is each task in turn, under the head that its vector was trained against; control is the mean over the
other tasks, or over those of --control. lambda is picked on validation: the least target accuracy among
lambdas that leave control at least --floor of what it has at lambda = 0. Subtracted is one of

    own      tau_t
    random   a random vector of the norm that tau_t has in each tensor, with lambdas ten times as large
    other    another task's vector, the next's, which then is no control

A task is forgotten only if a new head does not bring it back. At 0 and at each pick, on test images:

    frozen      the head as it was
    all, few    converged heads, fitted again on all training images, or on ten of each class; the penalty
                still by all of validation
    neighbours  no head: what the 20 training images say whose features are nearest

Reads   runs/ENCODER/pretrained.safetensors, features/, heads/ (probe.py), NAME/finetune.json,
        NAME/vectors/TASK.safetensors (make_vectors.py)
Writes  runs/ENCODER/NAME/negation.json, negation.png
Source  arXiv:2212.04089 section 3, with its random vector and its floor of 95 %; fitting heads again and
        neighbours are this study's
"""
import time

import numpy as np
import torch
import torch.nn.functional as F

import common
from common import cached_features, count_hits, mean, predict
from lib import flags, plots
from lib.files import Refused, file_metadata
from lib.study import open_study, run
from lib.vectors import generator_of, head_file, load_vector
from merge_eval import paired_difference
from probe import fit_head
from refit import features_at, few, with_train

WAYS = ("frozen", "all", "few", "neighbours")
REACH = {"own": 1, "random": 10, "other": 1}               # times lambda; a random vector is felt later
NEIGHBOURS, TEMPERATURE = 20, 0.07                         # of DINO's evaluation, arXiv:2104.14294


def parse_args(argv=None):
    parser = flags.stage_parser(__doc__)
    flags.add_name(parser)
    add = parser.add_argument
    add("--control", metavar="TASKS",
        help="tasks that are to stay, as --tasks names them, no targets (default: all but the target)")
    add("--floor", type=flags.share, default=0.95,
        help="share of its accuracy that control keeps at least (default .95)")
    add("--lambda-max", type=flags.positive_float, default=0.5, help="of the grid, the largest (default .5)")
    add("--lambdas", type=flags.positive, default=11,
        help="values of lambda from 0 to the largest (default 11)")
    add("--a-class", type=flags.positive, default=10, help="labels of each class for `few` (default 10)")
    return parser.parse_args(argv)


def main(args):
    # ---------------------------------------------------- open
    study = open_study(args, __file__, "finetune.json")
    names, recipe = list(study.sources), study.recipe
    lambdas = flags.even_grid("--lambda-max", 0, args.lambda_max, args.lambdas).tolist()
    asked = control_sources(args, study)
    if len(names) < 2 and not asked:
        raise Refused(f"what is to stay when {names[0]} is forgotten? two tasks or more, or --control TASKS")
    controls = {}
    for name in names:
        controls[name] = list(asked) or [other for other in names if other != name]
    followed = dict(zip(names, names[1:] + names[:1], strict=True))        # {target: the next task}
    preceding = {after: before for before, after in followed.items()}
    fingerprints, made_of = study.vectors(), {}
    for name in names:
        pair = [name, followed[name]]
        made_of[name] = {"vectors": [fingerprints[task] for task in pair],
                         "data": [study.data[task] for task in pair]}
    kept = {name: common.task_summary(name, source, study.encoder, study.runs, study.seed)["sha256"]
            for name, source in asked.items()} or study.data
    used = {}                                              # SHA-256 of the heads that judge
    for name in dict.fromkeys([*names, *kept]):
        used[name] = file_metadata(*head_file(study.source, recipe, name, study.encoder.name))["sha256"]
    settings = {"recipe": recipe, "control": kept, "heads": used, "floor": args.floor, "lambdas": lambdas,
                "a_class": args.a_class, "dtype": str(study.dtype)[6:]}
    picture = study.here / "negation.png"
    result = study.result("negation.json", settings, made_of, key="targets", files=lambda row: [picture])
    if not result.todo:
        return

    # ---------------------------------------------------- tasks, heads, what lambda = 0 gives
    tasks, heads = dict(study.tasks), dict(study.heads)
    for name, source in asked.items():
        tasks[name] = common.load_task(name, source, study.encoder, study.runs, study.seed)
        path, made_by = head_file(study.source, recipe, name, study.encoder.name)
        heads[name] = common.load_head(path, made_by, tasks[name], study.encoder, study.device)
    images = sum(len(task.splits["val"]) for task in tasks.values()) * 2 * len(lambdas) * len(result.todo)
    evaluator, at_zero = study.evaluator(images, recipe["linear"]), {"val": {}, "test": {}}
    for name, task in tasks.items():
        features = cached_features(study.folder, task, evaluator)
        for split, known in at_zero.items():
            hits = count_hits(features[split], heads[name], task.splits[split])
            known[name] = hits / len(task.splits[split])

    def accuracies(names, split, settings):
        """[{task: accuracy}] of some tasks' split, the first at 0, the others under weight settings."""
        found = [{name: at_zero[split][name] for name in names}]
        if settings:
            splits = {name: tasks[name].splits[split] for name in names}
            found += evaluator.accuracies(splits, heads, settings)
        return found

    # ---------------------------------------------------- a target at a time
    curves = {}              # {(task, random): accuracies}: `other` of one target is `own` of the next
    for target in result.todo:
        start, task, head = time.perf_counter(), tasks[target], heads[target]
        vectors = {"own": load_vector(study.source, target, study.encoder)}
        vectors["random"] = random_like(vectors["own"], f"{study.seed} {target}")
        stay = dict.fromkeys(vectors, controls[target])
        without = [name for name in controls[target] if name != followed[target]]
        if followed[target] != target and without:
            vectors["other"] = load_vector(study.source, followed[target], study.encoder)
            stay["other"] = without
        evaluator.use_vectors(list(vectors.values()))
        before = judged(cached_features(study.folder, task, evaluator), head, task, args.a_class, study.seed)
        row = {"tasks": [target, followed[target]], "classes": len(task.classes),
               "n": len(task.splits["test"]), "test_lambda0": rates(before, task), "subtracted": {}}
        after = {}
        for place, (label, controlled) in enumerate(stay.items()):
            grid = [REACH[label] * lam for lam in lambdas]
            direction = np.eye(len(vectors))[place]
            weights = [tuple((-lam * direction).tolist()) for lam in grid]
            whose = followed[target] if label == "other" else target
            if (whose, label == "random") not in curves:
                seen = list(dict.fromkeys([whose, preceding[whose], *controls[whose]]))
                curves[whose, label == "random"] = accuracies(seen, "val", weights[1:])
            curve = curves[whose, label == "random"]
            control = [mean_of(of_lambda, controlled) for of_lambda in curve]
            allowed = [k for k in range(len(lambdas)) if control[k] >= args.floor * control[0]]
            best = min(allowed, key=lambda k: curve[k][target])            # of equals the smallest lambda
            after[label] = before
            if best > 0:
                found = features_at(evaluator, task, weights[best], list(task.splits))
                after[label] = judged(found, head, task, args.a_class, study.seed)
            tested = accuracies(controlled, "test", weights[best:best + 1] if best > 0 else [])
            row["subtracted"][label] = {
                "best": best, "lambda": grid[best], "test": rates(after[label], task),
                "control": {"lambda0": mean(tested[0].values()), "picked": mean(tested[-1].values())},
                "val": {"target": [of_lambda[target] for of_lambda in curve], "control": control},
                "change": differences(task, after[label], before)}
        row["own_minus_random"] = differences(task, after["own"], after["random"])
        row["seconds"] = time.perf_counter() - start
        with result.saving(target):
            result.rows[target] = row
            result.values["lambdas"] = lambdas
            result.values["means"] = means(result.rows)
            if target == result.todo[-1]:    # before the file that says all is done
                plots.trade_off(picture, result.rows, args.floor, f"{args.encoder}, {study.name}")
        own = row["subtracted"]["own"]
        print(f"negate {target}: lambda {own['lambda']:g}, target {row['test_lambda0']['frozen']:.4f} to "
              f"{own['test']['frozen']:.4f}, with its head fitted again {own['test']['all']:.4f}; control "
              f"{own['control']['lambda0']:.4f} to {own['control']['picked']:.4f} (n = {row['n']})",
              flush=True)

    # ---------------------------------------------------- say
    for label, row in result.values["means"].items():
        cells = [each["subtracted"][label] for each in result.rows.values() if label in each["subtracted"]]
        at_end = sum(0 < cell["best"] == len(lambdas) - 1 for cell in cells)
        if at_end:
            print(f"negate {label}: of {at_end} targets the grid's largest lambda: try a larger --lambda-max")
        print(f"negate {label}: mean target {row['lambda0']['frozen']:.4f} to {row['test']['frozen']:.4f}, "
              f"fitted again {row['lambda0']['all']:.4f} to {row['test']['all']:.4f}, control "
              f"{row['control']['lambda0']:.4f} to {row['control']['picked']:.4f} "
              f"over {row['targets']} tasks")
    for way, difference in result.values["means"]["own"]["minus_random"].items():
        print(f"negate own minus random, {way}: {difference['mean']:+.4f} "
              f"+- {difference['standard_error']:.4f}")


def control_sources(args, study):
    """{task: source} of --control; Refused where one is a target."""
    if args.control is None:
        return {}
    sources = common.task_sources(args.control, args.data, study.recorded("finetune.json"))
    for name in sources:
        if name in study.sources:
            raise Refused(f"--control {name} is one of the targets: --tasks says which tasks are")
    return sources


def random_like(vector, words):
    """A random {name: tensor} of a vector's norm in each tensor; the words are its seed."""
    drawn = {}
    for name, tensor in vector.items():
        noise = torch.randn(tensor.shape, generator=generator_of(f"{words} {name}"))
        drawn[name] = noise * (tensor.norm() / noise.norm().clamp_min(1e-30))
    return drawn


# --------------------------------------------------------------------------------------- accuracies


def judged(features, head, task, a_class, seed):
    """{way: (N,) predicted classes of the test images} on features {split: (N, D)}."""
    rows = few(task.splits["train"].labels, a_class, seed)
    some = features | {"train": features["train"][rows]}
    heads = {"frozen": head, "all": fit_head(features, task)[0],
             "few": fit_head(some, with_train(task, rows))[0]}
    predicted = {way: predict(features["test"], fitted) for way, fitted in heads.items()}
    return predicted | {"neighbours": neighbours(features, task)}


def neighbours(features, task):
    """(N,) classes of test images by a vote of the training images whose features are nearest by cosine."""
    train, test = (F.normalize(features[split].float(), dim=1) for split in ("train", "test"))
    labels = torch.from_numpy(task.splits["train"].labels).to(train.device)
    found = []
    for some in test.split(1024):
        near = (some @ train.T).topk(min(NEIGHBOURS, len(train)), dim=1)
        votes = torch.zeros(len(some), len(task.classes), device=train.device)
        votes.scatter_add_(1, labels[near.indices], (near.values / TEMPERATURE).exp())
        found.append(votes.argmax(1))
    return torch.cat(found)


def rates(predicted, task):
    """{way: test accuracy}."""
    labels = torch.from_numpy(task.splits["test"].labels)
    return {way: (predicted[way].cpu() == labels).double().mean().item() for way in WAYS}


def differences(task, ours, theirs):
    """{way: {"mean", "standard_error"}} of the test accuracy, paired."""
    found = {}
    for way in WAYS:
        difference = paired_difference({task.name: task}, [ours[way]], [theirs[way]])
        found[way] = {key: difference[key] for key in ("mean", "standard_error")}
    return found


def means(rows):
    """{what is subtracted: means over the targets that have it}; of differences with their standard error."""
    found = {}
    for label in REACH:
        having = [row for row in rows.values() if label in row["subtracted"]]
        if not having:
            continue
        cells = [row["subtracted"][label] for row in having]
        found[label] = {
            "targets": len(having), "n": sum(row["n"] for row in having),
            "lambda": mean(cell["lambda"] for cell in cells),
            "chance": mean(1 / row["classes"] for row in having),
            "lambda0": averages([row["test_lambda0"] for row in having]),
            "test": averages([cell["test"] for cell in cells]),
            "control": averages([cell["control"] for cell in cells]),
            "change": average_differences([cell["change"] for cell in cells])}
    found["own"]["minus_random"] = average_differences([row["own_minus_random"] for row in rows.values()])
    return found


def mean_of(accuracy, names):
    return mean(accuracy[name] for name in names)


def averages(dicts):
    """{key: mean over dicts of what they have there}."""
    found = {}
    for key in dicts[0]:
        found[key] = mean(each[key] for each in dicts)
    return found


def average_differences(dicts):
    """{way: the mean of independent differences, with its standard error}."""
    found = {}
    for way in WAYS:
        variance = sum(each[way]["standard_error"] ** 2 for each in dicts)
        found[way] = {"mean": mean(each[way]["mean"] for each in dicts),
                      "standard_error": variance ** 0.5 / len(dicts)}
    return found


if __name__ == "__main__":
    run(main, parse_args)
