"""Merging rules against small implementations of their own in numpy, their laws, and the stage."""
import json
import shutil

import disentangle
import numpy as np
import pytest
import torch
from conftest import TASKS, perform, refuse

from lib import encoders, files, merging
from lib.merging import RULES
from lib.vectors import load_vector

SHAPES = {"a": (7, 11), "b": (13, 5), "c": (9,), "d": (3, 2, 4), "e": (1, 6), "f": (6, 6)}
MATRICES = [name for name, shape in SHAPES.items() if len(shape) == 2]


def random_vectors(count, seed=0, shapes=SHAPES):
    """`count` task vectors {name: tensor}, float64."""
    generator = torch.Generator().manual_seed(seed)
    vectors = []
    for _ in range(count):
        vectors.append({name: torch.randn(shape, generator=generator, dtype=torch.float64)
                        for name, shape in shapes.items()})
    return vectors


def merged(rule, vectors, tasks=None, seed=0):
    """What merging.merge does, of vectors that lie in memory."""
    tasks = tasks or [f"task{t}" for t in range(len(vectors))]
    bounds, out = [merging.bound(vector) for vector in vectors], {}
    for name in vectors[0]:
        context = merging.Context(name, tasks, bounds, seed)
        found = RULES[rule].function([vector[name] for vector in vectors], context)
        assert len(found) == (len(vectors) if RULES[rule].apart or vectors[0][name].ndim != 2 else 1)
        out[name] = merging.total(found)
    return out


# --------------------------------------------------------------------------------------- each rule once more


def flat(vector):
    return np.concatenate([vector[name].numpy().ravel() for name in SHAPES])


def ties_again(vectors):
    """On flat vectors, entry by entry."""
    rows = []
    for vector in map(flat, vectors):
        order = np.argsort(-abs(vector))
        keep = order[:len(vector) - max(1, round(len(vector) * 0.8)) + 1]
        trimmed = np.zeros_like(vector)
        trimmed[keep] = vector[keep]
        rows.append(trimmed)
    merged = np.zeros_like(rows[0])
    for place, entries in enumerate(np.transpose(rows)):
        positive = entries.sum() > 0
        same = [entry for entry in entries if entry and (entry > 0) == positive]
        merged[place] = np.mean(same) if same else 0
    return merged


def whitened(columns):
    """The orthonormal columns nearest to these, by numpy's singular value decomposition."""
    u, s, vt = np.linalg.svd(columns, full_matrices=False)
    return (u * (s > 1e-9 * s[0])) @ vt


def tsv_again(matrices):
    """The sum over all kept triples, one by one, after whitening."""
    rank, lefts, rights, sizes = min(matrices[0].shape) // len(matrices), [], [], []
    for matrix in matrices:
        u, s, vt = np.linalg.svd(matrix)
        for k in range(max(1, rank)):
            lefts.append(u[:, k])
            rights.append(vt[k])
            sizes.append(s[k])
    u, v = whitened(np.transpose(lefts)), whitened(np.transpose(rights))
    return sum(size * np.outer(u[:, k], v[:, k]) for k, size in enumerate(sizes))


def iso_again(matrices):
    """The polar factor of the sum times its nuclear norm over the rank."""
    total = sum(matrices)
    polar = whitened(total) if total.shape[0] >= total.shape[1] else whitened(total.T).T
    return np.linalg.norm(total, "nuc") / min(total.shape) * polar


def iso_cts_again(matrices):
    count, short = len(matrices), min(matrices[0].shape)
    each = round((short - int(0.8 * short)) / count)
    u, s, vt = np.linalg.svd(sum(matrices), full_matrices=False)
    common = short - each * count
    lefts, rights, sizes = list(u.T[:common]), list(vt[:common]), list(s[:common])
    for matrix in matrices:
        projected = (np.eye(len(u)) - u[:, :common] @ u[:, :common].T) @ matrix
        own_u, own_s, own_vt = np.linalg.svd(projected, full_matrices=False)
        lefts += list(own_u.T[:each])
        rights += list(own_vt[:each])
        sizes += list(own_s[:each])
    return np.mean(sizes) * whitened(np.transpose(lefts)) @ whitened(np.transpose(rights)).T


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_rules_agree_with_other_implementations(count):
    vectors = random_vectors(count, seed=count)
    np.testing.assert_allclose(flat(merged("sum", vectors)), sum(map(flat, vectors)))
    np.testing.assert_allclose(flat(merged("mean", vectors)), np.mean([*map(flat, vectors)], 0))
    np.testing.assert_allclose(flat(merged("ties", vectors)), ties_again(vectors))
    for rule, again in (("tsv-m", tsv_again), ("iso-c", iso_again), ("iso-cts", iso_cts_again)):
        out = merged(rule, vectors)
        for name in SHAPES:
            tensors = [vector[name].numpy() for vector in vectors]
            if name not in MATRICES:
                expected = np.mean(tensors, 0)
            elif rule == "iso-c" or count <= min(SHAPES[name]):   # else each task keeps one, or none
                expected = again(tensors)
            else:
                continue
            np.testing.assert_allclose(out[name].numpy(), expected, atol=1e-9, err_msg=f"{rule} {name}")


def test_dare_drops_nine_tenths_by_task_and_seed_and_keeps_the_mean():
    vectors = random_vectors(2, shapes={"a": (400, 300), "b": (5000,)})
    for name in ("a", "b"):
        vectors[0][name].fill_(1.0)
        vectors[1][name].zero_()
    first = merged("dare", vectors)
    for name, tensor in first.items():
        assert set(tensor.unique().tolist()) == {0.0, 1 / (1 - merging.DROPPED)}
        assert abs(tensor.mean().item() - 1) < 5 * 3 / tensor.numel() ** 0.5
    assert all(torch.equal(first[name], merged("dare", vectors)[name]) for name in first)
    assert not torch.equal(first["a"], merged("dare", vectors, seed=1)["a"])
    assert not torch.equal(first["a"], merged("dare", vectors, ["other", "task1"])["a"])


# --------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_tasks_does_not_matter(rule):
    vectors, tasks = random_vectors(3), ["one", "two", "three"]
    forward = merged(rule, vectors, tasks)
    backward = merged(rule, vectors[::-1], tasks[::-1])
    for name, tensor in forward.items():
        torch.testing.assert_close(tensor, backward[name])


@pytest.mark.parametrize("rule, scale", [("sum", 3), ("mean", 1), ("tsv-m", 1), ("ties", 1), ("iso-c", 3)])
def test_equal_vectors_merge_to_one_of_them(rule, scale):
    """To what the rule makes of one alone, times a scale; of TSV-M in matrices as low in rank as it keeps."""
    [vector] = random_vectors(1)
    for name in MATRICES if rule == "tsv-m" else ():
        left, right = random_vectors(1, 1, {"l": (SHAPES[name][0], 1), "r": (1, SHAPES[name][1])})[0].values()
        vector[name] = left @ right
    alone, together = merged(rule, [vector]), merged(rule, [vector] * 3)
    for name in SHAPES:
        one = scale if rule != "iso-c" or name in MATRICES else 1          # what is no matrix it averages
        torch.testing.assert_close(together[name], one * alone[name])
        if rule in ("sum", "mean", "tsv-m"):
            torch.testing.assert_close(alone[name], vector[name])


def test_equal_vectors_push_no_directions_in_that_are_rounding():
    """In float32, of the size of real ones: of eight equal vectors TSV-M keeps the leading eighth."""
    matrix = torch.randn(384, 384, generator=torch.Generator().manual_seed(0))
    left, values, right = merging.leading(matrix, 384 // 8)
    together = merging.total(RULES["tsv-m"].function([matrix] * 8, None))
    torch.testing.assert_close(together, left * values @ right.T, rtol=1e-3, atol=1e-3)


def test_a_spectrum_of_repeated_values_is_found():
    """As columns have that are nearly orthonormal, of which LAPACK's decomposition may not converge."""
    basis, _ = torch.linalg.qr(torch.randn(96, 64, generator=torch.Generator().manual_seed(0)))
    left, values, right = merging.spectrum(torch.cat([basis[:, :32], basis[:, :32]], 1))    # of rank 32
    torch.testing.assert_close(values, torch.tensor([2 ** 0.5] * 32 + [0.0] * 32))
    torch.testing.assert_close(left[:, :32].T @ left[:, :32], torch.eye(32), atol=1e-5, rtol=0)
    assert not left[:, 32:].any() and not right[:, 32:].any()
    torch.testing.assert_close(merging.orthogonal(basis.T).T, basis, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", RULES)
def test_a_vector_of_zeros_is_harmless(rule):
    vectors = random_vectors(2)
    zero = {name: torch.zeros_like(tensor) for name, tensor in vectors[0].items()}
    for tensor in merged(rule, [zero, zero]).values():
        assert torch.equal(tensor, torch.zeros_like(tensor))
    with_it = merged(rule, [*vectors, zero])
    assert all(tensor.isfinite().all() for tensor in with_it.values())
    if rule in ("sum", "ties"):
        for name, tensor in merged(rule, vectors).items():
            torch.testing.assert_close(with_it[name], tensor)
    if rule == "tsv-m":                                    # its directions, which are any, push nobody away
        alone, *nothing = RULES[rule].function([vectors[0]["f"]] + [zero["f"]] * 2, None)
        leading, values, right = merging.leading(vectors[0]["f"], 2)
        torch.testing.assert_close(alone, leading * values @ right.T)
        assert all(torch.equal(part, zero["f"]) for part in nothing)


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.apart])
def test_a_task_that_did_not_move_has_no_part(rule):
    vectors = random_vectors(3)
    vectors[1] = {name: torch.zeros_like(tensor) for name, tensor in vectors[1].items()}
    context = merging.Context("a", ["one", "two", "three"], [merging.bound(vector) for vector in vectors], 0)
    parts = RULES[rule].function([vector["a"] for vector in vectors], context)
    assert [bool(part.any()) for part in parts] == [True, False, True]


# --------------------------------------------------------------------------------------- the stage


def test_rules_stand_beside_the_sum(copy, monkeypatch):
    """Each in a folder of its own, from the same vectors; the report has a table of them."""
    shared = ["tiny", "--runs", copy, "--tasks", ",".join(TASKS)]
    for rule in ("ties", "iso-cts"):
        perform("merge_eval", *shared, "--rule", rule, "--lambdas", "3")    # to 2
        found = json.loads((copy / f"tiny/aligned-{rule}/merge.json").read_text())
        assert found["rule"] == rule and found["of"] == "aligned" and found["lambdas"] == [0, 1, 2]
    encoder = encoders.load_encoder("tiny", copy)
    vectors = [load_vector(copy / "tiny/aligned", task, encoder) for task in TASKS]
    for rule in RULES:                                     # what lies on disk, in the order of its tasks
        expected = merged(rule, vectors, TASKS)
        whole = merging.merge(rule, copy / "tiny/aligned", TASKS, encoder)
        for name, tensor in expected.items():
            torch.testing.assert_close(whole[name], tensor, msg=f"{rule}, {name}")
        if RULES[rule].apart:
            parts = merging.parts(rule, copy / "tiny/aligned", TASKS, encoder)
            for name, tensor in whole.items():
                assert torch.equal(merging.total([part[name] for part in parts]), tensor), (rule, name)
    vector = merging.merge("iso-cts", copy / "tiny/aligned", TASKS, encoder)
    shipped, _ = files.load_tensors(copy / "tiny/aligned-iso-cts/merged.safetensors", "")
    for name, tensor in encoders.weights_of(encoder.module).items():
        torch.testing.assert_close(shipped[name], tensor + found["best_lambda"] * vector[name])
    perform("report", "--runs", copy)
    report = (copy / "report/report.md").read_text()
    assert "## Merging rules" in report and "| tiny | aligned | iso-cts | aligned-iso-cts |" in report
    one = [*shared[:-1], TASKS[0], "--rule", "ties"]
    assert "rule ties merges two tasks or more" in refuse("merge_eval", *one)


def test_heat_maps_and_subsets_of_the_mean_are_the_sums_at_half_of_lambda(both, tmp_path):
    """Of two tasks; and rules that mix tasks' spectra have no heat map."""
    copy = shutil.copytree(both, tmp_path / "runs")
    shared = ["tiny", "--runs", copy, "--rule", "mean"]
    perform("disentangle", *shared, "--points", "5", "--samples", "100", "--limit", "6")
    assert json.loads((copy / "tiny/aligned-mean/disentangle.json").read_text())["config"]["rule"] == "mean"
    ours, theirs = (np.load(copy / f"tiny/{name}/disentangle/glyphs-signs.npz")["xi"]
                    for name in ("aligned-mean", "aligned"))
    assert theirs.max() > 0.1 and np.array_equal(ours, theirs)
    small = ["--lambdas", "3", "--per-size", "1", "--images-per-task", "40"]
    perform("subsets", *shared, "--lambda-max", "2", *small)
    ours, theirs = (json.loads((copy / f"tiny/{name}/scaling.json").read_text())["subsets"]
                    for name in ("aligned-mean", "aligned"))
    assert list(ours) == [key for key in theirs if "+" in key]         # from two tasks on
    for key in list(ours)[:3]:
        assert ours[key]["best_lambda"] == 2 * theirs[key]["best_lambda"]
        assert ours[key]["normalized"] == theirs[key]["normalized"]
    with pytest.raises(SystemExit):
        disentangle.parse_args(["tiny", "--rule", "iso-c"])
