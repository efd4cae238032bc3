"""
Kernel-behaviour test: each fine-tuned encoder against its own linearization at theta_pre, made after the fact.

    python posthoc.py vit_b16_dino                               # all parameters
    python posthoc.py vit_b16_dino --recipe attention            # attention weights only

Reads   runs/ENCODER/pretrained.safetensors, heads/, RECIPE/vectors/TASK.safetensors (make_vectors.py)
Writes  runs/ENCODER/RECIPE/posthoc.json
Source  arXiv:2407.07089 section 3.2 and Figure 3: where f(x; theta_pre + tau_t) and f(x; theta_pre) + J(x) tau_t are equally accurate,
        fine-tuning has stayed in the kernel regime
"""
import argparse

import common
import encoders
import files
import linearized


def parse_args(argv=None):
    parser = common.stage_parser(__doc__)
    common.add_recipe(parser)
    parser.add_argument("--images-per-task", type=common.positive, default=2048, help="random test images per task at most (default 2048)")
    return parser.parse_args(argv)


def main(args):
    # ------------------------------------------------------------------ what is to be done
    folder, sources = encoders.run_folder(args), dict(common.task_names(args))
    if common.RECIPES[args.recipe].linear:
        raise files.Refused(f"recipe {args.recipe} is linear already; posthoc.py linearizes the others")
    encoder, device = encoders.load_encoder(args), common.pick_device(args.device)
    config = {"encoder": args.encoder, "theta_pre": encoder.theta_pre, "recipe": args.recipe, "images_per_task": args.images_per_task,
              "seed": args.seed, "dtype": str(common.pick_dtype(args.dtype, device)[0])[6:]}
    path = folder / args.recipe / "posthoc.json"
    vectors = {name: common.load_vector(folder, args.recipe, name, encoder) for name in sources}
    result = files.open_result(path, config, args.overwrite, device, sources)
    done = result.setdefault("tasks", {})
    todo = [name for name in sources if done.get(name, {}).get("vector") != vectors[name][1]["sha256"]]
    if not todo:
        print(f"posthoc: {path} has all {len(sources)} tasks, nothing to do (--overwrite to redo)")
        return
    tasks = {name: common.load_task(name, sources[name], encoder, args) for name in todo}

    # ------------------------------------------------------------------ both functions on the same images
    work = sum(min(args.images_per_task, len(task.splits["test"].rows)) for task in tasks.values())
    linear_args = argparse.Namespace(**vars(args) | {"recipe": "linearized"})
    evaluators = {"nonlinear": common.Evaluator(encoder, args, work), "linearized": linearized.evaluator(encoder, linear_args, work)}
    for name in todo:
        split, head = common.sample(tasks[name].splits["test"], args.images_per_task, args.seed), common.load_head(folder, args.recipe, tasks[name], encoder, device)
        row = {"n": len(split.rows), "vector": vectors[name][1]["sha256"]}
        for kind, evaluator in evaluators.items():
            evaluator.use_vectors([vectors[name][0]])
            [[hits]] = evaluator.hits([split], [head], [(1.0,)])
            row |= {kind: hits / len(split.rows), f"hits_{kind}": hits}
        with files.adding_rows(path, result, "tasks", args.overwrite):
            done[name] = row
        print(f"posthoc {name}: fine-tuned {row['nonlinear']:.4f}, its linearization {row['linearized']:.4f} (n = {row['n']})", flush=True)
    print(f"posthoc: mean {common.mean(row['nonlinear'] for row in done.values()):.4f} and {common.mean(row['linearized'] for row in done.values()):.4f} over {len(done)} tasks")


if __name__ == "__main__":
    files.run(main, parse_args)
