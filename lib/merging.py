"""
Merging rules: the vectors of several tasks become one, which lambda then scales.

    merged = merging.merge("ties", folder, ["cars", "dtd"], encoder)     # {name: tensor}
    parts = merging.parts("ties", folder, ["cars", "dtd"], encoder)    # [{name: tensor}], adding up to it

A rule gets the tensors of one name, one of each task, and gives what adds up to the merged one: a part of
each task where the rule keeps them apart, which heat maps need. In memory are the result and a few times T
times the largest tensor, and before that a vector at a time, whole, for its checksum. Rules on spectra treat
matrices; what is no matrix they average, as their authors do.
Shapes: T tasks, m x n a matrix.
Source  with each rule; the shares that are kept are those of its authors' code
"""
from typing import NamedTuple

import torch

from lib import vectors
from lib.files import Refused
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


def require_several(rule, tasks):
    """Refused where a rule would have one task to merge."""
    if rule != "sum" and len(tasks) < 2:
        raise Refused(f"rule {rule} merges two tasks or more, there is {tasks[0]}")


def merge(rule, folder, tasks, encoder, seed=0, device="cpu"):
    """{name: tensor} on the CPU: the vectors of some tasks in a variant's folder, merged by one of RULES."""
    return {name: total(found).cpu() for name, found in by_name(rule, folder, tasks, encoder, seed, device)}


def parts(rule, folder, tasks, encoder, seed=0, device="cpu"):
    """[{name: tensor}] on the CPU, one of each task, that add up to merge(); of a rule that is `apart`."""
    of_tasks = [{} for _ in tasks]
    for name, found in by_name(rule, folder, tasks, encoder, seed, device):
        for part, tensor in zip(of_tasks, found, strict=True):
            part[name] = tensor.cpu()
    return of_tasks


def by_name(rule, folder, tasks, encoder, seed, device):
    """Yield (name, what a rule makes of the tasks' tensors of that name)."""
    if torch.device(device).type == "mps":                 # which has no float64
        device = "cpu"
    bounds = []
    for task in tasks:                                     # whole once: its checksum, and what TIES keeps
        vector = load_vector(folder, task, encoder)
        bounds.append(bound(vector) if rule == "ties" else None)
        del vector                                         # before the next
    files = [vector_file(folder, task, encoder) for task in tasks]
    for name, found in vectors.by_name(files):
        tensors = [tensor.to(device) for tensor in found]
        yield name, RULES[rule].function(tensors, Context(name, tasks, bounds, seed))


def bound(vector):
    """The magnitude from which on an entry is among the KEPT largest of a vector {name: tensor}."""
    sizes = torch.cat([tensor.abs().flatten() for tensor in vector.values()]).numpy()
    place = max(1, round(len(sizes) * (1 - KEPT))) - 1
    sizes.partition(place)                                 # numpy's takes a twentieth of kthvalue's time
    return sizes[place].item()


# --------------------------------------------------------------------------------------- the rules


def as_they_are(tensors, context):
    """Whose sum is task addition: arXiv:2212.04089."""
    return tensors


def shares(tensors, context):
    """Whose sum is the mean."""
    return [tensor / len(tensors) for tensor in tensors]


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
    return list(kept * agreeing / agreeing.sum(0).clamp_min(1))


def dare(tensors, context):
    """Drop DROPPED of each at random, scale up what stays, add up: arXiv:2311.03099."""
    stay = []
    for tensor, task in zip(tensors, context.tasks, strict=True):
        generator = generator_of(f"{context.seed} {task} {context.name}")
        mask = torch.rand(tensor.shape, generator=generator) >= DROPPED
        stay.append(tensor * mask.to(tensor.device) / (1 - DROPPED))
    return stay


def tsv_m(tensors, context):
    """The leading 1/T of each matrix's singular vectors, made orthogonal across tasks: arXiv:2412.00081."""
    if tensors[0].ndim != 2:
        return shares(tensors, context)
    rank = max(1, min(tensors[0].shape) // len(tensors))
    lefts, values, rights = zip(*(leading(tensor, rank) for tensor in tensors), strict=True)
    lefts, rights = (orthogonal(torch.cat(each, 1)).split(rank, 1) for each in (lefts, rights))
    return [left * value @ right.T for left, value, right in zip(lefts, values, rights, strict=True)]


def iso_c(tensors, context):
    """The sum with all its singular values replaced by their mean: arXiv:2502.04959."""
    if tensors[0].ndim != 2:
        return shares(tensors, context)
    left, values, right = spectrum(total(tensors))
    return [values.mean() * left @ right.T]


def iso_cts(tensors, context):
    """Iso-C on COMMON of the sum's singular vectors and on what each task has besides: arXiv:2502.04959."""
    if tensors[0].ndim != 2:
        return shares(tensors, context)
    rank = min(tensors[0].shape)
    own = round((rank - int(rank * COMMON)) / len(tensors))                # singular vectors of each task
    left, values, right = leading(total(tensors), rank - own * len(tensors))
    lefts, all_values, rights = [left], [values], [right]
    for tensor in tensors:
        rest = tensor - left @ (left.T @ tensor)
        for found, part in zip((lefts, all_values, rights), leading(rest, own), strict=True):
            found.append(part)
    flat = torch.cat(all_values).mean()
    return [flat * orthogonal(torch.cat(lefts, 1)) @ orthogonal(torch.cat(rights, 1)).T]


def total(tensors):
    added = tensors[0].clone()
    for tensor in tensors[1:]:
        added += tensor
    return added


def leading(matrix, rank):
    """The first `rank` columns and values of a matrix's spectrum."""
    left, values, right = spectrum(matrix)
    return left[:, :rank], values[:rank], right[:, :rank]


def orthogonal(columns):
    """The matrix of orthonormal columns that is nearest to (m, k).

    Where columns depend on each other, of those directions that it has.
    """
    left, _, right = spectrum(columns)
    return left @ right.T


def spectrum(matrix):
    """Singular vectors (m, r) on the left, values (r,), largest first, (n, r) on the right; r = min(m, n).

    Of the smaller Gram matrix in float64, which takes half the time and converges where values repeat, as
    they do among columns that are nearly orthonormal. What is not more than rounding is 0.
    """
    if matrix.shape[0] < matrix.shape[1]:
        return spectrum(matrix.T)[::-1]
    tall = matrix.double()
    squares, right = torch.linalg.eigh(tall.T @ tall)
    values, right = squares.clamp_min(0).sqrt().flip(0), right.flip(1)
    rounding = len(tall) * max(torch.finfo(matrix.dtype).eps, torch.finfo(torch.float64).eps ** 0.5)
    real = values > rounding * values[0]
    left = tall @ right * (real / values.where(real, 1.0))
    return left.to(matrix.dtype), (values * real).to(matrix.dtype), (right * real).to(matrix.dtype)


class Rule(NamedTuple):
    function: object        # [T tensors of one name], Context -> [tensors], which add up to the merged one
    largest: float          # lambda of the grid
    apart: bool = True      # whether they are one of each task


RULES = {
    "sum": Rule(as_they_are, 1.0), "mean": Rule(shares, 8.0), "ties": Rule(ties, 2.0),
    "dare": Rule(dare, 1.0), "tsv-m": Rule(tsv_m, 2.0), "iso-c": Rule(iso_c, 2.0, apart=False),
    "iso-cts": Rule(iso_cts, 2.0, apart=False),
}
