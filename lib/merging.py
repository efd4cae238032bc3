"""
Merging rules: the vectors of several tasks become one, which lambda then scales.

    merged = merging.merge("ties", folder, ["cars", "dtd"], encoder)     # {name: tensor}

A rule gets the tensors of one name, one of each task: besides the result T times the largest tensor are in
memory, and before that a vector at a time, whole, for its checksum. Rules on spectra treat matrices; what is
no matrix they average, as their authors do.
Shapes: T tasks, m x n a matrix.
Source  with each rule; the shares that are kept are those of its authors' code
"""
import contextlib
from typing import NamedTuple

import torch

from lib.files import opened
from lib.vectors import generator_of, load_vector, vector_file

KEPT = 0.2          # of a vector's entries by TIES, the largest
DROPPED = 0.9       # share that DARE drops
COMMON = 0.8        # of the rank, for what all tasks share in Iso-CTS


class Context(NamedTuple):
    """What a rule may know besides the tensors."""
    name: str           # theirs in the encoder
    tasks: list         # T names
    bounds: list        # T numbers: of a vector's magnitudes, what the KEPT largest begin with
    seed: int


def merge(rule, folder, tasks, encoder, seed=0, device="cpu"):
    """{name: tensor} on the CPU: the vectors of some tasks in a variant's folder, merged by one of RULES."""
    bounds = []
    for task in tasks:                                     # whole once: its checksum, and what TIES keeps
        vector = load_vector(folder, task, encoder)
        bounds.append(bound(vector) if rule == "ties" else None)
    merged, function = {}, RULES[rule].merged
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(opened(*vector_file(folder, task, encoder))) for task in tasks]
        for name in files[0].keys():
            tensors = [file.get_tensor(name).to(device) for file in files]
            merged[name] = function(tensors, Context(name, tasks, bounds, seed)).cpu()
    return merged


def bound(vector):
    """The magnitude from which on an entry is among the KEPT largest of a vector {name: tensor}."""
    sizes = torch.cat([tensor.abs().flatten() for tensor in vector.values()])
    return sizes.kthvalue(max(1, round(len(sizes) * (1 - KEPT)))).values


# --------------------------------------------------------------------------------------- the rules


def total(tensors, context):
    """Their sum: task addition, arXiv:2212.04089."""
    merged = tensors[0].clone()
    for tensor in tensors[1:]:
        merged += tensor
    return merged


def average(tensors, context):
    return torch.stack(tensors).mean(0)


def ties(tensors, context):
    """Trim, elect a sign, average those of that sign: arXiv:2306.01708.

    What is not among the KEPT largest of its whole vector is 0; the sign is that of the sum; where no task is
    left, 0.
    """
    kept = []
    for tensor, bound in zip(tensors, context.bounds, strict=True):
        kept.append(tensor * (tensor.abs() >= bound))
    kept = torch.stack(kept)                                               # (T, ...)
    agreeing = kept.sign() == kept.sum(0).sign()
    agreeing &= kept != 0
    return (kept * agreeing).sum(0) / agreeing.sum(0).clamp_min(1)


def dare(tensors, context):
    """Drop DROPPED of each at random, scale up what stays, add up: arXiv:2311.03099."""
    stay = []
    for tensor, task in zip(tensors, context.tasks, strict=True):
        generator = generator_of(f"{context.seed} {task} {context.name}")
        mask = torch.rand(tensor.shape, generator=generator) >= DROPPED
        stay.append(tensor * mask.to(tensor.device) / (1 - DROPPED))
    return total(stay, context)


def tsv_m(tensors, context):
    """The leading 1/T of each matrix's singular vectors, made orthogonal across tasks: arXiv:2412.00081."""
    if tensors[0].ndim != 2:
        return average(tensors, context)
    rank = max(1, min(tensors[0].shape) // len(tensors))
    left, values, right = zip(*(leading(tensor, rank) for tensor in tensors), strict=True)
    return orthogonal(torch.cat(left, 1)) @ torch.diag(torch.cat(values)) @ orthogonal(torch.cat(right, 1)).T


def iso_c(tensors, context):
    """The sum with all its singular values replaced by their mean: arXiv:2502.04959."""
    if tensors[0].ndim != 2:
        return average(tensors, context)
    left, values, right = torch.linalg.svd(total(tensors, context), full_matrices=False)
    return values.mean() * left @ right


def iso_cts(tensors, context):
    """Iso-C on COMMON of the sum's singular vectors and on what each task has besides: arXiv:2502.04959."""
    if tensors[0].ndim != 2:
        return average(tensors, context)
    rank = min(tensors[0].shape)
    own = round((rank - int(rank * COMMON)) / len(tensors))                # singular vectors of each task
    left, values, right = leading(total(tensors, context), rank - own * len(tensors))
    lefts, all_values, rights = [left], [values], [right]
    for tensor in tensors:
        rest = tensor - left @ (left.T @ tensor)
        for found, part in zip((lefts, all_values, rights), leading(rest, own), strict=True):
            found.append(part)
    return torch.cat(all_values).mean() * orthogonal(torch.cat(lefts, 1)) @ orthogonal(torch.cat(rights, 1)).T


def leading(matrix, rank):
    """(m, rank) left singular vectors, (rank,) values, (n, rank) right ones; 0 what a matrix has not."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    real = values[:rank] > 1e-6 * values[0]                                # else its vectors are any
    return left[:, :rank] * real, values[:rank] * real, right[:rank].T * real


def orthogonal(columns):
    """The matrix of orthonormal columns that is nearest to (m, k): U V^T of its singular vectors.

    Where columns depend on each other, of those vectors that it has.
    """
    left, values, right = torch.linalg.svd(columns, full_matrices=False)
    return left * (values > 1e-6 * values[0]) @ right


class Rule(NamedTuple):
    merged: object      # function: [T tensors of one name], Context -> tensor
    largest: float      # lambda of the grid


RULES = {
    "sum": Rule(total, 1.0), "mean": Rule(average, 2.0), "ties": Rule(ties, 2.0), "dare": Rule(dare, 1.0),
    "tsv-m": Rule(tsv_m, 2.0), "iso-c": Rule(iso_c, 2.0), "iso-cts": Rule(iso_cts, 2.0),
}

