"""
What pretrain.py, probe.py and finetune.py train by: the learning rate's course and search, the batch order.
"""
import contextlib

import numpy as np
import torch

from common import mean
from lib.devices import training_batch
from lib.encoders import weights_of
from lib.files import Refused, read_json
from lib.linearized import batch_norms, plain_attention
from lib.vectors import task_vector


def learning_rate(step, steps, peak):
    """Linear warm-up over the first tenth of the steps, then cosine to 0 (200 of 2,000 in the paper)."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return float(peak * 0.5 * (1 + np.cos(np.pi * (step - warm_up) / max(1, steps - warm_up))))


def batches(n, batch_size, steps, generator):
    """(steps, batch_size) int64 indices into a set of n: one random order of all after another, cut."""
    if batch_size * steps > 2 ** 28:
        raise Refused(f"{steps} steps of {batch_size} are {steps * batch_size:,} inputs, and the order of so "
                      f"many is not kept in memory: give fewer steps or a smaller batch")
    orders = []
    for _ in range(-(-batch_size * steps // n)):
        orders.append(torch.randperm(n, device=generator.device, generator=generator))
    return torch.cat(orders)[: batch_size * steps].view(steps, batch_size)


@contextlib.contextmanager
def mixed_precision(device, amp):
    """Inside, a forward pass is in bf16 where `amp` is true, its weights, gradients and the rest in fp32.

    On a CPU with plain attention: the fused kernel's backward pass takes longer there than all the rest.
    """
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        with plain_attention() if amp and device.type == "cpu" else contextlib.nullcontext():
            yield


def choose_micro_batch(asked, forward, module, encoder, batch_size, device, amp):
    """Images that go through the encoder at a time: as asked, else all of a step's, on a GPU what fits.

    forward  what trains the module, not compiled
    Errors   Refused: a part of a step under batch norm, whose statistics are the whole batch's
    """
    def one_step(n):
        with mixed_precision(device, amp):
            forward(encoder.example(n).to(device)).float().sum().backward()
        module.zero_grad()

    micro_batch = min(asked or training_batch(one_step, batch_size, device), batch_size)
    if micro_batch < batch_size and batch_norms(module):
        raise Refused(f"{encoder.name} has batch norms, which see the whole batch, and {batch_size} images "
                      f"do not go through it at a time: give a --batch-size of {micro_batch}")
    return micro_batch


def search_task(names):
    """The task whose validation split picks a learning rate: cars, or else the first."""
    return "cars" if "cars" in names else next(iter(names))


def check_search(path, values, task):
    """Refused if a result's learning rate was searched on another task although cars is there now."""
    searched = values.get("search", {}).get("task")
    if task == "cars" and searched not in (None, "cars"):
        raise Refused(f"{path} has its learning rate from a search on {searched}, but cars is among the "
                      f"tasks now: give --overwrite or another --runs")


def compare(folder, rows, how, steps):
    """Mean accuracy and cost of a variant, also against the variant that trains everything on such heads.

    nonlinear_advantage   what this recipe loses on single tasks: that variant's accuracy minus this one's
    """
    costs = median_cost(rows, steps)
    values = {"mean_test": mean(row["test"] for row in rows.values()), "cost": costs}
    if not how["trained"] and not how["linear"]:
        return values
    whole = {"head": how["head"], "probe": how["probe"], "train_head": how["train_head"], "trained": "",
             "linear": False}
    for path in sorted(folder.glob("*/finetune.json")):
        other = read_json(path, "python finetune.py")
        as_named = path.parent.name == other["recipe"]["name"]             # not a variant of that recipe
        if "steps" not in other["config"]:                 # fine-tuned elsewhere
            continue
        if as_named and whole.items() <= other["recipe"].items() and set(rows) <= set(other["tasks"]):
            gaps = {name: other["tasks"][name]["test"] - row["test"] for name, row in rows.items()}
            ratios = {key: costs[key] / value for key, value in other["cost"].items()}
            values["against"] = {"name": path.parent.name, "nonlinear_advantage": mean(gaps.values()),
                                 "tasks": gaps, "cost_ratio": ratios}
    return values


def median_cost(rows, steps):
    """Medians over tasks: parameters trained, seconds per step, peak bytes."""
    median = {}
    for key in ("trainable_params", "seconds", "peak_memory_bytes"):
        median[key] = float(np.median([row[key] for row in rows.values()]))
    return {"trainable_params": int(median["trainable_params"]),
            "seconds_per_step": median["seconds"] / steps,
            "peak_memory_bytes": median["peak_memory_bytes"]}


def evaluate(evaluator, encoder, theta_t, task, head, splits):
    """{split: accuracy, hits_split, n_split} of theta_pre + tau_t, the way merge_eval.py will meet it."""
    _, tau_t = task_vector(weights_of(encoder.module), theta_t)
    evaluator.use_vectors([tau_t])
    counted = evaluator.hits([task.splits[split] for split in splits], [head] * len(splits), [(1.0,)])
    row = {}
    for split, [hits] in zip(splits, counted, strict=True):
        n = len(task.splits[split])
        row |= {split: hits / n, f"hits_{split}": hits, f"n_{split}": n}
    return row
