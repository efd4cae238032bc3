"""
Fine-tune the encoder on each task: with its probed head frozen, or under another recipe.

    python finetune.py vit_b16_dino                              # searches the learning rate on Cars first
    python finetune.py vit_b16_dino --recipe full                # encoder and a random head together
    python finetune.py vit_b16_clip_laion2b --recipe zeroshot    # head from class names, frozen
    python finetune.py vit_b16_dino --lr 1e-5                    # without the search
    python finetune.py tiny --tasks glyphs,textures --steps 100
    torchrun --nproc-per-node 8 finetune.py vit_b16_dino         # a learning rate or a task for each of eight GPUs

Reads   runs/ENCODER/pretrained.safetensors, for aligned heads/TASK.safetensors (probe.py)
Writes  runs/ENCODER/RECIPE/finetuned/TASK.safetensors, finetune.json, for the other recipes also heads/TASK.safetensors;
        while a task trains state/TASK-*.safetensors, from which the same command continues after a kill, bit for bit on a CPU
Source  arXiv:2511.14569 section 3.1, appendices B, C, G and H: AdamW, 2,000 steps of 128, warm-up, cosine to 0
"""
import copy
import hashlib
import json
import re
import time

import torch
import torch.nn.functional as F

import common
import encoders
import files
import linearized
import ranks
import text_heads

LEARNING_RATES = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
WEIGHT_DECAY, CLIP_NORM = 0.1, 1.0


def parse_args(argv=None):
    parser = common.stage_parser(__doc__)
    common.add_recipe(parser)
    parser.add_argument("--steps", type=common.positive, default=2000, help="optimizer steps per task (default 2000)")
    parser.add_argument("--batch-size", type=common.positive, default=128, help="images per step (default 128)")
    parser.add_argument("--save-minutes", type=common.positive_float, default=5.0, help="minutes between two savings of the training state (default 5)")
    parser.add_argument("--lr", type=common.positive_float, help="peak learning rate; without it a search over decades on one task, cars or else the first")
    return parser.parse_args(argv)


def main(args):
    # ------------------------------------------------------------------ what is to be done
    folder, sources = encoders.run_folder(args), dict(common.task_names(args))
    encoder = encoders.load_encoder(args)
    device, search = common.pick_device(args.device), common.search_task(list(sources))
    config = {"encoder": args.encoder, "theta_pre": encoder.theta_pre, "image_size": encoder.size, "recipe": args.recipe,
              "steps": args.steps, "batch_size": args.batch_size, "lr": args.lr or "search", "weight_decay": WEIGHT_DECAY,
              "seed": args.seed, "dtype": str(common.pick_dtype(args.dtype, device)[0])[6:]}
    path, recipe = folder / args.recipe / "finetune.json", common.RECIPES[args.recipe]
    result = files.open_result(path, config, args.overwrite, device, sources)
    common.check_search(path, result, search)
    done = result.setdefault("tasks", {})
    if recipe.head == "probed":
        files.require_rows(folder / "probe.json", list(sources), f"python probe.py {args.encoder}")
    tasks = {name: common.load_task(name, source, encoder, args) for name, source in sources.items()}
    written = {name: [folder / args.recipe / "finetuned" / f"{name}.safetensors", common.head_file(folder, args.recipe, name, args.encoder)[0]] for name in tasks}
    todo = [name for name, task in tasks.items() if done.get(name, {}).get("data") != task.fingerprint or not all(file.exists() for file in written[name])]
    if not todo:
        print(f"finetune: {path} has all {len(sources)} tasks, nothing to do (--overwrite to redo)")
        return
    for left in (folder / args.recipe / "state").glob("*.safetensors") if args.overwrite else ():
        left.unlink(missing_ok=True)
    size = sum(tensor.numel() * 4 for tensor in encoders.weights_of(encoder.module).values())
    files.make_room(folder, (len(todo) + 3) * size, f"fine-tuned encoders ({len(todo)} of {size / 1e6:.0f} MB, and a training state)")
    largest = max(tasks[name].splits["train"].images[:1].nbytes * len(tasks[name].splits["train"].rows) for name in {*todo, search})
    files.check_memory(device, 5 * size + largest, "weights, gradients, AdamW's moments, theta_pre and the images of the largest task")
    tower = text_heads.text_tower(args, encoder) if recipe.head == "text" else None
    heads = {name: first_head(recipe, folder, task, encoder, tower, device, args) for name, task in tasks.items()}
    del tower

    # ------------------------------------------------------------------ one module to train, one evaluator
    images = sum(len(tasks[name].splits[split].rows) for name in todo for split in ("val", "test"))
    evaluator = linearized.evaluator(encoder, args, images, alone=True)
    module = copy.deepcopy(encoder.module).to(device).train()
    zero_shot = {}
    for name in todo if recipe.head == "text" else ():
        features, split = common.cached_features(folder, tasks[name], evaluator)["test"], tasks[name].splits["test"]
        zero_shot[name] = {"zero_shot": common.count_hits(features, heads[name], split) / len(split.rows)}
    runs = (len(todo) + (0 if args.lr else len(LEARNING_RATES) - 1)) / ranks.world()
    compiled, why = common.compile_pays(args.compile, device, encoder, 3 * runs * args.steps * args.batch_size)
    if device.type == "cpu" and args.compile == "auto":
        compiled, why = False, "a compiled training step is no faster on CPUs"
    if recipe.linear:
        compiled, why = False, "a linearized encoder is not compiled"
        forward = linearized.forward(module, encoder, device)
    else:
        forward = torch.compile(module, dynamic=False) if compiled else module
    print(f"finetune: {len(todo)} tasks x {args.steps} steps of {args.batch_size}, {choose_parameters(module, args):,} parameters of the encoder train, "
          f"{'compiled' if compiled else 'eager'} ({why})", flush=True)

    # ------------------------------------------------------------------ learning rate, on one task's validation split
    best = 0, None, None                                                   # validation accuracy, learning rate, what train returned
    if args.lr:
        result["lr"] = args.lr
    elif "lr" not in result:
        tried = result.setdefault("search", {"task": search, "val": {}})["val"]
        for lr in ranks.deal([lr for lr in LEARNING_RATES if f"{lr:g}" not in tried]):
            found, start = None, time.perf_counter()
            if lr:
                theta_t, head, cost = train(forward, module, encoder, tasks[search], heads[search], lr, args, folder / args.recipe / "state")
                val = None if theta_t is None else evaluate(evaluator, encoder, theta_t, tasks[search], head, ["val"])["val"]
                best = (val, lr, (theta_t, head, cost)) if (val or 0) > best[0] else best
                found = f"{lr:g}", val, time.perf_counter() - start
            for key, val, seconds in filter(None, ranks.gather(found)):
                print(f"finetune: search on {search}, learning rate {key}: {'diverged' if val is None else f'validation {val:.4f}'}", flush=True)
                tried[key], result["search"].setdefault("seconds", {})[key] = val, seconds
            files.write_json(path, result)
        if all(val is None for val in tried.values()):
            raise files.Refused(f"every learning rate of the search diverged on {search}; give --lr")
        result["lr"] = max((lr for lr in LEARNING_RATES if tried[f"{lr:g}"] is not None), key=lambda lr: tried[f"{lr:g}"])

    # ------------------------------------------------------------------ one theta_t per task
    diverged = []
    for name in ranks.deal(todo):
        found = None
        if name:
            if (name, result["lr"]) == (search, best[1]):                  # the search has trained this one already, same seed and steps
                theta_t, head, cost = best[2]
            else:
                theta_t, head, cost = train(forward, module, encoder, tasks[name], heads[name], result["lr"], args, folder / args.recipe / "state")
            found = name, cost
            if theta_t is not None:
                about = {"theta_pre": encoder.theta_pre, "recipe": args.recipe, "task": name, "data": tasks[name].fingerprint}
                files.save_tensors(written[name][0], theta_t, from_any_rank=True, **about, head=files.fingerprint(head))
                if recipe.head != "probed":
                    files.save_tensors(written[name][1], head, from_any_rank=True, **about)
                row = evaluate(evaluator, encoder, theta_t, tasks[name], head, ["val", "test"])
                found = name, row | cost | {"data": tasks[name].fingerprint} | zero_shot.get(name, {})
        for name, row in filter(None, ranks.gather(found)):
            if "diverged_at" in row:
                diverged.append(f"{name} (step {row['diverged_at']} of {args.steps})")
                continue
            done[name] = row
            print(f"finetune {name}: validation {row['val']:.4f}, test {row['test']:.4f} (n = {row['n_test']}), "
                  f"{row['seconds']:.1f} s, {row['images_per_second']:.0f} img/s", flush=True)
        if done:
            with files.adding_rows(path, result, "tasks", args.overwrite):
                result |= {"recipe": args.recipe, "mean_test": common.mean(row["test"] for row in done.values())}
            for left in [left for name in done if name in todo for left in (folder / args.recipe / "state").glob(f"{name}-{'?' * 10}.safetensors")]:  # not a task named NAME-MORE
                left.unlink(missing_ok=True)
    if diverged:
        raise files.Refused(f"training diverged at learning rate {result['lr']:g} on {', '.join(diverged)}; "
                            f"finished tasks are kept, a smaller --lr needs --overwrite or another --runs")
    print(f"finetune: mean test accuracy {result['mean_test']:.4f} over {len(done)} tasks, learning rate {result['lr']:g}")


def first_head(recipe, folder, task, encoder, tower, device, args):
    """The head that fine-tuning starts from; see common.logits for its form."""
    if recipe.head == "probed":
        return common.load_head(folder, "aligned", task, encoder, device)
    if recipe.head == "text":
        return text_heads.text_head(task, *tower, device)
    return common.random_head(encoders.width_of(encoder), len(task.classes), torch.Generator(device).manual_seed(args.seed))


def choose_parameters(module, args):
    """Let the parameters train that the recipe names, and only those; returns how many numbers they hold."""
    wanted = common.RECIPES[args.recipe].trained
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(bool(re.search(wanted, name)))
    count = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    if count == 0:
        raise files.Refused(f"recipe {args.recipe} trains parameters named like {wanted!r}, and {args.encoder} has none: aligned and full train any encoder")
    return count


def train(forward, module, encoder, task, head, lr, args, states=None):
    """Train `module` (through `forward`, perhaps compiled) from theta_pre on one task, the head along if the recipe says so.

    states   folder for the training state, saved every --save-minutes and continued from; None: do without
    Returns  (theta_t, head, {"seconds", "images_per_second", ...}), or where the loss or a weight is not finite
             (None, None, {"diverged_at": the step at which that was seen}), the last good state kept
    """
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(args.seed)
    dtype, _ = common.pick_dtype(args.dtype, device)
    amp = device.type == "cuda" and dtype == torch.bfloat16  # bf16 does not speed up training on CPUs
    module.load_state_dict(encoder.module.state_dict())
    split = task.splits["train"]
    images = torch.from_numpy(split.images[split.rows]).to(device)         # (N, 3, s, s) uint8, resident
    labels = torch.from_numpy(split.labels).to(device)
    head = {name: tensor.clone().requires_grad_(common.RECIPES[args.recipe].train_head) for name, tensor in head.items()}
    parameters = [tensor for tensor in [*module.parameters(), *head.values()] if tensor.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=WEIGHT_DECAY, fused=True)
    normalise = common.normaliser(encoder, device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    order = common.batches(len(labels), args.batch_size, args.steps, generator)
    identity = {"theta_pre": encoder.theta_pre, "recipe": args.recipe, "task": task.name, "data": task.fingerprint, "lr": lr, "steps": args.steps,
                "batch_size": args.batch_size, "seed": args.seed, "dtype": str(dtype)[6:], "head": files.fingerprint(head)}
    state = states and states / f"{task.name}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:10]}.safetensors"
    begun, before = restore(state, module, head, optimizer, generator) if state and state.exists() else (0, 0.0)
    common.reset_peak_memory(device)
    start = saved = time.perf_counter()
    bar = common.progress(order[begun:], f"finetune {task.name} lr {lr:g}{f' from step {begun}' if begun else ''}", "step")
    for step, rows in enumerate(bar, begun):
        optimizer.param_groups[0]["lr"] = common.learning_rate(step, args.steps, lr)
        pixels = normalise(common.random_resized_crop(images[rows], encoder.size, generator))  # (B, 3, S, S)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            features = forward(pixels)                                     # (B, D)
        loss = F.cross_entropy(common.logits(features, head), labels[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        finite &= loss.isfinite()
        if step % 50 == 49:
            bar.set_postfix(loss=f"{loss.item():.3f}")
            if not finite:
                return None, None, {"diverged_at": step + 1}
        if state and step + 1 < args.steps and time.perf_counter() - saved > 60 * args.save_minutes and finite:
            saved = time.perf_counter()
            save(state, module, head, optimizer, generator, step + 1, before + saved - start, identity)
    finite &= torch.stack([parameter.isfinite().all() for parameter in parameters]).all()
    if not finite:                                                         # waits for the device, so the clock is right below
        return None, None, {"diverged_at": args.steps}
    seconds = before + time.perf_counter() - start
    theta_pre = encoders.weights_of(encoder.module)
    changed = {name: tensor.cpu() for name, tensor in encoders.weights_of(module).items() if re.search(common.RECIPES[args.recipe].trained, name)}
    theta_t, _ = common.task_vector(theta_pre, changed)
    head = {name: tensor.detach() for name, tensor in head.items()}
    return theta_t, head, {"final_loss": loss.item(), "trainable_params": sum(p.numel() for p in parameters), "seconds": seconds,
                     "images_per_second": args.steps * args.batch_size / seconds, "peak_memory_bytes": common.peak_memory(device)}


def save(path, module, head, optimizer, generator, step, seconds, identity):
    """Write all that the remaining steps depend on."""
    tensors = {f"weights.{name}": tensor for name, tensor in module.state_dict().items()} | {f"head.{name}": tensor for name, tensor in head.items()}
    tensors |= {f"optimizer.{index}.{name}": tensor for index, row in optimizer.state_dict()["state"].items() for name, tensor in row.items()}
    files.save_tensors(path, tensors | {"generator": generator.get_state()}, from_any_rank=True, step=step, seconds=seconds, **identity)


def restore(path, module, head, optimizer, generator):
    """Read back what save wrote; returns (steps done, seconds they took)."""
    tensors, about = files.load_tensors(path, "python finetune.py")
    module.load_state_dict({name[8:]: tensor for name, tensor in tensors.items() if name.startswith("weights.")})
    rows = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            rows.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": rows, "param_groups": optimizer.state_dict()["param_groups"]})
    for name, tensor in head.items():
        tensor.data.copy_(tensors[f"head.{name}"])
    generator.set_state(tensors["generator"])
    return about["step"], about["seconds"]


def evaluate(evaluator, encoder, theta_t, task, head, splits):
    """{split: accuracy, hits_split, n_split} of theta_pre + tau_t, the way merge_eval.py will meet it."""
    _, tau_t = common.task_vector(encoders.weights_of(encoder.module), theta_t)
    evaluator.use_vectors([tau_t])
    counted = evaluator.hits([task.splits[split] for split in splits], [head] * len(splits), [(1.0,)])
    row = {}
    for split, [correct] in zip(splits, counted):
        n = len(task.splits[split].rows)
        row |= {split: correct / n, f"hits_{split}": correct, f"n_{split}": n}
    return row


if __name__ == "__main__":
    files.run(main, parse_args)
