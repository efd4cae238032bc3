"""--search fine picks what looking at everything picks, by fewer looks."""
import json

import common
import numpy as np
import pytest
from conftest import perform, refuse

from lib import race

LAMBDAS = np.linspace(0, 1, 21).round(10).tolist()


def made_up(seed, n=(400, 37, 1500)):
    """({task: Split}, {lambda: {task: (N_t,) bool}}, {task: single-task accuracy}): smooth curves of hits.

    An image is right up to a lambda of its own, or from one on.
    """
    rng, splits, hits, single = np.random.default_rng(seed), {}, {}, {}
    for task, count in enumerate(n):
        name = f"task{task}"
        splits[name] = common.Split(np.arange(count), np.arange(count), np.zeros(count, int))
        until, since = rng.gamma(2, rng.uniform(.05, .2), count), rng.uniform(-.3, .4, count)
        for lam in range(101):
            right = (lam / 100 < until) & (lam / 100 >= since)
            hits.setdefault(lam / 100, {})[name] = right
        single[name] = rng.uniform(0.6, 1)
    return splits, hits, single


def full_score(hits, single):
    return common.normalized_accuracy({name: right.mean() for name, right in hits.items()}, single)


def searched(splits, hits, single, error):
    """(the pick, the best of what was looked at, forward passes)."""
    looks = []

    def look(part, some):
        looks.append(len(some) * sum(map(len, part)))
        rows = zip(hits[some[0]], part, strict=True)
        return [np.stack([hits[lam][name][split.indices] for lam in some]) for name, split in rows]

    right = {}
    best = race.fine_search(look, splits, single, LAMBDAS, error, hits[0.0], right, lambda: None)
    for lam, seen in right.items():                        # each image once
        accuracies = race.accuracies(seen, splits)
        if len(seen) == sum(map(len, splits.values())):
            assert accuracies == {name: hits[lam][name].mean() for name in splits}
    tried = {lam: full_score(hits[lam], single) for lam in sorted(right)}
    return best, max(tried, key=tried.get), sum(looks)


@pytest.mark.parametrize("error", [0.01, 0])
def test_the_pick_is_the_best_of_what_is_tried_and_of_the_grid(error):
    everything, looks = 20 * (400 + 37 + 1500), []
    for seed in range(40):
        splits, hits, single = made_up(seed)
        best, tried, images = searched(splits, hits, single, error)
        grid = {lam: full_score(hits[lam], single) for lam in LAMBDAS}
        assert best == tried
        assert full_score(hits[best], single) >= max(grid.values())
        assert abs(best - max(grid, key=grid.get)) < 0.05
        looks.append(images)
    assert np.mean(looks) < (0.75 if error else 1.3) * everything


def test_a_test_of_no_difference_drops_as_rarely_as_it_says():
    """Two lambdas that are right equally often: at error .2 one in five is dropped at most, and some are."""
    n, dropped = 600, 0
    tasks, sizes, worth = np.zeros(n, int), np.array([n]), np.array([1.0])
    for seed in range(400):
        own, leader = np.random.default_rng(seed).permuted([np.arange(n) < 400] * 2, axis=1)
        z = race.statistics.NormalDist().inv_cdf(0.8)
        dropped += not race.may_win(own[:300].astype(int) - leader[:300], leader, tasks, sizes, worth, z)
    assert 40 < dropped < 110


def test_what_cannot_win_is_dropped_and_what_may_is_not():
    tasks, sizes, worth = np.repeat([0, 1], 10), np.array([10, 10]), np.array([1.0, 2.0])
    leader = np.ones(20, bool)
    leader[[18, 19]] = False
    seen = np.zeros(18, int)
    seen[:4] = -1
    assert race.may_win(seen, leader, tasks, sizes, worth, np.inf)          # .4 behind, .4 to be gained
    seen[4] = -1
    assert not race.may_win(seen, leader, tasks, sizes, worth, np.inf)
    assert race.may_win(seen, leader[:18], tasks, sizes, worth, np.inf) is False


def test_merge_eval_searches_finely_and_goes_on_after_an_interruption(copy, monkeypatch, capsys):
    words = ["merge_eval", "tiny", "--runs", copy, "--lambdas", "5", "--lambda-max", "0.4"]
    fine, looked, predictions = [*words, "--search", "fine"], [], common.Evaluator.predictions

    def counting(self, splits, heads, settings):
        looked.append(len(settings) * sum(map(len, splits)))
        if len(looked) == stop:
            raise KeyboardInterrupt
        return predictions(self, splits, heads, settings)

    monkeypatch.setattr(common.Evaluator, "predictions", counting)
    stop = 0
    perform(*fine)
    found, whole = json.loads((copy / "tiny/aligned/merge.json").read_text()), sum(looked)
    assert f"{found['images']} img" in capsys.readouterr().out
    (copy / "tiny/aligned/merge.json").unlink()
    looked.clear()
    stop = 4
    with pytest.raises(KeyboardInterrupt):
        perform(*fine)
    before, stop = sum(looked[:-1]), 0
    looked.clear()
    perform(*fine)
    again = json.loads((copy / "tiny/aligned/merge.json").read_text())
    assert before + sum(looked) == whole
    for key in ("lambdas", "best_lambda", "val", "test", "images"):
        assert again[key] == found[key], key
    # the grid of all that was tried, on all images
    n = sum(found["val"]["n"].values())
    assert found["images"] == sum(found["val"]["seen"]) - n and min(found["val"]["seen"]) < n
    assert found["lambdas_within_2_points"] is None        # not known of lambdas that saw fewer
    perform("report", "--runs", copy)
    assert f"{len(found['lambdas'])} values on at most {n} val" in (copy / "report/report.md").read_text()
    perform("merge_eval", "tiny", "--runs", copy, "--lambdas", "21", "--lambda-max", "0.4")
    grid = json.loads((copy / "tiny/aligned/merge.json").read_text())
    at = dict(zip(grid["lambdas"], grid["val"]["normalized"], strict=True))
    tried = {lam: at[lam] for lam in found["lambdas"] if lam in at}
    assert found["best_lambda"] in tried and at[found["best_lambda"]] == max(tried.values())
    of_each = (found["lambdas"], found["val"]["normalized"], found["val"]["seen"])
    for lam, value, seen in zip(*of_each, strict=True):
        assert seen < n or lam not in at or value == pytest.approx(at[lam], abs=1e-12)


def test_an_error_is_of_the_fine_search(copy):
    assert "--error" in refuse("merge_eval", "tiny", "--runs", copy, "--error", "0.1")
