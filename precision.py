"""
What bf16 changes: accuracy, predictions that flip, the floor it puts under xi, and rounding beside the step lambda * tau.

    python precision.py vit_b16_dino
    python precision.py tiny --images-per-task 200

Reads   what merge_eval.py reads, RECIPE/merge.json (merge_eval.py)
Writes  runs/ENCODER/RECIPE/precision.json

At the lambda that merge_eval.py picked (.05 where it picked 0), on random test images, each task with its own head:
fp32      the reference
bf16      the merge formed in fp32 and cast once, as every stage evaluates it
again     the same weights in bf16 along another path: batches of another size, compiled where that is possible
added     theta_pre cast first and lambda * tau added in bf16, for comparison
The floor under xi is what two tasks together flip between bf16 and again, where nothing should: twice the mean share.
"""
import argparse
import copy

import torch

import common
import encoders
import files


def parse_args(argv=None):
    parser = common.stage_parser(__doc__)
    common.add_recipe(parser)
    parser.add_argument("--images-per-task", type=common.positive, default=2048, help="random test images per task at most (default 2048)")
    return parser.parse_args(argv)


def main(args):
    # ------------------------------------------------------------------ what is to be done
    folder, sources = encoders.run_folder(args), dict(common.task_names(args))
    encoder, device = encoders.load_encoder(args), common.pick_device(args.device)
    merge = files.require_rows(folder / args.recipe / "merge.json", [], f"python merge_eval.py {args.encoder} --recipe {args.recipe}")
    lam = merge["best_lambda"] or 0.05
    total, used = common.sum_of_vectors(folder, args.recipe, list(sources), encoder)
    config = {"encoder": args.encoder, "theta_pre": encoder.theta_pre, "recipe": args.recipe, "lambda": lam, "vectors": used,
              "images_per_task": args.images_per_task, "seed": args.seed}
    path = folder / args.recipe / "precision.json"
    result = files.open_result(path, config, args.overwrite, device)
    if "tasks" in result:
        print(f"precision: {path} is there, nothing to do (--overwrite to redo)")
        return
    tasks = [common.load_task(name, source, encoder, args) for name, source in sources.items()]
    heads = [common.load_head(folder, args.recipe, task, encoder, device) for task in tasks]
    splits = [common.sample(task.splits["test"], args.images_per_task, args.seed) for task in tasks]
    images = sum(len(split.rows) for split in splits)

    # ------------------------------------------------------------------ the same merge four times
    def predicted(dtype, compiled, **change):
        evaluator = common.Evaluator(change.get("encoder", encoder), argparse.Namespace(**vars(args) | {"dtype": dtype, "compile": compiled}), images)
        evaluator.batch_size = change.get("batch_size", evaluator.batch_size)
        evaluator.use_vectors([change.get("vector", total)])
        return [rows[0] for rows in evaluator.predictions(splits, heads, [(change.get("lam", lam),)])]

    theta_pre = encoders.weights_of(encoder.module)
    rounded = {name: tensor.bfloat16() for name, tensor in theta_pre.items()}
    steps = {name: (lam * vector).bfloat16() for name, vector in total.items()}   # the sum of two bf16 numbers, rounded once: the cast of their fp32 sum
    ways = {"fp32": predicted("fp32", args.compile), "bf16": predicted("bf16", "off"),
            "again": predicted("bf16", "on" if args.compile != "off" and common.compile_pays("on", device, encoder, 0)[0] else "off", batch_size=48),
            "added": predicted("bf16", "off", encoder=encoder._replace(module=with_weights(encoder.module, rounded)),
                               vector={name: step.float() for name, step in steps.items()}, lam=1.0)}

    # ------------------------------------------------------------------ what rounding does to the weights, beside the step itself
    exact = {name: theta_pre[name] + lam * vector for name, vector in total.items()}
    merged = {"bf16": {name: tensor.bfloat16() for name, tensor in exact.items()}, "added": {name: rounded[name] + steps[name] for name in exact}}
    step, count = lam * common.length(total), sum(tensor.numel() for tensor in exact.values())
    weights = {way: {"error": common.length({name: there[name].float() - exact[name] for name in exact}) / step,
                     "unchanged": sum((there[name] == rounded[name]).sum().item() for name in exact) / count} for way, there in merged.items()}

    # ------------------------------------------------------------------ results
    rows = {}
    for index, (task, split) in enumerate(zip(tasks, splits)):
        labels, n = torch.from_numpy(split.labels).to(device), len(split.rows)
        rows[task.name] = {"n": n, "accuracy": {way: (there[index] == labels).sum().item() / n for way, there in ways.items()},
                           "flips_to_fp32": {way: (there[index] != ways["fp32"][index]).sum().item() / n for way, there in ways.items()},
                           "flips_between_paths": (ways["bf16"][index] != ways["again"][index]).sum().item() / n}
    result |= {"lambda": lam, "tasks": rows, "weights": weights, "xi_floor": 2 * common.mean(row["flips_between_paths"] for row in rows.values())}
    files.write_json(path, result)
    print(f"lambda = {lam:g}, percent; flips: predictions that differ from fp32's, and between two bf16 paths\n"
          "| task | n | fp32 | bf16 | flips | flips between paths | added in bf16 | flips |\n|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        accuracy, flips = row["accuracy"], row["flips_to_fp32"]
        print(f"| {name} | {row['n']} | " + " | ".join(f"{100 * value:.2f}" for value in (
            accuracy["fp32"], accuracy["bf16"], flips["bf16"], row["flips_between_paths"], accuracy["added"], flips["added"])) + " |")
    for way, label in (("bf16", "formed in fp32, cast once"), ("added", "added in bf16")):
        print(f"{label}: rounding moves the weights by {weights[way]['error']:.2f} of the step lambda * tau; {100 * weights[way]['unchanged']:.1f} % of them are those of theta_pre")
    print(f"floor under xi: {result['xi_floor']:.4f}")


def with_weights(module, weights):
    """A copy of a module with other weights, in float32."""
    module = copy.deepcopy(module)
    module.load_state_dict(module.state_dict() | {name: tensor.float() for name, tensor in weights.items()})
    return module


if __name__ == "__main__":
    files.run(main, parse_args)
