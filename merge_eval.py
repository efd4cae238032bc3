"""
Task addition: theta_pre + lambda * sum_t tau_t, lambda picked on validation, the test split run at 0 and at the pick.

    python merge_eval.py vit_b16_dino
    python merge_eval.py tiny --lambda-max 0.2                   # 21 values again, but on a finer grid
    python merge_eval.py tiny --subsets 5 --images-per-task 500  # merges of 1, 2, ... tasks: all pairs, five of each larger size

Reads   runs/ENCODER/pretrained.safetensors, features/, heads/ (probe.py), RECIPE/finetune.json (finetune.py),
        RECIPE/vectors/TASK.safetensors (make_vectors.py)
Writes  runs/ENCODER/RECIPE/merge.json, merge.png, merged.safetensors (the encoder at the picked lambda, as timm loads it)
        with --subsets only scaling.json, scaling.png; while it searches state/merge.json, from which the same command goes on
Source  arXiv:2511.14569 sections 3.2 and 4.2, appendices E and I
"""
import itertools
import time

import numpy as np

import common
import encoders
import files
import linearized
import ranks


def parse_args(argv=None):
    parser = common.stage_parser(__doc__)
    common.add_recipe(parser)
    parser.add_argument("--lambda-max", type=common.positive_float, default=1.0, help="largest lambda of the grid (default 1)")
    parser.add_argument("--lambdas", type=common.positive, default=21, help="values of lambda from 0 to the largest (default 21)")
    parser.add_argument("--subsets", type=common.positive, help="merge subsets of the tasks instead: every pair, and of larger sizes at most this many")
    parser.add_argument("--images-per-task", type=common.positive, help="with --subsets: at most so many random validation and test images per task")
    return parser.parse_args(argv)


def main(args):
    # ------------------------------------------------------------------ what is to be done
    folder, sources = encoders.run_folder(args), dict(common.task_names(args))
    names, path = list(sources), folder / args.recipe / "merge.json"
    encoder = encoders.load_encoder(args)
    device = common.pick_device(args.device)
    dtype, _ = common.pick_dtype(args.dtype, device)
    lambdas = [round(float(lam), 10) for lam in np.linspace(0, args.lambda_max, args.lambdas)]
    if args.subsets:
        scale(args, folder, sources, encoder, lambdas)
        return
    finetuned = files.require_rows(folder / args.recipe / "finetune.json", names, f"python finetune.py {args.encoder} --recipe {args.recipe}")

    # ------------------------------------------------------------------ the sum of the vectors, one file at a time
    total, vectors = common.sum_of_vectors(folder, args.recipe, names, encoder)
    tasks = {name: common.load_task(name, source, encoder, args) for name, source in sources.items()}
    config = {"encoder": args.encoder, "theta_pre": encoder.theta_pre, "image_size": encoder.size, "recipe": args.recipe, "tasks": names,
              "lambdas": lambdas, "dtype": str(dtype)[6:], "vectors": vectors, "data": {name: task.fingerprint for name, task in tasks.items()}}
    result = files.open_result(path, config, args.overwrite, device)
    state_path = folder / args.recipe / "state" / "merge.json"
    if "test" in result:
        files.forget(state_path)
        print(f"merge_eval: {path} is there, nothing to do (--overwrite to redo)")
        return
    heads = [common.load_head(folder, args.recipe, task, encoder, device) for task in tasks.values()]
    n = {split: {name: len(task.splits[split].rows) for name, task in tasks.items()} for split in ("val", "test")}

    # ------------------------------------------------------------------ validation: lambda = 0 from cached features, then the search
    evaluator = linearized.evaluator(encoder, args, (len(lambdas) - 1) * sum(n["val"].values()) + sum(n["test"].values()))
    at_zero = {split: {} for split in ("val", "test")}
    for (name, task), head in zip(tasks.items(), heads):
        features = common.cached_features(folder, task, evaluator)
        for split in at_zero:
            at_zero[split][name] = common.count_hits(features[split], head, task.splits[split])
    evaluator.use_vectors([total])
    state = files.half_done(state_path, config, args.overwrite, device)
    hits, block = state.setdefault("hits", [list(at_zero["val"].values())]), -(-5 // ranks.world()) * ranks.world()  # a row of counts for each lambda so far
    while len(hits) < len(lambdas):
        start = time.perf_counter()
        counted = evaluator.hits([task.splits["val"] for task in tasks.values()], heads, [(lam,) for lam in lambdas[len(hits):len(hits) + block]])
        hits += [list(row) for row in zip(*counted)]
        state["seconds"] = state.get("seconds", 0) + time.perf_counter() - start
        files.write_json(state_path, state)
    seconds = state.get("seconds", 0)
    val = {name: [row[t] / n["val"][name] for row in hits] for t, name in enumerate(names)}
    single = {split: {name: finetuned["tasks"][name][split] for name in names} for split in ("val", "test")}
    normalized = [common.normalized_accuracy({name: val[name][k] for name in names}, single["val"]) for k in range(len(lambdas))]
    best = int(np.argmax(normalized))

    # ------------------------------------------------------------------ test: at 0 and at the chosen lambda
    if best == 0:
        at_best = at_zero["test"]
    else:
        counted = evaluator.hits([task.splits["test"] for task in tasks.values()], heads, [(lambdas[best],)])
        at_best = {name: counts[0] for name, counts in zip(names, counted)}
    images = (len(lambdas) - 1) * sum(n["val"].values())
    result |= {"lambdas": lambdas, "best_lambda": lambdas[best],
               "val": {"absolute": [common.mean(val[name][k] for name in names) for k in range(len(lambdas))],
                       "normalized": normalized, "tasks": val, "n": n["val"]},
               "test": summary(at_best, n["test"], single["test"]), "test_lambda0": summary(at_zero["test"], n["test"], single["test"]),
               "single_task": single["test"], "seconds": seconds, "images_per_second": images / max(seconds, 1e-9)}

    # ------------------------------------------------------------------ results
    if not common.RECIPES[args.recipe].linear:                             # whose merge is no set of weights for the encoder as it is
        theta_pre = encoders.weights_of(encoder.module)
        merged = {key: theta_pre[key] + lambdas[best] * vector for key, vector in total.items()}
        files.save_tensors(folder / args.recipe / "merged.safetensors", encoder.module.state_dict() | merged, theta_pre=encoder.theta_pre,
                           recipe=args.recipe, tasks=names, best_lambda=lambdas[best])
    at_zero_is = {"probed": "probing (lambda = 0)", "text": "zero-shot (lambda = 0)", "random": "lambda = 0"}[common.RECIPES[args.recipe].head]
    draw(folder / args.recipe / "merge.png", result, f"{args.encoder}, {args.recipe}, {len(names)} tasks", at_zero_is)
    files.write_json(path, result)
    files.forget(state_path)
    print(f"merge_eval: {images} images in {seconds:.1f} s, {result['images_per_second']:.0f} img/s (compiling included)")
    for label, row in ((at_zero_is, result["test_lambda0"]), (f"addition (lambda = {lambdas[best]:g})", result["test"])):
        print(f"merge_eval: {label}: test absolute {row['absolute']:.4f}, normalized {row['normalized']:.4f}, n = {sum(n['test'].values())}")


def scale(args, folder, sources, encoder, lambdas):
    """Addition against the number of tasks: a lambda search and a test for every chosen subset (appendix I)."""
    # ------------------------------------------------------------------ which subsets, and what they cost
    names, path, device = list(sources), folder / args.recipe / "scaling.json", common.pick_device(args.device)
    if len(names) < 2:
        raise files.Refused(f"--subsets needs two tasks or more, --tasks names {', '.join(names)}")
    loaded = {name: common.load_vector(folder, args.recipe, name, encoder) for name in names}
    config = {"encoder": args.encoder, "theta_pre": encoder.theta_pre, "image_size": encoder.size, "recipe": args.recipe, "tasks": names,
              "lambdas": lambdas, "subsets_per_size": args.subsets, "images_per_task": args.images_per_task, "seed": args.seed,
              "dtype": str(common.pick_dtype(args.dtype, device)[0])[6:], "vectors": {name: about["sha256"] for name, (_, about) in loaded.items()}}
    result = files.open_result(path, config, args.overwrite, device)
    rows = result.setdefault("subsets", [])
    chosen = choose_subsets(names, args.subsets, args.seed)
    todo = [subset for subset in chosen if list(subset) not in [row["tasks"] for row in rows]]
    if not todo:
        print(f"merge_eval: {path} has all {len(chosen)} subsets, nothing to do (--overwrite to redo)")
        return
    tasks = {name: common.load_task(name, source, encoder, args) for name, source in sources.items()}
    heads = {name: common.load_head(folder, args.recipe, task, encoder, device) for name, task in tasks.items()}
    splits = {name: {split: common.sample(task.splits[split], args.images_per_task, args.seed) for split in ("val", "test")} for name, task in tasks.items()}
    n = {name: {split: len(splits[name][split].rows) for split in ("val", "test")} for name in names}
    images = sum((len(lambdas) - 1) * n[name]["val"] + 2 * n[name]["test"] for subset in todo for name in subset)
    print(f"merge_eval: {len(todo)} subsets of {len(names)} tasks, {images} images to evaluate, at most "
          f"{args.images_per_task or 'all'} validation and test images per task", flush=True)

    # ------------------------------------------------------------------ lambda = 0 and the single tasks, on the same images, once
    evaluator = linearized.evaluator(encoder, args, images)
    evaluator.use_vectors([vector for vector, _ in loaded.values()])       # on the device from here on
    one = [tuple(float(name == other) for other in names) for name in names]
    at_zero, single = {}, {}
    for name, row in zip(names, one):
        for split in ("val", "test"):
            [[zero, own]] = evaluator.hits([splits[name][split]], [heads[name]], [(0.0,) * len(names), row])
            at_zero[name, split], single[name, split] = zero / n[name][split], own / n[name][split]

    # ------------------------------------------------------------------ every subset
    for subset in todo:
        start = time.perf_counter()
        member = [float(name in subset) for name in names]
        settings = [tuple(lam * m for m in member) for lam in lambdas[1:]]
        counted = evaluator.hits([splits[name]["val"] for name in subset], [heads[name] for name in subset], settings)
        alone = {split: {name: single[name, split] for name in subset} for split in ("val", "test")}
        curve = [common.normalized_accuracy({name: at_zero[name, "val"] for name in subset}, alone["val"])]
        curve += [common.normalized_accuracy({name: counts[k] / n[name]["val"] for name, counts in zip(subset, counted)}, alone["val"]) for k in range(len(settings))]
        best = int(np.argmax(curve))
        accuracy = {name: at_zero[name, "test"] for name in subset}
        if best > 0:
            counted = evaluator.hits([splits[name]["test"] for name in subset], [heads[name] for name in subset], [settings[best - 1]])
            accuracy = {name: counts[0] / n[name]["test"] for name, counts in zip(subset, counted)}
        rows.append({"tasks": list(subset), "best_lambda": lambdas[best], "absolute": common.mean(accuracy.values()),
                     "normalized": common.normalized_accuracy(accuracy, alone["test"]), "seconds": time.perf_counter() - start})
        result["images_per_task"] = n
        if subset == todo[-1]:                                             # before the file that says all is done
            draw_scaling(folder / args.recipe / "scaling.png", rows, f"{args.encoder}, {args.recipe}")
        files.write_json(path, result)

    # ------------------------------------------------------------------ results
    for size in sorted({len(row["tasks"]) for row in rows}):
        normalized = [row["normalized"] for row in rows if len(row["tasks"]) == size]
        print(f"merge_eval: {size} tasks: mean normalized accuracy {common.mean(normalized):.4f} over {len(normalized)} subsets")


def choose_subsets(names, per_size, seed):
    """Every single task and pair (pairs are also compared by their vectors' angle), and of each larger size every subset, or
    `per_size` of them drawn without replacement where there are more."""
    rng, chosen = np.random.default_rng(seed), []
    for size in range(1, len(names) + 1):
        every = list(itertools.combinations(names, size))
        chosen += every if size <= 2 or len(every) <= per_size else [every[i] for i in sorted(rng.choice(len(every), per_size, replace=False))]
    return chosen


def summary(hits, n, single_task):
    """{"absolute", "normalized", "tasks", "hits", "n"} of counts {task: hits} over {task: n} test images."""
    accuracy = {name: hits[name] / n[name] for name in hits}
    return {"absolute": common.mean(accuracy.values()), "normalized": common.normalized_accuracy(accuracy, single_task),
            "tasks": accuracy, "hits": hits, "n": n}


def draw_scaling(path, rows, title):
    """Normalized accuracy against the number of merged tasks: a dot per subset, a line through the means."""
    fig, axes = common.figure(5.6, 4.0)
    sizes = sorted({len(row["tasks"]) for row in rows})
    axes.plot([len(row["tasks"]) for row in rows], [row["normalized"] for row in rows], "o", alpha=0.45, label="a subset of tasks")
    axes.plot(sizes, [common.mean(row["normalized"] for row in rows if len(row["tasks"]) == size) for size in sizes], color="black", label="mean")
    axes.set(xlabel="number of merged tasks", ylabel="normalized test accuracy", ylim=(0, None), title=title)
    axes.legend(fontsize=8, loc="lower left")
    common.save_figure(path, fig)


def draw(path, result, title, at_zero_is):
    """Accuracy against lambda on validation: each task thin, the mean normalized accuracy thick, lambda = 0 marked."""
    fig, axes = common.figure(7.6, 4.2)
    lambdas, normalized, best = result["lambdas"], result["val"]["normalized"], result["best_lambda"]
    for name, accuracy in result["val"]["tasks"].items():
        axes.plot(lambdas, accuracy, linewidth=0.9, alpha=0.6, label=name)
    axes.plot(lambdas, normalized, color="black", linewidth=2.2, marker=".", label="mean, normalized")
    axes.axhline(normalized[0], color="black", linestyle=":", linewidth=1)
    axes.annotate(at_zero_is, (lambdas[-1], normalized[0]), ha="right", va="bottom", fontsize=8)
    axes.plot(best, max(normalized), marker="*", markersize=14, color="crimson", label=f"chosen, lambda = {best:g}", linestyle="none")
    axes.set(xlabel="scaling coefficient lambda", ylabel="validation accuracy", ylim=(0, 1.03))
    axes.set_title(title, loc="left", fontsize=9)
    fig.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    common.save_figure(path, fig)


if __name__ == "__main__":
    files.run(main, parse_args)
