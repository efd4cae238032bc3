"""The converged probe against scikit-learn, and what a probe is compared by."""
import json

import common
import merge_eval
import numpy as np
import probe
import pytest
import torch
import torch.nn.functional as F
from conftest import TASKS, perform, refuse
from sklearn.linear_model import LogisticRegression


def random_task(n=300, width=12, n_classes=4, offset=40.0, seed=0):
    """(features {split: (N, D)}, Task): overlapping classes, axes of very different spread, far from 0."""
    rng = np.random.default_rng(seed)
    spread, middles = np.logspace(1, -2, width), rng.normal(0, 1, (n_classes, width))
    features, splits = {}, {}
    for split, count in (("train", n), ("val", n // 3), ("test", n)):
        labels = rng.integers(0, n_classes, count)
        points = offset + spread * (middles[labels] + rng.normal(0, 1, (count, width)))
        features[split] = torch.from_numpy(points).float()
        splits[split] = common.Split(points, np.arange(count), labels)
    return features, common.Task("random", splits, list("abcdefghij"[:n_classes]), "", "")


def regularised_loss(head, features, labels, penalty):
    """What the probe minimises, in float64, on features that are centred and divided by their deviation."""
    middle, variance = features.double().mean(0), features.double().var(0, correction=0).mean()
    weight = head.weight.double() * variance.sqrt()
    inputs = (features.double() - middle) / variance.sqrt()
    bias = head.bias.double() + head.weight.double() @ middle
    loss = F.cross_entropy(F.linear(inputs, weight, bias), torch.from_numpy(labels))
    return (loss + penalty / 2 * weight.square().sum()).item()


@pytest.mark.parametrize("penalty", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("shape", [{}, {"n": 90, "width": 40, "n_classes": 7}])
def test_the_head_is_the_optimum_that_scikit_learn_finds(monkeypatch, penalty, shape):
    """LogisticRegression in float64 on the standardised features: the same minimum, the same predictions."""
    features, task = random_task(**shape)
    train, labels = features["train"].double(), task.splits["train"].labels
    middle, deviation = train.mean(0), train.var(0, correction=0).mean().sqrt()
    reference = LogisticRegression(C=1 / (penalty * len(labels)), tol=1e-10, max_iter=100_000)
    reference.fit(((train - middle) / deviation).numpy(), labels)
    theirs = common.Head(torch.from_numpy(reference.coef_) / deviation, None, False)
    theirs = theirs._replace(bias=torch.from_numpy(reference.intercept_) - theirs.weight @ middle)
    monkeypatch.setattr(probe, "PENALTIES", [penalty])
    ours, about = probe.fit_head(features, task)
    losses = [regularised_loss(head, features["train"], labels, penalty) for head in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-5) and losses[0] < np.log(len(task.classes))
    assert about["gradient"] < 1e-4
    classes = reference.predict(((features["test"].double() - middle) / deviation).numpy())
    differ = int((common.predict(features["test"], ours).numpy() != classes).sum())
    assert differ <= 1                                     # a tie to rounding


def test_the_penalty_is_picked_on_validation_and_of_equals_the_largest(monkeypatch):
    features, task = random_task(n=60, width=30, n_classes=5)
    monkeypatch.setattr(probe, "PATIENCE", len(probe.PENALTIES))
    whole = list(probe.fit_head(features, task)[1]["val_of_penalties"].values())
    monkeypatch.undo()
    head, about = probe.fit_head(features, task)
    accuracies = list(about["val_of_penalties"].values())
    best = accuracies.index(max(accuracies))
    assert len(accuracies) == best + 1 + probe.PATIENCE < len(whole) and len(set(accuracies)) > 2
    assert accuracies == whole[:len(accuracies)]           # what is left out changes nothing before it
    assert about["penalty"] == probe.PENALTIES[best]
    labels = torch.from_numpy(task.splits["val"].labels)
    hits = int((common.predict(features["val"], head) == labels).sum())
    assert hits / len(labels) == max(accuracies)


def test_features_most_of_which_are_zero_are_fitted():
    """As behind a ReLU; on their covariance LAPACK's fp32 decomposition finds NaN, or does not converge."""
    features, task = random_task(n=60, width=400, n_classes=3)
    dead = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:280]
    for rows in features.values():
        rows[:, dead] = 0
    head, about = probe.fit_head(features, task)
    assert head.weight.isfinite().all() and about["gradient"] < 1e-4
    assert common.count_hits(features["train"], head, task.splits["train"]) > 0.8 * len(features["train"])


def test_features_that_are_all_the_same_give_the_most_frequent_class():
    features, task = random_task(n=60, width=30, n_classes=5)
    alike = {split: torch.full_like(rows, 0.3).bfloat16() for split, rows in features.items()}
    head, _ = probe.fit_head(alike, task)
    assert all(tensor.isfinite().all() for tensor in (head.weight, head.bias))
    frequent = np.bincount(task.splits["train"].labels).argmax()
    assert (common.predict(alike["test"], head) == int(frequent)).all()


def test_scale_and_shift_of_the_features_change_nothing():
    """One grid for every encoder: its penalty is relative to the features' variance."""
    features, task = random_task()
    head, about = probe.fit_head(features, task)
    moved, also = probe.fit_head({split: 100 * there + 5 for split, there in features.items()}, task)
    assert also["penalty"] == about["penalty"]
    classes = common.predict(100 * features["test"] + 5, moved)
    assert (classes != common.predict(features["test"], head)).sum() <= 1


def test_both_probes_are_in_probe_json_and_under_merge_json(study):
    rows = json.loads((study / "tiny/probe.json").read_text())["tasks"]
    merge = json.loads((study / "tiny/aligned/merge.json").read_text())
    for kind in common.PROBES:
        gaps = []
        for name in TASKS:
            assert merge["probing"][kind]["hits"][name] == rows[name][kind]["hits_test"]
            gaps.append(merge["test"]["tasks"][name] - rows[name][kind]["test"])
        difference = merge["probing"][kind]["addition_minus"]
        assert difference["mean"] == pytest.approx(np.mean(gaps))
        same = merge["test"]["hits"] == merge["probing"][kind]["hits"]
        assert (difference["standard_error"] == 0) == same and difference["standard_error"] < 0.02


def test_the_paired_error_is_that_of_the_difference_image_by_image():
    """Against a bootstrap over images: resampling them moves the mean difference by the stated error."""
    rng = np.random.default_rng(0)
    tasks, ours, theirs = {}, [], []
    for name, n in (("a", 400), ("b", 150)):
        labels = rng.integers(0, 3, n)
        split = common.Split(labels, np.arange(n), labels)
        tasks[name] = common.Task(name, {"test": split}, list("xyz"), "", "")
        right = rng.random(n) < 0.7
        flips = rng.random(n) < 0.05                       # the two agree on most images
        ours.append(torch.from_numpy(np.where(right, labels, (labels + 1) % 3)))
        theirs.append(torch.from_numpy(np.where(right ^ flips, labels, (labels + 1) % 3)))
    found = merge_eval.paired_difference(tasks, ours, theirs)
    means = []
    for _ in range(2000):
        gaps = []
        for task, a, b in zip(tasks.values(), ours, theirs, strict=True):
            labels = task.splits["test"].labels
            chosen = rng.integers(0, len(labels), len(labels))
            gaps.append(np.mean((a.numpy() == labels)[chosen]) - np.mean((b.numpy() == labels)[chosen]))
        means.append(np.mean(gaps))
    assert found["standard_error"] == pytest.approx(np.std(means), rel=0.1)
    alone = np.sqrt(sum(0.7 * 0.3 / n for n in (400, 150))) / 2    # of a single accuracy
    assert found["standard_error"] < 0.7 * alone


def test_fine_tuning_is_against_the_head_that_is_asked_for(copy):
    words = ["tiny", "--runs", copy, "--tasks", "glyphs", "--steps", "2", "--batch-size", "8", "--lr", "1e-3"]
    shared = ["tiny", "--runs", copy, "--name", "on-converged"]
    perform("finetune", *words, "--name", "on-converged", "--recipe", "aligned", "--probe", "converged")
    perform("make_vectors", *shared)
    perform("merge_eval", *shared, "--lambdas", "2")
    merge = json.loads((copy / "tiny/on-converged/merge.json").read_text())
    assert merge["recipe"]["probe"] == "converged"
    assert merge["test_lambda0"]["hits"] == merge["probing"]["converged"]["hits"]
    assert merge["test_lambda0"]["hits"] != merge["probing"]["paper"]["hits"]
    assert "--name NEW" in refuse("finetune", *words, "--name", "on-converged")
    with pytest.raises(SystemExit):
        perform("finetune", *words, "--recipe", "full", "--probe", "paper")
