"""Results have names: what is merely different is not refused, and nothing of the earlier results is lost."""
import datetime
import itertools
import json
import os
import re
import shutil

import merge_eval
import pytest
import torch
from conftest import ROOT, STAGES, TASKS, contents, edit, perform, refuse, snapshot

from lib import flags, results
from lib.files import Refused, replacing

RECIPE = ["--steps", "5", "--batch-size", "16"]
SMALL = {  # settings that make a stage short, others than those of the study
    "make_vectors": [], "merge_eval": ["--lambdas", "3"], "disentangle": ["--points", "3", "--samples", "50"],
    "subsets": ["--lambdas", "3", "--images-per-task", "30"], "posthoc": ["--images-per-task", "50"],
    "precision": ["--images-per-task", "20", "--compile", "off"],
}
MADE = {"make_vectors": "vectors.json", "merge_eval": "merge.json", "disentangle": "disentangle.json",
        "subsets": "scaling.json", "posthoc": "posthoc.json", "precision": "precision.json"}


# --------------------------------------------------------------------------------------- in any order


def short_variant(runs):
    perform("finetune", "tiny", "--runs", runs, "--tasks", "glyphs,textures", *RECIPE, "--name", "short")
    for name, words in SMALL.items():
        perform(name, "tiny", "--runs", runs, "--name", "short", *words)


FIRST_DAY = {  # what it is: the stage and its words, or a function of the runs folder
    "a finer grid": ["merge_eval", "--lambda-max", "0.2", *SMALL["merge_eval"]],
    "two of the tasks": ["merge_eval", "--tasks", "glyphs,signs", *SMALL["merge_eval"]],
    "every pair": ["disentangle", "--pairs", "all", *SMALL["disentangle"]],
    "subsets": ["subsets", *SMALL["subsets"]],
    "subsets of two": ["subsets", "--per-size", "1", "--tasks", "signs,textures", *SMALL["subsets"]],
    "linearized": ["posthoc", *SMALL["posthoc"]],
    "a shorter variant": short_variant,
    "fewer images": ["posthoc", "--images-per-task", "40"],
    "another order": ["make_vectors", "--tasks", "signs,glyphs"],
    "bf16": ["precision", *SMALL["precision"]],
}


def test_whatever_is_tried_is_not_refused_and_loses_nothing(copy):
    for what, tried in FIRST_DAY.items():
        before = set(contents(copy / "tiny").values())
        if callable(tried):
            tried(copy)
        else:
            name, *words = tried
            perform(name, "tiny", "--runs", copy, *words)
        assert before <= set(contents(copy / "tiny").values()), what
    for file in MADE.values():
        result = json.loads((copy / "tiny/short" / file).read_text())
        tasks = result.get("tasks") or result["config"].get("tasks")
        assert set(tasks or result["pairs"]["glyphs-textures"]["tasks"]) == {"glyphs", "textures"}, file
    assert not (copy / "tiny/short/earlier").exists()


# --------------------------------------------------------------------------------------- earlier/


@pytest.mark.parametrize("name, words, replaced", [
    ("merge_eval", ["--lambda-max", "0.2", "--lambdas", "3"],
     ["merge.json", "merge.png", "merged.safetensors"]),
    ("merge_eval", ["--tasks", "glyphs,signs", "--lambdas", "3"],
     ["merge.json", "merge.png", "merged.safetensors"]),
    ("disentangle", ["--pairs", "all", "--points", "3", "--samples", "50"],
     ["disentangle.json", "disentangle/glyphs-signs.npz", "disentangle/glyphs-signs.png"]),
    ("make_vectors", ["--tasks", "glyphs,signs"],
     ["vectors.json", "vectors.png", "overlap.png", "overlap_layers.png"]),
])
def test_what_an_analysis_replaces_is_kept_byte_for_byte_under_its_date(copy, capsys, name, words, replaced):
    folder = copy / "tiny/aligned"
    before, stem = contents(folder), replaced[0].removesuffix(".json")
    made = datetime.datetime.fromtimestamp((folder / replaced[0]).stat().st_mtime)
    perform(name, "tiny", "--runs", copy, *words)
    said = capsys.readouterr().out
    assert f"{replaced[0]} is made anew (" in said and f"kept in {folder / 'earlier'}/" in said
    [aside] = (folder / "earlier").iterdir()
    assert aside.name == f"{stem}-{made:%Y-%m-%dT%H-%M-%S}"
    assert contents(aside) == {file: before[file] for file in replaced}
    after = contents(folder)
    assert {file: after[file] for file in before if file not in replaced} == \
        {file: content for file, content in before.items() if file not in replaced}
    assert after[replaced[0]] != before[replaced[0]]


def test_every_result_that_is_replaced_has_a_folder_of_its_own(copy):
    folder, kept = copy / "tiny/aligned", []
    for samples in (10, 11, 12):
        kept.append((folder / "disentangle.json").read_bytes())
        perform("disentangle", "tiny", "--runs", copy, "--points", "3", "--samples", samples)
    asides = [contents(aside) for aside in (folder / "earlier").iterdir()]
    assert sorted(aside["disentangle.json"] for aside in asides) == sorted(kept)
    assert [len(aside) for aside in asides] == [3, 3, 3]


def test_pairs_of_the_same_settings_are_added_and_nothing_is_set_aside(copy):
    folder = copy / "tiny/aligned"
    before = contents(folder)
    row = json.loads(before["disentangle.json"])["pairs"]["glyphs-signs"]
    perform("disentangle", "tiny", "--runs", copy, "--pairs", "glyphs-textures", *STAGES["disentangle"])
    after = contents(folder)
    pairs = json.loads(after.pop("disentangle.json"))["pairs"]
    assert pairs["glyphs-signs"] == row and set(pairs) == {"glyphs-signs", "glyphs-textures"}
    del before["disentangle.json"]
    assert {file: after.get(file) for file in before} == before and not (folder / "earlier").exists()


def test_overwrite_keeps_nothing_of_an_analysis(copy):
    folder = copy / "tiny/aligned"
    perform("disentangle", "tiny", "--runs", copy, "--points", "3", "--samples", "9", "--overwrite")
    assert json.loads((folder / "disentangle.json").read_text())["pairs"]["glyphs-signs"]["samples"] == [9, 9]
    assert not (folder / "earlier").exists()


# --------------------------------------------------------------------------------------- killed anywhere


def analysis(path, settings, made_of, key):
    """A small analysis of rows a and b with a picture each, or of one whole with a picture."""
    def picture(row):
        return path.parent / f"{row or 'whole'}.png"

    inputs = {row: {"vector": value} for row, value in made_of.items()} if key else made_of
    result = results.Result(path, {"encoder": "tiny", **settings}, inputs, ROOT / "posthoc.py",
                            torch.device("cpu"), overwrite=False, key=key, files=lambda row: [picture(row)])
    for row in result.todo:
        with result.saving(row):
            with replacing(picture(row)) as temporary:
                temporary.write_text(f"{settings} {made_of} {row}")
            if key:
                result.rows[row] = {"value": f"{settings} {made_of[row]}"}
            else:
                result.values = {"value": f"{settings} {made_of}"}
    return result.todo


@pytest.mark.parametrize("key", ["rows", None])
@pytest.mark.parametrize("settings, made_of", [
    ({"points": 5}, {"a": 1, "b": 1}),
    ({"points": 3}, {"a": 1, "b": 2}),
], ids=["other settings", "other inputs"])
def test_an_analysis_killed_while_it_replaces_loses_nothing_and_goes_on(tmp_path, monkeypatch, key, settings,
                                                                        made_of):
    """Killed before the n-th renaming or copying of a file, for every n there is."""
    move, copy_file = os.replace, shutil.copy2

    def counted(function):
        def call(*words, **more):
            if next(calls) == last:
                raise KeyboardInterrupt
            return function(*words, **more)
        return call

    monkeypatch.setattr(results, "code_of", lambda script: {script.name: "the same"})  # saves a second
    monkeypatch.setattr(os, "replace", counted(move))
    monkeypatch.setattr(shutil, "copy2", counted(copy_file))
    for last in itertools.count(1):
        path, calls = tmp_path / str(last) / "result.json", itertools.count(-1000)
        analysis(path, {"points": 3}, {"a": 1, "b": 1}, key)
        before, calls = contents(path.parent), itertools.count(1)
        try:
            analysis(path, settings, made_of, key)
            break
        except KeyboardInterrupt:
            assert set(before.values()) <= set(contents(path.parent).values()), last
        analysis(path, settings, made_of, key)
        assert set(before.values()) <= set(contents(path.parent).values()), last
        calls = itertools.count(-1000)
        assert analysis(path, settings, made_of, key) == []
        values = json.loads(path.read_text())
        if key:
            for row, value in made_of.items():
                assert values[key][row]["value"] == f"{settings} {value}"
        else:
            assert values["value"] == f"{settings} {made_of}"
    assert last > 3


def test_a_row_made_of_other_inputs_is_made_anew_and_the_others_stay(tmp_path):
    path = tmp_path / "result.json"
    assert analysis(path, {"points": 3}, {"a": 1, "b": 1}, "rows") == ["a", "b"]
    before, row = contents(tmp_path), json.loads(path.read_text())["rows"]["a"]
    assert analysis(path, {"points": 3}, {"a": 1, "b": 2}, "rows") == ["b"]
    [aside] = (tmp_path / "earlier").iterdir()
    assert contents(aside) == {file: before[file] for file in ("result.json", "b.png")}
    assert json.loads(path.read_text())["rows"]["a"] == row
    assert (tmp_path / "a.png").read_bytes() == before["a.png"]


# --------------------------------------------------------------------------------------- --name and --of


def test_results_of_a_variant_under_another_name_leave_its_folder_untouched(copy):
    before = snapshot(copy / "tiny/aligned")
    words = ["tiny", "--runs", copy, "--of", "aligned", "--name", "fine"]
    perform("merge_eval", *words, "--lambda-max", "0.2", "--lambdas", "3")
    assert snapshot(copy / "tiny/aligned") == before
    fine = json.loads((copy / "tiny/fine/merge.json").read_text())
    aligned = json.loads((copy / "tiny/aligned/merge.json").read_text())
    assert fine["of"] == "aligned" and fine["lambdas"] == [0, 0.1, 0.2]
    for task in TASKS:                                     # at lambda 0.1
        assert fine["val"]["tasks"][task][1] == aligned["val"]["tasks"][task][1]
    for name in ("make_vectors", "disentangle", "subsets", "posthoc"):
        perform(name, *words, *SMALL[name])
    assert snapshot(copy / "tiny/aligned") == before
    assert not (copy / "tiny/fine/earlier").exists()


@pytest.mark.parametrize("words, of, name", [
    ([], "aligned", "aligned"), (["--name", "full"], "full", "full"),
    (["--of", "full", "--name", "mine"], "full", "mine"), (["--rule", "ties"], "aligned", "aligned-ties"),
    (["--rule", "ties", "--of", "aligned"], "aligned", "aligned-ties"),
    (["--rule", "ties", "--of", "full"], "full", "full-ties"),
    (["--rule", "ties", "--of", "full", "--name", "full"], "full", "full-ties"),
    (["--rule", "ties", "--of", "full", "--name", "mine"], "full", "mine"),
    (["--rule", "ties", "--name", "full"], "full", "full-ties"), (["--of", "full"], None, None)])
def test_results_of_other_vectors_or_a_rule_stand_beside_those_of_the_sum(words, of, name):
    args = merge_eval.parse_args(["tiny", *words])
    if of:
        assert flags.variant_names(args) == (of, name)
    else:
        with pytest.raises(Refused, match="--name NAME says where"):
            flags.variant_names(args)


def test_a_variant_that_is_not_there_is_named_with_the_command_that_makes_it(copy):
    before = snapshot(copy / "tiny")
    for name, words in SMALL.items():
        words = ["tiny", "--runs", copy, "--tasks", ",".join(TASKS), *words]
        for chosen in (["--name", "nowhere"], ["--of", "nowhere", "--name", "aligned"]):
            said = refuse(name, *words, *chosen)
            assert "nowhere/" in said, said
            assert re.search(r"python \w+\.py tiny --name nowhere", said), said
    assert snapshot(copy / "tiny") == before


def test_a_name_that_is_a_recipe_chooses_it_and_any_other_goes_with_any_recipe():
    import finetune
    for words, recipe, name in (([], "aligned", "aligned"), (["--recipe", "full"], "full", "full"),
                                (["--name", "full"], "full", "full"), (["--name", "mine"], "aligned", "mine"),
                                (["--recipe", "full", "--name", "mine"], "full", "mine")):
        args = finetune.parse_args(["tiny", *words])
        assert (args.recipe, args.name) == (recipe, name)


# --------------------------------------------------------------------------------------- a copied stage


def sam(code_copy):
    """A copy of finetune.py with another loss."""
    path = shutil.copy(code_copy / "finetune.py", code_copy / "finetune_sam.py")
    loss = "loss = F.cross_entropy(logits(features, head), answers)"
    edit(path, loss, loss[:-1] + ", label_smoothing=0.1)")
    return path


def test_a_copied_stage_with_a_name_goes_through_every_later_stage_and_touches_no_other_file(code_copy, copy):
    script, before = sam(code_copy), snapshot(copy)
    code = contents(code_copy)
    words = ["tiny", "--runs", copy, "--name", "sam"]
    perform(script, *words, "--tasks", "glyphs,signs", *RECIPE)
    for name in ("make_vectors", "merge_eval", "disentangle", "posthoc"):
        perform(code_copy / f"{name}.py", *words, *SMALL[name])
        assert (copy / "tiny/sam" / MADE[name]).exists()
    after = snapshot(copy)
    assert {path: after.get(path) for path in before} == before
    assert {path.relative_to(copy / "tiny").parts[0] for path in set(after) - set(before)} == {"sam"}
    assert {file: content for file, content in contents(code_copy).items() if file in code} == code
    result = json.loads((copy / "tiny/sam/finetune.json").read_text())
    assert "finetune_sam.py" in result["code"][result["tasks"]["glyphs"]["version"]]
    perform("finetune", "tiny", "--runs", copy, "--name", "plain", "--tasks", "glyphs,signs", *RECIPE)
    plain = json.loads((copy / "tiny/plain/finetune.json").read_text())
    assert plain["tasks"]["glyphs"]["final_loss"] != result["tasks"]["glyphs"]["final_loss"]


def test_a_copied_stage_without_a_name_is_refused_where_it_would_stand_in_for_another(code_copy, copy):
    script = sam(code_copy)
    shared = ["tiny", "--runs", copy]
    for words in (["--tasks", ",".join(TASKS), *STAGES["finetune"]], STAGES["finetune"], RECIPE,
                  ["--tasks", "signs", *STAGES["finetune"]]):
        before = snapshot(copy)
        said = refuse(script, *shared, *words)
        assert "finetune.json" in said and "--name" in said and "--overwrite" in said
        assert snapshot(copy) == before
    perform("finetune", *shared, "--tasks", "glyphs,signs", *RECIPE, "--name", "two")
    before = snapshot(copy)
    said = refuse(script, *shared, "--tasks", "textures", *RECIPE, "--name", "two")
    assert "finetune.json" in said and "--name" in said and "--overwrite" in said
    assert {path: stat for path, stat in snapshot(copy).items() if path.suffix != ".lock"} == \
        {path: stat for path, stat in before.items() if path.suffix != ".lock"}
