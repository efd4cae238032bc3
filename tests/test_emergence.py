"""emergence.py: encoders along pre-training, xi of vectors as they are, of one norm and of one gain."""
import json
import os
import shutil
from unittest import mock

import disentangle
import emergence
import filelock
import numpy as np
import probe
import pytest
import torch
from conftest import TASKS, draw_few, perform, refuse
from test_pretraining import NARROW, SCHEMES, few_pictures

from lib import encoders, files, generated
from lib.study import open_study
from lib.vectors import norm

SMALL = ["--seeds", "0", "--schemes", "random,shuffled", "--checkpoints", "2", "--pretrain-steps", "4",
         "--tasks", ",".join(TASKS), "--steps", "8", "--samples", "24", "--gain", "0.01", "--device", "cpu"]
ROWS = ["seed0-random-step0", "seed0-shuffled-step4"]


@pytest.fixture(scope="session")
def emerged(tmp_path_factory):
    """A runs folder with a small emergence.json: two encoders, three tasks; tests leave it as it is."""
    base = tmp_path_factory.getbasetemp()
    runs = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emerged/runs"
    with filelock.FileLock(runs.parent.with_suffix(".lock")):    # once for all of xdist's workers
        if not runs.exists():
            emerge(runs)
    return runs


def emerge(runs):
    draw_few(runs / "emergence/seed0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generated, "draw_pretraining", few_pictures)
        patch.setattr(emergence, "LEARNING_RATES", [1e-3, 1e-2])
        patch.setattr(emergence, "SEARCHED", 1)
        patch.setattr(probe, "LEARNING_RATES", [0.1])
        parse = probe.parse_args
        patch.setattr(probe, "parse_args", lambda words: parse([*words, "--probe-steps", "100"]))
        for scheme in SCHEMES:
            patch.setattr(f"{scheme}.ARCHITECTURE", NARROW)
        args = emergence.parse_args(["--runs", str(runs), *SMALL])
        with mock.patch.object(emergence, "measure", dies_at_the_second(emergence.measure)):
            with pytest.raises(KeyboardInterrupt):
                emergence.main(args)
        perform("report", "--runs", runs)                  # of what a kill has left
        assert [row["scheme"] for row in result(runs)["over_seeds"]] == ["random"]
        emergence.main(args)
        made = (runs / "emergence/emergence.json").read_bytes()
        emergence.main(args)                               # nothing is measured again
        again = json.loads((runs / "emergence/emergence.json").read_bytes())
        assert again["encoders"] == json.loads(made)["encoders"]


def dies_at_the_second(measure):
    """A function that is `measure` once, and then as if it were interrupted."""
    return mock.Mock(wraps=measure, side_effect=[mock.DEFAULT, KeyboardInterrupt])


def result(runs):
    return json.loads((runs / "emergence/emergence.json").read_text())


def variant(runs, row):
    """(folder, open study) of an encoder's chosen variant."""
    found = result(runs)["encoders"][row]
    encoder = f"{found['scheme']}-step{found['step']}"
    folder = runs / "emergence/seed0" / encoder / f"lr{found['lr']:g}"
    words = [encoder, "--runs", folder.parent.parent, "--name", folder.name, "--device", "cpu"]
    return folder, open_study(disentangle.parse_args([str(word) for word in words]), "x", "finetune.json")


def test_every_encoder_has_a_row_of_the_stages_own_figures(emerged):
    rows = result(emerged)["encoders"]
    assert list(rows) == ROWS
    for name, row in rows.items():
        folder, _ = variant(emerged, name)
        merge = json.loads((folder / "merge.json").read_text())
        tuned = json.loads((folder / "finetune.json").read_text())
        assert tuned["config"]["recipe"]["probe"] == "converged" and set(tuned["tasks"]) == set(TASKS)
        probing = merge["probing"]["converged"]["absolute"]
        assert row["probing"] == probing == merge["test_lambda0"]["absolute"]
        assert row["addition"] == merge["test"]["absolute"] and row["n"] == 1200
        xi = json.loads((folder / "disentangle.json").read_text())["pairs"]
        assert set(xi) == {"glyphs-signs", "signs-textures", "textures-glyphs"}
        found = np.mean([pair["mean_xi_in_box"] for pair in xi.values()])
        assert row["xi"]["as it is"]["prediction"] == pytest.approx(found)
        other = {1e-3: 1e-2, 1e-2: 1e-3}[row["lr"]]
        searched = json.loads((folder.with_name(f"lr{other:g}") / "finetune.json").read_text())["tasks"]
        assert list(searched) == ["glyphs"] and searched["glyphs"]["val"] <= tuned["tasks"]["glyphs"]["val"]


def test_vectors_as_they_are_scaled_by_one_have_the_xi_of_disentangle(emerged):
    for name in ROWS:
        _, study = variant(emerged, name)
        evaluator = study.evaluator(0)
        xi = emergence.xi_of_scaled(study, evaluator, emergence.ring(TASKS), dict.fromkeys(TASKS, 1.0), 24)
        row = result(emerged)["encoders"][name]
        assert xi == {**row["xi"]["as it is"], "pairs": 3}


def test_vectors_of_one_norm_have_it_and_those_of_one_gain_stop_there(emerged):
    for name in ROWS:
        row, (folder, study) = result(emerged)["encoders"][name], variant(emerged, name)
        length = 0.05 * norm(encoders.weights_of(study.encoder.module))
        for task in TASKS:
            vector, _ = files.load_tensors(folder / f"vectors/{task}.safetensors", "")
            scaled = {key: row["scales"]["norm"][task] * tensor for key, tensor in vector.items()}
            assert norm(scaled) == pytest.approx(length, rel=1e-5)
            alpha, whole = row["scales"]["gain"][task], row["gains"]["as it is"][task]
            assert (alpha is None) <= (whole < 0.01) and (alpha is None or 0 < alpha <= 1)
        left = sum(None not in (row["scales"]["gain"][a], row["scales"]["gain"][b])
                   for a, b in emergence.ring(TASKS))
        assert row["xi"]["gain"]["pairs"] == left and row["xi"]["norm"]["pairs"] == 3


@pytest.mark.parametrize("gained, expected", [
    ([0, .1, .2], .25), ([0, -.2, .2], .8125), ([0, .04, .04], None), ([0, .05, 0], .5)])
def test_the_smallest_scale_with_the_gain_is_found_on_a_straight_line(gained, expected):
    alpha = emergence.first_reached(np.array([0, .5, 1]), np.array(gained), .05)
    assert alpha is None if expected is None else alpha == pytest.approx(expected)


def test_schemes_are_looked_at_on_the_way_and_controls_at_their_ends():
    assert emergence.looked_at("random", [25, 100], 400) == [0]
    assert emergence.looked_at("mae", [25, 100], 400) == [25, 100, 400]
    assert emergence.looked_at("shuffled", [25, 100], 400) == [400]


def test_a_ring_has_every_task_in_two_pairs():
    assert emergence.ring(["a", "b"]) == [("a", "b")]
    assert emergence.ring(["a", "b", "c"]) == [("a", "b"), ("b", "c"), ("c", "a")]
    pairs = [name for pair in emergence.ring(list("abcdefgh")) for name in pair]
    assert all(pairs.count(name) == 2 for name in "abcdefgh")


def row_of(scheme, step, seed, probing, xi):
    columns = dict.fromkeys(emergence.COLUMNS, 0.0) | {"probing": probing}
    found = {"prediction": xi, "representation": xi}
    return {"scheme": scheme, "step": step, "seed": seed, "xi": {"as it is": found}, **columns}


def test_mean_deviation_and_rank_correlation_over_seeds():
    rows = [row_of("mae", 25, 0, .5, .3), row_of("mae", 25, 1, .7, .1), row_of("random", 0, 0, .2, .35),
            row_of("mae", 25, 2, .6, None)]
    random, mae = emergence.over_seeds(rows)
    assert (random["scheme"], random["seeds"], mae["seeds"]) == ("random", 1, 3)
    assert mae["probing"] == pytest.approx([.6, np.std([.5, .7, .6], ddof=1)])
    assert random["probing"] == [.2, None]
    assert mae["xi, as it is, prediction"] == pytest.approx([.2, np.std([.1, .3], ddof=1)])
    assert emergence.rank_correlations(rows) == {"as it is": pytest.approx(-1)}
    assert emergence.rank_correlations(rows[:2]) == {"as it is": None}
    ties = [row_of("mae", 25, seed, probing, xi) for seed, (probing, xi) in
            enumerate([(.1, .3), (.1, .3), (.2, .2), (.3, .2)])]
    expected = np.corrcoef([1.5, 1.5, 3, 4], [3.5, 3.5, 1.5, 1.5])[0, 1]
    assert emergence.rank_correlations(ties) == {"as it is": pytest.approx(expected)}


def test_the_report_shows_the_figure_and_the_table(emerged, tmp_path):
    for name in ("emergence.json", "emergence.png"):
        (tmp_path / "emergence").mkdir(exist_ok=True)
        shutil.copy(emerged / "emergence" / name, tmp_path / "emergence")
    perform("report", "--runs", tmp_path)
    text = (tmp_path / "report/report.md").read_text()
    assert "![emergence](../emergence/emergence.png)" in text
    table = [line for line in text.splitlines() if line.startswith(("| random |", "| shuffled |"))]
    rows = result(emerged)["encoders"].values()
    assert len(table) == 2
    for line, row in zip(table, rows, strict=True):
        assert f"| {100 * row['probing']:.1f} | {100 * row['single']:.1f} |" in line
        assert f"| {row['xi']['norm']['prediction']:.2f} |" in line


def test_wrong_words_are_refused_in_a_line(tmp_path, capsys):
    for words, said in ((["--schemes", "mae,simclr"], "'simclr' is none of random, supervised"),
                        (["--seeds", "1,0"], "not in ascending order"),
                        (["--gain", "0"], "not a number above 0")):
        with pytest.raises(SystemExit) as end:
            emergence.parse_args(words)
        assert end.value.code == 2 and said in capsys.readouterr().err
    words = ["--runs", tmp_path, "--schemes", "mae", "--seeds", "0", "--checkpoints", "50"]
    said = refuse("emergence", *words, "--pretrain-steps", "4")
    assert "--checkpoints 50 is not before the last step, 4" in said


def test_random_initialisation_is_what_every_scheme_begins_with(emerged):
    torch.manual_seed(0)
    module = encoders.build_architecture(NARROW)
    encoder = encoders.load_encoder("random-step0", emerged / "emergence/seed0")
    torch.testing.assert_close(encoder.module.patch_embed.proj.weight, module.patch_embed.proj.weight)
