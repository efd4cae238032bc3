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

from lib import vectors
from lib.study import open_study

TWO = TASKS[:2]


def read(runs, file, name="aligned"):
    return json.loads((runs / "tiny" / name / file).read_text())


def test_refitting_at_lambda_0_is_probing_and_frozen_heads_are_addition(copy, capsys):
    shared = ["tiny", "--runs", copy, "--tasks", ",".join(TWO), "--lambda-max", "0.1", "--lambdas", "2"]
    perform("merge_eval", *shared)
    perform("refit", *shared)
    found, merge = read(copy, "refit.json")["ways"], read(copy, "merge.json")
    for key in ("hits", "n", "tasks"):
        assert found["all"]["test_lambda0"][key] == merge["probing"]["converged"][key]
        assert found["frozen"]["test_lambda0"][key] == merge["test_lambda0"][key]
    assert found["frozen"]["val"] == pytest.approx(merge["val"]["normalized"], abs=1e-12)
    for way in ("unlabelled", "rotated"):
        assert all(0 <= rate <= 1 for rate in found[way]["val"])
    assert found["all"]["minus_probing"]["mean"] == pytest.approx(
        found["all"]["test"]["absolute"] - merge["probing"]["converged"]["absolute"])
    half = ["--rule", "mean", "--lambda-max", "0.2", "--lambdas", "2"]
    perform("refit", *shared[:-4], *half)                  # of two tasks
    assert read(copy, "refit.json", "aligned-mean")["ways"]["all"] == found["all"]
    assert "merges two tasks or more" in refuse("refit", *shared[:4], TWO[0], "--rule", "ties")
    perform("report", "--runs", copy)
    assert "## Heads fitted again" in (copy / "report/report.md").read_text()
    assert "rotated" in capsys.readouterr().out


def test_a_rotated_head_undoes_a_rotation_and_a_shift():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(200, 16, generator=generator) @ torch.diag(torch.linspace(.1, 2, 16))
    turn, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator))
    for normalise in (False, True):
        head = common.random_head(16, 5, generator)
        shift = 0 if normalise else torch.randn(16, generator=generator)
        head = common.Head(head.weight, None if normalise else head.bias, normalise)
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

