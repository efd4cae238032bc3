"""predict.py says of pictures on disk what merge_eval.py counted."""
import csv
import io
import itertools
import json
import re
import shutil
import sys
import textwrap
from unittest import mock

import common
import merge_eval
import numpy as np
import pytest
import torch
from conftest import TASKS, contents, edit, image_folder, perform, refuse, stage
from PIL import Image
from stand_in_hub import client_here, receive, serve

from lib import encoders, files


@pytest.fixture(scope="module")
def fine(study, tmp_path_factory):
    """A runs folder like the study's, with another merge of its vectors, at a lambda above 0."""
    runs = tmp_path_factory.mktemp("fine") / "runs"
    shutil.copytree(study, runs)
    rising = mock.patch.object(merge_eval, "normalized_accuracy", side_effect=itertools.count())
    with rising:                                          # so that the last lambda is picked
        perform("merge_eval", "tiny", "--runs", runs, "--rule", "ties", "--of", "aligned", "--name", "fine",
                "--lambdas", "2", "--lambda-max", "0.1")
    assert read(runs / "tiny/fine", "merge")["best_lambda"] == 0.1
    return runs


@pytest.fixture(scope="module")
def pictures(study, tmp_path_factory):
    """Folder of every test picture of the study's tasks, as TASK/NUMBER-CLASS.png."""
    folder, encoder = tmp_path_factory.mktemp("pictures"), encoders.load_encoder("tiny", study)
    for name in TASKS:
        (folder / name).mkdir()
        task = common.load_task(name, "generated", encoder, study)
        split = task.splits["test"]
        for number, label in zip(split.indices, split.labels, strict=True):
            pixels = split.inputs[number].transpose(1, 2, 0)
            Image.fromarray(pixels).save(folder / name / f"{number:04}-{task.classes[label]}.png")
    return folder


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize("by, counted", [
    ("merged", lambda here, task: read(here / "fine", "merge")["test"]["hits"][task]),
    ("pretrained", lambda here, task: read(here / "fine", "merge")["test_lambda0"]["hits"][task]),
    ("finetuned", lambda here, task: read(here / "aligned", "finetune")["tasks"][task]["hits_test"]),
])
def test_whole_test_splits_have_the_hits_of_the_study(fine, pictures, by, counted, capsys):
    perform("predict", "tiny", pictures, "--runs", fine, "--name", "fine", "--by", by, "--csv", "--top", "1")
    said = capsys.readouterr()
    rows = rows_of(said.out)
    assert len(rows) == len(TASKS) * sum(1 for _ in pictures.rglob("*.png"))
    for task in TASKS:
        own = [row for row in rows if row["task"] == task and f"/{task}/" in row["picture"]]
        hits = sum(row["picture"].endswith(f"-{row['class']}.png") for row in own)
        assert hits == counted(fine / "tiny", task), task
    assert f"passes each: {len(TASKS) if by == 'finetuned' else 1}," in said.err


def read(here, result):
    return json.loads((here / f"{result}.json").read_text())


def test_pictures_are_read_as_those_of_a_task(study, tmp_path, capsys):
    """Large, small and square ones, not one of the size that the encoder takes."""
    folder, encoder = image_folder(tmp_path / "set"), encoders.load_encoder("tiny", study)
    noise = np.random.default_rng(1)
    for side in (16, 32, 40, 200):
        pixels = noise.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"test/cat/square{side}.png")
    task = common.load_task("set", str(folder), encoder, tmp_path / "runs")
    tensors, about = files.load_tensors(study / "tiny/heads/paper/glyphs.safetensors", "")
    head = common.Head(tensors["weight"], tensors["bias"], about["normalise"])
    evaluator = common.Evaluator(encoder, torch.device("cpu"), torch.float32)
    [features] = evaluator.features([task.splits["test"]])
    expected = common.logits(features[0], head).softmax(1).max(1).values
    capsys.readouterr()
    perform("predict", "tiny", folder / "test", "--runs", study, "--by", "pretrained", "--task", "glyphs",
            "--csv", "--top", "1", "--dtype", "fp32")
    said = sorted(float(row["probability"]) for row in rows_of(capsys.readouterr().out))
    np.testing.assert_allclose(said, expected.sort().values, atol=1e-6)


def test_what_cannot_be_read_is_named_and_the_rest_go_on(study, pictures, tmp_path, monkeypatch, capsys):
    good = sorted((pictures / "signs").iterdir())[:2]
    (tmp_path / "cut.png").write_bytes(good[0].read_bytes()[:200])
    (tmp_path / "words.jpg").write_text("no picture")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{good[1]}\n"))
    with pytest.raises(SystemExit) as end:
        perform("predict", "tiny", good[0], tmp_path, "missing.png", "-", "--runs", study, "--task", "signs")
    said = capsys.readouterr()
    assert end.value.code == 1
    for name in ("cut.png", "words.jpg", "missing.png"):
        assert f"{name} cannot be read: " in said.err
    assert "3 of 5 could not be read" in said.err and "2 pictures, passes each: 1" in said.err
    assert [line for line in said.out.splitlines() if line[0] != " "] == [str(path) for path in good]
    assert said.out.count("  signs  ") == 2


def test_patterns_and_several_tasks(study, pictures, capsys):
    perform("predict", "tiny", pictures / "glyphs/000*.png", "--runs", study, "--task", "signs,glyphs")
    said = capsys.readouterr().out
    assert said.count(str(pictures)) == 10 and said.count("  signs   ") == said.count("  glyphs  ") == 10
    assert "textures" not in said


def test_linearized_merges_answer_too(copy, pictures, capsys):
    shared = ["tiny", "--runs", copy, "--name", "linearized"]
    perform("finetune", *shared, "--steps", "20", "--batch-size", "32", "--lr", "3e-4", "--tasks",
            "glyphs,signs")
    perform("make_vectors", *shared)
    perform("merge_eval", *shared, "--lambdas", "5", "--lambda-max", "0.4")
    merge = read(copy / "tiny/linearized", "merge")
    capsys.readouterr()
    perform("predict", *shared, pictures / "signs", "--task", "signs", "--top", "1", "--csv")
    rows = rows_of(capsys.readouterr().out)
    hits = sum(row["picture"].endswith(f"-{row['class']}.png") for row in rows)
    assert merge["best_lambda"] > 0 and hits == merge["test"]["hits"]["signs"]


def test_what_is_wrong_is_said_in_one_line(study, pictures, tmp_path):
    shared = ["--runs", study]
    assert "did you mean glyphs" in refuse("predict", "tiny", pictures, *shared, "--task", "glyph")
    other = [*shared, "--name", "other"]
    assert "merge_eval.py tiny --name other" in refuse("predict", "tiny", pictures, *other)
    assert "holds no picture" in refuse("predict", "tiny", tmp_path, *shared)
    assert "no file fits" in refuse("predict", "tiny", tmp_path / "*.png", *shared)
    assert "unknown encoder" in refuse("predict", "tinny", pictures, *shared)


# --------------------------------------------------------------------------------------- bundles


@pytest.fixture(scope="module")
def bundle(fine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "eight"
    perform("bundle", "tiny", folder, "--runs", fine, "--name", "fine")
    return folder


def test_a_bundle_has_the_hits_of_the_study(fine, pictures, bundle, capsys):
    assert sorted(path.name for path in bundle.iterdir()) == [
        "README.md", "config.json", "heads.safetensors", "model.safetensors"]
    capsys.readouterr()
    perform("predict", bundle, pictures, "--csv", "--top", "1")
    rows, hits = rows_of(capsys.readouterr().out), read(fine / "tiny/fine", "merge")["test"]["hits"]
    for task in TASKS:
        own = [row for row in rows if row["task"] == task and f"/{task}/" in row["picture"]]
        assert sum(row["picture"].endswith(f"-{row['class']}.png") for row in own) == hits[task]


def test_the_cards_lines_say_what_predict_says(bundle, pictures, tmp_path, capsys):
    """In a process that knows nothing of this repository."""
    code = re.search("```python\n(.*?)```", (bundle / "README.md").read_text(), re.S)[1]
    assert len(code.splitlines()) < 15
    chosen = [path for name in TASKS for path in sorted((pictures / name).iterdir())[:4]]
    code = code.replace("FOLDER", str(bundle)).replace("PICTURE", "{}")
    begin, end = code.split("picture = ")
    loop = f"picture = {end}".replace('"{}"', "path")
    script = begin + f"for path in {list(map(str, chosen))}:\n" + textwrap.indent(loop, "    ")
    said = stage(sys.executable, "-c", script, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    capsys.readouterr()
    perform("predict", bundle, *chosen, "--csv", "--top", "1", "--dtype", "fp32")
    rows = rows_of(capsys.readouterr().out)
    for row, line in zip(rows, said.stdout.splitlines(), strict=True):
        task, name, chance = re.fullmatch(r"(\S+) (.+) (\S+)", line).groups()
        assert (task, name) == (row["task"], row["class"])
        assert abs(float(chance) - float(row["probability"])) < .006


def test_the_card_has_the_tables_numbers(bundle, fine):
    card, merge = (bundle / "README.md").read_text(), read(fine / "tiny/fine", "merge")
    assert card.startswith("---\nlibrary_name: timm\n")
    for task in TASKS:
        row = next(line for line in card.splitlines() if line.startswith(f"| {task} |"))
        for value in (merge["test_lambda0"]["tasks"][task], merge["test"]["tasks"][task],
                      merge["single_task"][task]):
            assert f"| {100 * value:.1f} |" in row
    assert merge["command"] in card and f"lambda = {merge['best_lambda']:g}" in card


def test_bundles_that_cannot_be_are_refused(bundle, pictures, study, copy, tmp_path):
    assert "is there already" in refuse("bundle", "tiny", bundle, "--runs", study)
    assert "merge_eval.py tiny --name other" in refuse("bundle", "tiny", tmp_path / "new", "--runs", study,
                                                       "--name", "other")
    assert not (tmp_path / "new").exists()
    assert "a bundle holds the merged encoder" in refuse("predict", bundle, pictures, "--by", "finetuned")
    assert "did you mean signs" in refuse("predict", bundle, pictures, "--task", "sign")
    edit(copy / "tiny/aligned/merge.json", '"linear": false,\n  "probe": "paper"\n },\n "rule"',
         '"linear": true,\n  "probe": "paper"\n },\n "rule"')
    assert "linearized" in refuse("bundle", "tiny", tmp_path / "new", "--runs", copy)
    shutil.copytree(bundle, tmp_path / "cut")
    heads = tmp_path / "cut/heads.safetensors"
    heads.write_bytes(heads.read_bytes()[:-10])
    assert "is no bundle" in refuse("predict", tmp_path / "cut", pictures)


def test_a_bundle_is_pushed_and_comes_back(bundle, fine, pictures, tmp_path, capsys):
    """To a hub that takes files as they are, and from the stand-in hub that serves what it got."""
    words = ["tiny", tmp_path / "eight", "--runs", fine, "--name", "fine", "--push", "user/eight"]
    with client_here("http://127.0.0.1:9", tmp_path / "home"):
        message = refuse("bundle", *words)
    assert "is made, but could not be uploaded to user/eight" in message
    assert contents(tmp_path / "eight") == contents(bundle)
    with receive() as (url, got), client_here(url, tmp_path / "home"):
        perform("bundle", *words)                          # what is there already, the same, goes up
    assert "uploaded to user/eight" in capsys.readouterr().out
    assert got == contents(bundle)
    with serve({"user/eight": bundle}) as (url, _), client_here(url, tmp_path / "home"):
        perform("predict", "hf-hub:user/eight", pictures / "signs", "--csv", "--top", "1")
    rows = [row for row in rows_of(capsys.readouterr().out) if row["task"] == "signs"]
    hits = sum(row["picture"].endswith(f"-{row['class']}.png") for row in rows)
    assert hits == read(fine / "tiny/fine", "merge")["test"]["hits"]["signs"]
    edit(tmp_path / "eight/README.md", "mean", "means")
    assert "is there already" in refuse("bundle", *words)
