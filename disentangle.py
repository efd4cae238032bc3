"""
Weight disentanglement: how often adding another task's vector changes a task's predictions, as a heat map over two lambdas.

    python disentangle.py vit_b16_dino --pairs cars-dtd,mnist-svhn
    python disentangle.py tiny --pairs all --points 7 --samples 256
    python disentangle.py tiny --metric both --points 15 --limit 2    # predictions and representations from one pass

Reads   runs/ENCODER/pretrained.safetensors, heads/ (probe.py), RECIPE/vectors/TASK.safetensors (make_vectors.py)
Writes  runs/ENCODER/RECIPE/disentangle/A-B.npz and .png, disentangle.json; of the metric representation representation/ and representation.json;
        while it works state/disentangle-METRIC-A-B.json with the finished rows, from which the same command goes on
Source  arXiv:2511.14569 section 4.1 and Figure 1: xi is the sum of both tasks' terms, in [0, 2]; of representations arXiv:2407.07089
        section 4: the mean over images of KL(softmax f(x; theta_pre + lambda_t tau_t) || softmax f(x; both)), summed over both tasks
"""
import itertools
import time

import numpy as np
import torch
import torch.nn.functional as F

import common
import encoders
import files
import linearized


def parse_args(argv=None):
    parser = common.stage_parser(__doc__)
    parser.set_defaults(dtype="fp32")                                      # bf16 alone flips more predictions than fine maps show (precision.py)
    common.add_recipe(parser)
    parser.add_argument("--pairs", default="first", help="A-B,C-D,... or all, or first: the first two tasks (default first)")
    parser.add_argument("--points", type=common.positive, default=25, help="values of each lambda; odd, so that 0 is one (default 25)")
    parser.add_argument("--limit", type=common.positive_float, default=3.0, help="lambdas run from -limit to limit (default 3)")
    parser.add_argument("--samples", type=common.positive, default=2048, help="random test images per task (default 2048)")
    parser.add_argument("--metric", choices=["prediction", "representation", "both"], default="prediction",
                        help="what is compared: predicted classes, features, or both in one pass (default prediction)")
    return parser.parse_args(argv)


def main(args):
    # ------------------------------------------------------------------ what is to be done
    folder, sources = encoders.run_folder(args), dict(common.task_names(args))
    pairs = choose_pairs(args.pairs, list(sources))
    if args.points % 2 == 0 or args.points < 3:
        raise files.Refused(f"--points {args.points} has to be odd and at least 3: another grid would miss lambda = 0")
    encoder = encoders.load_encoder(args)
    device = common.pick_device(args.device)
    dtype, _ = common.pick_dtype(args.dtype, device)
    vectors = {name: common.load_vector(folder, args.recipe, name, encoder) for name in sorted({name for pair in pairs for name in pair})}
    config = {"encoder": args.encoder, "theta_pre": encoder.theta_pre, "image_size": encoder.size, "recipe": args.recipe,
              "points": args.points, "limit": args.limit, "samples": args.samples, "dtype": str(dtype)[6:], "seed": args.seed}
    results, todo = {}, {}                                                 # for each metric
    for metric in ("prediction", "representation") if args.metric == "both" else (args.metric,):
        path = folder / args.recipe / f"{STEMS[metric]}.json"
        result = files.open_result(path, config, args.overwrite, device, [f"{a}-{b}" for a, b in pairs])
        done = result.setdefault("pairs", {})
        missing = [(a, b) for a, b in pairs if done.get(f"{a}-{b}", {}).get("vectors") != [vectors[a][1]["sha256"], vectors[b][1]["sha256"]]]
        results[metric], todo = result, todo | dict.fromkeys(missing)
    state_paths = {(a, b): folder / args.recipe / "state" / f"disentangle-{args.metric}-{a}-{b}.json" for a, b in pairs}
    for pair in pairs:
        if pair not in todo:
            files.forget(state_paths[pair])
    if not todo:
        print(f"disentangle: {path} has all {len(pairs)} pairs, nothing to do (--overwrite to redo)")
        return

    # ------------------------------------------------------------------ random test images, the same in every pair
    used = sorted({name for pair in todo for name in pair})
    tasks = {name: common.load_task(name, sources[name], encoder, args) for name in used}
    heads = {name: common.load_head(folder, args.recipe, tasks[name], encoder, device) for name in used}
    images = {name: common.sample(tasks[name].splits["test"], args.samples, args.seed) for name in used}
    lambdas = np.linspace(-args.limit, args.limit, args.points).round(10)
    cells = args.points ** 2 * sum(len(images[name].rows) for pair in todo for name in pair)
    evaluator = linearized.evaluator(encoder, args, cells)
    print(f"disentangle: {len(todo)} pairs, {args.points} x {args.points} points, {cells} images to evaluate", flush=True)

    # ------------------------------------------------------------------ every cell of every pair
    for a, b in todo:
        start = time.perf_counter()
        evaluator.use_vectors([vectors[a][0], vectors[b][0]])
        name, inside = f"{a}-{b}", np.abs(lambdas) <= 1
        state = files.half_done(state_paths[a, b], config | {"metrics": list(results), "vectors": [vectors[a][1]["sha256"], vectors[b][1]["sha256"]]}, args.overwrite, device)
        rows = state.setdefault("xi", {metric: [] for metric in results})  # the finished rows of the grids
        for found in error_rows(evaluator, [images[a], images[b]], [heads[a], heads[b]], lambdas, list(results), len(min(rows.values(), key=len))):
            for metric, row in found.items():
                rows[metric].append(row)
            files.write_json(state_paths[a, b], state | {"seconds": state.get("seconds", 0) + time.perf_counter() - start})
        seconds = state.get("seconds", 0) + time.perf_counter() - start
        for metric, grid in rows.items():
            xi = np.array(grid)
            stem = folder / args.recipe / STEMS[metric]
            files.save_arrays(stem / f"{name}.npz", xi=xi, lambdas=lambdas)
            draw(stem / f"{name}.png", xi, lambdas, a, b, f"{args.encoder}, {args.recipe}", metric)
            with files.adding_rows(stem.with_suffix(".json"), results[metric], "pairs", args.overwrite):
                results[metric]["pairs"][name] = row = {
                    "limit": args.limit, "points": args.points, "samples": [len(images[a].rows), len(images[b].rows)],
                    "mean_xi_in_box": float(xi[np.ix_(inside, inside)].mean()), "xi_at_origin": float(xi[args.points // 2, args.points // 2]),
                    "max_xi": float(xi.max()), "seconds": seconds, "vectors": [vectors[a][1]["sha256"], vectors[b][1]["sha256"]]}
            print(f"disentangle {name}, {metric}: mean xi in [-1, 1]^2 {row['mean_xi_in_box']:.4f}, at the origin {row['xi_at_origin']:g}, "
                  f"n = {row['samples']}, {seconds:.1f} s", flush=True)
        files.forget(state_paths[a, b])


def choose_pairs(text, names):
    """[(A, B)] for --pairs; Refused for an unknown task, a task with itself, or fewer than two tasks."""
    if len(names) < 2:
        raise files.Refused(f"a pair needs two tasks, --tasks names {', '.join(names)}")
    if text in ("all", "first"):
        return list(itertools.combinations(names, 2))[: 1 if text == "first" else None]
    pairs = []
    for word in text.split(","):
        fitting = [(a, b) for a in names for b in names if a != b and word == f"{a}-{b}"]
        if len(fitting) != 1:
            raise files.Refused(f"--pairs: {word!r} is not A-B with A and B two of {', '.join(names)}")
        pairs += fitting
    return pairs


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
    """Mean over images of KL(softmax(single) || softmax(merged)): one task's term for --metric representation.

    single   (N, D)   features of theta_pre + lambda_t tau_t
    merged   (N, D)   features of theta_pre + lambda_1 tau_1 + lambda_2 tau_2, same images, same order
    Returns  float, at least 0, in nats
    Errors   ValueError if N is 0 or the shapes differ
    Source   arXiv:2407.07089 equation 2, with its order of arguments
    """
    if single.shape != merged.shape or single.numel() == 0:
        raise ValueError(f"features of shapes {tuple(single.shape)} and {tuple(merged.shape)}")
    return F.kl_div(merged.float().log_softmax(1), single.float().log_softmax(1), reduction="batchmean", log_target=True).item()


ERRORS = {"prediction": disentanglement_error, "representation": representation_error}
STEMS = {"prediction": "disentangle", "representation": "representation"}  # of each metric's files


def outputs(evaluator, metrics, splits, heads, settings):
    """{metric: what it compares, for each split: predictions (K, N) or features (K, N, D)}, from one pass over the images."""
    if metrics == ["prediction"]:
        return {"prediction": evaluator.predictions(splits, heads, settings)}
    features = evaluator.features(splits, settings)
    predictions = [torch.stack([common.predict(row, head) for row in one]) for one, head in zip(features, heads)] if "prediction" in metrics else None
    return {"representation": features, "prediction": predictions}


def error_rows(evaluator, images, heads, lambdas, metrics, begin=0):
    """Yield {metric: xi(lambda_1, every lambda_2)} for each lambda_1 from row `begin` on, for the two tasks whose vectors the evaluator holds.

    images, heads  two Splits and their heads; lambdas: symmetric around 0, an odd number of them
    metrics        list of "prediction" and "representation"
    """
    zero = len(lambdas) // 2
    if begin == len(lambdas):
        return
    second = outputs(evaluator, metrics, images[1:], heads[1:], [(0.0, lam) for lam in lambdas])  # task 2 with its own vector alone
    for row, first in list(enumerate(lambdas))[begin:]:                    # a row at a time bounds the memory that features take
        both = [0, 1] if row != zero else [0]                              # in the row of lambda_1 = 0 task 2's term is 0
        merged = outputs(evaluator, metrics, [images[t] for t in both], [heads[t] for t in both], [(first, lam) for lam in lambdas])
        xi = {metric: [0.0] * len(lambdas) for metric in metrics}
        for metric in metrics:
            for t, found in zip(both, merged[metric]):
                for column in range(len(lambdas)):
                    single = found[zero] if t == 0 else second[metric][0][column]
                    xi[metric][column] += ERRORS[metric](single, found[column])
            if not np.isfinite(xi[metric]).all():
                raise files.Refused(f"the {metric} error is not finite where lambda_1 is {first:g}: the features are not; give a smaller --limit, or --metric prediction")
        yield xi


def draw(path, xi, lambdas, a, b, title, metric):
    fig, axes = common.figure(4.6, 4.0)
    image = common.heat_map(axes, xi, lambdas, 2 if metric == "prediction" else xi.max())
    axes.set(xlabel=f"lambda of {a}", ylabel=f"lambda of {b}")
    axes.set_title(title, loc="left", fontsize=8)
    fig.colorbar(image, ax=axes, label="disentanglement error xi, 0 to 2" if metric == "prediction" else "KL divergence of representations, nats")
    common.save_figure(path, fig)


if __name__ == "__main__":
    files.run(main, parse_args)
