"""Every printed command runs in a folder left by the study, in any order, and nothing of it is lost."""
import hashlib
import itertools
import json
import os
import random
import re
import shlex
import shutil
import stat
from pathlib import Path

import pytest
import timm
import torch
from conftest import ROOT, STAGES, TASKS, TIMM, image_folder, perform, stage

from lib.comparisons import PUBLISHED

SCHEMES = ["pretrain", "pretrain_mae", "pretrain_dino", "pretrain_contrastive"]
SCRIPTS = [*SCHEMES, "pretrain_t5", "emergence", "probe", "finetune", "make_vectors", "merge_eval",
           "disentangle", "subsets", "posthoc", "precision", "refit", "coefficients", "negate", "report",
           "bench", "predict", "bundle"]
PRINTED = re.compile(r"^(?:#   |    )(?:torchrun --nproc-per-node \d+ |python )(\w+)\.py(.*)$", re.M)
ELSEWHERE = {  # executed by other tests, on what they make
    "finetune vit_b16_clip_laion2b --recipe zeroshot": "test_text_heads.py",
    "probe vit_b16_dino": "test_encoders_and_hub.py, from a stand-in hub",
    "probe transformers:NAME --tasks cola,sst2": "test_encoders_and_hub.py, from a stand-in hub",
    "pretrain_t5 runs/small-t5 --data DIR --tasks cola,sst2,mrpc,rte,stsb,qqp": "test_texts.py",
    "probe transformers:small/t5 --weights runs/small-t5 --data DIR --tasks cola,sst2,mrpc": "test_texts.py",
    "finetune transformers:small/t5 --recipe zeroshot": "test_texts.py",
    "emergence": "test_emergence.py, small", "emergence --seeds 1": "test_emergence.py, small",
    "emergence --seeds 0 --schemes random,mae --checkpoints 400": "test_emergence.py, small",
    "bench": "below, at a size that takes seconds",
    "bundle tiny runs/bundle": "test_predict.py, as all of predict's and bundle's",
    "make_vectors vit_b16_dino --from dtd=CHECKPOINT": "test_brought.py",
    "make_vectors vit_b16_dino --from dtd=checkpoint.pth svhn=OWNER/NAME": "test_brought.py",
    "refit tiny": "test_refit.py", "coefficients tiny": "test_refit.py", "negate tiny": "test_negate.py",
}
SMALL = {  # settings behind what is printed; of two the last counts
    **dict.fromkeys(SCHEMES, ["--pretrain-steps", "3", "--checkpoints", "0,2"]),
    "probe": [*STAGES["probe"], "--tasks", ",".join(TASKS)],
    "finetune": ["--steps", "20", "--batch-size", "32"], "merge_eval": ["--lambdas", "4"],
    "disentangle": ["--points", "3", "--samples", "40"],
    "subsets": ["--lambdas", "3", "--images-per-task", "40"],
    "posthoc": ["--images-per-task", "60"], "precision": ["--images-per-task", "60", "--compile", "off"],
    "refit": ["--lambdas", "2"], "negate": ["--lambdas", "2"],
}
FEW_STEPS = ["--steps", "2", "--batch-size", "8", "--lr", "1e-3", "--tasks", "glyphs,textures"]
WORDS = {"vit_b16_dino": "tiny", "cars-dtd,mnist-svhn": "glyphs-signs,glyphs-textures",
         "vit_b16_clip_laion2b": "tiny", "cars,dtd": "glyphs,signs", "sun397": "textures"}


def printed_commands():
    """{"stage words"} in the order in which they are printed."""
    texts = [ROOT / "README.md", *(ROOT / f"{name}.py" for name in SCRIPTS)]
    found = {}
    for text in texts:
        for script, words in PRINTED.findall(text.read_text()):
            found[f"{script}{words.split('#')[0]}".strip()] = text.name
    return list(found)


COMMANDS = [command for command in printed_commands()
            if command not in ELSEWHERE and command.split()[0] not in ("bench", "predict", "bundle")]


def test_every_stage_prints_a_command():
    assert {command.split()[0] for command in printed_commands()} == set(SCRIPTS)
    assert set(ELSEWHERE) - {"bench"} <= set(printed_commands())


@pytest.fixture(scope="module")
def left(study, tmp_path_factory):
    """The small study's runs folder with the variants that run_all.sh's flags add, and what commands name."""
    folder = tmp_path_factory.mktemp("commands")
    runs = Path(shutil.copytree(study, folder / "runs"))
    for name in ("full", "attention"):
        perform("finetune", "tiny", "--runs", runs, "--name", name, *FEW_STEPS)
        perform("make_vectors", "tiny", "--runs", runs, "--name", name)
    torch.manual_seed(0)
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), folder / "weights.pth")
    image_folder(folder / "data/pets", n_train=40, n_test=20)
    left_out = shutil.ignore_patterns("inputs", "features", "*.safetensors")
    for name in ("runs-seed1", "runs-seed2"):              # for report.py --seeds
        shutil.copytree(study, folder / name, ignore=left_out)
    return runs


def as_run(command, runs):
    """[stage, words]: a printed command with this machine's names in it and small settings behind it."""
    script, *words = shlex.split(command)
    folder = runs.parent
    if "timm:NAME" in words or "DIR" in words:
        data = f"pets={folder / 'data/pets'}"
        words = [script, TIMM, "--weights", folder / "weights.pth", "--image-size", "32", "--tasks", data]
        return [*words, "--runs", runs, "--probe-steps", "3", "--probe-lr", "0.1"]
    pets = {"pets=FOLDER": f"pets={folder / 'data/pets'}"}
    words = [(WORDS | pets).get(word, word) for word in words]
    if script == "report":
        words = [runs.parent / word for word in words if word.startswith("runs-seed")]
        return [script, "--runs", runs, *(["--seeds", *words] if words else [])]
    small = SMALL.get(script, [])
    if command.startswith("pretrain tiny") and words[0] == "tiny":
        small = ["--pretrain-steps", "40"]                  # as the study was made
    if script == "finetune" and "full" in words:
        small = FEW_STEPS
    elif script == "finetune" and not {"--lr", "--name"} & set(words):
        small = [*small, "--lr", "1e-3"]                   # as the study was made
    return [script, *words, *small, "--runs", runs]


def contents(folder):
    """The SHA-256 of every picture, array and result, of results that gain rows that of each row."""
    found = set()
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".png", ".npz", ".safetensors") and "state" not in path.parts:
            parts = [path.read_bytes()]
            if path.suffix == ".json":
                result = json.loads(parts[0])
                keys = [key for key in ("pairs", "subsets", "targets", "tasks") if key in result]
                rows = result[keys[0]] if keys else None
                if isinstance(rows, dict):
                    parts = [json.dumps([name, row]).encode() for name, row in rows.items()]
            found |= {hashlib.sha256(part).hexdigest() for part in parts}
    return found


@pytest.mark.parametrize("command", random.Random(0).sample(COMMANDS, len(COMMANDS)))
def test_a_printed_command_is_not_refused_and_nothing_is_lost(left, command, few_pictures):
    before = contents(left / "tiny")
    perform(*as_run(command, left))
    assert before <= contents(left / "tiny")


def test_run_all_takes_every_flag_of_the_stages_that_it_runs():
    """But for those that it sets itself; pretrain.py's --batch-size and --lr are fine-tuning's there."""
    taken = set(re.findall(r"(?<=[ |])(--[a-z-]+)(?= \||\))", (ROOT / "run_all.sh").read_text()))
    for name in ("probe", "finetune", "merge_eval", "disentangle", "subsets", "lib/flags"):
        flags = set(re.findall(r'add(?:_argument)?\("(--[a-z-]+)"', (ROOT / f"{name}.py").read_text()))
        assert flags - {"--recipe", "--name", "--of", "--rule", "--metric"} <= taken, name


@pytest.fixture
def few_pictures(monkeypatch):
    """As many pictures to pre-train on as a few steps take."""
    monkeypatch.setattr("lib.generated.PRETRAINING_IMAGES", 2400)


SECOND_PAPER = ["attention", "attention-bias", "attention-mlp", "attention-mlp-bias", "linearized"]


def asked_by_run_all(folder, *words):
    """What run_all.sh asks of python: called from a folder with a python that writes it down there."""
    log, fake = folder / "asked", folder / "python"
    fake.write_text("""#!/bin/sh
[ "$1" = - ] || echo "$@" >> asked
""")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    finished = stage("bash", ROOT / "run_all.sh", *words, env=environment, cwd=folder)
    assert finished.returncode == 0, finished.stderr
    asked = itertools.chain(*[line.split(" -- ")[1:] for line in log.read_text().splitlines()])
    return [line.removeprefix(f"{ROOT}/").replace(".py", "", 1) for line in asked]


@pytest.mark.parametrize("flag, names", [("--everything", ["aligned", "full"]),
                                         ("--attention", ["aligned", *SECOND_PAPER])])
def test_the_commands_of_run_all_are_not_refused(left, tmp_path, few_pictures, flag, names):
    """Each of them is run here, small."""
    asked = asked_by_run_all(tmp_path, "tiny", flag)
    assert [line.split()[3] for line in asked if line.startswith("finetune")] == names
    assert [line.split()[0] for line in asked[:2]] == ["pretrain", "probe"] and asked[-1] == "report"
    for line in asked:
        if any(f"--name {name} " in f"{line} " for name in SECOND_PAPER[1:]):
            # three differ from attention in one expression only; linearized: test_attention_and_linearized.py
            continue
        words = as_run(line, left)
        if line.startswith("finetune") and "--name aligned" not in line:
            words = [*words, *FEW_STEPS]
        elif line.startswith("finetune"):
            words = [*words, "--lr", "1e-3"]
        perform(*words)


def test_tiny_paper_is_the_study_of_eight_encoders(tmp_path):
    asked = asked_by_run_all(tmp_path, "tiny-paper", "--pretrain-steps", "9", "--seed", "1", "--steps", "5")
    at, few = "--seed 1 {}--pretrain-steps 9", "--pictures 2400 "
    assert [line for line in asked if line.startswith("pretrain")] == [
        f"pretrain tiny-few --seed 1 {few}--pretrain-steps 9", "pretrain tiny " + at.format(""),
        "pretrain_mae tiny-mae " + at.format(""), "pretrain_dino tiny-dino " + at.format(""),
        f"pretrain_contrastive tiny-clip-few --seed 1 {few}--pretrain-steps 9",
        "pretrain_contrastive tiny-clip " + at.format(""), "pretrain tiny-large " + at.format("--large "),
        "pretrain_contrastive tiny-clip-large " + at.format("--large ")]
    tuned = [line.split() for line in asked if line.startswith("finetune")]
    for encoder in PUBLISHED["in small"]:
        text = ["zeroshot", "zeroshot-full"] if "clip" in encoder else []
        assert [words[3] for words in tuned if words[1] == encoder] == ["aligned", "full", *text]
        assert f"subsets {encoder} --name full --seed 1" in asked
    assert asked.count("report") == 8


def test_bench_measures_every_part(left, tmp_path, monkeypatch, capsys):
    """The peak memories in this process but for one, and two rules: the rest would take most of the time."""
    import bench
    own_process, asked = bench.own_process, []

    def mostly_here(args, part, compile):
        asked.append(part)
        if len(asked) == 1:
            return own_process(args, part, compile)
        encoder = bench.random_encoder(args.encoder, args.image_size)
        return bench.part_peak(part, encoder, bench.Machine(torch.device("cpu"), torch.float32, False), 8)

    monkeypatch.setattr(bench, "own_process", mostly_here)
    two_rules = {name: bench.merging.RULES[name] for name in ("sum", "tsv-m")}
    monkeypatch.setattr(bench.merging, "RULES", two_rules)
    monkeypatch.setattr(bench, "TEXT_SHAPE", bench.TEXT_SHAPE | {"hidden_size": 48, "num_hidden_layers": 1})
    small = ["--image-size", "32", "--images", "4", "--lambdas", "2", "--repeats", "1", "--compile", "off"]
    perform("bench", "timm:test_vit", "--quick", *small, "--study", left / "tiny",
            "--out", tmp_path / "bench.json")
    said = capsys.readouterr().out
    for part in ("evaluator", "bare forward", "plain way", "heat map", "linearized, 1 lambda",
                 "merging, 8 vectors", "rule tsv-m, 8 vectors", "texts, evaluator", "texts, plain way",
                 "start-up, a stage", "peak memory, search over 8 tasks", "study, features"):
        assert f"| {part}" in said, part
    assert (tmp_path / "bench.json").exists()
