"""Code is a setting: a result remembers what made it, and no row of other code stands beside it unsaid."""
import json
import re
import shlex
import shutil

import pytest
from conftest import STAGES, TASKS, contents, edit, perform, refuse, snapshot, stage_module

from lib.code import code_of

ALL_TASKS = ["--tasks", ",".join(TASKS)]
LOSS = "loss = F.cross_entropy(logits(features, head), answers)"
SMOOTHED = LOSS[:-1] + ", label_smoothing=0.1)"


def test_a_comment_a_docstring_or_white_space_is_no_change(code_copy, copy, capsys):
    for file in ("common.py", "lib/training.py", "lib/vectors.py", *(f"{name}.py" for name in STAGES)):
        text = (code_copy / file).read_text().replace('"""\n', '"""\nAnother word.\n', 1)
        text = text.replace("import torch\n", "import torch  # why\n\n\n")
        (code_copy / file).write_text(text + "\n# an afterthought\n")
    before = snapshot(copy)
    for name, settings in STAGES.items():
        perform(code_copy / f"{name}.py", "tiny", "--runs", copy, *ALL_TASKS, *settings)
    assert capsys.readouterr().out.count("nothing to do") == len(STAGES)
    assert snapshot(copy) == before


def test_the_code_of_a_stage_is_its_file_and_what_it_imports_that_makes_numbers(code_copy):
    before = code_of(code_copy / "merge_eval.py")
    assert {"merge_eval.py", "common.py", "lib/encoders.py", "lib/vectors.py", "lib/images.py"} <= set(before)
    for file in ("finetune.py", "lib/training.py", "lib/plots.py", "lib/results.py", "lib/drawing.py"):
        assert file not in before
    assert {"finetune.py", "lib/training.py", "lib/linearized.py"} <= set(code_of(code_copy / "finetune.py"))
    edit(code_copy / "lib/vectors.py", "return theta_t, tau_t", "return tau_t, theta_t")
    edit(code_copy / "lib/plots.py", "import numpy as np", "import numpy")
    after = code_of(code_copy / "merge_eval.py")
    assert set(after) == set(before)
    assert {file for file in after if after[file] != before[file]} == {"lib/vectors.py"}


def test_a_changed_loss_is_said_with_what_to_type_and_nothing_is_made(code_copy, copy, capsys):
    words = ["tiny", "--runs", copy, *ALL_TASKS, *STAGES["finetune"]]
    edit(code_copy / "finetune.py", LOSS, SMOOTHED)
    before = snapshot(copy)
    perform(code_copy / "finetune.py", *words)
    [said] = capsys.readouterr().out.splitlines()
    assert "finetune.json was made before finetune.py changed" in said and "nothing to do" not in said
    assert "python finetune.py tiny" in said and "--overwrite" in said and "--name NEW" in said
    assert snapshot(copy) == before


def test_a_task_more_under_a_changed_loss_is_refused_and_overwrite_leaves_no_row_of_the_old(code_copy, copy):
    words = ["tiny", "--runs", copy, "--steps", "2", "--batch-size", "8", "--lr", "1e-3", "--name", "two"]
    perform("finetune", *words, "--tasks", "glyphs,signs")
    edit(code_copy / "finetune.py", LOSS, SMOOTHED)
    before = contents(copy / "tiny/two/finetuned") | contents(copy / "tiny/aligned")
    result = (copy / "tiny/two/finetune.json").read_bytes()
    said = refuse(code_copy / "finetune.py", *words, *ALL_TASKS)
    assert "before finetune.py changed, and textures would stand beside it" in said
    assert "--overwrite" in said and "--name" in said
    assert "textures would" in refuse(code_copy / "finetune.py", *words, "--tasks", "textures")
    assert contents(copy / "tiny/two/finetuned") | contents(copy / "tiny/aligned") == before
    assert (copy / "tiny/two/finetune.json").read_bytes() == result
    perform(code_copy / "finetune.py", *words, "--tasks", "textures", "--overwrite")
    assert set(json.loads((copy / "tiny/two/finetune.json").read_text())["tasks"]) == {"textures"}


@pytest.mark.parametrize("name", ["finetune", "probe"])
def test_what_is_printed_about_changed_code_makes_the_same_result_again(code_copy, copy, capsys, name):
    words = ["tiny", "--runs", copy, *ALL_TASKS, *STAGES[name]]
    if name == "finetune":
        shutil.copytree(copy / "tiny/aligned", copy / "tiny/mine")
        words += ["--name", "mine"]
    edit(code_copy / f"{name}.py", "(parameters, CLIP_NORM)", "(parameters, 2 * CLIP_NORM)")
    perform(code_copy / f"{name}.py", *words)
    said = capsys.readouterr().out
    assert f"{name}.py changed" in said
    [command] = re.findall(r'"(python .*?)"', said)
    python, script, *printed = shlex.split(command)
    parse = stage_module(name).parse_args
    assert script == f"{name}.py"
    assert vars(parse(printed)) == vars(parse([str(word) for word in words])) | {"overwrite": True}
    assert name == "finetune" or "--name" not in said      # probe.py has none


@pytest.mark.parametrize("name, flag", [("probe", "--probe-steps"), ("pretrain", "--pretrain-steps")])
def test_a_stage_without_variants_does_not_offer_a_name(copy, name, flag):
    said = refuse(name, "tiny", "--runs", copy, flag, "3")
    assert "of other settings" in said and "--overwrite" in said and "--name" not in said


def test_a_module_behind_training_that_changed_is_said_and_rows_may_be_added(code_copy, copy, capsys):
    words = ["tiny", "--runs", copy, "--steps", "2", "--batch-size", "8", "--lr", "1e-3", "--name", "two"]
    perform("finetune", *words, "--tasks", "glyphs")
    edit(code_copy / "lib/training.py", "warm_up = max(1, steps // 10)", "warm_up = max(2, steps // 10)")
    capsys.readouterr()
    perform(code_copy / "finetune.py", *words, "--tasks", "glyphs,signs")
    assert "was made before lib/training.py changed" in capsys.readouterr().out
    result = json.loads((copy / "tiny/two/finetune.json").read_text())
    assert len({result["tasks"][name]["version"] for name in ("glyphs", "signs")}) == len(result["code"]) == 2


def test_an_analysis_whose_code_changed_is_made_anew_and_what_it_replaces_is_kept(code_copy, copy, capsys):
    folder = copy / "tiny/fine"
    words = ["tiny", "--runs", copy, "--of", "aligned", "--name", "fine", "--lambdas", "2"]
    perform("merge_eval", *words)
    before = contents(folder)
    assert set(before) == {"merge.json", "merge.png", "merged.safetensors"}
    edit(code_copy / "merge_eval.py", "normalized[best] - 0.02", "normalized[best] - 0.03")
    capsys.readouterr()
    perform(code_copy / "merge_eval.py", *words)
    said = capsys.readouterr().out
    assert "merge.json is made anew (merge_eval.py changed since)" in said and "earlier" in said
    [aside] = (folder / "earlier").iterdir()
    assert contents(aside) == before
    result = json.loads((folder / "merge.json").read_text())
    assert result["code"][result["version"]] == code_of(code_copy / "merge_eval.py")
    assert result["val"] == json.loads(before["merge.json"])["val"]
    perform(code_copy / "merge_eval.py", *words)
    assert "nothing to do" in capsys.readouterr().out and len(list((folder / "earlier").iterdir())) == 1


def test_rows_of_an_analysis_that_are_not_asked_for_stay_with_the_code_that_made_them(code_copy, copy):
    path, words = copy / "tiny/aligned/posthoc.json", ["tiny", "--runs", copy, "--images-per-task", "20"]
    perform("posthoc", *words, *ALL_TASKS)
    before, old = path.read_bytes(), json.loads(path.read_text())
    edit(code_copy / "posthoc.py", '[(1.0,)]', '[(0.5,)]')
    perform(code_copy / "posthoc.py", *words, "--tasks", "signs")
    new = json.loads(path.read_text())
    for task in ("glyphs", "textures"):
        assert new["tasks"][task] == old["tasks"][task]
    assert new["code"] == old["code"] | {new["tasks"]["signs"]["version"]: code_of(code_copy / "posthoc.py")}
    assert new["tasks"]["signs"]["version"] != old["tasks"]["signs"]["version"]
    [kept] = (path.parent / "earlier").rglob("*.json")
    assert kept.read_bytes() == before
