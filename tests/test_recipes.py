"""Recipe full, subsets of tasks, geometry of the vectors, and bf16, on a copy of the small study."""
import itertools
import json
import time

import common
import make_vectors
import numpy as np
import probe
import pytest
import subsets
import torch
from conftest import TASKS, perform, refuse

from lib import comparisons, files, vectors
from lib.study import open_study


def test_full_trains_its_own_head_and_leaves_the_probed_one(both, study):
    for name in TASKS:
        probed, _ = files.load_tensors(both / f"tiny/heads/paper/{name}.safetensors", "")
        before, _ = files.load_tensors(study / f"tiny/heads/paper/{name}.safetensors", "")
        own, _ = files.load_tensors(both / f"tiny/full/heads/{name}.safetensors", "")
        assert torch.equal(probed["weight"], before["weight"])
        assert not torch.equal(own["weight"], probed["weight"])
    trained = {}
    for recipe in ("aligned", "full"):
        rows = json.loads((both / f"tiny/{recipe}/finetune.json").read_text())["tasks"]
        trained[recipe] = rows["glyphs"]["trainable_params"]
    assert trained["full"] - trained["aligned"] == 128 * 10 + 10    # the head of ten classes


def test_full_meets_its_own_heads_in_every_stage(both):
    merge = json.loads((both / "tiny/full/merge.json").read_text())
    words = ["tiny", "--runs", str(both), "--tasks", ",".join(TASKS), "--name", "full"]
    there = open_study(subsets.parse_args(words), subsets.__file__, "finetune.json")
    evaluator, hits = there.evaluator(0), {}
    for name, task in there.tasks.items():
        tensors, _ = files.load_tensors(both / f"tiny/full/heads/{name}.safetensors", "")
        head = common.Head(tensors["weight"], tensors["bias"], normalise=False)
        [[hits[name]]] = evaluator.hits([task.splits["test"]], [head], [()])
    assert merge["test_lambda0"]["hits"] == hits
    grid = json.loads((both / "tiny/full/disentangle.json").read_text())["pairs"]["glyphs-signs"]
    assert grid["xi_at_origin"] == 0


def test_subsets_cover_every_task_and_pair_and_agree_with_a_search_by_hand(both):
    rows = json.loads((both / "tiny/full/scaling.json").read_text())["subsets"]
    every = itertools.chain(*[itertools.combinations(TASKS, size) for size in (1, 2, 3)])
    assert list(rows) == ["+".join(subset) for subset in every]
    assert all("+".join(row["tasks"]) == key for key, row in rows.items())

    # the pair (glyphs, textures), by hand: both vectors written as one sum, on the same images
    pair = "glyphs", "textures"
    words = ["tiny", "--runs", str(both), "--tasks", ",".join(pair), "--name", "full"]
    there = open_study(subsets.parse_args(words), subsets.__file__, "finetune.json")
    evaluator, tau = there.evaluator(0), {}
    for name in pair:
        tau[name] = vectors.load_vector(both / "tiny/full", name, there.encoder)
    merged = {key: tau["glyphs"][key] + tau["textures"][key] for key in tau["glyphs"]}
    curves = {"val": {}, "test": {}}
    for split, name in itertools.product(curves, pair):
        images, head = common.sample(there.tasks[name].splits[split], 40, 0), there.heads[name]
        evaluator.use_vectors([tau[name]])
        [[alone]] = evaluator.hits([images], [head], [(1.0,)])
        evaluator.use_vectors([merged])
        [counts] = evaluator.hits([images], [head], [(0.0,), (0.5,), (1.0,)])
        curves[split][name] = [count / alone for count in counts]
    best = int(np.argmax(np.mean([curves["val"][name] for name in pair], axis=0)))
    row = rows["glyphs+textures"]
    assert row["best_lambda"] == [0.0, 0.5, 1.0][best]
    assert row["normalized"] == pytest.approx(np.mean([curves["test"][name][best] for name in pair]))


def test_subset_choice_is_seeded_and_without_repeats():
    names = list("abcdefgh")
    chosen = subsets.choose_subsets(names, 5, 0)
    sizes = [len(subset) for subset in chosen]
    assert [sizes.count(size) for size in range(1, 9)] == [8, 28, 5, 5, 5, 5, 5, 1]
    assert len(set(chosen)) == len(chosen)
    assert chosen == subsets.choose_subsets(names, 5, 0) != subsets.choose_subsets(names, 5, 1)
    assert len(subsets.choose_subsets(names, 100, 0)) == 255


def test_subsets_of_one_task_are_refused(both):
    message = refuse("subsets", "tiny", "--runs", both, "--tasks", "glyphs", "--per-size", "3")
    assert "two tasks or more" in message


@pytest.mark.parametrize("size", [10, 2 ** 20 + 5, 6_000_000])
def test_cosines_are_summed_in_double(size):
    generator = torch.Generator().manual_seed(0)
    vectors_ = [scale * torch.randn(size, generator=generator) for scale in (1e-4, 1.0, 1e3)]
    matrix = np.stack([vector.double().numpy() for vector in vectors_])
    lengths = np.linalg.norm(matrix, axis=1)
    tensors = zip(*[vector.split(size // 3 + 1) for vector in vectors_], strict=True)
    found = np.array(make_vectors.cosines(sum(map(make_vectors.inner_products, tensors))))
    np.testing.assert_allclose(found, matrix @ matrix.T / np.outer(lengths, lengths), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.diag(found), 1, rtol=1e-14)


def test_the_seconds_of_probing_include_the_features_of_the_task_that_is_searched(copy, monkeypatch):
    """Whose features are cached when its head is trained."""
    cached_features, took = probe.cached_features, []

    def timed(*given):
        start = time.perf_counter()
        features = cached_features(*given)
        took.append(time.perf_counter() - start)
        return features

    monkeypatch.setattr(probe, "cached_features", timed)
    (copy / "tiny/features/signs.safetensors").unlink()
    perform("probe", "tiny", "--runs", copy, "--tasks", "signs", "--probe-steps", "5", "--overwrite")
    seconds = comparisons.probing_seconds(files.read_json(copy / "tiny/probe.json", ""), ["signs"])
    assert seconds > sum(took) and took[0] > 10 * took[1]


def test_overlap_of_subspaces_is_one_with_itself_and_by_chance_between_random_ones():
    generator, bases = torch.Generator().manual_seed(0), []
    for _ in range(12):
        bases.append(make_vectors.leading_directions(torch.randn(96, 200, generator=generator), 8))
    overlap = [float((a.T @ b).square().sum() / 8) for a, b in itertools.combinations(bases, 2)]
    assert float((bases[0].T @ bases[0]).square().sum() / 8) == pytest.approx(1)
    assert np.mean(overlap) == pytest.approx(8 / 96, rel=0.15)
    matrix = np.array(make_vectors.pairwise(make_vectors.overlap_of, bases))    # the stage's own
    np.testing.assert_allclose(matrix[np.triu_indices(12, 1)], overlap)
    np.testing.assert_allclose(np.diag(matrix), 1)
    noise = 1e-3 * torch.randn(50, 20, generator=generator)
    planted = torch.outer(torch.arange(50.0), torch.ones(20)) + noise
    along = torch.full((20, 1), 20 ** -0.5, dtype=torch.float64)
    assert abs(float(make_vectors.leading_directions(planted, 1).T @ along)) == pytest.approx(1, abs=1e-5)


def test_precision_compares_the_four_ways_on_the_same_images(copy):
    perform("precision", "tiny", "--runs", copy, "--tasks", ",".join(TASKS), "--images-per-task", "60",
            "--compile", "off")
    result = files.read_json(copy / "tiny/aligned/precision.json", "")
    rows, weights = result["tasks"], result["weights"]
    assert set(rows) == set(TASKS) and all(row["n"] == 60 for row in rows.values())
    assert all(row["flips_to_fp32"]["fp32"] == 0 for row in rows.values())
    assert 0 < weights["bf16"]["error"] < weights["added"]["error"]    # two roundings lose more than one
    assert 0 < weights["added"]["unchanged"] < 1
    between = [row["flips_between_paths"] for row in rows.values()]
    assert result["xi_floor"] == pytest.approx(2 * np.mean(between))
