"""The README's recipes under "Change one thing", applied to a copy as they are printed, and run."""
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, edit, stage

TITLES = ["The loss", "The merging rule", "A task", "The encoder family", "The metric of the heat map"]
README = (ROOT / "README.md").read_text()
RECIPES = re.findall(rf"\*\*({'|'.join(TITLES)})\*\*.*?```diff\n(.*?)```", README, re.S)
SMALL = {  # what makes a stage short, after what is printed
    "pretrain": ["--pretrain-steps", "20"], "probe": ["--probe-steps", "300"],
    "finetune": ["--steps", "20", "--batch-size", "32"], "merge": ["--lambdas", "3"],
    "disentangle": ["--points", "3", "--samples", "50"],
}
TASKS = ["--tasks", "glyphs"]  # for an encoder that has none yet
RUN_ALL = """  # one process for a recipe's commands: importing torch for each takes most of the time
import runpy, shlex, sys
for command in sys.argv[1:]:
    sys.argv = shlex.split(command)[1:]
    sys.path[0] = "."
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_there_are_five_recipes():
    assert [title for title, _ in RECIPES] == TITLES


@pytest.fixture
def tree(copy, tmp_path):
    """A copy of the project with the small study's results in its runs folder."""
    project = tmp_path / "project"
    left_out = shutil.ignore_patterns("runs*", ".git", ".venv", "tests", "__pycache__")
    shutil.copytree(ROOT, project, ignore=left_out)
    shutil.move(copy, project / "runs")
    return project


@pytest.mark.parametrize("title, recipe", RECIPES)
def test_a_recipe_runs_from_a_copy_and_leaves_the_original_alone(tree, title, recipe):
    if title == "The encoder family":                      # as many pictures as its few steps take
        edit(tree / "lib/generated.py", "PRETRAINING_IMAGES = 8, 24000", "PRETRAINING_IMAGES = 8, 2400")
    before = {path: path.read_bytes() for path in (tree / "runs/tiny/aligned").glob("*.json")}
    commands, changed = apply(tree, recipe)
    assert 1 <= changed <= 10, f"{title}: {changed} lines"
    finished = stage(sys.executable, "-c", RUN_ALL, *map(shortened, commands), "python report.py", cwd=tree)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "nothing to do" not in finished.stdout
    if title not in ("A task", "The metric of the heat map"):
        assert {path: path.read_bytes() for path in before} == before
    report = (tree / "runs/report/report.md").read_text()
    shown = {"The loss": "| tiny | smooth | 3 |", "The merging rule": "| tiny | top | 3 |",
             "A task": "| rings |", "The encoder family": "| conv | aligned | 1 |"}
    assert shown.get(title, "| tiny | aligned | 3 |") in report
    if title == "The metric of the heat map":
        assert (tree / "runs/tiny/aligned/angle/glyphs-signs.png").exists()
    if title == "The merging rule":
        assert "| tiny | aligned | 3 |" in report          # side by side


def shortened(command):
    """A printed command with the settings of the small study behind it."""
    script, encoder = shlex.split(command)[1:3]
    small = next((words for stem, words in SMALL.items() if script.startswith(stem)), [])
    return shlex.join([*shlex.split(command), *small, *(TASKS if encoder == "conv" else [])])


def apply(tree, recipe):
    """Copy and replace as a reader would; returns (the commands, how many lines were written)."""
    commands, target, old, new, changed = [], None, [], [], 0

    def replace():
        nonlocal old, new
        if old or new:
            text = target.read_text()
            before = "\n".join(old)
            places = [match.start() for match in re.finditer(rf"^{re.escape(before)}", text, re.M)]
            assert len(places) == 1, f"{target.name} has {before!r} {len(places)} times"
            after = "\n".join(new)
            end = places[0] + len(before) + (0 if new else 1)
            target.write_text(text[:places[0]] + after + text[end:])
        old, new = [], []

    for line in recipe.splitlines():
        if line.startswith("-"):
            if new:
                replace()
            old.append(line[1:])
        elif line.startswith("+"):
            new.append(line[1:])
            changed += bool(line[1:].strip()) and line[1:] not in old
        else:
            replace()
            verb, *words = shlex.split(line)
            if verb == "cp":
                target = Path(shutil.copy(tree / words[0], tree / words[1]))
            elif verb == "edit":
                target = tree / words[0]
            else:
                commands += line.split(" && ")
    replace()
    return commands, changed
