"""Wrong input in bulk: each ends in exit code 2 and one line, or is handled as the README says."""
import contextlib
import errno
import importlib
import io
import itertools
import json
import os
import resource
import shutil
import struct
import sys
import types
import unicodedata
import zlib
from pathlib import Path

import common
import datasets
import numpy as np
import pytest
import torch
from conftest import (RESULT, STAGES, TASKS, TIMM, as_a_process, image_folder, perform, refuse, snapshot,
                      stage)
from PIL import Image, ImageOps
from safetensors.torch import save_file

from lib import encoders, files, plots, reading, store
from lib import study as study_module

ALL_TASKS = ["--tasks", ",".join(TASKS)]

# --------------------------------------------------------------------------------------- arguments

WRONG = {  # {stage: {flag: values it does not take}}
    "finetune": {"--steps": ["0", "-1", "x", "1.5", str(10 ** 12), "9" * 5000], "--batch-size": ["0", "x"],
                 "--micro-batch": ["0", "-1", "x"],
                 "--seed": ["-1", "1.5", "x", str(10 ** 19), "9" * 5000],
                 "--runs": ["", __file__], "--data": ["", __file__],
                 "--lr": ["0", "-1", "nan", "inf", "x"], "--save-minutes": ["0", "-2", "x"],
                 "--image-size": ["0", "x"], "--dtype": ["fp8", "tf32"], "--compile": ["yes"],
                 "--recipe": ["Aligned", "attention-full"],
                 "--name": ["", "..", "../x", "/x", "a/b", "a b", "-x", ".x", "é",
                            "heads", "features", "state", "earlier"]},
    "probe": {"--probe-steps": ["0", "x"], "--probe-lr": ["0", "x"]},
    "merge_eval": {"--lambdas": ["0", "-1", "x"], "--lambda-max": ["0", "-1", "x"],
                   "--name": ["../x", "heads"], "--of": ["../x", "heads"]},
    "subsets": {"--lambdas": ["0", "-1", "x"], "--lambda-max": ["0", "-1", "x"],
                "--per-size": ["0", "-1", "x"], "--images-per-task": ["0", "-1", "x"]},
    "disentangle": {"--points": ["0", "x"], "--limit": ["0", "x"], "--samples": ["0", "x"],
                    "--metric": ["kl"]},
    "posthoc": {"--images-per-task": ["0"]}, "precision": {"--images-per-task": ["x"]},
    "pretrain": {"--pretrain-steps": ["0"]},
}
ARGUMENTS = [("report", ["--runs="]), ("report", ["--runs", __file__]), ("report", ["--seeds", __file__]),
             ("report", ["--encoder"]), ("report", ["tiny"]), ("bench", ["--repeats", "0"]), ("pretrain", []),
             ("make_vectors", ["tiny", "extra"]), ("finetune", ["tiny", "--step", "5", "--lrr", "1"]),
             ("merge_eval", ["tiny", "--subsets", "5"]), ("merge_eval", ["tiny", "--recipe", "full"])]
for stage_name, flags in WRONG.items():
    for flag, values in flags.items():
        ARGUMENTS += [(stage_name, ["tiny", f"{flag}={value}"]) for value in values]


@pytest.mark.parametrize("name, words", ARGUMENTS)
def test_arguments(name, words, capsys):
    with pytest.raises(SystemExit) as left:
        importlib.import_module(name).parse_args(words)
    said = capsys.readouterr()
    assert left.value.code == 2 and said.err.count("\n") == 1 and said.out == ""


NAMES = ["../x", "..", ".", "/etc", "a/b", "a b", "", ",", "glyphs,", "glyphs,,signs", "-x", ".hidden", "x=",
         "glyphs=~/no/such", "glyphs=~nosuchuser", "glyphs=~nosuchuser/x", "é"]


@pytest.mark.parametrize("tasks", NAMES)
def test_task_names(study, tasks):
    before = snapshot(study)
    refuse("probe", "tiny", "--runs", study, f"--tasks={tasks}")
    assert snapshot(study) == before


@pytest.mark.parametrize("encoder", ["", "timm:", "timm:../../x", "open_clip:", "open_clip:../x/y", "../tiny",
                                     "tiny/..", "hf:x/y", "TINY", "vit_b16", "timm:resnet5000"])
def test_encoder_names(tmp_path, encoder):
    refuse("probe", encoder, "--runs", tmp_path / "runs", "--tasks", "glyphs")
    assert not snapshot(tmp_path)


@pytest.mark.parametrize("words", [["--device", "cuda:99"], ["--device", "tpu"], ["--image-size", "33"],
                                   ["--data", "/no/such/folder"], ["--weights", "/no/such/file"]])
def test_flags_that_do_not_fit_the_machine_or_the_runs(study, words):
    before = snapshot(study)
    refuse("probe", "tiny", "--runs", study, "--tasks", "glyphs", *STAGES["probe"], *words)
    assert snapshot(study) == before


@pytest.mark.parametrize("name, words", [
    ("merge_eval", ["--lambda-max", "1e-12"]), ("merge_eval", ["--lambda-max", "1e308"]),
    ("merge_eval", ["--lambda-max", "1e-9"]), ("subsets", ["--lambda-max", "1e-12"]),
    ("disentangle", ["--limit", "1e308"]), ("disentangle", ["--limit", "1e-11"]),
])
def test_a_grid_that_rounding_or_overflow_spoils_is_refused(study, name, words):
    before = snapshot(study)
    said = refuse(name, "tiny", "--runs", study, *words)
    assert f"{words[0]} {float(words[1]):g} is no end of a grid" in said
    assert snapshot(study) == before


def test_more_steps_than_fit_in_memory_are_refused():
    from lib import files, training
    with pytest.raises(files.Refused, match="1000000000 steps of 64 are 64,000,000,000 inputs"):
        training.batches(100, 64, 10 ** 9, torch.Generator())


@pytest.mark.parametrize("words, said", [
    (["tiny", "--nonsense", "3"], "unknown flag --nonsense"),
    (["tiny", "--nonsense=3"], "unknown flag --nonsense"),
    (["tiny", "extra"], "unknown flag extra"),
    (["tiny", "--lambda-max"], "--lambda-max needs a value"),
    (["--tasks"], "--tasks needs a value"),
    (["vit_b16_dino", "--pretrain-steps", "5"], "--pretrain-steps: vit_b16_dino comes trained"),
    (["tiny", "--images-per-task", "40"], "goes with --everything"),
    (["tiny", "--per-size=2", "--attention"], "goes with --everything"),
])
def test_run_all_refuses_flags_it_cannot_pass_on_before_any_stage_starts(tmp_path, words, said):
    encoder = [] if words[0].startswith("-") else words[:1]
    finished = stage("bash", "run_all.sh", *encoder, "--runs", tmp_path / "runs", *words[len(encoder):])
    assert finished.returncode == 2 and finished.stdout == ""
    assert finished.stderr.count("\n") == 1 and said in finished.stderr
    assert not (tmp_path / "runs").exists()


# --------------------------------------------------------------------------------------- data sets


def tables(folder, **columns):
    """A folder with SPLIT.parquet for each split {SPLIT: {column: values}}: one picture in twelve rows.

    Values are repeated; they may bring their feature, (values, feature).
    """
    folder.mkdir()
    for split, given in columns.items():
        features, values = {"image": datasets.Image()}, {"image": [{"bytes": png(), "path": None}] * 12}
        for name, column in given.items():
            column, features[name] = column if isinstance(column, tuple) else (column, None)
            values[name] = (column * 12)[:12]
            features[name] = features[name] or datasets.Dataset.from_dict({"x": column}).features["x"]
        rows = datasets.Dataset.from_dict(values, features=datasets.Features(features))
        rows.to_parquet(folder / f"{split}.parquet")
    return folder


def read(folder, n=3):
    """(first labels of train, of test, classes) of a folder's data set."""
    _, labels, classes = reading.read_dataset("pets", str(folder), None, encoders.Encoder)
    return labels["train"][:n].tolist(), labels["test"][:n].tolist(), classes


def named(values, *names):
    return values, datasets.ClassLabel(names=list(names))


@pytest.mark.parametrize("train, test, labels", [
    (named([0, 1, 2], "a", "b", "c"), named([0, 1, 2], "c", "a", "b"), [2, 0, 1]),      # another order
    (named([0, 1, 2], "a", "b", "c"), named([0, 1, 0], "b", "c"), [1, 2, 1]),           # a subset
    (named([0, 1, 2], "a", "b", "c"), named([1, 0, 1], "z", "c"), None),                # z is not in train
    (named([0, 1, 2], "a", "b", "c"), named([1, 1, 1], "z", "c"), [2, 2, 2]),           # named, never used
    (named([0, 1, 2], "a", "b", "c"), named([0, 1, 2], "A", "b", "c"), None),
    (named([0, 1, 2], "a", "b", "c"), [0, 1, 2], None),                                 # names and numbers
    (["a", "b", "c"], named([0, 1, 2], "c", "a", "b"), [2, 0, 1]),
    (["b", "c", "a"], ["c", "a", "b"], [2, 0, 1]),
])
def test_classes_of_the_test_split_are_matched_by_name(tmp_path, train, test, labels):
    folder = tables(tmp_path / "pets", train={"label": train}, test={"label": test})
    if labels:
        assert read(folder)[1:] == (labels, ["a", "b", "c"])
    else:
        with pytest.raises(files.Refused, match="task pets: split test has .* that train lacks"):
            read(folder)


def test_parquet_files_of_one_split_that_name_classes_in_another_order_are_refused(tmp_path):
    folder = tables(tmp_path / "pets", **{"train-0": {"label": named([0, 1], "a", "b")},
                                          "train-1": {"label": named([0, 1], "b", "a")},
                                          "test-0": {"label": named([0, 1], "a", "b")}})
    with pytest.raises(files.Refused, match="train-0.parquet and .*train-1.parquet of split train"):
        read(folder)


def test_classes_whose_accents_are_encoded_otherwise_are_the_same(tmp_path):
    folder = image_folder(tmp_path / "pets", classes=("bus", "é"))
    (folder / "test/é").rename(folder / "test" / unicodedata.normalize("NFD", "é"))
    assert read(folder) == ([0] * 3, [0] * 3, ["bus", "é"])


@pytest.mark.parametrize("moved, said", [("test/dog test/Dog", "'Dog'; did you mean dog"),
                                         ("train/dog train/Dog", "'dog'; did you mean Dog"),
                                         ("test/dog test/emu", "'emu'")])
def test_an_image_folder_whose_test_has_a_class_that_train_lacks_is_refused(tmp_path, moved, said):
    folder = image_folder(tmp_path / "pets", n_train=20)
    before, after = moved.split()
    (folder / before).rename(folder / after)
    with pytest.raises(files.Refused, match=f"train lacks: {said}"):
        read(folder)


@pytest.mark.parametrize("inner", ["", "inner/data", "train station", "test"])
@pytest.mark.parametrize("classes", [("bus", "train_station"), ("test-tube", "training"), ("test", "train"),
                                     ("a[1]", "b*"), ("eval.x", "Ünïcode")])
def test_the_split_of_a_picture_is_the_folder_above_its_class(tmp_path, inner, classes):
    """A file or folder elsewhere that has a split's name in its own changes nothing."""
    image_folder(tmp_path / "pets" / inner, n_train=60, n_test=20, classes=classes)
    (tmp_path / "pets/test_notes.txt").write_text("none")
    if inner == "test":                                     # test/train/CLASS: the outer folder is the split
        with pytest.raises(files.Refused, match="train and test are needed"):
            read(tmp_path / "pets")
    else:
        assert read(tmp_path / "pets", 60) == ([0] * 30 + [1] * 30, [0] * 10 + [1] * 10, list(classes))


def test_splits_that_share_a_file_are_refused(tmp_path):
    """Folders named like a split only in part: `datasets` decides, and finds test in a class of train's."""
    folder = image_folder(tmp_path / "pets", classes=("cat", "test_tube"))
    for split in ("train", "test"):
        (folder / split).rename(folder / f"{split}_2017")
    with pytest.raises(files.Refused, match="test_tube/001.png belongs to train and to test"):
        read(folder)


def test_folders_that_are_links_are_read_and_files_of_other_endings_are_counted(tmp_path, capsys):
    """A class and a split elsewhere, and a link that leads back up."""
    folder, elsewhere = image_folder(tmp_path / "pets"), tmp_path / "elsewhere"
    expected = read(folder)
    capsys.readouterr()
    elsewhere.mkdir()
    for place in ("train/cat", "test"):
        (folder / place).rename(elsewhere / Path(place).name)
        (folder / place).symlink_to(elsewhere / Path(place).name)
    (folder / "train/dog/up").symlink_to(folder)
    (folder / "train/dog/000.txt").write_text("a dog")
    (folder / "train/dog/picture").write_bytes(b"")
    (folder / ".hidden").write_bytes(b"")
    assert read(folder) == expected
    assert f"2 files whose names do not end as pictures' are left out, as {folder}/train/dog/000.txt" in \
        capsys.readouterr().out


def test_a_folder_that_is_linked_from_two_places_is_in_both(tmp_path):
    """Whatever the order in which folders are listed; only a link to what is above it is left out."""
    for name in ("aaa", "zoo"):                             # one is before the splits, one behind them
        folder = image_folder(tmp_path / name / "pets")
        (folder / "train/dog").rename(folder / name)
        (folder / "train/dog").symlink_to(folder / name)
        (folder / "loop").symlink_to(tmp_path / name)
        found = [path.relative_to(folder).parts[:-1] for path in reading.files_below(folder)]
        assert found.count(("train", "dog")) == found.count((name,)) == 6 and len(found) == 28


def test_pictures_beside_folders_of_pictures_are_refused(tmp_path):
    folder = image_folder(tmp_path / "pets")
    (folder / "train/cat/000.png").rename(folder / "train/000.png")
    with pytest.raises(files.Refused, match="as .*train/000.png and .*train/cat/0"):
        read(folder)


@pytest.mark.parametrize("values, classes", [
    ([10 ** 12, 7, 1355868], [7, 1355868, 10 ** 12]), ([3, 1, 2], [1, 2, 3]),
    ([[2], [0], [1]], [0, 1, 2]),
    (([[2], [0], [1]], datasets.List(datasets.ClassLabel(names=["x", "y", "z"]))), ["x", "y", "z"]),
])
def test_labels_that_are_identifiers_or_lists_of_one_class_become_numbers(tmp_path, values, classes):
    folder = tables(tmp_path / "pets", train={"labels": values}, test={"labels": values})
    assert read(folder) == ([2, 0, 1], [2, 0, 1], classes)


@pytest.mark.parametrize("test, said", [
    ({"label": [[0], [1], [0, 1]]}, "other than one class in some rows of column `label`"),
    ({"label": [[0], [1], []]}, "other than one class in some rows of column `label`"),
    ({"label": [[0], [1], None]}, "other than one class in some rows of column `label`"),
    ({"label": [0, 1, 5]}, "1 classes that train lacks: 5"),
    ({"label": [0.0, 1.5]}, "labels in column `label` are not all whole numbers"),
    ({"class": [0, 1]}, "split test of .* has no column 'label' as train has"),
])
def test_labels_that_are_no_classes_are_refused_by_their_column_before_decoding(tmp_path, test, said):
    folder = tables(tmp_path / "pets", train={"label": [0, 1]}, test=test)
    with pytest.raises(files.Refused, match=said):
        read(folder)


def test_splits_with_other_columns_beside_image_and_label_are_read(tmp_path):
    folder = tables(tmp_path / "pets", train={"id": ["a", "b"], "label": [0, 1]}, test={"label": [1, 0]})
    assert read(folder) == ([0, 1, 0], [1, 0, 1], [0, 1])


LIST_CLASSES = """
import sys
from pathlib import Path
from lib import flags

flags.speak_utf8()
classes = " ".join(sorted(path.name for path in Path(sys.argv[1], "test").iterdir()))
print(classes)
Path(sys.argv[1], "classes").write_text(classes)
"""


def test_an_ascii_locale_reads_paths_and_classes_in_any_alphabet(tmp_path):
    folder = image_folder(tmp_path / "Tïere-犬", classes=("Kätzchen", "犬"))
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
                                "PYTHONIOENCODING": "ascii"}
    finished = stage(sys.executable, "-c", LIST_CLASSES, folder, env=environment)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "K\\xe4tzchen \\u72ac\n"
    assert (folder / "classes").read_text(encoding="utf-8") == "Kätzchen 犬"


def test_a_user_without_a_passwd_entry_and_a_home_has_one_for_caches(monkeypatch):
    """Without it a folder called ~ appears where the command was typed."""
    from lib import flags

    def nobody(_):
        raise KeyError("uid not found")

    home = os.environ["HOME"]
    flags.have_home()
    assert os.environ["HOME"] == home                      # whoever has one keeps it
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert os.path.expanduser("~/.cache") == "~/.cache"
    flags.have_home()
    assert os.path.isabs(os.path.expanduser("~/.cache"))


@pytest.mark.parametrize("trouble", ["nowhere", "unwritable", "full", "file too large", "not enough"])
def test_a_full_or_unwritable_cache_of_datasets_is_named_and_not_the_data(tmp_path, monkeypatch, trouble):
    folder = tables(tmp_path / "pets", train={"label": [0, 1]}, test={"label": [0, 1]})
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    if trouble == "nowhere":                               # below a home that is not there
        cache = Path("/proc/nowhere/cache")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    elif trouble == "unwritable":
        cache.write_text("a file where a folder should be")
    elif trouble == "not enough":
        monkeypatch.setattr("datasets.builder.has_sufficient_disk_space", lambda *_, **__: False)
    else:
        code = errno.ENOSPC if trouble == "full" else errno.EFBIG

        def fail(*_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "write_table", fail)
    with pytest.raises(files.Refused, match=f"task pets: .*cannot be copied to the caches {cache} and "):
        read(folder)


# --------------------------------------------------------------------------------------- images


def png(mode="RGB", size=(20, 24), **options):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG", **options)
    return buffer.getvalue()


def bomb():
    """A PNG whose header promises 60,000 x 60,000 pixels."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BROKEN_IMAGES = {"empty": b"", "html": b"<html>404</html>", "header only": png()[:30], "cut": png()[:-30],
                 "zeros": bytes(500), "bomb": bomb(), "text": b"hello", "gif cut": b"GIF89a\x01",
                 "crc": png()[:45] + bytes([png()[45] ^ 255]) + png()[46:]}


@pytest.mark.parametrize("kind", BROKEN_IMAGES)
def test_broken_images_are_named_with_their_index(copy, tmp_path, kind):
    folder = image_folder(tmp_path / "pets", size=(40, 40))
    sorted((folder / "test").rglob("*.png"))[3].write_bytes(BROKEN_IMAGES[kind])
    before = snapshot(copy)
    said = refuse("probe", "tiny", "--runs", copy, "--tasks", f"pets={folder}", *STAGES["probe"])
    assert "image 3 of split test cannot be decoded" in said
    assert snapshot(copy) == before


def odd_images():
    """{name: (file ending, bytes)} of unusual images that are read like any other."""
    made = {"1 x 1": ("png", png(size=(1, 1))), "16 bit": ("png", png("I;16")), "grey": ("png", png("L")),
            "grey with alpha": ("png", png("LA")), "palette": ("png", png("P")), "1 bit": ("png", png("1")),
            "transparent": ("png", png("RGBA")), "wide": ("png", png(size=(900, 3))),
            "wrong ending": ("jpg", png())}
    for name, mode, form in (("CMYK", "CMYK", "JPEG"), ("animated", "RGB", "GIF"), ("tiff", "RGB", "TIFF"),
                             ("webp", "RGB", "WEBP")):
        buffer, more = io.BytesIO(), {}
        if name == "animated":
            more = {"save_all": True, "append_images": [Image.new(mode, (20, 24), 9)]}
        Image.new(mode, (20, 24)).save(buffer, form, **more)
        made[name] = (form.lower(), buffer.getvalue())
    return made


def test_unusual_images_are_read(small_encoder, tmp_path):
    folder = image_folder(tmp_path / "pets", n_test=20)
    for index, (ending, content) in enumerate(odd_images().values()):
        (folder / "test/cat" / f"odd{index}.{ending}").write_bytes(content)
    task = common.load_task("pets", str(folder), small_encoder, tmp_path / "runs")
    assert len(task.splits["test"]) == len(task.splits["test"].indices) == 20 + len(odd_images())
    assert task.splits["test"].inputs.shape[1:] == (3, 16, 16)


def stored(small_encoder, folder, pictures):
    """(N, 3, s, s) pictures as stored, of test files {name: bytes}; ten others follow them."""
    image_folder(folder, n_test=20, size=(16, 16))
    shutil.rmtree(folder / "test/cat")
    (folder / "test/cat").mkdir()
    for name, content in pictures.items():
        (folder / "test/cat" / name).write_bytes(content)
    task = common.load_task("pets", str(folder), small_encoder, folder.parent / "runs")
    return task.splits["test"].inputs[:len(pictures)]


def encode(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_pictures_are_decoded_to_what_a_viewer_shows(small_encoder, tmp_path):
    """16 bits a channel, palettes, transparency on white, EXIF orientation; others as they always were."""
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    alpha = np.tile(np.array([0, 128, 255, 255], np.uint8), (16, 4))
    colours = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    grey, colour = Image.fromarray(ramp), Image.fromarray(colours)
    deep = Image.fromarray(ramp.astype(np.uint16) * 257)
    palette = colour.quantize(8)
    clear = Image.fromarray(np.dstack([colours, alpha]))
    on_white = np.round(255 + (colours.astype(float) - 255) * alpha[..., None] / 255)
    index_0 = np.where(np.asarray(palette)[..., None] == 0, 255, np.asarray(palette.convert("RGB")))
    expected = {
        "16 bit.png": (encode(deep), ramp), "16 bit.tif": (encode(deep, "TIFF"), ramp),
        "16 bit big.tif": (encode(Image.fromarray(ramp.astype(">u2") * np.array(257, ">u2")), "TIFF"), ramp),
        "16 bit.pgm": (encode(deep, "PPM"), ramp), "8 bit.png": (encode(grey), ramp),
        "rgb.png": (encode(colour), colours), "palette.png": (encode(palette), palette.convert("RGB")),
        "palette clear.png": (encode(palette, transparency=0), index_0),
        "rgba.png": (encode(clear), on_white), "rgba.webp": (encode(clear, "WEBP", lossless=True, exact=True),
                                                              on_white),
        "la.png": (encode(Image.merge("LA", [grey, Image.fromarray(alpha)])),
                   np.round(255 + (ramp.astype(float) - 255) * alpha / 255)),
        "key.png": (encode(grey, transparency=7), np.where(ramp == 7, 255, ramp)),
        "opaque.png": (encode(colour.convert("RGBA")), colours),
        "cmyk.tif": (encode(colour.convert("CMYK"), "TIFF"), colour.convert("CMYK").convert("RGB")),
        "1 bit.png": (encode(grey.convert("1")), grey.convert("1").convert("RGB")),
    }
    for orientation in range(10):                           # 0 and 9 mean nothing
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = encode(colour, exif=exif)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        expected[f"exif {orientation}.png"] = content, upright
    pictures = {name: content for name, (content, _) in expected.items()}
    found = dict(zip(sorted(pictures), stored(small_encoder, tmp_path / "pets", pictures), strict=True))
    for name, (_, right) in expected.items():
        right = np.asarray(right)
        right = right if right.ndim == 3 else np.repeat(right[..., None], 3, 2)
        off = np.abs(found[name].transpose(1, 2, 0).astype(float) - right).max()
        assert off <= (1 if name.startswith(("rgba", "la")) else 0), name


def test_a_jpeg_stored_on_its_side_is_the_upright_picture(small_encoder, tmp_path):
    blocks = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
    upright = Image.fromarray(blocks.repeat(8, 0).repeat(8, 1))
    exif = Image.Exif()
    exif[0x0112] = 6                                        # turn it clockwise to look at it
    on_its_side = upright.transpose(Image.Transpose.ROTATE_90)
    turned = encode(on_its_side, "JPEG", exif=exif, quality=100, subsampling=0)
    broken = turned.replace(b"MM\0*", b"MM\0\0", 1)
    assert broken != turned
    pictures = {"a.png": encode(upright), "b.jpg": turned, "c.jpg": broken}
    a, b, c = stored(small_encoder, tmp_path / "pets", pictures).astype(int)
    assert np.abs(a - b).max() < 12 < np.abs(a - c).max()   # without a readable orientation it is as stored


def tiff(values):
    """A grey TIFF as its array's dtype says; Pillow itself writes whole numbers of 32 bits as signed."""
    entries = [(256, 16), (257, 16), (258, 8 * values.itemsize), (259, 1), (262, 1), (273, 8), (277, 1),
               (278, 16), (279, values.nbytes), (339, {"u": 1, "i": 2, "f": 3}[values.dtype.kind])]
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return (b"II*\0" + struct.pack("<I", 8 + values.nbytes) + values.tobytes()
            + struct.pack("<H", len(entries)) + table + b"\0" * 4)


def test_32_bits_a_pixel_are_scaled_by_the_white_of_their_type(small_encoder, tmp_path):
    ramp = np.arange(256).reshape(16, 16)
    pictures = {"float32": tiff((ramp / 255).astype("<f4")), "int32": tiff((ramp << 23).astype("<i4")),
                "uint32": tiff((ramp << 24).astype("<u4")), "black": tiff(np.zeros((16, 16), "<u4")),
                "int16": tiff((ramp << 7).astype("<i2")),
                "pillow": encode(Image.fromarray((ramp << 23).astype(np.int32)), "TIFF")}
    found = stored(small_encoder, tmp_path / "pets", {f"{kind}.tif": made for kind, made in pictures.items()})
    for kind, picture in zip(sorted(pictures), found, strict=True):
        assert (picture == (0 if kind == "black" else ramp)).all(), kind


@pytest.mark.parametrize("values, said", [
    (np.full((16, 16), 1.5, "<f4"), "hold 1.5 to 1.5, where 0 is black and 1 white"),
    (np.full((16, 16), -0.5, "<f4"), "hold -0.5 to"), (np.full((16, 16), np.nan, "<f4"), "hold nan"),
    (np.full((16, 16), -7, "<i4"), "hold -7 to -7"),
    (np.full((16, 16), 65535, "<u4"), "hold 65535 to 65535, where 0 is black and 4.29497e[+]09 white"),
])
def test_pictures_without_a_known_white_are_refused(small_encoder, tmp_path, values, said):
    with pytest.raises(files.Refused, match=f"image 0 of split test cannot be .*{said}.*8 or 16 bits"):
        stored(small_encoder, tmp_path / "pets", {"a.tif": tiff(values)})


# --------------------------------------------------------------------------------------- files under runs/

FILES = {
    "tiny/pretrained.safetensors": "probe", "tiny/heads/paper/signs.safetensors": "finetune",
    "tiny/features/signs.safetensors": "merge_eval", "tiny/aligned/vectors/signs.safetensors": "merge_eval",
    "tiny/aligned/finetuned/signs.safetensors": "make_vectors", "inputs/*signs*/about.json": "merge_eval",
    "inputs/*signs*/test_inputs.npy": "merge_eval", "inputs/*signs*/train_labels.npy": "merge_eval",
}


def hurt(runs, pattern, name):
    """The file that a pattern names, the result of stage `name` out of the way so that the file is read."""
    [path] = [path for path in runs.glob(pattern) if path.is_file()]
    if runs / RESULT[name] != path:
        (runs / RESULT[name]).unlink(missing_ok=True)
    return path


def flips(content, seed=0):
    """A file's bytes with one bit flipped, at eight seeded places."""
    rng = np.random.default_rng(seed)
    for place in [0, len(content) - 1, *rng.integers(0, len(content), 6)]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(0, 8))
        yield bytes(damaged)


@pytest.mark.parametrize("pattern", FILES)
def test_a_flipped_bit_anywhere_is_caught(copy, pattern):
    """Eight seeded places in every kind of file: caught, never a traceback or another number."""
    name = FILES[pattern]
    path = hurt(copy, pattern, name)
    for damaged in flips(path.read_bytes()):
        path.write_bytes(damaged)
        before = snapshot(copy)
        said = refuse(name, "tiny", "--runs", copy, *ALL_TASKS, *STAGES[name])
        assert path.name in said or path.parent.name in said
        assert snapshot(copy) == before


@pytest.mark.parametrize("file, name, words", [
    ("tiny/aligned/finetune.json", "merge_eval", ["--lambdas", "2", *ALL_TASKS]),
    ("tiny/probe.json", "finetune", STAGES["finetune"]),   # read for the default tasks
    ("tiny/aligned/finetune.json", "finetune", [*STAGES["finetune"], *ALL_TASKS]),
    ("tiny/aligned/disentangle.json", "disentangle", ["--points", "3", "--samples", "9", *ALL_TASKS]),
    ("tiny/aligned/merge.json", "precision", ["--images-per-task", "2", "--compile", "off"]),
])
def test_a_flipped_bit_in_a_result_is_refused_or_warned_about(copy, capsys, file, name, words):
    """What stands in it may then be no use to the stage, but not unsaid."""
    path, sound = copy / file, (copy / file).read_bytes()
    for damaged in flips(sound):
        path.write_bytes(damaged)
        capsys.readouterr()
        failed = ""
        try:
            perform(name, "tiny", "--runs", copy, *words)
        except (files.Refused, KeyError) as error:
            failed = str(error)
        warned = f"warning: {path} is not as it was written" in capsys.readouterr().err
        assert warned or path.name in failed


def take_out(path, where):
    """Take a key out of a JSON file, [outer key, ..., the key]."""
    values = json.loads(path.read_text())
    inner = values
    for key in where[:-1]:
        inner = inner[key]
    del inner[where[-1]]
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("where", [["recipe"], ["tasks"], ["tasks", "signs"], ["tasks", "signs", "test"]],
                         ids="/".join)
def test_a_result_edited_by_hand_that_lacks_what_a_stage_needs_is_refused_by_name(copy, where):
    path = hurt(copy, "tiny/aligned/finetune.json", "merge_eval")
    take_out(path, where)
    said = refuse("merge_eval", "tiny", "--runs", copy, *ALL_TASKS, "--lambdas", "2")
    assert "finetune.json" in said and "python finetune.py tiny --name aligned" in said


def test_no_flipped_bit_in_a_result_changes_a_value_silently(study, tmp_path, capsys):
    sound, path = (study / "tiny/aligned/finetune.json").read_bytes(), tmp_path / "finetune.json"
    values, rng = json.loads(sound), np.random.default_rng(0)
    outcomes = {"refused": 0, "warned": 0, "same": 0}
    for place in rng.choice(len(sound), 400, replace=False):
        damaged = bytearray(sound)
        damaged[place] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(damaged)
        try:
            found = files.read_json(path, "finetune.py")
        except files.Refused as refusal:
            assert str(path) in str(refusal)
            outcomes["refused"] += 1
            continue
        warned = f"warning: {path} is not as it was written" in capsys.readouterr().err
        assert warned or found == {key: value for key, value in values.items() if key != "checksum"}
        outcomes["warned" if warned else "same"] += 1
    assert outcomes["refused"] > 50 and outcomes["warned"] > 50, outcomes


JSON_DAMAGE = {"deep": b'{"config":' * 10 ** 5 + b"1" + b"}" * 10 ** 5, "deep lists": b"[" * 10 ** 5,
               "not JSON": b"{", "a list": b"[]", "a number": b"3", "nothing": b"", "no config": b"{}",
               "bytes": b"\xff\xfe", "other keys": b'{"config": {}, "command": ""}',
               "other kinds": b'{"config": {}, "command": 3, "machine": {}}'}


@pytest.mark.parametrize("damage", JSON_DAMAGE)
def test_what_is_no_result_is_refused(copy, damage):
    path = hurt(copy, "tiny/aligned/finetune.json", "merge_eval")
    path.write_bytes(JSON_DAMAGE[damage])
    before = snapshot(copy)
    assert "finetune.json" in refuse("merge_eval", "tiny", "--runs", copy, *ALL_TASKS)
    assert snapshot(copy) == before


@pytest.mark.parametrize("file, where", [
    ("merge.json", ["probing"]), ("merge.json", ["test", "n"]), ("merge.json", ["test", "tasks", "signs"]),
    ("finetune.json", ["cost"]), ("finetune.json", ["tasks", "signs", "seconds"]), ("finetune.json", ["lr"]),
    ("vectors.json", ["tasks"]), ("disentangle.json", ["pairs", "glyphs-signs", "max_xi"]),
    ("../probe.json", ["search"]), ("../probe.json", ["tasks", "signs", "data"]),
], ids=str)
def test_the_report_names_the_file_that_lacks_a_key(copy, file, where):
    path = copy / "tiny/aligned" / file
    take_out(path, where)
    said = refuse("report", "--runs", copy)
    assert path.name in said and f"lacks {where[-1]}" in said
    assert "--overwrite" in said and "delete" not in said


def as_an_older_version_wrote(path):
    """A result without what rows remember of code, inputs and weights."""
    values = json.loads(path.read_text())
    values.pop("code")
    for row in values["tasks"].values():
        for key in ("version", "made_of", "weights_sha256"):
            row.pop(key, None)
    path.write_text(json.dumps(values))


def test_results_of_an_older_version_are_called_that_and_never_to_be_deleted(copy):
    shared = ["tiny", "--runs", copy, *ALL_TASKS]
    for file, name in (("tiny/aligned/finetune.json", "finetune"), ("tiny/probe.json", "probe")):
        as_an_older_version_wrote(copy / file)
        said = refuse(name, *shared, *STAGES[name])
        assert f"{copy / file} was made by an older version of this study" in said
        assert "--overwrite" in said and "delete" not in said
    for name, words in (("finetune", ["--name", "new", *STAGES["finetune"]]),
                        ("merge_eval", ["--lambdas", "2"]), ("make_vectors", ["--overwrite"])):
        said = refuse(name, *shared, *words)
        assert "lacks weights_sha256" in said and "--overwrite" in said and "delete" not in said
    save_file({"weight": torch.zeros(3)}, copy / "tiny/aligned/vectors/glyphs.safetensors")
    with pytest.raises(files.Refused, match="was not written by this version of the study: move it away"):
        files.file_metadata(copy / "tiny/aligned/vectors/glyphs.safetensors", "python make_vectors.py tiny")


@contextlib.contextmanager
def no_descriptors():
    """While this process can open no more files."""
    limits, held = resource.getrlimit(resource.RLIMIT_NOFILE), []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_what_cannot_be_opened_is_not_called_damaged(study):
    [images] = (study / "inputs").glob("glyphs-*")
    for read in (lambda: files.load_tensors(study / "tiny/heads/paper/glyphs.safetensors", "probe.py"),
                 lambda: files.read_json(study / "tiny/probe.json", "probe.py"),
                 lambda: store.read_about(images), lambda: store.read_arrays(images)):
        with no_descriptors(), pytest.raises(OSError) as error:
            read()
        assert error.value.errno == errno.EMFILE


def test_others_may_read_what_the_umask_lets_them(study, tmp_path):
    umask = os.umask(0o027)
    try:
        files.save_tensors(tmp_path / "own.safetensors", {"weight": torch.zeros(3)})
        files.write_json(tmp_path / "own.json", {})
        assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}
    finally:
        os.umask(umask)
    written = [path for path in study.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert {path.stat().st_mode & 0o777 for path in written} == {0o666 & ~umask}


def test_a_result_edited_by_hand_is_used_with_a_warning(copy, capsys):
    path = hurt(copy, "tiny/aligned/finetune.json", "merge_eval")
    result = json.loads(path.read_text())
    result["tasks"]["signs"]["test"] = 0.99
    path.write_text(json.dumps(result))
    perform("merge_eval", "tiny", "--runs", copy, *ALL_TASKS, "--lambdas", "2")
    said = capsys.readouterr().err
    assert f"warning: {path} is not as it was written" in said and "edited by hand" in said
    assert json.loads((copy / RESULT["merge_eval"]).read_text())["single_task"]["signs"] == 0.99
    del result["tasks"]["signs"]
    path.write_text(json.dumps(result))
    assert "finetune.json lacks signs" in refuse("merge_eval", "tiny", "--runs", copy, *ALL_TASKS)
    assert "edited by hand" in capsys.readouterr().err


def test_a_flipped_byte_in_a_training_state_is_refused(copy, monkeypatch):
    """Stopped in step 3 with its state saved; the sound state is gone on with."""
    import finetune
    words = ["tiny", "--runs", copy, "--tasks", "signs", "--steps", "5", "--batch-size", "8", "--lr", "1e-3",
             "--name", "stopped", "--save-minutes", "1e-9"]
    rate, asked = finetune.learning_rate, []

    def stopping(step, steps, peak):
        asked.append(step)
        if step == stop:
            raise KeyboardInterrupt
        return rate(step, steps, peak)

    monkeypatch.setattr(finetune, "learning_rate", stopping)
    stop = 3
    with pytest.raises(KeyboardInterrupt):
        perform("finetune", *words)
    [state] = (copy / "tiny/stopped/state").glob("finetune-signs-*.state")
    sound = state.read_bytes()
    for damaged in [*flips(sound), sound[:len(sound) // 2], b""]:
        state.write_bytes(damaged)
        before = snapshot(copy)
        said = refuse("finetune", *words)
        assert str(state) in said and "checksum" in said
        assert snapshot(copy) == before
    state.write_bytes(sound)
    stop, asked[:] = None, []
    perform("finetune", *words)
    assert asked == [3, 4] and not state.exists()


# --------------------------------------------------------------------------------------- checkpoints


def test_checkpoints(tmp_path):
    """No code of a checkpoint runs, half precision is read, everything else is refused."""
    import timm
    good, runs = timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "runs"
    first_rows = {key: tensor[:1].clone() if tensor.ndim else tensor for key, tensor in good.items()}
    not_finite = good | {"blocks.3.norm1.weight": torch.full((192,), float("inf"))}
    torch.save({"state_dict": good, "extra": print}, tmp_path / "pickled.pth")
    torch.save(timm.create_model("vit_tiny_patch16_224"), tmp_path / "module.pth")
    save_file(first_rows, tmp_path / "shapes.safetensors")
    save_file({f"model.{key}": tensor for key, tensor in good.items()}, tmp_path / "prefix.safetensors")
    save_file(not_finite, tmp_path / "inf.safetensors")
    (tmp_path / "page.pth").write_text("<html>404</html>")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "inf.safetensors").read_bytes()[:1000])
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("pickled.pth", "module.pth", "shapes.safetensors", "prefix.safetensors", "inf.safetensors",
                 "page.pth", "cut.safetensors", "folder.safetensors"):
        said = refuse("probe", TIMM, "--weights", tmp_path / name, "--runs", runs, "--tasks", "glyphs")
        assert name in said or "is no checkpoint" in said
        assert not runs.exists() or not snapshot(runs)
    half = tmp_path / "half.safetensors"
    save_file({key: tensor.half() for key, tensor in good.items()}, half)
    module = encoders.load_encoder(TIMM, tmp_path / "half", half).module
    assert {tensor.dtype for tensor in encoders.weights_of(module).values()} == {torch.float32}


# --------------------------------------------------------------------------------------- disks


@pytest.mark.parametrize("call", range(1, 13, 4))
def test_a_full_disk_at_any_write_ends_in_one_line_and_the_next_run_finishes(copy, monkeypatch, capsys, call):
    """ENOSPC at the n-th flush to disk of finetune, make_vectors and merge_eval, run from the heads on."""
    shutil.rmtree(copy / "tiny/aligned")
    flush, calls = os.fsync, itertools.count(1)
    stages = {"finetune": ["--steps", "1", "--batch-size", "8", "--lr", "1e-3"], "make_vectors": [],
              "merge_eval": ["--lambdas", "2"]}

    def full(descriptor):
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device", "somewhere")
        flush(descriptor)

    def run_stages():
        for name, words in stages.items():
            shared = ["tiny", "--runs", str(copy), "--tasks", ",".join(TASKS[:2])]
            monkeypatch.setattr(sys, "argv", [f"{name}.py", *shared, *words])
            module = importlib.import_module(name)
            with as_a_process():
                study_module.run(module.main, module.parse_args)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as left:
        run_stages()
    assert left.value.code == 2 and "No space left" in capsys.readouterr().err
    assert not list(copy.rglob("*.tmp"))
    monkeypatch.setattr(os, "fsync", flush)
    run_stages()
    assert "test" in files.read_json(copy / "tiny/aligned/merge.json", "")


def run_stage(monkeypatch, name, *words):
    """A stage as its command line runs it, in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
    module = importlib.import_module(name)
    try:
        with as_a_process():
            study_module.run(module.main, module.parse_args)
    except SystemExit as left:
        return left.code
    return 0


@pytest.mark.parametrize("name, made, too_large", [
    ("probe", ["inputs", "tiny/probe.json"], "inputs/glyphs-*/train_inputs.npy"),
    ("probe", ["inputs", "tiny/probe.json"], "inputs/glyphs-*/train_labels.npy"),
    ("finetune", ["tiny/aligned"], "tiny/aligned/finetuned/glyphs.safetensors"),
    ("make_vectors", ["tiny/aligned/vectors.json"], "tiny/aligned/overlap.png"),
    ("disentangle", ["tiny/aligned/disentangle.json"], "tiny/aligned/disentangle/glyphs-signs.npz"),
    ("report", [], "report/report.html"),
])
def test_a_file_that_does_not_fit_ends_in_one_line(copy, monkeypatch, capfd, name, made, too_large):
    """As on a full disk, but for the error's number: this process may write no larger file meanwhile."""
    [path] = copy.glob(too_large)
    limit = path.stat().st_size - 1
    monkeypatch.setattr(plots, "save", plots.save.in_full)
    for file in map(copy.joinpath, made):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    words = ["tiny", *ALL_TASKS, *STAGES[name]] if name in STAGES else []
    capfd.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        code = run_stage(monkeypatch, name, *words, "--runs", copy)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capfd.readouterr().err
    assert code == 2 and said.count("\n") == 1 and "File too large" in said, said
    assert not list(copy.rglob("*.tmp"))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no posix_fallocate here")
def test_the_blocks_of_a_mapped_array_are_on_the_disk_before_anything_is_written_to_it(tmp_path):
    files.new_array(tmp_path / "new.npy", (1000, 1000), np.uint8)
    assert 512 * (tmp_path / "new.npy").stat().st_blocks >= 10 ** 6
    files.save_array(tmp_path / "saved.npy", np.arange(12.0).reshape(3, 4))
    assert (np.load(tmp_path / "saved.npy") == np.arange(12.0).reshape(3, 4)).all()


def raising(error):
    def main(args):
        raise error
    return main


@pytest.mark.parametrize("main, code, said", [
    (lambda args: torch.empty(2 ** 50), 2, "out of memory"),
    (lambda args: np.empty(2 ** 50), 2, "out of memory"),
    (raising(MemoryError()), 2, "out of memory"),
    (raising(OSError(errno.EMFILE, "Too many open files", "x.json")), 2, "Too many open files: x.json"),
    (lambda args: print("said", flush=True), 141, "what read its output has ended"),
    (lambda args: print("said"), 141, "what read its output has ended"),
])
def test_no_memory_no_file_or_no_reader_is_one_line(monkeypatch, capsys, main, code, said):
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", os.fdopen(write, "w"))
    with pytest.raises(SystemExit) as left:
        study_module.run(main, lambda: None)
    sys.stdout.close()
    found = capsys.readouterr().err
    assert left.value.code == code and found.count("\n") == 1 and said in found


@pytest.mark.parametrize("error", [RuntimeError("a bug"), FileNotFoundError(errno.ENOENT, "gone", "x")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        study_module.run(raising(error), lambda: None)


def test_what_does_not_fit_is_refused_before_it_starts(copy, monkeypatch):
    shutil.rmtree(copy / "tiny/aligned")
    words = ["tiny", "--runs", copy, *ALL_TASKS, *STAGES["finetune"]]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10 ** 6))
    assert "which has 0.00 GB free" in refuse("finetune", *words)
    left = [path for path in (copy / "tiny/aligned").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert left == []
