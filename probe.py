"""
Probe: train a linear head per task on cached features of the frozen encoder.

    python probe.py vit_b16_dino                                 # the paper's eight tasks, from the hub
    python probe.py tiny                                         # generated tasks, after `python pretrain.py tiny`
    python probe.py timm:NAME --weights FILE --tasks pets=FOLDER # your own encoder and task

Reads   runs/ENCODER/pretrained.safetensors (made here from the hub or --weights when it is not there yet)
Writes  runs/images/, runs/ENCODER/features/TASK.safetensors, heads/TASK.safetensors, probe.json
Source  arXiv:2511.14569 section 3.1 and appendix C: AdamW, 2,000 steps of 128, six learning rates, picked on Cars
"""
import time

import torch
import torch.nn.functional as F

import common
import encoders
import files

LEARNING_RATES = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
BATCH_SIZE, WEIGHT_DECAY, CLIP_NORM = 128, 0.1, 1.0


def parse_args(argv=None):
    parser = common.stage_parser(__doc__)
    parser.add_argument("--probe-steps", type=common.positive, default=2000, help="optimizer steps per head (default 2000)")
    parser.add_argument("--probe-lr", type=common.positive_float, help="learning rate; without it a search on one task, cars or else the first")
    return parser.parse_args(argv)


def main(args):
    # ------------------------------------------------------------------ what is to be done
    folder, sources = encoders.run_folder(args), dict(common.task_names(args))
    encoder = encoders.load_encoder(args)
    device, search = common.pick_device(args.device), common.search_task(list(sources))
    config = {"encoder": args.encoder, "theta_pre": encoder.theta_pre, "image_size": encoder.size, "steps": args.probe_steps,
              "lr": args.probe_lr or "search", "batch_size": BATCH_SIZE, "weight_decay": WEIGHT_DECAY, "seed": args.seed,
              "dtype": str(common.pick_dtype(args.dtype, device)[0])[6:]}
    result = files.open_result(folder / "probe.json", config, args.overwrite, device, sources)
    common.check_search(folder / "probe.json", result, search)
    done = result.setdefault("tasks", {})
    tasks = {name: common.load_task(name, source, encoder, args) for name, source in sources.items()}
    todo = [name for name, task in tasks.items() if done.get(name, {}).get("data") != task.fingerprint or not (folder / "heads" / f"{name}.safetensors").exists()]
    if not todo:
        print(f"probe: {folder / 'probe.json'} has all {len(sources)} tasks, nothing to do (--overwrite to redo)")
        return
    images = sum(len(split.rows) for name in todo for split in tasks[name].splits.values())
    evaluator = common.Evaluator(encoder, args, images)
    files.make_room(folder, images * encoders.width_of(encoder) * evaluator.dtype.itemsize, "features")

    # ------------------------------------------------------------------ learning rate, on one task's validation split
    if "lr" not in result:
        features, accuracies = common.cached_features(folder, tasks[search], evaluator, args.overwrite), {}
        start = time.perf_counter()
        for lr in [args.probe_lr] if args.probe_lr else LEARNING_RATES:
            head = train_head(features["train"], tasks[search], lr, args)
            accuracies[lr] = common.count_hits(features["val"], head, tasks[search].splits["val"]) / len(features["val"])
            print(f"probe: search on {search}, learning rate {lr:g}: validation {accuracies[lr]:.4f}", flush=True)
        result["lr"] = max(accuracies, key=accuracies.get)
        result["search"] = {"task": search, "val": {f"{lr:g}": value for lr, value in accuracies.items()},
                            "seconds": time.perf_counter() - start}

    # ------------------------------------------------------------------ one head per task
    for name in todo:
        start, task = time.perf_counter(), tasks[name]
        features = common.cached_features(folder, task, evaluator, args.overwrite)
        feature_seconds, start = time.perf_counter() - start, time.perf_counter()
        head = train_head(features["train"], task, result["lr"], args)
        done[name] = {"classes": len(task.classes), "data": task.fingerprint, "feature_seconds": feature_seconds}
        for split in ("val", "test"):
            n = len(features[split])
            correct = common.count_hits(features[split], head, task.splits[split])
            done[name] |= {split: correct / n, f"hits_{split}": correct, f"n_{split}": n}
        done[name]["seconds"] = time.perf_counter() - start
        files.save_tensors(folder / "heads" / f"{name}.safetensors", head, task=name, data=task.fingerprint,
                            theta_pre=encoder.theta_pre, classes=task.classes)
        with files.adding_rows(folder / "probe.json", result, "tasks", args.overwrite):
            result |= {"encoder": args.encoder, "feature_dim": features["val"].shape[1],
                       "mean_test": common.mean(row["test"] for row in done.values())}
        row = done[name]
        print(f"probe {name}: validation {row['val']:.4f}, test {row['test']:.4f} (n = {row['n_test']}), "
              f"features {feature_seconds:.1f} s, head {row['seconds']:.1f} s", flush=True)
    print(f"probe: mean test accuracy {result['mean_test']:.4f} over {len(done)} tasks, learning rate {result['lr']:g}")


def train_head(features, task, lr, args):
    """Train a randomly initialised linear head on (N, D) cached features: {"weight" (C, D), "bias" (C,)} float32."""
    generator = torch.Generator(features.device).manual_seed(args.seed)
    features, labels = features.float(), torch.from_numpy(task.splits["train"].labels).to(features.device)
    head = common.random_head(features.shape[1], len(task.classes), generator)
    parameters = [tensor.requires_grad_() for tensor in head.values()]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=WEIGHT_DECAY, fused=True)
    for step, rows in enumerate(common.batches(len(features), BATCH_SIZE, args.probe_steps, generator)):
        optimizer.param_groups[0]["lr"] = common.learning_rate(step, args.probe_steps, lr)
        loss = F.cross_entropy(F.linear(features[rows], head["weight"], head["bias"]), labels[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.detach() for name, tensor in head.items()}


if __name__ == "__main__":
    files.run(main, parse_args)
