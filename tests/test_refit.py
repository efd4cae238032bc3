"""Heads fitted again on merged encoders, and coefficients of tasks, against what else says the same."""
import itertools
import json

import coefficients
import common
import numpy as np
import pytest
import refit
import torch
from conftest import TASKS, perform, refuse
from soak import numbers

from lib import vectors
from lib.study import open_study

TWO = TASKS[:2]
WAYS_WITHOUT_LABELS = ("unlabelled", "rotated")


def read(runs, file, name="aligned"):
    return json.loads((runs / "tiny" / name / file).read_text())


def test_refitting_at_lambda_0_is_probing_and_frozen_heads_are_addition(copy, capsys, monkeypatch):
    shared = ["tiny", "--runs", copy, "--tasks", ",".join(TWO), "--lambda-max", "0.1", "--lambdas", "2"]
    perform("merge_eval", *shared)
    perform("refit", *shared)
    found, merge = read(copy, "refit.json")["ways"], read(copy, "merge.json")
    for key in ("hits", "n", "tasks"):
        assert found["all"]["test_lambda0"][key] == merge["probing"]["converged"][key]
        assert found["frozen"]["test_lambda0"][key] == merge["test_lambda0"][key]
    assert found["frozen"]["val"] == pytest.approx(merge["val"]["normalized"], abs=1e-12)
    for way in WAYS_WITHOUT_LABELS:
        assert all(0 <= rate <= 1 for rate in found[way]["val"])
    assert found["all"]["minus_probing"]["mean"] == pytest.approx(
        found["all"]["test"]["absolute"] - merge["probing"]["converged"]["absolute"])
    for row in found.values():                             # picks are by validation, of equals the smallest
        assert row["best_lambda"] == [0, 0.1][int(np.argmax(row["val"]))]

    # without labels: other ones change neither the search nor its pick
    load = common.load_task

    def load_shuffled(*given):
        task = load(*given)
        splits, rng = {}, np.random.default_rng(1)
        for split, part in task.splits.items():
            splits[split] = common.Split(part.inputs, part.indices, rng.permutation(part.labels))
        return task._replace(splits=splits)

    with monkeypatch.context() as patched:
        patched.setattr(common, "load_task", load_shuffled)
        perform("refit", *shared, "--overwrite")
    again = read(copy, "refit.json")["ways"]
    for way, key in itertools.product(WAYS_WITHOUT_LABELS, ("val", "best_lambda")):
        assert again[way][key] == found[way][key], (way, key)
    assert again["all"]["val"] != found["all"]["val"]

    half = ["--rule", "mean", "--lambda-max", "0.2", "--lambdas", "2"]
    perform("refit", *shared[:-4], *half)                  # of two tasks
    of_mean = read(copy, "refit.json", "aligned-mean")["ways"]["all"]
    assert of_mean.pop("best_lambda") == 2 * found["all"].pop("best_lambda")
    assert of_mean == found["all"]
    assert "merges two tasks or more" in refuse("refit", *shared[:4], TWO[0], "--rule", "ties")
    perform("report", "--runs", copy)
    assert "## Heads fitted again" in (copy / "report/report.md").read_text()
    assert "rotated" in capsys.readouterr().out


@pytest.mark.parametrize("stage, tasks, words, function, stop", [
    ("refit", TASKS[:1], ["--lambdas", "3", "--lambda-max", "0.2"], "features", 3),
    ("coefficients", TWO, ["--rounds", "2"], "hits", 2)])
def test_what_was_interrupted_ends_as_what_was_not(copy, monkeypatch, stage, tasks, words, function, stop):
    """In the middle: of refitting, when the heads of the first lambdas are lost; of a coordinate search."""
    shared, file = [stage, "tiny", "--runs", copy, "--tasks", ",".join(tasks)], f"{stage}.json"
    if stage == "coefficients":
        perform("merge_eval", *shared[1:], "--lambdas", "5")
    perform(*shared, *words)
    undisturbed, calls = numbers(copy / "tiny/aligned" / file), []
    evaluate = getattr(common.Evaluator, function)

    def stopping(self, *given):
        calls.append(given)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return evaluate(self, *given)

    monkeypatch.setattr(common.Evaluator, function, stopping)
    with pytest.raises(KeyboardInterrupt):
        perform(*shared, *words, "--overwrite")
    assert (copy / "tiny/aligned/state" / file).exists()
    perform(*shared, *words)
    assert numbers(copy / "tiny/aligned" / file) == undisturbed


def test_a_rotated_head_undoes_a_rotation_and_a_shift():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(200, 16, generator=generator) @ torch.diag(torch.linspace(.1, 2, 16))
    turn, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator))
    for normalise, biased in ((False, True), (True, False), (False, False)):
        head = common.random_head(16, 5, generator)
        shift = 0 if normalise else torch.randn(16, generator=generator)
        head = common.Head(head.weight, head.bias if biased else None, normalise)
        features = teacher @ turn + shift
        found = refit.rotated(head, features, teacher)
        torch.testing.assert_close(common.logits(features, found), common.logits(teacher, head), rtol=1e-4,
                                   atol=1e-4)
        torch.testing.assert_close(found.weight.norm(), head.weight.norm())
        assert not torch.allclose(common.logits(features, head), common.logits(teacher, head), atol=1e-1)


def test_few_are_so_many_of_each_class():
    labels = np.random.default_rng(0).permutation([0] * 50 + [1] * 30 + [2] * 4)
    rows = refit.few(labels, 10, seed=0)
    assert np.bincount(labels[rows]).tolist() == [10, 10, 4] and len(set(rows)) == 24
    assert not np.array_equal(rows, refit.few(labels, 10, seed=1))


def test_coefficients_are_no_worse_than_any_neighbour_on_the_grid(copy):
    shared = ["tiny", "--runs", copy, "--tasks", ",".join(TWO)]
    perform("merge_eval", *shared, "--lambdas", "5", "--lambda-max", "0.4")
    perform("coefficients", *shared, "--rounds", "4")
    found, merge = read(copy, "coefficients.json"), read(copy, "merge.json")
    assert found["begins_at"] == merge["best_lambda"]
    assert found["val"]["normalized"] >= found["val"]["sum"] == max(merge["val"]["normalized"])
    assert found["settings_tried"] == len(found["trail"]) * len(merge["lambdas"])
    args = coefficients.parse_args([str(word) for word in shared])
    study = open_study(args, coefficients.__file__, "finetune.json")
    evaluator = common.Evaluator(study.encoder, study.device, study.dtype)
    evaluator.use_vectors([vectors.load_vector(study.source, name, study.encoder) for name in TWO])
    picked = [found["coefficients"][name] for name in TWO]
    neighbours = [tuple(picked)]
    for place, lam in itertools.product(range(len(TWO)), merge["lambdas"]):
        neighbours.append((*picked[:place], lam, *picked[place + 1:]))
    splits = [study.tasks[name].splits["val"] for name in TWO]
    counted = np.array(evaluator.hits(splits, list(study.heads.values()), neighbours))     # (T, K)
    single = [merge["config"]["single_task"]["val"][name] for name in TWO]
    rates = (counted / np.array([[len(split)] for split in splits]) / np.array(single)[:, None]).mean(0)
    assert rates[0] == pytest.approx(found["val"]["normalized"]) and rates[0] >= rates.max() - 1e-12
    [one] = evaluator.hits([study.tasks["signs"].splits["test"]], [study.heads["signs"]], [tuple(picked)])
    assert one == [found["test"]["hits"]["signs"]]
    perform("report", "--runs", copy)
    assert "## A coefficient for each task" in (copy / "report/report.md").read_text()
    perform("merge_eval", *shared, "--rule", "mean", "--lambdas", "3")
    said = refuse("coefficients", *shared, "--of", "aligned", "--name", "aligned-mean")
    assert "is by rule mean" in said

