"""What the README and the docstrings print can be typed."""
import importlib
import re
import shlex

import pytest
from conftest import ROOT

STAGES = ["pretrain", "pretrain_mae", "pretrain_dino", "pretrain_contrastive", "emergence", "probe",
          "finetune", "make_vectors", "merge_eval", "disentangle", "subsets", "posthoc", "precision",
          "refit", "coefficients", "negate", "report", "bench", "predict", "bundle", "lib.generated"]
TEXTS = ["README.md", "run_all.sh", *(f"{name.replace('.', '/')}.py" for name in STAGES)]
PRINTED = r"^(?:#   |    )(?:python|torchrun --nproc-per-node \d+) (?:-m )?([\w.]+?)(?:\.py)?(?: +(.*))?$"


def printed_commands():
    """{(stage, words)} of every command that a text prints."""
    commands = set()
    for text in TEXTS:
        for name, words in re.findall(PRINTED, (ROOT / text).read_text(), re.M):
            if "${stage" not in words:
                commands.add((name, words.split("#")[0].strip()))
    return sorted(commands)


COMMANDS = printed_commands()


@pytest.mark.parametrize("name, words", COMMANDS)
def test_every_printed_command_is_accepted_by_its_stage(name, words):
    importlib.import_module(name).parse_args(shlex.split(words))


def test_every_stage_prints_a_command():
    assert {name for name, _ in COMMANDS} >= set(STAGES)


def test_the_readmes_links_and_scripts_exist():
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"\]\((?!http)([^)#]+)\)", text) + re.findall(r"`(\w+\.(?:py|sh))`", text)
    for target in named + re.findall(r"^    bash (\S+)", text, re.M):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("name", STAGES)
def test_help_shows_the_docstring(name, capsys):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as left:
        module.parse_args(["--help"])
    assert left.value.code == 0 and module.__doc__.strip().splitlines()[0] in capsys.readouterr().out


@pytest.mark.parametrize("name, words", [
    ("probe", []), ("probe", ["tiny", "--seed", "-1"]), ("finetune", ["tiny", "--steps", "0"]),
    ("finetune", ["tiny", "--lr", "nan"]), ("disentangle", ["tiny", "--limit", "x"]),
    ("merge_eval", ["tiny", "--lamda-max", "1"]),
    ("finetune", ["tiny", "--recipe", "magic"]), ("make_vectors", ["tiny", "--recipe", "magic"]),
])
def test_a_wrong_flag_is_one_line_and_exit_code_2(name, words, capsys):
    with pytest.raises(SystemExit) as left:
        importlib.import_module(name).parse_args(words)
    said = capsys.readouterr()
    assert left.value.code == 2 and said.err.count("\n") == 1 and said.out == ""
