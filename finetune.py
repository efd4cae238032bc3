"""
Fine-tune the encoder on each task: with its probed head frozen, or under another recipe.

    python finetune.py tiny --recipe full                     # encoder and a random head together
    python finetune.py tiny --probe converged --name on-converged    # against heads that have converged
    python finetune.py tiny --tasks glyphs,textures --steps 100 --name short    # beside the first
    python finetune.py vit_b16_dino                           # searches the learning rate on Cars first
    python finetune.py vit_b16_dino --lr 1e-5 --name slow     # without the search, beside the first
    python finetune.py vit_b16_clip_laion2b --recipe zeroshot # head from class names, frozen
    torchrun --nproc-per-node 8 finetune.py vit_b16_dino      # a learning rate or a task for each of 8 GPUs

Reads   runs/ENCODER/pretrained.safetensors, for recipes on probed heads heads/PROBE/TASK.safetensors
        (probe.py)
Writes  runs/ENCODER/NAME/finetuned/TASK.safetensors, finetune.json, for other heads also
        NAME/heads/TASK.safetensors; while a task trains state/finetune-TASK-*.state, from which the same
        command continues after a kill, bit for bit on a CPU
Source  arXiv:2511.14569 section 3.1, appendices B, C, G and H: AdamW, 2,000 steps of 128, warm-up, cosine to
        0; arXiv:2407.07089 for the recipes that train attention alone, or in the tangent space
"""
import copy
import re
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common import (PROBES, Head, cached_features, count_hits, head_tensors, load_head, logits, random_head,
                    save_head)
from lib import devices, flags, linearized, ranks
from lib.encoders import weights_of
from lib.files import Refused, checksum, fingerprint, load_state, save_state, save_tensors
from lib.parameters import PARTS, choose_parameters
from lib.progress import progress
from lib.study import open_study, run
from lib.training import (batches, check_search, choose_micro_batch, compare, evaluate, learning_rate,
                          mixed_precision, search_task)
from lib.vectors import head_file, task_vector

LEARNING_RATES = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
DEFAULTS = {"steps": 2000, "batch_size": 128, "lr": "search"}    # an encoder's own settings come before these
WEIGHT_DECAY, CLIP_NORM = 0.1, 1.0


class Recipe(NamedTuple):
    head: str             # where it comes from: "probed" (probe.py), "random", or "text" (lib/text_heads.py)
    train_head: bool      # along with the encoder, else it stays frozen
    trained: str = ""     # regular expression of the encoder's parameters that train; empty: all of them
    linear: bool = False  # the encoder is its first-order Taylor expansion at theta_pre


RECIPES = {
    "aligned": Recipe("probed", False),
    "full": Recipe("random", True),
    "zeroshot": Recipe("text", False),
    "zeroshot-full": Recipe("text", True),
}
for ending, (head, train_head) in {"": ("probed", False), "-zeroshot": ("text", False),
                                   "-random": ("random", True)}.items():
    for part, trained in PARTS.items():                    # attention, attention-bias-zeroshot, ...
        RECIPES[part + ending] = Recipe(head, train_head, trained)
    RECIPES["linearized" + ending] = Recipe(head, train_head, linear=True)


def parse_args(argv=None):
    parser = flags.stage_parser(__doc__)
    add = parser.add_argument
    add("--recipe", choices=list(RECIPES), metavar="RECIPE",
        help=f"how theta_t comes about: {', '.join(RECIPES)} "
             f"(default: --name where that is one, else aligned)")
    add("--name", type=flags.folder_name,
        help="the variant's name, its folder runs/ENCODER/NAME (default: the recipe)")
    add("--probe", choices=PROBES,
        help="which of probe.py's heads a recipe on probed heads trains against (default paper: as the "
             "published numbers were made)")
    add("--steps", type=flags.positive, help="optimizer steps per task (default 2000; tiny 120)")
    add("--batch-size", type=flags.positive, help="images per step (default 128; tiny 64)")
    add("--micro-batch", type=flags.positive,
        help="images that go through the encoder at a time, where a step's do not fit: their losses add up "
             "to the step's, its one clip and update (default: on a GPU as many as fit, else all)")
    add("--lr", type=flags.positive_float,
        help="peak learning rate (default: a search over decades on one task, cars or else the first; "
             "tiny 1e-3 for aligned)")
    add("--save-minutes", type=flags.positive_float, default=5.0,
        help="minutes between two savings of the training state (default 5)")
    args = parser.parse_args(argv)
    args.recipe = args.recipe or (args.name if args.name in RECIPES else "aligned")
    args.name = args.name or args.recipe
    if RECIPES[args.recipe].head == "probed":
        args.probe = args.probe or "paper"
    elif args.probe:
        parser.error(f"recipe {args.recipe} has no probed head: leave out --probe")
    return args


def main(args):
    # ---------------------------------------------------- open
    study = open_study(args, __file__, "probe.json")
    encoder, device, recipe = study.encoder, study.device, RECIPES[args.recipe]
    settings = study.settings("finetune", args, DEFAULTS, args.recipe)
    how = {"name": args.recipe, **recipe._asdict(), "probe": args.probe}
    head_files = {name: head_file(study.here, how, name, encoder.name)[0] for name in study.sources}
    tuned_files = {name: study.here / "finetuned" / f"{name}.safetensors" for name in study.sources}
    config = {"recipe": how, **settings, "weight_decay": WEIGHT_DECAY, "dtype": str(study.dtype)[6:]}
    study.refuse_other_settings("finetune.json", config)
    of_heads = {}                            # first: without them the data sets need not be fetched
    for name in study.sources if recipe.head == "probed" else ():
        of_heads[name] = {"head": study.probed_head(args.probe, name)}
    made_of = {name: {"data": data} | of_heads.get(name, {}) for name, data in study.data.items()}
    result = study.result("finetune.json", config, made_of, key="tasks", protected=True,
                          weights=lambda name: [tuned_files[name], head_files[name]])
    check_search(result.path, result.values, search_task(study.sources))
    if not result.todo:
        return
    tasks, result.values["recipe"] = study.tasks, how
    check_room(study, result.todo, tasks)

    # ---------------------------------------------------- heads, the module that trains, the evaluator
    heads = first_heads(recipe, study, head_files, args.weights)
    module = copy.deepcopy(encoder.module).to(device).train()
    amp = study.dtype == torch.bfloat16 and device.type != "mps"
    if amp and device.type == "cpu":
        devices.unfuse_attention(module)
    trainable = choose_parameters(module, recipe.trained, f"recipe {args.recipe} on {encoder.name}")
    searches = len(LEARNING_RATES) - 1 if settings["lr"] == "search" else 0
    images = 3 * (len(result.todo) + searches) * settings["steps"] * settings["batch_size"] / ranks.world()
    forward, why = training_forward(module, recipe, study, images, amp)
    validated = sum(len(tasks[name].splits[split]) for name in result.todo for split in ("val", "test"))
    evaluator = study.evaluator(validated, recipe.linear, alone=True)
    zero_shot = {}
    for name in result.todo if recipe.head == "text" else ():
        features, split = (cached_features(study.folder, tasks[name], evaluator)["test"],
                           tasks[name].splits["test"])
        zero_shot[name] = {"zero_shot": count_hits(features, heads[name], split) / len(split)}
    eager = forward if recipe.linear else module
    micro_batch = choose_micro_batch(args.micro_batch, eager, module, encoder, settings["batch_size"], device,
                                     amp)
    print(f"finetune: {len(result.todo)} tasks x {settings['steps']} steps of {settings['batch_size']}, "
          f"{micro_batch} at a time, {trainable:,} parameters of the encoder train, {why}", flush=True)

    def train_one(name, lr):
        """What train returns for a task at a learning rate; its state is kept until the row is written."""
        plan = settings | {"lr": lr, "seed": study.seed, "micro_batch": micro_batch}
        # a generator's state is of its kind of device
        identity = [result.config, result.version, made_of[name], fingerprint(head_tensors(heads[name])), lr,
                    device.type]
        state = result.training_state(name, checksum(identity))
        return train(forward, module, encoder, tasks[name], heads[name], recipe, plan, amp, state,
                     args.save_minutes)

    # ---------------------------------------------------- learning rate, on one task's validation split
    best = 0, None, None                     # validation accuracy, learning rate, what train returned
    if settings["lr"] != "search":
        result.values["lr"] = settings["lr"]
    elif "lr" not in result.values and result.search_begins():
        searched = search_task(tasks)
        search = result.values.get("search", {})
        # none begun, or by other code, or by a process with other tasks that was killed
        if search.get("version") != result.version or search["task"] != searched:
            search = {"task": searched, "val": {}, "seconds": {}, "version": result.version}
            result.values["search"] = search
        for lr in ranks.deal([lr for lr in LEARNING_RATES if f"{lr:g}" not in search["val"]]):
            found, start = None, time.perf_counter()
            if lr:
                theta_t, head, cost = train_one(searched, lr)
                val = None
                if theta_t is not None:
                    val = evaluate(evaluator, encoder, theta_t, tasks[searched], head, ["val"])["val"]
                    best = max(best, (val, lr, (theta_t, head, cost)), key=lambda tried: tried[0])
                found = f"{lr:g}", val, time.perf_counter() - start
            for key, val, seconds in filter(None, ranks.gather(found)):
                search["val"][key], search["seconds"][key] = val, seconds
                print(f"finetune: search on {searched}, learning rate {key}: "
                      f"{'diverged' if val is None else f'validation {val:.4f}'}", flush=True)
            with result.saving():
                pass
        accuracies = {lr: search["val"][f"{lr:g}"] for lr in LEARNING_RATES
                      if search["val"][f"{lr:g}"] is not None}
        if not accuracies:
            raise Refused(f"every learning rate of the search diverged on {searched}; give --lr")
        result.values["lr"] = max(accuracies, key=accuracies.get)
        result.search_ends()
    check_search(result.path, result.values, search_task(tasks))           # what another process has found
    lr = result.values["lr"]

    # ---------------------------------------------------- one theta_t per task
    diverged = []
    for name in ranks.deal(result.todo):
        found = None
        if name:
            if (name, lr) == (search_task(tasks), best[1]):    # trained in the search: same seed, same steps
                theta_t, head, cost = best[2]
            else:
                theta_t, head, cost = train_one(name, lr)
            found = name, cost
            if theta_t is not None:
                save_tensors(tuned_files[name], theta_t, from_any_rank=True, theta_pre=encoder.fingerprint,
                             recipe=how, task=name, data=tasks[name].fingerprint,
                             head=fingerprint(head_tensors(head)))
                if recipe.head != "probed":
                    save_head(head_files[name], head, tasks[name], encoder, from_any_rank=True)
                row = evaluate(evaluator, encoder, theta_t, tasks[name], head, ["val", "test"])
                row |= {"lr": lr, "data": tasks[name].fingerprint, "source": tasks[name].source}
                found = name, row | cost | zero_shot.get(name, {})
        for name, row in filter(None, ranks.gather(found)):
            if "diverged_at" in row:
                diverged.append(f"{name} (step {row['diverged_at']} of {settings['steps']})")
                continue
            with result.saving(name):
                result.rows[name] = row
                result.values |= compare(study.folder, result.rows, how, settings["steps"])
            print(f"finetune {name}: validation {row['val']:.4f}, test {row['test']:.4f} "
                  f"(n = {row['n_test']}), {row['seconds']:.1f} s, {row['images_per_second']:.0f} "
                  f"{encoder.unit}/s", flush=True)

    # ---------------------------------------------------- say
    if diverged:
        raise Refused(f"training diverged at learning rate {lr:g} on {', '.join(diverged)}; finished tasks "
                      f"are kept, a smaller --lr needs --overwrite or another --name")
    print(f"finetune: mean test accuracy {result.values['mean_test']:.4f} over {len(result.rows)} tasks, "
          f"learning rate {lr:g}")


# --------------------------------------------------------------------------------------- before training


def check_room(study, todo, tasks):
    """Refused where disk or memory are too small for what is ahead."""
    size = sum(tensor.numel() * 4 for tensor in weights_of(study.encoder.module).values())
    what = f"fine-tuned encoders ({len(todo)} of {size / 1e6:.0f} MB, and a training state)"
    devices.make_room(study.folder, (len(todo) + 3) * size, what)
    trained = [tasks[name].splits["train"] for name in {*todo, search_task(tasks)}]
    largest = max(split.inputs[:1].nbytes * len(split) for split in trained)
    what = "weights, gradients, AdamW's moments, theta_pre and the images of the largest task"
    devices.check_memory(study.device, 5 * size + largest, what)


def first_heads(recipe, study, paths, weights):
    """{task: the Head that fine-tuning starts from}."""
    if recipe.head == "text":
        from lib import text_heads
        head_of = text_heads.maker(study.encoder, weights, study.folder, study.device)
    heads = {}
    for name, task in study.tasks.items():
        if recipe.head == "probed":
            made_by = f"python probe.py {study.encoder.name}"
            heads[name] = load_head(paths[name], made_by, task, study.encoder, study.device)
        elif recipe.head == "text":
            heads[name] = head_of(task)
        else:
            generator = torch.Generator(study.device).manual_seed(study.seed)
            heads[name] = random_head(study.encoder.width, len(task.classes), generator)
    return heads


def training_forward(module, recipe, study, images, amp):
    """(function from inputs to features (B, D) that trains the module, how it runs)."""
    if recipe.linear:
        return (linearized.forward(module, study.encoder, study.device, amp),
                "eager (a linearized encoder is not compiled)")
    compiled, why = devices.compile_pays(study.compile, study.device, study.encoder, images)
    if study.device.type == "cpu" and study.compile == "auto":
        compiled, why = False, "a compiled training step is no faster on CPUs"
    return ((devices.compile_module(module), f"compiled ({why})") if compiled
            else (module, f"eager ({why})"))


# --------------------------------------------------------------------------------------- training


def train(forward, module, encoder, task, head, recipe, plan, amp=False, state=None, save_minutes=5.0):
    """Train `module` through `forward` (it, perhaps compiled) from theta_pre on one task.

    head     starts from these weights; trains along where the recipe says so
    plan     {"lr", "steps", "batch_size", "micro_batch", "seed"}
    amp      whether the forward pass runs in bf16
    state    file of the training state, saved every save_minutes and continued from; None: do without
    Returns  (theta_t {name: tensor}, Head, {"seconds", "images_per_second", ...}), or where the loss or a
             weight is not finite (None, None, {"diverged_at": the step at which that was seen}), the last
             good state kept
    """
    device, micro_batch = next(module.parameters()).device, plan["micro_batch"]
    generator = torch.Generator(device).manual_seed(plan["seed"])
    module.load_state_dict(encoder.module.state_dict())
    split = task.splits["train"]
    inputs = torch.from_numpy(split.inputs[split.indices]).to(device)      # (N, ...) as stored, resident
    labels = torch.from_numpy(split.labels).to(device)
    trained_head = {name: tensor.clone().requires_grad_(recipe.train_head)
                    for name, tensor in head_tensors(head).items()}
    head = Head(trained_head["weight"], trained_head.get("bias"), head.normalise)
    parameters = [tensor for tensor in [*module.parameters(), *trained_head.values()] if tensor.requires_grad]
    optimizer = torch.optim.AdamW(parameters, plan["lr"], weight_decay=WEIGHT_DECAY, fused=True)
    finite = torch.ones((), dtype=torch.bool, device=device)
    order = batches(len(labels), plan["batch_size"], plan["steps"], generator)
    begun, seconds_before = 0, 0.0
    if state and state.exists():
        begun, seconds_before = restore(state, module, trained_head, optimizer, generator)

    devices.reset_peak_memory(device)
    start = saved = time.perf_counter()
    what = f"finetune {task.name} lr {plan['lr']:g}" + (f" from step {begun}" if begun else "")
    bar = progress(order[begun:], what, "step")
    for step, rows in enumerate(bar, begun):
        # of which stochastic depth draws, in a training that goes on as in one that was never killed
        torch.manual_seed((plan["seed"] * plan["steps"] + step) % 2 ** 63)
        optimizer.param_groups[0]["lr"] = learning_rate(step, plan["steps"], plan["lr"])
        total = 0.0                                        # the mean loss of the step
        for part, answers in encoder.training_parts(inputs[rows], labels[rows], micro_batch, generator):
            with mixed_precision(device, amp):
                features = forward(part)                   # (micro-batch, D)
            loss = F.cross_entropy(logits(features, head), answers)
            share = loss * (len(part) / len(rows))
            share.backward()
            total += share.detach()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        finite &= total.isfinite()
        if step % 50 == 49:
            bar.set_postfix(loss=f"{total.item():.3f}", refresh=False)
            if not finite:
                return None, None, {"diverged_at": step + 1}
        now = time.perf_counter()
        if state and step + 1 < plan["steps"] and now - saved > 60 * save_minutes and finite:
            saved = now
            save_state(state, {"step": step + 1, "seconds": seconds_before + now - start,
                               "module": module.state_dict(), "head": trained_head,
                               "optimizer": optimizer.state_dict(), "generator": generator.get_state()})

    finite &= torch.stack([parameter.isfinite().all() for parameter in parameters]).all()
    if not finite:                                         # waits for the device, so the clock is right below
        return None, None, {"diverged_at": plan["steps"]}
    seconds = seconds_before + time.perf_counter() - start
    changed = {name: tensor.cpu() for name, tensor in weights_of(module).items()
               if re.search(recipe.trained, name)}
    theta_t, _ = task_vector(weights_of(encoder.module), changed)
    bias = None if head.bias is None else head.bias.detach()
    return theta_t, Head(head.weight.detach(), bias, head.normalise), {
        "final_loss": total.item(), "micro_batch": micro_batch,
        "trainable_params": sum(parameter.numel() for parameter in parameters),
        "seconds": seconds, "images_per_second": plan["steps"] * plan["batch_size"] / seconds,
        "peak_memory_bytes": devices.peak_memory(device)}


def restore(path, module, head, optimizer, generator):
    """Go back to a saved training state; returns (steps done, seconds they took)."""
    saved = load_state(path)
    module.load_state_dict(saved["module"])
    optimizer.load_state_dict(saved["optimizer"])
    for name, tensor in head.items():
        tensor.data.copy_(saved["head"][name])
    generator.set_state(saved["generator"])
    return saved["step"], saved["seconds"]


if __name__ == "__main__":
    run(main, parse_args)
