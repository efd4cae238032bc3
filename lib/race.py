"""
The best lambda on validation images, without looking at all of them under every lambda.

    best = fine_search(look, splits, single_task, lambdas, 0.01, right_at_zero, right := {}, save)

Lambdas see growing shares of the images, each task's in one random order. From an eighth on the leader sees
all of them. Any other is dropped
  - surely: where a hit on every image it has not seen and the leader misses would not bring it level;
  - by a paired test on the images that both have seen: one-sided, normal, tasks as strata drawn without
    replacement, `error` divided by the number of tests a search can make (Bonferroni).
What wins is then the best on all images but for a chance of at most `error`; with error 0 always. The grid's
winner then runs against lambdas a FINER-th of the grid's step apart, up to its neighbours.
"""
import math
import statistics

import numpy as np

from common import Split

SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
FINER = 5


def fine_search(look, splits, single, lambdas, error, at_zero, right, keep):
    """The best of a grid of lambdas and of finer ones around its winner.

    look     function of ([Split of each task], lambdas): [(K, n) bool, which of its images are right]
    splits   {task: Split}
    single   {task: single-task accuracy}
    at_zero  {task: (N_t,) bool, which of its images are right under lambda = 0}, which is not looked at
    right    {lambda: (n,) bool, which of the images it has seen are right, part by part}; filled. What a
             killed search has seen is not seen again
    keep     called after each look
    """
    parts, tasks, zero = [], tasks_in_order(splits), []
    for rows in shuffled(splits):
        parts.append([part_of(splits[name], rows[name]) for name in splits])
        zero += [at_zero[name][rows[name]] for name in splits]
    right[0.0] = np.concatenate(zero)
    ends = np.cumsum([sum(map(len, part)) for part in parts])
    sizes = np.array([len(split) for split in splits.values()])
    worth = 1 / np.array([single[name] for name in splits]) / len(splits)      # (T,) of an accuracy
    tests = (len(lambdas) + 2 * FINER) * len(SHARES)
    z = statistics.NormalDist().inv_cdf(1 - error / tests) if error else np.inf

    def see(some, k):
        """Let lambdas see part k, where they have not."""
        start = ends[k - 1] if k else 0
        some = [lam for lam in some if len(right.get(lam, ())) == start]
        if some:
            found = np.concatenate(look(parts[k], some), axis=1)               # (K, N of the part)
            for lam, row in zip(some, found, strict=True):
                right[lam] = np.concatenate([right.get(lam, np.zeros(0, bool)), row])
            keep()

    def score(lam, end):
        """Normalized accuracy on the first `end` images."""
        n = np.bincount(tasks[:end], minlength=len(sizes))
        hits = np.bincount(tasks[:end], right[lam][:end], len(sizes))
        return (worth * hits / np.maximum(n, 1)).sum()

    def winner(some):
        for k, end in enumerate(ends):
            see(some, k)
            leader = max(some, key=lambda lam: score(lam, end))                # the smallest of equals
            for later in range(k + 1, len(parts)) if k > 1 else ():            # before, it is chance's leader
                see([leader], later)
            some = [lam for lam in some if lam == leader or may_win(
                right[lam][:end].astype(int) - right[leader][:end], right[leader], tasks, sizes, worth, z)]
        return max(some, key=lambda lam: score(lam, ends[-1]))

    best = winner(lambdas)
    return winner(sorted({best, *around(best, lambdas)}))


def around(best, lambdas):
    """Lambdas between the neighbours of one of an even grid, a FINER-th of its step apart."""
    step = (lambdas[-1] - lambdas[0]) / (len(lambdas) - 1)
    near = (best + step * np.arange(1 - FINER, FINER) / FINER).round(10)
    return [float(lam) for lam in near if lambdas[0] <= lam <= lambdas[-1]]


def shuffled(splits):
    """[{task: rows (n,)}]: the images of {task: Split} in random order, cut at SHARES."""
    parts = []
    for low, high in zip((0, *SHARES[:-1]), SHARES, strict=True):
        rows = {}
        for name, split in splits.items():
            order = np.random.default_rng(0).permutation(len(split))
            rows[name] = order[math.ceil(low * len(split)):math.ceil(high * len(split))]
        parts.append(rows)
    return parts


def tasks_in_order(splits):
    """(N,) number of the task of each image, part by part."""
    numbers = []
    for part in shuffled(splits):
        numbers += [np.full(len(rows), task) for task, rows in enumerate(part.values())]
    return np.concatenate(numbers)


def accuracies(right, splits):
    """{task: accuracy} on the images seen, (n,) bool part by part."""
    tasks = tasks_in_order(splits)[:len(right)]
    return {name: float(right[tasks == task].mean()) for task, name in enumerate(splits)}


def part_of(split, rows):
    return Split(split.inputs, split.indices[rows], split.labels[rows])


def may_win(difference, leader, tasks, sizes, worth, z):
    """Whether a lambda may yet be better than the leader.

    difference  (n,) -1, 0 or 1: what it gets right and the leader does not, of the images it has seen
    leader      (n or N,) bool: what the leader gets right
    tasks       (N,) number of each image's task
    sizes       (T,) images of each task
    worth       (T,) what a task's accuracy adds to what is compared
    z           quantile of the one-sided test; infinite: only what is sure
    """
    seen = len(difference)
    each = (worth / sizes)[tasks]                                              # (N,) what a hit adds
    may_gain = each[seen:len(leader)] @ ~leader[seen:] + each[len(leader):].sum()
    if difference @ each[:seen] + may_gain < -1e-12:                           # below rounding's nothing
        return False
    n = np.bincount(tasks[:seen], minlength=len(sizes))
    if z == np.inf or n.min() < 2:
        return True
    means = np.bincount(tasks[:seen], difference, len(sizes)) / n
    squares = np.bincount(tasks[:seen], difference ** 2, len(sizes))
    variances = np.maximum((squares - n * means ** 2) / (n - 1), 1 / n)        # as if one image differed
    error = np.sqrt((worth ** 2 * variances / n * (1 - n / sizes)).sum())
    return worth @ means + z * error >= 0
