"""
How task vectors come to be disentangled while an encoder is pre-trained: by scheme, checkpoint and seed.

    python emergence.py                      # 19 encoders under each of three seeds: hours, see RESULTS.md
    python emergence.py --seeds 1            # a part of it, say on a core of its own; parts add up
    python emergence.py --seeds 0 --schemes random,mae --checkpoints 400    # a look at one scheme

The stages themselves pre-train, probe, fine-tune and add up each encoder; against converged heads, so that
what is seen is the encoder and not how far the paper's probing gets on it. Of LEARNING_RATES an encoder has
the one that is best on validation images of the first three tasks. Short task vectors look disentangled
whatever the encoder, so xi is measured three times, for the same images and pairs of tasks:

    as it is   task vectors as fine-tuning leaves them
    norm       each rescaled to the same norm, a share of theta_pre's
    gain       each scaled down to where its task has gained a few points over probing, on validation images

Reads   what of it is there already
Writes  runs/emergence/seedSEED/SCHEME-stepSTEP/, all that the stages write; runs/emergence/emergence.json, a
        row for each encoder, and emergence.png
Source  left open by arXiv:2511.14569; xi is that of disentangle.py
"""
import argparse
import itertools
import time
from pathlib import Path

import numpy as np
import pandas

import disentangle
import finetune
import make_vectors
import merge_eval
import pretrain
import pretrain_contrastive
import pretrain_dino
import pretrain_mae
import probe
from common import mean, sample
from lib import flags, plots
from lib.devices import pick_device
from lib.encoders import weights_of
from lib.files import Refused, read_json
from lib.pretraining import BATCH_SIZE, ascending_steps
from lib.results import Result
from lib.study import open_study, run
from lib.vectors import load_vector, norm

SCHEMES = {  # name: its script and flags
    "random": (pretrain, ["--pretrain-steps", "1"]),       # looked at before the first step
    "supervised": (pretrain, []),
    "contrastive": (pretrain_contrastive, []),
    "mae": (pretrain_mae, []),
    "dino": (pretrain_dino, []),
    "half-noise": (pretrain, ["--label-noise", "0.5"]),
    "shuffled": (pretrain, ["--label-noise", "1"]),
}
LAST_ONLY = ("half-noise", "shuffled")                     # controls, not looked at on the way
LEARNING_RATES = [1e-4, 3e-4, 1e-3, 3e-3]                  # of fine-tuning
SEARCHED = 3                                               # tasks, the first ones, on which one is picked
POINTS, LIMIT = 5, 1                                       # of each heat map


def parse_args(argv=None):
    parser = flags.flag_parser(__doc__)
    add = parser.add_argument
    add("--seeds", type=ascending_steps, default=[0, 1, 2],
        help="of pictures, pre-training and all else (default 0,1,2)")
    add("--schemes", type=schemes, default=list(SCHEMES), help=f"some of {','.join(SCHEMES)} (default: all)")
    add("--checkpoints", type=ascending_steps, default=[25, 100, 400],
        help="steps after which schemes are looked at, besides the last (default 25,100,400)")
    add("--pretrain-steps", type=flags.positive, default=1500, help="of each scheme (default 1500)")
    add("--tasks", help="of the study (default: tiny's eight)")
    add("--steps", type=flags.positive, default=120, help="of fine-tuning (default 120)")
    add("--samples", type=flags.positive, default=128, help="test images per task for xi (default 128)")
    add("--relative-norm", type=flags.positive_float, default=0.05,
        help="of rescaled vectors, a share of theta_pre's norm (default .05)")
    add("--gain", type=flags.positive_float, default=0.05,
        help="over probing, a fraction of the images, to which vectors are scaled down (default .05)")
    add("--runs", type=flags.folder, default=Path("runs"), help="where results go (default: runs)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto")
    add("--overwrite", action="store_true", help="measure again, with what is trained already")
    return parser.parse_args(argv)


def schemes(text):
    """"mae,dino": a list of keys of SCHEMES."""
    names = text.split(",")
    for name in names:
        if name not in SCHEMES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(SCHEMES)}")
    return names


def main(args):
    # ---------------------------------------------------- open
    if args.checkpoints and args.checkpoints[-1] >= args.pretrain_steps:
        raise Refused(f"--checkpoints {args.checkpoints[-1]} is not before the last step, "
                      f"{args.pretrain_steps}: give larger --pretrain-steps")
    encoders = {}                                          # row: (seed, scheme, step)
    for seed in args.seeds:
        for scheme in args.schemes:
            for step in looked_at(scheme, args.checkpoints, args.pretrain_steps):
                encoders[f"seed{seed}-{scheme}-step{step}"] = seed, scheme, step
    settings = {"pretrain_steps": args.pretrain_steps, "tasks": args.tasks, "steps": args.steps,
                "learning_rates": LEARNING_RATES, "points": POINTS, "limit": LIMIT, "samples": args.samples,
                "relative_norm": args.relative_norm, "gain": args.gain}
    folder = args.runs / "emergence"
    result = Result(folder / "emergence.json", settings, dict.fromkeys(encoders, {}), __file__,
                    pick_device(args.device), args.overwrite, key="encoders")

    # ---------------------------------------------------- every encoder
    for row in result.todo:
        start, (seed, scheme, step) = time.perf_counter(), encoders[row]
        shared = ["--runs", folder / f"seed{seed}", "--seed", seed, "--device", args.device]
        script, more = SCHEMES[scheme]
        checkpoints = ",".join(map(str, looked_at(scheme, args.checkpoints, args.pretrain_steps)))
        stage(script, scheme, *shared, "--pretrain-steps", args.pretrain_steps, "--checkpoints", checkpoints,
              *more)
        encoder, there = f"{scheme}-step{step}", folder / f"seed{seed}" / f"{scheme}-step{step}"
        stage(probe, encoder, *shared, *(["--tasks", args.tasks] if args.tasks else []))
        name = fine_tune([encoder, *shared], there, args.steps)
        for script in (make_vectors, merge_eval):
            stage(script, encoder, *shared, "--name", name)
        found = measure([encoder, *shared, "--name", name], there / name, settings)
        with result.saving(row):                           # with what other processes have measured meanwhile
            result.rows[row] = {"seed": seed, "scheme": scheme, "step": step, "lr": float(name[2:]), **found,
                                "seconds": time.perf_counter() - start}
            rows = list(result.rows.values())
            result.values |= {"over_seeds": over_seeds(rows), "rank_correlation": rank_correlations(rows)}
            plots.emergence(folder / "emergence.png", result.values["over_seeds"], rows, BATCH_SIZE)
        print(f"emergence {row}: probing {found['probing']:.4f}, single task {found['single']:.4f}, "
              f"addition {found['addition']:.4f}, xi {found['xi']['as it is']['prediction']:.3f} as it is, "
              f"{found['xi']['norm']['prediction']:.3f} of one norm, {time.perf_counter() - start:.0f} s",
              flush=True)

    # ---------------------------------------------------- say
    for way, correlation in result.values["rank_correlation"].items():
        if correlation is not None:
            print(f"emergence: xi, {way}, against probing: rank correlation {correlation:+.2f} over "
                  f"{len(result.rows)} encoders")


def looked_at(scheme, checkpoints, last):
    """The steps at which a scheme's encoder is looked at."""
    if scheme == "random":
        return [0]
    return [last] if scheme in LAST_ONLY else [*checkpoints, last]


def stage(script, *words):
    """Call a stage as the command line does."""
    script.main(script.parse_args([str(word) for word in words]))


def fine_tune(words, folder, steps):
    """theta_t of all tasks at the learning rate that is best on some; returns the variant's name, "lr0.001".

    words, folder   of the encoder: its words on a command line, runs/emergence/seedSEED/ENCODER
    """
    tasks = list(read_json(folder / "probe.json", "python probe.py")["tasks"])[:SEARCHED]
    words, val = [*words, "--probe", "converged", "--steps", steps], {}
    for lr in LEARNING_RATES:
        name = f"lr{lr:g}"
        stage(finetune, *words, "--tasks", ",".join(tasks), "--lr", lr, "--name", name)
        rows = read_json(folder / name / "finetune.json", "python finetune.py")["tasks"]
        val[name] = mean(rows[task]["val"] for task in tasks)
    best = max(val, key=val.get)
    stage(finetune, *words, "--lr", best[2:], "--name", best)
    return best


# --------------------------------------------------------------------------------------- one encoder


def measure(words, folder, settings):
    """What is kept of an encoder: figures of the stages' results, and xi of rescaled vectors.

    words, folder   of the variant: its words on a command line, runs/emergence/seedSEED/ENCODER/NAME
    """
    tasks = list(read_json(folder / "finetune.json", "python finetune.py")["tasks"])
    pairs = ring(tasks)
    named = ",".join(itertools.starmap(disentangle.pair_name, pairs))
    words = [*words, "--pairs", named, "--metric", "both", "--points", POINTS, "--limit", LIMIT, "--samples",
             settings["samples"]]
    stage(disentangle, *words)
    merge = read_json(folder / "merge.json", "python merge_eval.py")
    vectors = read_json(folder / "vectors.json", "python make_vectors.py")
    xi = {"as it is": {}}
    for metric, (_, _, stem, _, _) in disentangle.METRICS.items():
        rows = read_json(folder / f"{stem}.json", "python disentangle.py")["pairs"].values()
        xi["as it is"][metric] = mean(row["mean_xi_in_box"] for row in rows)
    study = open_study(disentangle.parse_args([str(word) for word in words]), __file__, "finetune.json")
    evaluator = study.evaluator(4 * len(pairs) * POINTS ** 2 * settings["samples"])
    scales, gains = scales_of(study, evaluator, settings["relative_norm"], settings["gain"])
    for way in scales:
        xi[way] = xi_of_scaled(study, evaluator, pairs, scales[way], settings["samples"])
    probing, addition = merge["probing"]["converged"], merge["test"]["absolute"]
    return {"probing": probing["absolute"], "probing_paper": merge["probing"]["paper"]["absolute"],
            "single": merge["single_task_mean"], "addition": addition,
            "minus_probing": probing["addition_minus"]["mean"],
            "paired_error": probing["addition_minus"]["standard_error"],
            "best_lambda": merge["best_lambda"], "n": sum(merge["test"]["n"].values()),
            "relative_norm": mean(vectors["relative_norm"].values()),
            "cosine": vectors["cosine_of_pairs"]["mean"], "overlap": vectors["overlap_of_pairs"]["mean"],
            "overlap_by_chance": vectors["subspace_overlap_by_chance"],
            "xi": xi, "scales": scales, "gains": gains}


def ring(tasks):
    """Each task with the next and the last with the first: every task is in two pairs."""
    pairs = list(zip(tasks, tasks[1:], strict=False))
    return pairs + [(tasks[-1], tasks[0])] if len(tasks) > 2 else pairs


def scales_of(study, evaluator, relative_norm, gain):
    """({way: {task: factor of its vector}}, {way: {task: gain over probing on validation}}).

    A factor is None where the task gains less than `gain` with its whole vector.
    """
    length, alphas = relative_norm * norm(weights_of(study.encoder.module)), np.linspace(0, 1, 11)
    scales, gains = {"norm": {}, "gain": {}}, {"as it is": {}, "norm": {}}
    for name, task in study.tasks.items():
        vector, split = load_vector(study.source, name, study.encoder), task.splits["val"]
        scales["norm"][name] = length / norm(vector)
        evaluator.use_vectors([vector])
        tried = [(alpha,) for alpha in [*alphas, scales["norm"][name]]]
        [hits] = evaluator.hits([split], [study.heads[name]], tried)
        gained = (np.array(hits) - hits[0]) / len(split)
        gains["as it is"][name], gains["norm"][name] = gained[-2], gained[-1]
        scales["gain"][name] = first_reached(alphas, gained[:-1], gain)
    return scales, gains


def first_reached(alphas, gained, gain):
    """The smallest alpha with this gain, between two on a straight line; None where no gain is as large.

    alphas, gained   (K,) ascending from 0, and what is gained there, 0 at 0
    """
    above = np.flatnonzero(gained >= gain)
    if not len(above):
        return None
    before, after = above[0] - 1, above[0]
    return float(np.interp(gain, gained[[before, after]], alphas[[before, after]]))


def xi_of_scaled(study, evaluator, pairs, scales, samples):
    """{metric: mean xi in the box over pairs, each task's vector times its factor, "pairs": how many}.

    A pair with a task without a factor is left out; None where none is left.
    """
    pairs = [pair for pair in pairs if None not in (scales[pair[0]], scales[pair[1]])]
    lambdas, metrics = np.linspace(-LIMIT, LIMIT, POINTS), list(disentangle.METRICS)
    images, vectors = {}, {}
    for name in set(itertools.chain(*pairs)):
        images[name] = sample(study.tasks[name].splits["test"], samples, study.seed)
        vector = load_vector(study.source, name, study.encoder)
        vectors[name] = {key: scales[name] * tensor for key, tensor in vector.items()}
    found = {metric: [] for metric in metrics}
    for pair in pairs:
        evaluator.use_vectors([vectors[name] for name in pair])
        rows = list(disentangle.error_rows(evaluator, [images[name] for name in pair],
                                           [study.heads[name] for name in pair], lambdas, metrics))
        for metric in metrics:
            xi = np.array([row[metric] for row in rows])   # (points, points)
            found[metric].append(disentangle.describe(xi, lambdas)["mean_xi_in_box"])
    means = {metric: mean(values) if values else None for metric, values in found.items()}
    return means | {"pairs": len(pairs)}


# --------------------------------------------------------------------------------------- all encoders


COLUMNS = ("probing", "single", "addition", "minus_probing", "best_lambda", "relative_norm", "cosine",
           "overlap")


def over_seeds(rows):
    """[{"scheme", "step", "seeds", and each of COLUMNS and of xi: [mean, deviation or None]}], in order."""
    groups = {}
    for row in rows:
        groups.setdefault((row["scheme"], row["step"]), []).append(row)
    table = []
    for scheme, step in sorted(groups, key=lambda group: (list(SCHEMES).index(group[0]), group[1])):
        group = groups[scheme, step]
        values = {}
        for column in COLUMNS:
            values[column] = [row[column] for row in group]
        for way, metric in itertools.product(group[0]["xi"], disentangle.METRICS):
            values[f"xi, {way}, {metric}"] = [row["xi"][way][metric] for row in group]
        spread = {column: mean_and_deviation(found) for column, found in values.items()}
        table.append({"scheme": scheme, "step": step, "seeds": len(group), **spread})
    return table


def mean_and_deviation(values):
    """[mean, standard deviation] of those that are not None; None for a deviation of fewer than two."""
    values = [value for value in values if value is not None]
    return [float(np.mean(values)) if values else None,
            float(np.std(values, ddof=1)) if len(values) > 1 else None]


def rank_correlations(rows):
    """{way: Spearman's rank correlation of xi with probing over encoders that have this xi, None for few}."""
    found = {}
    for way in rows[0]["xi"]:
        points = [(row["probing"], row["xi"][way]["prediction"]) for row in rows
                  if row["xi"][way]["prediction"] is not None]
        ranks = pandas.DataFrame(points).rank()            # equal values share one
        found[way] = float(ranks.corr().iloc[0, 1]) if len(points) > 2 else None
    return found


if __name__ == "__main__":
    run(main, parse_args)
