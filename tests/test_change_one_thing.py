"""The README's recipes under "Change one thing", applied to a copy as they are printed, and run."""
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

from conftest import FEW, ROOT, edit, stage

TITLES = ["The loss", "The merging rule", "A task", "The encoder family", "The metric of the heat map"]
README = (ROOT / "README.md").read_text()
RECIPES = re.findall(rf"\*\*({'|'.join(TITLES)})\*\*.*?```diff\n(.*?)```", README, re.S)
SMALL = {  # what makes a stage short, after what is printed
    "pretrain": ["--pretrain-steps", "20"], "probe": ["--probe-steps", "300"],
    "finetune": ["--steps", "20", "--batch-size", "32"], "merge": ["--lambdas", "3"],
    "disentangle": ["--points", "3", "--samples", "50"],
}
TASKS = ["--tasks", "glyphs"]  # for an encoder that has none yet
RUN_ALL = """  # one process for all recipes: importing torch for each command takes most of the time
import contextlib, json, os, runpy, shlex, sys, traceback
for tree, commands in json.loads(sys.argv[1]).items():
    os.chdir(tree)
    sys.path[0] = tree
    for name in [name for name in sys.modules if name.split(".")[0] == "lib" or os.path.exists(f"{name}.py")]:
        del sys.modules[name]
    with (open("output", "w", buffering=1) as output, contextlib.redirect_stdout(output),
          contextlib.redirect_stderr(output)):
        try:
            for command in commands:
                sys.argv = shlex.split(command)[1:]
                runpy.run_path(sys.argv[0], run_name="__main__")
        except BaseException:
            traceback.print_exc()
"""


def test_there_are_five_recipes():
    assert [title for title, _ in RECIPES] == TITLES


def test_the_recipes_run_from_a_copy_and_leave_the_original_alone(study, tmp_path):
    commands, changed = {}, {}
    left_out = shutil.ignore_patterns("runs*", ".git", ".venv", "tests", "__pycache__")
    for title, recipe in RECIPES:
        tree = tmp_path / title
        shutil.copytree(ROOT, tree, ignore=left_out)
        shutil.copytree(study, tree / "runs")
        sizes = f'"train": {FEW["train"]}, "test": {FEW["test"]}'              # where tasks are drawn anew
        edit(tree / "lib/generated.py", '"train": (0, 4000), "test": (1, 1000)', sizes)
        if title == "The encoder family":                  # as many pictures as its few steps take
            edit(tree / "lib/generated.py", "_IMAGES = 8, 24000", "_IMAGES = 8, 2400")
        printed, changed[title] = apply(tree, recipe)
        commands[str(tree)] = [*map(shortened, printed), "python report.py"]
    assert all(1 <= lines <= 10 for lines in changed.values()), changed
    finished = stage(sys.executable, "-c", RUN_ALL, json.dumps(commands))
    assert finished.returncode == 0, finished.stderr
    shown = {"The loss": "| tiny | smooth | 3 |", "The merging rule": "| tiny | aligned-top | 3 |",
             "A task": "| rings |", "The encoder family": "| conv | aligned | 1 |"}
    for title in TITLES:
        said = (tmp_path / title / "output").read_text()
        assert "Traceback" not in said and "report.html" in said and "nothing to do" not in said, said
        runs = tmp_path / title / "runs"
        if title not in ("A task", "The metric of the heat map"):
            for path in (study / "tiny/aligned").glob("*.json"):
                assert (runs / "tiny/aligned" / path.name).read_bytes() == path.read_bytes(), title
        report = (runs / "report/report.md").read_text()
        assert shown.get(title, "| tiny | aligned | 3 |") in report, title
    assert (runs / "tiny/aligned/angle/glyphs-signs.png").exists()         # of the last, the heat map's
    report = (tmp_path / "The merging rule/runs/report/report.md").read_text()
    assert "| tiny | aligned | 3 |" in report              # side by side


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
