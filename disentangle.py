"""
Weight disentanglement: how often adding another task's vector changes a task's predictions, over two lambdas.

    python disentangle.py tiny                                        # the first two tasks
    python disentangle.py tiny --pairs all --points 7 --samples 256
    python disentangle.py tiny --metric both --points 15 --limit 2    # predictions and features from one pass
    python disentangle.py tiny --rule tsv-m                           # results in aligned-tsv-m
    python disentangle.py vit_b16_dino --pairs cars-dtd,mnist-svhn
    python disentangle.py vit_b16_dino --dtype fp32                   # on a GPU not in TF32

Reads   runs/ENCODER/pretrained.safetensors, heads/ (probe.py), NAME/finetune.json,
        NAME/vectors/TASK.safetensors (make_vectors.py)
Writes  runs/ENCODER/NAME/disentangle/A-B.npz and .png (A+B where a task's name has a hyphen),
        disentangle.json; of the metric representation representation/ and representation.json; while it
        works state/disentangle-A-B.json with the finished rows, from which it goes on
Rules   tau_t is then what a rule makes of it beside the other of its pair; those on the spectrum of the sum
        (iso-c, iso-cts) leave nothing that is one task's
Source  arXiv:2511.14569 section 4.1 and Figure 1: xi is the sum of both tasks' terms, in [0, 2]; of
        representations arXiv:2407.07089 section 4: the mean over images of
        KL(softmax f(x; theta_pre + lambda_t tau_t) || softmax f(x; both)), summed over both tasks
"""
import contextlib
import itertools
import time

import numpy as np
import torch
import torch.nn.functional as F

from common import predict, sample
from lib import flags, merging, plots
from lib.files import Refused, save_arrays
from lib.study import open_study, run

DEFAULTS = {"points": 25, "limit": 3.0, "samples": 2048}    # an encoder's own settings come before these


def parse_args(argv=None):
    parser = flags.stage_parser(__doc__, ["fine", "auto", "bf16", "fp32", "tf32"])
    parser.set_defaults(dtype="fine")        # bf16 alone flips more predictions than fine maps show
    flags.add_name(parser)
    add = parser.add_argument
    flags.add_rule(parser, [name for name, rule in merging.RULES.items() if rule.apart])
    add("--pairs", default="first", help="A-B,C-D,... or all, or first: the first two tasks (default first)")
    add("--points", type=flags.positive,
        help="values of each lambda; odd, so that 0 is one (default 25; tiny 13)")
    add("--limit", type=flags.positive_float, help="lambdas run from -limit to limit (default 3)")
    add("--samples", type=flags.positive, help="random test images per task (default 2048; tiny 128)")
    add("--metric", choices=[*METRICS, "both"], default="prediction",
        help="what is compared: predicted classes, features, or both in one pass (default prediction)")
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------- the metrics


def disentanglement_error(single, merged):
    """Fraction of images on which merging the other task in changes the prediction: one task's term of xi.

    single   (N,) int64   predictions of theta_pre + lambda_t tau_t
    merged   (N,) int64   predictions of theta_pre + lambda_1 tau_1 + lambda_2 tau_2, same images, same order
    Returns  float in [0, 1]; xi is the sum of the two tasks' terms, in [0, 2]
    Errors   ValueError if N is 0 or the lengths differ
    Source   arXiv:2511.14569 section 4.1
    """
    if single.shape != merged.shape or single.numel() == 0:
        raise ValueError(f"predictions of shapes {tuple(single.shape)} and {tuple(merged.shape)}")
    return (single != merged).sum().item() / single.numel()


def representation_error(single, merged):
    """Mean over images of KL(softmax(single) || softmax(merged)): one task's term of --metric representation.

    single   (N, D)   features of theta_pre + lambda_t tau_t
    merged   (N, D)   features of theta_pre + lambda_1 tau_1 + lambda_2 tau_2, same images, same order
    Returns  float, at least 0, in nats
    Errors   ValueError if N is 0 or the shapes differ
    Source   arXiv:2407.07089 equation 2, with its order of arguments
    """
    if single.shape != merged.shape or single.numel() == 0:
        raise ValueError(f"features of shapes {tuple(single.shape)} and {tuple(merged.shape)}")
    single, merged = single.float().log_softmax(1), merged.float().log_softmax(1)
    return F.kl_div(merged, single, reduction="batchmean", log_target=True).item()


# name: what is compared, the error of one task, the name of its files, what its colour bar says, its end
METRICS = {
    "prediction": ("predictions", disentanglement_error, "disentangle",
                   "disentanglement error xi, 0 to 2", 2),
    "representation": ("features", representation_error, "representation",
                       "KL divergence of representations, nats", None),
}


# --------------------------------------------------------------------------------------- the heat maps


def main(args):
    # ---------------------------------------------------- open
    study = open_study(args, __file__, "finetune.json")
    settings = study.settings("disentangle", args, DEFAULTS) | {"rule": args.rule}
    lambdas, pairs = grid_of(settings), choose_pairs(args.pairs, list(study.sources))
    metrics = list(METRICS) if args.metric == "both" else [args.metric]
    results = {metric: open_result(study, metric, settings, pairs) for metric in metrics}
    missing = set().union(*(result.todo for result in results.values()))
    todo = [pair for pair in pairs if pair in missing]
    if not todo:
        return

    # ---------------------------------------------------- random test images, the same in every pair
    used = sorted(set(itertools.chain(*pairs.values())))
    tasks = {name: study.load_task(name) for name in used}
    heads = {name: study.load_head(tasks[name]) for name in used}
    images = {name: sample(tasks[name].splits["test"], settings["samples"], args.seed) for name in used}
    cells = len(lambdas) ** 2 * sum(len(images[name]) for pair in todo for name in pairs[pair])
    evaluator = study.evaluator(cells, study.recipe["linear"])
    print(f"disentangle: {len(todo)} pairs, {len(lambdas)} x {len(lambdas)} points, {cells} forward passes",
          flush=True)

    # ---------------------------------------------------- every cell of every pair
    for pair in todo:
        start, (a, b) = time.perf_counter(), pairs[pair]
        lacking = [metric for metric, result in results.items() if pair in result.todo]
        parts = merging.parts(args.rule, study.source, [a, b], study.encoder, study.seed, study.device)
        evaluator.use_vectors(parts)
        keeper = results[lacking[0]]                        # of the rows that are finished
        state = keeper.state(pair)
        if list(state.get("xi", ())) != lacking:
            state = {"xi": {metric: [] for metric in lacking}, "seconds": 0.0}
        before, done = state["seconds"], len(state["xi"][lacking[0]])
        for found in error_rows(evaluator, [images[a], images[b]], [heads[a], heads[b]], lambdas, lacking,
                                done):
            for metric, row in found.items():
                state["xi"][metric].append(row)
            state["seconds"] = before + time.perf_counter() - start
            keeper.keep(state, pair)

        # ------------------------------------------------ save, say
        samples = [len(images[a]), len(images[b])]
        with contextlib.ExitStack() as saving:
            for metric in lacking:
                result = results[metric]
                saving.enter_context(result.saving(pair))
                _, _, stem, label, top = METRICS[metric]
                xi = np.array(state["xi"][metric])          # (points, points)
                save_arrays(study.here / stem / f"{pair}.npz", xi=xi, lambdas=lambdas)
                plots.heat_map_of_pair(study.here / stem / f"{pair}.png", xi, lambdas, (a, b),
                                       f"{args.encoder}, {study.name}", label, top)
                row = describe(xi, lambdas) | {"tasks": [a, b], "samples": samples,
                                               "seconds": state["seconds"]}
                error = ""
                if metric == "prediction":
                    row["mean_xi_error_at_most"] = sampling_error(xi, lambdas, min(samples))
                    error = f" +- {row['mean_xi_error_at_most']:.4f} at most"
                result.rows[pair], box = row, f"[-{row['box']:g}, {row['box']:g}]^2"
                print(f"disentangle {pair}, {metric}: mean xi in {box} {row['mean_xi_in_box']:.4f}{error}, "
                      f"at the origin {row['xi_at_origin']:g}, n = {samples}, {state['seconds']:.1f} s",
                      flush=True)


def grid_of(settings):
    """The grid's lambdas, the same for both tasks; Refused where 0 would not be among them."""
    points, limit = settings["points"], settings["limit"]
    if points % 2 == 0 or points < 3:
        raise Refused(f"--points {points} has to be odd and at least 3: another grid would miss lambda = 0")
    return flags.even_grid("--limit", -limit, limit, points)


def open_result(study, metric, settings, pairs):
    """The result of one metric, a row for each pair."""
    stem, made_of = METRICS[metric][2], {}
    fingerprints = study.vectors(sorted(set(itertools.chain(*pairs.values()))))
    for pair, (a, b) in pairs.items():
        made_of[pair] = {"vectors": [fingerprints[a], fingerprints[b]],
                         "data": [study.data[a], study.data[b]]}
    settings = settings | {"recipe": study.recipe, "dtype": study.precision}
    return study.result(f"{stem}.json", settings, made_of, key="pairs",
                        files=lambda pair: [study.here / stem / f"{pair}.npz",
                                            study.here / stem / f"{pair}.png"])


def choose_pairs(text, names):
    """{pair_name: (A, B)} for --pairs; Refused: an unknown task, a task with itself, fewer than two tasks, or
    A-B that could mean two pairs."""
    if len(names) < 2:
        raise Refused(f"a pair needs two tasks, --tasks names {', '.join(names)}")
    every = list(itertools.combinations(names, 2))
    if text in ("all", "first"):
        return {pair_name(a, b): (a, b) for a, b in (every if text == "all" else every[:1])}
    pairs = {}
    for word in text.split(","):
        fitting = [(a, b) for a, b in itertools.permutations(names, 2) if word in (f"{a}-{b}", f"{a}+{b}")]
        if len(fitting) != 1:
            raise Refused(f"--pairs: {word!r} is not A-B with A and B two of {', '.join(names)}"
                          f"{' in one way only: write A+B' if fitting else ''}")
        pairs[pair_name(*fitting[0])] = fitting[0]
    return pairs


def pair_name(a, b):
    """A-B, or A+B where a task's own name has a hyphen: `a` with `b-c` and `a-b` with `c` are two pairs."""
    return f"{a}+{b}" if "-" in a + b else f"{a}-{b}"


def describe(xi, lambdas):
    """The numbers of one heat map (points, points)."""
    middle, weights = len(lambdas) // 2, box_weights(lambdas)
    return {"points": len(lambdas), "limit": float(lambdas[-1]), "box": min(1.0, float(lambdas[-1])),
            "mean_xi_in_box": float(weights @ xi @ weights),
            "xi_at_origin": float(xi[middle, middle]), "max_xi": float(xi.max())}


def box_weights(lambdas):
    """(points,) w so that w @ xi @ w is the mean of xi over the box [-1, 1]^2.

    The trapezoidal rule: xi is taken as bilinear between the grid's lines, also at the box's edge where it
    has none. A box that the grid does not reach ends where the grid does. The axes, on which one of the two
    terms is 0 by definition, weigh nothing by themselves, but a coarse grid flattens the valley around them.
    """
    edge = min(1.0, lambdas[-1])
    knots = [-edge, *lambdas[np.abs(lambdas) < edge], edge]
    # each hat is 1 on a line of its own and 0 on the others
    hats = [np.interp(knots, lambdas, own) for own in np.eye(len(lambdas))]
    return np.trapezoid(hats, knots) / (2 * edge)


def sampling_error(xi, lambdas, n):
    """What the standard error of mean xi in the box is at most, from the choice of images.

    Each task's term is a share e of its images, of variance e (1 - e) / n; that of xi, the sum of two, is at
    most xi (1 - xi / 2) / n. Cells share their images: standard errors are averaged, not variances.

    n  images of the task that has fewer
    """
    weights = box_weights(lambdas)
    return float(weights @ np.sqrt(xi * (1 - xi / 2) / n) @ weights)


def compared(evaluator, metrics, splits, heads, settings):
    """{metric: what it compares, predictions (K, N) or features (K, N, D) of each split}, from one pass."""
    if all(METRICS[metric][0] == "predictions" for metric in metrics):
        predictions = evaluator.predictions(splits, heads, settings)
        return dict.fromkeys(metrics, predictions)
    features, predictions = evaluator.features(splits, settings), []
    for rows, head in zip(features, heads, strict=True):
        predictions.append(torch.stack([predict(row, head) for row in rows]))
    return {metric: features if METRICS[metric][0] == "features" else predictions for metric in metrics}


def error_rows(evaluator, images, heads, lambdas, metrics, begin=0):
    """Yield {metric: xi(lambda_1, every lambda_2)} for each lambda_1 from row `begin` on.

    evaluator      holds both task vectors
    images, heads  two Splits and their heads; lambdas: symmetric around 0, an odd number of them
    metrics        list of keys of METRICS
    """
    zero, columns = len(lambdas) // 2, range(len(lambdas))
    if begin == len(lambdas):
        return
    alone = [(0.0, lam) for lam in lambdas]    # task 2 with its own vector alone
    second = compared(evaluator, metrics, images[1:], heads[1:], alone)
    for row in range(begin, len(lambdas)):    # a row at a time bounds the memory that features take
        both = [0, 1] if row != zero else [0]    # in the row of lambda_1 = 0 task 2's term is 0
        settings = [(lambdas[row], lam) for lam in lambdas]
        merged = compared(evaluator, metrics, [images[t] for t in both], [heads[t] for t in both], settings)
        xi = {}
        for metric in metrics:
            error = METRICS[metric][1]
            xi[metric] = [error(merged[metric][0][zero], merged[metric][0][column]) for column in columns]
            if row != zero:
                for column in columns:
                    xi[metric][column] += error(second[metric][0][column], merged[metric][1][column])
            if not np.isfinite(xi[metric]).all():
                raise Refused(f"the {metric} error is not finite where lambda_1 is {lambdas[row]:g}: "
                              f"the features are not; give a smaller --limit, or --metric prediction")
        yield xi


if __name__ == "__main__":
    run(main, parse_args)
