"""Wrong input in bulk: each ends in exit code 2 and one line, or is handled as the README says; none leaves a changed file."""
import importlib
import io
import itertools
import json
import shutil
import struct
import types
import zlib

import common
import encoders
import files
import numpy as np
import pytest
import torch
from conftest import RESULT, STAGES, TASKS, TIMM, image_folder, refuse, snapshot
from PIL import Image
from safetensors.torch import save_file

# ---------------------------------------------------------------------------------------------- arguments

WRONG_NUMBERS = {"--steps": ["0", "-1", "x", "1.5"], "--batch-size": ["0", "x"], "--lr": ["0", "-1", "nan", "inf", "x"], "--seed": ["-1", "1.5", "x"],
                 "--image-size": ["0", "x"], "--save-minutes": ["0", "-2", "x"], "--device": [], "--dtype": ["fp8", "bfloat16"], "--compile": ["yes"], "--recipe": ["Aligned", "attention-full"]}
ARGUMENTS = [("finetune", ["tiny", flag, value]) for flag, values in WRONG_NUMBERS.items() for value in values]
ARGUMENTS += [("probe", ["tiny", flag, value]) for flag, value in itertools.product(("--probe-steps", "--probe-lr"), ("0", "x"))]
ARGUMENTS += [("merge_eval", ["tiny", flag, value]) for flag in ("--lambdas", "--lambda-max", "--subsets", "--images-per-task") for value in ("0", "-1", "x")]
ARGUMENTS += [("disentangle", ["tiny", flag, value]) for flag in ("--points", "--limit", "--samples") for value in ("0", "x")]
ARGUMENTS += [("disentangle", ["tiny", "--metric", "kl"]), ("posthoc", ["tiny", "--images-per-task", "0"]), ("precision", ["tiny", "--images-per-task", "x"]),
              ("report", ["--encoder"]), ("report", ["tiny"]), ("bench", ["--repeats", "0"]), ("pretrain", ["tiny", "--pretrain-steps", "0"]), ("pretrain", []),
              ("make_vectors", ["tiny", "extra"]), ("finetune", ["tiny", "--step", "5", "--lrr", "1"])]


@pytest.mark.parametrize("name, words", ARGUMENTS)
def test_arguments(name, words, capsys):
    with pytest.raises(SystemExit) as left:
        importlib.import_module(name).parse_args(words)
    said = capsys.readouterr()
    assert left.value.code == 2 and said.err.count("\n") == 1 and said.out == ""


NAMES = ["../x", "..", ".", "/etc", "a/b", "a b", "", ",", "glyphs,", "glyphs,,signs", "-x", ".hidden", "x=", "glyphs=~/no/such", "é"]


@pytest.mark.parametrize("tasks", NAMES)
def test_task_names(study, tasks):
    before = snapshot(study)
    refuse("probe", "tiny", "--runs", study, f"--tasks={tasks}")
    assert snapshot(study) == before


@pytest.mark.parametrize("encoder", ["", "timm:", "timm:../../x", "open_clip:", "open_clip:../x/y", "../tiny", "tiny/..", "hf:x/y", "TINY", "vit_b16", "timm:resnet5000"])
def test_encoder_names(tmp_path, encoder):
    refuse("probe", encoder, "--runs", tmp_path / "runs", "--tasks", "glyphs")
    assert not snapshot(tmp_path)


@pytest.mark.parametrize("words", [["--device", "cuda:99"], ["--device", "tpu"], ["--data", "/no/such/folder"], ["--image-size", "33"], ["--weights", "/no/such/file"]])
def test_flags_that_do_not_fit_the_machine_or_the_runs(study, words):
    before = snapshot(study)
    refuse("probe", "tiny", "--runs", study, "--tasks", "glyphs", *STAGES["probe"], *words)
    assert snapshot(study) == before


# ---------------------------------------------------------------------------------------------- images


def png(mode="RGB", size=(20, 24), **options):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG", **options)
    return buffer.getvalue()


def bomb():
    """A PNG whose header promises 60,000 x 60,000 pixels."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BROKEN_IMAGES = {"empty": b"", "html": b"<html>404</html>", "header only": png()[:30], "cut": png()[:-30], "zeros": bytes(500), "bomb": bomb(),
                 "text": b"hello", "crc": png()[:45] + bytes([png()[45] ^ 255]) + png()[46:], "gif cut": b"GIF89a\x01"}


@pytest.mark.parametrize("kind", BROKEN_IMAGES)
def test_broken_images_are_named_with_their_index(copy, tmp_path, kind):
    folder = image_folder(tmp_path / "pets", size=(40, 40))
    sorted((folder / "test").rglob("*.png"))[3].write_bytes(BROKEN_IMAGES[kind])
    before = snapshot(copy)
    assert "image 3 of split test cannot be decoded" in refuse("probe", "tiny", "--runs", copy, "--tasks", f"pets={folder}", *STAGES["probe"])
    assert snapshot(copy) == before


def odd_images():
    """{name: (file ending, bytes)} of unusual images that are read like any other."""
    made = {"1 x 1": ("png", png(size=(1, 1))), "16 bit": ("png", png("I;16")), "grey": ("png", png("L")), "grey with alpha": ("png", png("LA")), "palette": ("png", png("P")),
            "transparent": ("png", png("RGBA")), "1 bit": ("png", png("1")), "wide": ("png", png(size=(900, 3))), "wrong ending": ("jpg", png())}
    for name, mode, form in (("CMYK", "CMYK", "JPEG"), ("animated", "RGB", "GIF"), ("tiff", "RGB", "TIFF"), ("webp", "RGB", "WEBP")):
        buffer = io.BytesIO()
        Image.new(mode, (20, 24)).save(buffer, form, **({"save_all": True, "append_images": [Image.new(mode, (20, 24), 9)]} if name == "animated" else {}))
        made[name] = (form.lower(), buffer.getvalue())
    return made


def test_unusual_images_are_read(args, small_encoder, tmp_path):
    folder = image_folder(tmp_path / "pets", n_test=20)
    for index, (ending, content) in enumerate(odd_images().values()):
        (folder / "test/cat" / f"odd{index}.{ending}").write_bytes(content)
    task = common.load_task("pets", folder, small_encoder, args)
    assert len(task.splits["test"].rows) == 20 + len(odd_images()) and task.splits["test"].images.shape[1:] == (3, 16, 16)


# ---------------------------------------------------------------------------------------------- files under runs/

FILES = {"tiny/pretrained.safetensors": "probe", "tiny/heads/signs.safetensors": "finetune", "tiny/features/signs.safetensors": "merge_eval",
         "tiny/aligned/finetuned/signs.safetensors": "make_vectors", "tiny/aligned/vectors/signs.safetensors": "merge_eval",
         "tiny/aligned/finetune.json": "merge_eval", "tiny/probe.json": "finetune", "images/*signs*/test_images.npy": "merge_eval", "images/*signs*/train_labels.npy": "merge_eval",
         "images/*signs*/about.json": "merge_eval"}


def hurt(runs, pattern, name):
    """The file that a pattern names, and the result of stage `name` out of the way, so that the stage reads it."""
    [path] = [path for path in runs.glob(pattern) if path.is_file()]
    if runs / RESULT[name] != path:
        (runs / RESULT[name]).unlink(missing_ok=True)
    return path


@pytest.mark.parametrize("pattern", FILES)
def test_a_flipped_bit_anywhere_is_caught(copy, pattern):
    """Eight seeded places in every kind of file: caught, never a traceback or another number."""
    name, rng = FILES[pattern], np.random.default_rng(0)
    path = hurt(copy, pattern, name)
    sound = path.read_bytes()
    for place in [0, len(sound) - 1, *rng.integers(0, len(sound), 6)]:
        damaged = bytearray(sound)
        damaged[place] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(damaged)
        before = snapshot(copy)
        assert path.name in (said := refuse(name, "tiny", "--runs", copy, "--tasks", ",".join(TASKS), *STAGES[name])) or path.parent.name in said
        assert snapshot(copy) == before


JSON_EDITS = {"not JSON": "{", "a list": "[]", "a number": "3", "nothing": "", "no config": "{}", "bytes": b"\xff\xfe", "other keys": '{"config": {}, "command": ""}'}


@pytest.mark.parametrize("edit", [*JSON_EDITS, "a number changed", "a row taken out"])
def test_results_edited_by_hand_are_refused(copy, edit):
    path = hurt(copy, "tiny/aligned/finetune.json", "merge_eval")
    result = json.loads(path.read_text())
    if edit == "a number changed":
        result["tasks"]["signs"]["test"] = 0.99
    elif edit == "a row taken out":
        del result["tasks"]["signs"]
    content = JSON_EDITS.get(edit, json.dumps(result))
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert "finetune.json" in refuse("merge_eval", "tiny", "--runs", copy, "--tasks", ",".join(TASKS))


# ---------------------------------------------------------------------------------------------- checkpoints


def test_checkpoints(tmp_path):
    """No code of a checkpoint runs, half precision is read, everything else is refused."""
    import timm
    good = timm.create_model("vit_tiny_patch16_224").state_dict()
    torch.save({"state_dict": good, "extra": print}, tmp_path / "pickled.pth")
    torch.save(timm.create_model("vit_tiny_patch16_224"), tmp_path / "module.pth")
    save_file({key: tensor[:1].clone() if tensor.ndim else tensor for key, tensor in good.items()}, tmp_path / "shapes.safetensors")
    save_file({f"model.{key}": tensor for key, tensor in good.items()}, tmp_path / "prefix.safetensors")
    save_file(good | {"blocks.3.norm1.weight": torch.full((192,), float("inf"))}, tmp_path / "inf.safetensors")
    (tmp_path / "page.pth").write_text("<html>404</html>")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "inf.safetensors").read_bytes()[:1000])
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("pickled.pth", "module.pth", "shapes.safetensors", "prefix.safetensors", "inf.safetensors", "page.pth", "cut.safetensors", "folder.safetensors"):
        said = refuse("probe", TIMM, "--weights", tmp_path / name, "--runs", tmp_path / "runs", "--tasks", "glyphs")
        assert name in said or "is no checkpoint" in said
        assert not (tmp_path / "runs").exists() or not snapshot(tmp_path / "runs")
    save_file({key: tensor.half() for key, tensor in good.items()}, tmp_path / "half.safetensors")
    args = common.stage_parser("").parse_args([TIMM, "--weights", str(tmp_path / "half.safetensors"), "--runs", str(tmp_path / "half")])
    assert {tensor.dtype for tensor in encoders.weights_of(encoders.load_encoder(args).module).values()} == {torch.float32}


# ---------------------------------------------------------------------------------------------- a full disk


@pytest.mark.parametrize("call", range(1, 13, 2))
def test_a_full_disk_at_any_write_ends_in_one_line_and_the_next_run_finishes(copy, monkeypatch, capsys, call):
    """ENOSPC at the n-th flush to disk of finetune, make_vectors and merge_eval, run from the heads on."""
    import errno
    import os
    import sys
    shutil.rmtree(copy / "tiny/aligned")
    flush, calls = os.fsync, itertools.count(1)

    def full(descriptor):
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device", "somewhere")
        flush(descriptor)

    def stages():
        for name, words in (("finetune", ["--steps", "1", "--batch-size", "8", "--lr", "1e-3"]), ("make_vectors", []), ("merge_eval", ["--lambdas", "2"])):
            monkeypatch.setattr(sys, "argv", [f"{name}.py", "tiny", "--runs", str(copy), "--tasks", ",".join(TASKS[:2]), *words])
            module = importlib.import_module(name)
            files.run(module.main, module.parse_args)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as left:
        stages()
    assert left.value.code == 2 and "No space left" in capsys.readouterr().err
    assert not list(copy.rglob("*.tmp"))
    monkeypatch.setattr(os, "fsync", flush)
    stages()
    assert "test" in files.read_json(copy / "tiny/aligned/merge.json", "")


def test_what_does_not_fit_is_refused_before_it_starts(copy, monkeypatch):
    shutil.rmtree(copy / "tiny/aligned")
    before = snapshot(copy)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10 ** 6))
    assert "which has 0.00 GB free" in refuse("finetune", "tiny", "--runs", copy, "--tasks", ",".join(TASKS), *STAGES["finetune"])
    assert snapshot(copy) == before
