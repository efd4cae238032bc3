"""
Kernel-behaviour test: each fine-tuned encoder against its own linearization at theta_pre, made afterwards.

    python posthoc.py tiny
    python posthoc.py tiny --images-per-task 200
    python posthoc.py vit_b16_dino --name attention

Reads   runs/ENCODER/pretrained.safetensors, heads/, NAME/finetune.json, NAME/vectors/TASK.safetensors
        (make_vectors.py)
Writes  runs/ENCODER/NAME/posthoc.json
Source  arXiv:2407.07089 section 3.2 and Figure 3: where f(x; theta_pre + tau_t) and
        f(x; theta_pre) + J(x) tau_t are equally accurate, fine-tuning has stayed in the kernel regime
"""
from common import mean, sample
from lib import flags
from lib.files import Refused
from lib.study import open_study, run
from lib.vectors import load_vector


def parse_args(argv=None):
    parser = flags.stage_parser(__doc__)
    flags.add_name(parser)
    parser.add_argument("--images-per-task", type=flags.positive, default=2048,
                        help="random test images per task at most (default 2048)")
    return parser.parse_args(argv)


def main(args):
    # ---------------------------------------------------- open
    study = open_study(args, __file__, "finetune.json")
    recipe = study.recipe
    if recipe["linear"]:
        raise Refused(f"{study.source.name} is linear already; posthoc.py linearizes the others")
    made_of = {}
    for name, fingerprint in study.vectors().items():
        made_of[name] = {"vector": fingerprint, "data": study.data[name]}
    settings = {"recipe": recipe, "images_per_task": args.images_per_task, "dtype": str(study.dtype)[6:]}
    result = study.result("posthoc.json", settings, made_of, key="tasks")
    if not result.todo:
        return

    # ---------------------------------------------------- both functions on the same images
    tasks = {name: study.load_task(name) for name in result.todo}
    images = sum(min(args.images_per_task, len(task.splits["test"])) for task in tasks.values())
    evaluators = {"nonlinear": study.evaluator(images), "linearized": study.evaluator(images, linear=True)}
    for name, task in tasks.items():
        split, head = sample(task.splits["test"], args.images_per_task, args.seed), study.load_head(task)
        row, vector = {"n": len(split)}, load_vector(study.source, name, study.encoder)
        for kind, evaluator in evaluators.items():
            evaluator.use_vectors([vector])
            [[hits]] = evaluator.hits([split], [head], [(1.0,)])
            row |= {kind: hits / len(split), f"hits_{kind}": hits}
        with result.saving(name):
            result.rows[name] = row
            result.values["mean"] = {}
            for kind in evaluators:
                result.values["mean"][kind] = mean(row[kind] for row in result.rows.values())
        print(f"posthoc {name}: fine-tuned {row['nonlinear']:.4f}, its linearization {row['linearized']:.4f} "
              f"(n = {row['n']})", flush=True)

    # ---------------------------------------------------- say
    average = result.values["mean"]
    print(f"posthoc: mean {average['nonlinear']:.4f} and {average['linearized']:.4f} "
          f"over {len(result.rows)} tasks")


if __name__ == "__main__":
    run(main, parse_args)
