"""
Task addition: theta_pre + lambda * sum_t tau_t, lambda picked on validation, the test split run at 0 and at the pick.

    python merge_eval.py vit_b16_dino
    python merge_eval.py tiny --lambda-max 0.2                   # 21 values again, but on a finer grid

Reads   runs/ENCODER/pretrained.safetensors, features/, heads/ (probe.py), RECIPE/finetune.json (finetune.py),
        RECIPE/vectors/TASK.safetensors (make_vectors.py)
Writes  runs/ENCODER/RECIPE/merge.json, merge.png, merged.safetensors (the encoder at the picked lambda, as timm loads it)
Source  arXiv:2511.14569 sections 3.2 and 4.2, appendix E
"""
import time

import numpy as np
import torch

import common
import encoders
import files


def parse_args(argv=None):
    parser = common.stage_parser(__doc__)
    common.add_recipe(parser)
    parser.add_argument("--lambda-max", type=common.positive_float, default=1.0, help="largest lambda of the grid (default 1)")
    parser.add_argument("--lambdas", type=common.positive, default=21, help="values of lambda from 0 to the largest (default 21)")
    return parser.parse_args(argv)


def main(args):
    # ------------------------------------------------------------------ what is to be done
    folder, sources = encoders.run_folder(args), dict(common.task_names(args))
    names, path = list(sources), encoders.run_folder(args) / args.recipe / "merge.json"
    encoder = encoders.load_encoder(args)
    device = common.pick_device(args.device)
    dtype, _ = common.pick_dtype(args.dtype, device)
    lambdas = [round(float(lam), 10) for lam in np.linspace(0, args.lambda_max, args.lambdas)]
    finetuned = files.read_json(folder / args.recipe / "finetune.json", f"python finetune.py {args.encoder} --recipe {args.recipe}")
    missing = [name for name in names if name not in finetuned["tasks"]]
    if missing:
        raise files.Refused(f'{folder / args.recipe / "finetune.json"} lacks {", ".join(missing)}: run "python finetune.py {args.encoder} --recipe {args.recipe} --tasks {",".join(missing)}" first')

    # ------------------------------------------------------------------ the sum of the vectors, one file at a time
    total, vectors = common.sum_of_vectors(folder, args.recipe, names, encoder)
    config = {"encoder": args.encoder, "theta_pre": encoder.theta_pre, "image_size": encoder.size, "recipe": args.recipe, "tasks": names,
              "lambdas": lambdas, "dtype": str(dtype)[6:], "vectors": vectors}
    result = files.open_result(path, config, args.overwrite, device)
    if "test" in result:
        print(f"merge_eval: {path} is there, nothing to do (--overwrite to redo)")
        return
    tasks = {name: common.load_task(name, source, encoder, args) for name, source in sources.items()}
    heads = [common.load_head(folder, task, encoder, device) for task in tasks.values()]
    n = {split: {name: len(task.splits[split].rows) for name, task in tasks.items()} for split in ("val", "test")}

    # ------------------------------------------------------------------ validation: lambda = 0 from cached features, then the search
    evaluator = common.Evaluator(encoder, args, (len(lambdas) - 1) * sum(n["val"].values()) + sum(n["test"].values()))
    at_zero = {split: {} for split in ("val", "test")}
    for (name, task), head in zip(tasks.items(), heads):
        features = common.cached_features(folder, task, evaluator)
        for split in at_zero:
            labels = torch.from_numpy(task.splits[split].labels).to(device)
            at_zero[split][name] = int((common.predict(features[split], head) == labels).sum())
    evaluator.use_vectors([total])
    start = time.perf_counter()
    searched = evaluator.hits([task.splits["val"] for task in tasks.values()], heads, [(lam,) for lam in lambdas[1:]])
    seconds = time.perf_counter() - start
    val = {name: [correct / n["val"][name] for correct in [at_zero["val"][name], *counts]] for name, counts in zip(names, searched)}
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
               "single_task": single["test"], "seconds": seconds, "images_per_second": images / seconds}

    # ------------------------------------------------------------------ results
    merged = {key: pre + lambdas[best] * total[key] for key, pre in encoders.weights_of(encoder.module).items()}
    files.save_tensors(folder / args.recipe / "merged.safetensors", encoder.module.state_dict() | merged, theta_pre=encoder.theta_pre,
                        recipe=args.recipe, tasks=names, best_lambda=lambdas[best])
    draw(folder / args.recipe / "merge.png", result, f"{args.encoder}, {args.recipe}, {len(names)} tasks")
    files.write_json(path, result)
    print(f"merge_eval: {images} images in {seconds:.1f} s, {images / seconds:.0f} img/s (compiling included)")
    for label, row in (("probing (lambda 0)", result["test_lambda0"]), (f"addition (lambda {lambdas[best]:g})", result["test"])):
        print(f"merge_eval: {label}: test absolute {row['absolute']:.4f}, normalized {row['normalized']:.4f}, n = {sum(n['test'].values())}")


def summary(hits, n, single_task):
    """{"absolute", "normalized", "tasks", "hits", "n"} of counts {task: hits} over {task: n} test images."""
    accuracy = {name: hits[name] / n[name] for name in hits}
    return {"absolute": common.mean(accuracy.values()), "normalized": common.normalized_accuracy(accuracy, single_task),
            "tasks": accuracy, "hits": hits, "n": n}


def draw(path, result, title):
    """Accuracy against lambda on validation: each task thin, the mean normalized accuracy thick, lambda = 0 marked as probing."""
    fig, axes = common.figure(7.6, 4.2)
    lambdas, normalized, best = result["lambdas"], result["val"]["normalized"], result["best_lambda"]
    for name, accuracy in result["val"]["tasks"].items():
        axes.plot(lambdas, accuracy, linewidth=0.9, alpha=0.6, label=name)
    axes.plot(lambdas, normalized, color="black", linewidth=2.2, marker=".", label="mean, normalized")
    axes.axhline(normalized[0], color="black", linestyle=":", linewidth=1)
    axes.annotate("probing (lambda = 0)", (lambdas[-1], normalized[0]), ha="right", va="bottom", fontsize=8)
    axes.plot(best, max(normalized), marker="*", markersize=14, color="crimson", label=f"chosen, lambda = {best:g}", linestyle="none")
    axes.set(xlabel="scaling coefficient lambda", ylabel="validation accuracy", ylim=(0, 1.03), title=title)
    fig.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    common.save_figure(path, fig)


if __name__ == "__main__":
    files.run(main, parse_args)
