"""
Probe: train a linear head per task on cached features of the frozen encoder.

    python probe.py tiny                                   # generated tasks, after `python pretrain.py tiny`
    python probe.py vit_b16_dino                           # the paper's eight tasks, from the hub
    python probe.py timm:NAME --weights FILE --tasks pets=FOLDER    # your own encoder and task

Reads   runs/ENCODER/pretrained.safetensors (made here from the hub or --weights when it is not there yet)
Writes  runs/inputs/, runs/ENCODER/features/TASK.safetensors, heads/TASK.safetensors, probe.json
Source  arXiv:2511.14569 section 3.1 and appendix C: AdamW, 2,000 steps of 128, six learning rates, picked on
        Cars
"""
import time

import torch
import torch.nn.functional as F

from common import Head, cached_features, count_hits, logits, mean, random_head, save_head
from lib import flags
from lib.devices import make_room
from lib.progress import progress
from lib.study import open_study, run
from lib.training import batches, check_search, learning_rate, search_task

LEARNING_RATES = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
BATCH_SIZE, WEIGHT_DECAY, CLIP_NORM = 128, 0.1, 1.0


def parse_args(argv=None):
    parser = flags.stage_parser(__doc__)
    add = parser.add_argument
    add("--probe-steps", type=flags.positive, default=2000, help="optimizer steps per head (default 2000)")
    add("--probe-lr", type=flags.positive_float,
        help="learning rate; without it a search on one task, cars or else the first")
    return parser.parse_args(argv)


def main(args):
    # ---------------------------------------------------- open
    study = open_study(args, __file__)
    encoder, folder = study.encoder, study.folder
    heads = {name: folder / "heads" / f"{name}.safetensors" for name in study.sources}
    config = {"steps": args.probe_steps, "lr": args.probe_lr or "search", "batch_size": BATCH_SIZE,
              "weight_decay": WEIGHT_DECAY, "dtype": str(study.dtype)[6:]}
    study.refuse_other_settings("probe.json", config)
    made_of = {name: {"data": data} for name, data in study.data.items()}
    result = study.result("probe.json", config, made_of, key="tasks", weights=lambda name: [heads[name]],
                          protected=True)
    check_search(result.path, result.values, search_task(study.sources))
    if not result.todo:
        return

    # ---------------------------------------------------- features, computed once
    tasks = study.tasks
    images = sum(len(split) for name in result.todo for split in tasks[name].splits.values())
    evaluator = study.evaluator(images)
    make_room(folder, images * encoder.width * evaluator.dtype.itemsize, "features")

    # ---------------------------------------------------- learning rate, on one task's validation split
    if "lr" not in result.values and result.search_begins():
        searched = tasks[search_task(tasks)]
        features, accuracies = cached_features(folder, searched, evaluator, args.overwrite), {}
        start = time.perf_counter()
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

    # ---------------------------------------------------- one head per task
    for name in progress(result.todo, "probe", "task"):
        start, task = time.perf_counter(), tasks[name]
        features = cached_features(folder, task, evaluator, args.overwrite)
        feature_seconds, start = time.perf_counter() - start, time.perf_counter()
        head = train_head(features["train"], task, lr, args.probe_steps, args.seed)
        row = {"classes": len(task.classes), "data": task.fingerprint, "source": task.source, "lr": lr,
               "feature_seconds": feature_seconds}
        for split in ("val", "test"):
            n, hits = len(features[split]), count_hits(features[split], head, task.splits[split])
            row |= {split: hits / n, f"hits_{split}": hits, f"n_{split}": n}
        row["seconds"] = time.perf_counter() - start
        with result.saving(name):
            save_head(heads[name], head, task, encoder)
            result.rows[name] = row
            result.values |= {"encoder": encoder.name, "feature_dim": encoder.width,
                              "text_tower": encoder.description["text_tower"]}
        print(f"probe {name}: validation {row['val']:.4f}, test {row['test']:.4f} (n = {row['n_test']}), "
              f"features {feature_seconds:.1f} s, head {row['seconds']:.1f} s", flush=True)

    # ---------------------------------------------------- say
    average = mean(row["test"] for row in result.rows.values())
    print(f"probe: mean test accuracy {average:.4f} over {len(result.rows)} tasks, learning rate {lr:g}")


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


if __name__ == "__main__":
    run(main, parse_args)
