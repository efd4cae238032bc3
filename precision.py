"""
What bf16 changes: accuracy, predictions that flip, the floor under xi, rounding beside the step lambda * tau.

    python precision.py tiny --images-per-task 200
    python precision.py vit_b16_dino

Reads   what merge_eval.py reads, NAME/merge.json (merge_eval.py)
Writes  runs/ENCODER/NAME/precision.json

At the lambda that merge_eval.py picked (.05 where it picked 0), on random test images, each task with its own
head:
fp32      the reference
bf16      the merge formed in fp32 and cast once, as every stage evaluates it
again     the same weights in bf16 along another path: batches of another size, compiled where possible
added     theta_pre cast first and lambda * tau added in bf16, for comparison
tf32      on NVIDIA GPUs from Ampere on: fp32 whose products are rounded to TF32, and along another path too
The floor under xi is what two tasks together flip between two paths of one precision, where nothing should:
twice the mean share.
"""
import copy
import dataclasses

import torch

from common import Evaluator, mean, sample
from lib import flags, merging
from lib.devices import compile_pays, has_tf32
from lib.encoders import weights_of
from lib.files import Refused, read_json
from lib.study import open_study, run
from lib.vectors import norm


def parse_args(argv=None):
    parser = flags.stage_parser(__doc__)
    flags.add_name(parser)
    parser.add_argument("--images-per-task", type=flags.positive, default=2048,
                        help="random test images per task at most (default 2048)")
    return parser.parse_args(argv)


def main(args):
    # ---------------------------------------------------- open
    study = open_study(args, __file__, "finetune.json")
    encoder, device = study.encoder, study.device
    merge = read_json(study.here / "merge.json", f"python merge_eval.py {args.encoder} --name {study.name}")
    if study.recipe["linear"]:
        raise Refused(f"{study.source.name} is linear: its merge is no set of weights to be rounded")
    lam = merge["best_lambda"] or 0.05
    settings = {"recipe": study.recipe, "lambda": lam, "images_per_task": args.images_per_task}
    result = study.result("precision.json", settings, {"vectors": study.vectors(), "data": study.data})
    if not result.todo:
        return
    tasks, heads = study.tasks, list(study.heads.values())
    merged = merging.merge(merge["rule"], study.source, list(tasks), encoder, study.seed, study.device)
    splits = [sample(task.splits["test"], args.images_per_task, args.seed) for task in tasks.values()]
    images = sum(len(split) for split in splits)

    # ---------------------------------------------------- the same merge four times
    def predicted(encoder, vector, lam, dtype, compiled=False, batch_size=None, tf32=False):
        """[(N,) predicted classes] of every task."""
        evaluator = Evaluator(encoder, device, dtype, compiled, tf32=tf32)
        evaluator.batch_size = batch_size or evaluator.batch_size
        evaluator.use_vectors([vector])
        return [rows[0] for rows in evaluator.predictions(splits, heads, [(lam,)])]

    theta_pre = weights_of(encoder.module)
    rounded = {name: tensor.bfloat16() for name, tensor in theta_pre.items()}
    # the sum of two bf16 numbers rounded once is the cast of their fp32 sum
    steps = {name: (lam * vector).bfloat16() for name, vector in merged.items()}
    rounded_encoder = dataclasses.replace(encoder, build=lambda: with_weights(encoder.module, rounded))
    rounded_steps = {name: step.float() for name, step in steps.items()}
    whether, _ = compile_pays(args.compile, device, encoder, images)
    again, _ = compile_pays("off" if args.compile == "off" else "on", device, encoder, images)
    ways = {"fp32": predicted(encoder, merged, lam, torch.float32, whether),
            "bf16": predicted(encoder, merged, lam, torch.bfloat16),
            "again": predicted(encoder, merged, lam, torch.bfloat16, again, batch_size=48),
            "added": predicted(rounded_encoder, rounded_steps, 1.0, torch.bfloat16)}
    paths = {"": ("bf16", "again")}                         # two ways that differ in nothing but their path
    if has_tf32(device):
        ways["tf32"] = predicted(encoder, merged, lam, torch.float32, tf32=True)
        ways["tf32 again"] = predicted(encoder, merged, lam, torch.float32, again, batch_size=48, tf32=True)
        paths["_tf32"] = "tf32", "tf32 again"

    # ---------------------------------------------------- what rounding does to the weights, beside the step
    exact = {name: theta_pre[name] + lam * vector for name, vector in merged.items()}
    formed = {"bf16": {name: tensor.bfloat16() for name, tensor in exact.items()},
              "added": {name: rounded[name] + steps[name] for name in exact}}
    length, count, weights = lam * norm(merged), sum(tensor.numel() for tensor in exact.values()), {}
    for way, there in formed.items():
        error = norm({name: there[name].float() - exact[name] for name in exact})
        unchanged = sum((there[name] == rounded[name]).sum().item() for name in exact)
        weights[way] = {"error": error / length, "unchanged": unchanged / count}

    # ---------------------------------------------------- save
    rows = {}
    for index, (name, split) in enumerate(zip(tasks, splits, strict=True)):
        labels, n, classes = (torch.from_numpy(split.labels).to(device), len(split),
                              {way: ways[way][index] for way in ways})
        rows[name] = {
            "n": n,
            "accuracy": {way: (found == labels).sum().item() / n for way, found in classes.items()},
            "flips_to_fp32": {way: (found != classes["fp32"]).sum().item() / n
                              for way, found in classes.items()}}
        for of, (one, other) in paths.items():
            rows[name][f"flips_between_paths{of}"] = (classes[one] != classes[other]).sum().item() / n
    floors = {}
    for of in paths:
        floors[f"xi_floor{of}"] = 2 * mean(row[f"flips_between_paths{of}"] for row in rows.values())
    with result.saving():
        result.values = {"lambda": lam, "tasks": rows, "weights": weights, **floors}

    # ---------------------------------------------------- say
    print(f"lambda = {lam:g}, percent; flips: predictions that differ from fp32's, "
          "and between two bf16 paths\n"
          "| task | n | fp32 | bf16 | flips | flips between paths | added in bf16 | flips |\n"
          "|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        accuracy, flips = row["accuracy"], row["flips_to_fp32"]
        shares = [accuracy["fp32"], accuracy["bf16"], flips["bf16"], row["flips_between_paths"],
                  accuracy["added"], flips["added"]]
        print(f"| {name} | {row['n']} | " + " | ".join(f"{100 * share:.2f}" for share in shares) + " |")
    for way, label in (("bf16", "formed in fp32, cast once"), ("added", "added in bf16")):
        print(f"{label}: rounding moves the weights by {weights[way]['error']:.2f} of the step lambda * tau; "
              f"{100 * weights[way]['unchanged']:.1f} % of them are those of theta_pre")
    print(f"floor under xi: {floors['xi_floor']:.4f} in bf16"
          + (f", {floors['xi_floor_tf32']:.4f} in TF32" if "_tf32" in paths else ""))


def with_weights(module, weights):
    """A copy of a module with other weights, in float32."""
    module = copy.deepcopy(module)
    module.load_state_dict(module.state_dict() | {name: tensor.float() for name, tensor in weights.items()})
    return module


if __name__ == "__main__":
    run(main, parse_args)
