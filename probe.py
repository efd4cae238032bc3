"""
Probe: two linear heads per task on cached features of the frozen encoder, one each way.

paper      as the paper trains it: AdamW with decay, 2,000 steps of 128, one learning rate for all tasks, the
           best of six on Cars; it is stopped before it has converged
converged  the optimum of multinomial logistic regression with an L2 penalty, by L-BFGS, the penalty picked
           for each task on validation: the baseline that task addition has to beat

    python probe.py tiny                                   # generated tasks, after `python pretrain.py tiny`
    python probe.py vit_b16_dino                           # the paper's eight tasks, from the hub
    python probe.py timm:NAME --weights FILE --tasks pets=FOLDER    # your own encoder and task

Reads   runs/ENCODER/pretrained.safetensors (made here from the hub or --weights when it is not there yet)
Writes  runs/inputs/, runs/ENCODER/features/TASK.safetensors, heads/paper/TASK.safetensors,
        heads/converged/TASK.safetensors, probe.json; finetune.py --probe chooses between the heads
Source  arXiv:2511.14569 section 3.1 and appendix C. The second as in the linear evaluations of CLIP
        (arXiv:2103.00020, appendix A.3) and DINOv2 (arXiv:2304.07193): a penalty from a wide grid
"""
import time

import numpy as np
import torch
import torch.nn.functional as F

from common import PROBES, Head, cached_features, count_hits, logits, mean, random_head, save_head
from lib import flags
from lib.devices import make_room
from lib.progress import progress
from lib.study import open_study, run
from lib.training import batches, check_search, learning_rate, search_task
from lib.vectors import probe_file

LEARNING_RATES = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
BATCH_SIZE, WEIGHT_DECAY, CLIP_NORM = 128, 0.1, 1.0
PENALTIES = (10.0 ** np.arange(0, -6.5, -0.5)).tolist()     # for features of variance 1
PATIENCE = 3            # smaller penalties are left out after so many in a row that were not better


def parse_args(argv=None):
    parser = flags.stage_parser(__doc__)
    add = parser.add_argument
    add("--probe-steps", type=flags.positive, default=2000,
        help="optimizer steps of the paper's heads (default 2000)")
    add("--probe-lr", type=flags.positive_float,
        help="their learning rate; without it a search on one task, cars or else the first")
    return parser.parse_args(argv)


def main(args):
    # ---------------------------------------------------- open
    study = open_study(args, __file__)
    encoder, folder = study.encoder, study.folder
    files = {}
    for name in study.sources:
        files[name] = [probe_file(folder, kind, name, encoder.name)[0] for kind in PROBES]
    config = {"steps": args.probe_steps, "lr": args.probe_lr or "search", "batch_size": BATCH_SIZE,
              "weight_decay": WEIGHT_DECAY, "penalties": PENALTIES, "dtype": str(study.dtype)[6:]}
    study.refuse_other_settings("probe.json", config)
    made_of = {name: {"data": data} for name, data in study.data.items()}
    result = study.result("probe.json", config, made_of, key="tasks", weights=files.get, protected=True)
    check_search(result.path, result.values, search_task(study.sources))
    if not result.todo:
        return

    # ---------------------------------------------------- features, computed once
    tasks = study.tasks
    images = sum(len(split) for name in result.todo for split in tasks[name].splits.values())
    evaluator = study.evaluator(images)
    make_room(folder, images * encoder.width * evaluator.dtype.itemsize, "features")

    # ---------------------------------------------------- the paper's learning rate, on one task's validation
    if "lr" not in result.values and result.search_begins():
        searched = tasks[search_task(tasks)]
        start, accuracies = time.perf_counter(), {}         # a part of probing, so are the features
        features = cached_features(folder, searched, evaluator, args.overwrite)
        for lr in [args.probe_lr] if args.probe_lr else LEARNING_RATES:
            head = train_head(features["train"], searched, lr, args.probe_steps, args.seed)
            accuracies[lr] = count_hits(features["val"], head, searched.splits["val"]) / len(features["val"])
            print(f"probe: search on {searched.name}, learning rate {lr:g}: "
                  f"validation {accuracies[lr]:.4f}", flush=True)
        result.values["lr"] = max(accuracies, key=accuracies.get)
        val = {f"{lr:g}": accuracy for lr, accuracy in accuracies.items()}
        result.values["search"] = {"task": searched.name, "val": val, "seconds": time.perf_counter() - start}
        result.search_ends()
    check_search(result.path, result.values, search_task(tasks))           # what another process has found
    lr = result.values["lr"]

    # ---------------------------------------------------- two heads per task
    for name in progress(result.todo, "probe", "task"):
        task, start = tasks[name], time.perf_counter()
        features = cached_features(folder, task, evaluator, args.overwrite)
        row = {"classes": len(task.classes), "data": task.fingerprint, "source": task.source,
               "feature_seconds": time.perf_counter() - start}
        start = time.perf_counter()
        heads = {"paper": train_head(features["train"], task, lr, args.probe_steps, args.seed)}
        row["paper"] = {"lr": lr, "seconds": time.perf_counter() - start}
        heads["converged"], row["converged"] = fit_head(features, task)
        for kind, head in heads.items():
            for split in ("val", "test"):
                n, hits = len(features[split]), count_hits(features[split], head, task.splits[split])
                row[kind] |= {split: hits / n, f"hits_{split}": hits, f"n_{split}": n}
        with result.saving(name):
            for kind, path in zip(PROBES, files[name], strict=True):
                save_head(path, heads[kind], task, encoder)
            result.rows[name] = row
            result.values |= {"encoder": encoder.name, "feature_dim": encoder.width,
                              "text_tower": encoder.description["text_tower"]}
        print(f"probe {name}: test {row['paper']['test']:.4f} as in the paper, "
              f"{row['converged']['test']:.4f} converged (n = {len(features['test'])}), features "
              f"{row['feature_seconds']:.1f} s, heads {row['paper']['seconds']:.1f} and "
              f"{row['converged']['seconds']:.1f} s", flush=True)

    # ---------------------------------------------------- say
    average = {}
    for kind in PROBES:
        average[kind] = mean(row[kind]["test"] for row in result.rows.values())
    print(f"probe: mean test accuracy over {len(result.rows)} tasks {average['paper']:.4f} as in the paper, "
          f"learning rate {lr:g}, and {average['converged']:.4f} converged")


# --------------------------------------------------------------------------------------- as the paper does


def train_head(features, task, lr, steps, seed):
    """Train a randomly initialised linear Head on (N, D) cached features of a task's training split."""
    generator = torch.Generator(features.device).manual_seed(seed)
    features, labels = features.float(), torch.from_numpy(task.splits["train"].labels).to(features.device)
    head = random_head(features.shape[1], len(task.classes), generator)
    parameters = [head.weight.requires_grad_(), head.bias.requires_grad_()]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=WEIGHT_DECAY, fused=True)
    for step, rows in enumerate(batches(len(features), BATCH_SIZE, steps, generator)):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, lr)
        loss = F.cross_entropy(logits(features[rows], head), labels[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
    return Head(head.weight.detach(), head.bias.detach(), head.normalise)


# --------------------------------------------------------------------------------------- converged


def fit_head(features, task):
    """The regularised Head of a task, its penalty picked on validation (of equals the largest).

    features   {split: (N, D)}, cached
    Returns    Head, {"penalty", "val_of_penalties": accuracies, "gradient": its largest entry, "seconds"};
               the penalty is on the head for features that are centred and divided by their one overall
               standard deviation, so that one grid suits every encoder
    """
    start = time.perf_counter()
    train = features["train"].float()
    labels = torch.from_numpy(task.splits["train"].labels).to(train.device)
    middle = train.mean(0)
    # in fp64: LAPACK's fp32 finds NaN where many features are 0 for all inputs, as behind a ReLU
    variances, axes = torch.linalg.eigh(torch.cov(train.T, correction=0).cpu().double())
    variances, axes = variances.to(train), axes.to(train)   # (D,), (D, D)
    variance = variances.mean().clamp_min(1e-30)            # 0 where all features are the same
    axes, variances = axes / variance.sqrt(), (variances / variance).clamp_min(0)
    inputs = (train - middle) @ axes                       # (N, D) along the principal axes
    weight = torch.zeros(len(task.classes), len(middle), device=train.device)
    bias, found = torch.zeros(len(weight), device=train.device), []
    start_weight, start_bias = weight, bias
    for penalty in PENALTIES:
        before = weight, bias
        weight, bias, gradient = minimise(inputs, labels, variances, penalty, start_weight, start_bias)
        start_weight, start_bias = 2 * weight - before[0], 2 * bias - before[1]    # along the path of optima
        head = Head(weight @ axes.T, bias - weight @ axes.T @ middle, normalise=False)
        hits = count_hits(features["val"], head, task.splits["val"])
        found.append((hits, head, penalty, gradient))
        best = max(range(len(found)), key=lambda fit: found[fit][0])
        if len(found) - 1 - best == PATIENCE:
            break
    _, head, penalty, gradient = found[best]
    val = {f"{fit[2]:.1e}": fit[0] / len(features["val"]) for fit in found}
    return head, {"penalty": penalty, "val_of_penalties": val, "gradient": gradient,
                  "seconds": time.perf_counter() - start}


def minimise(inputs, labels, variances, penalty, weight, bias):
    """(weight (C, D), bias (C,), largest entry of the gradient) at the minimum of regularised cross entropy.

    The mean cross entropy of `inputs` (N, D) plus penalty / 2 * |weight|^2, by L-BFGS from a starting point.
    In the variable weight / scale the curvature is about the same along all axes, which takes a fifth of
    the steps and moves no minimum.
    """
    scale = (variances + 10 * penalty).rsqrt()             # (D,)
    scaled = (weight / scale).requires_grad_()
    bias = bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([scaled, bias], max_iter=1000, max_eval=2000, tolerance_grad=1e-5,
                                  tolerance_change=0, history_size=10, line_search_fn="strong_wolfe")
    inputs = inputs * scale

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(inputs, scaled, bias), labels)
        value = value + penalty / 2 * (scaled * scale).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    loss()                                                 # the gradient there
    gradient = max(scaled.grad.abs().max().item(), bias.grad.abs().max().item())
    return scaled.detach() * scale, bias.detach(), gradient


if __name__ == "__main__":
    run(main, parse_args)
