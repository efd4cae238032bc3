"""Data sets as people have them: one split, validation for test, other columns; the 8, 14 and 20 tasks."""
import shutil

import common
import datasets
import numpy as np
import pandas
import pytest
from conftest import image_folder
from test_wrong_inputs import named, png, read, tables

from lib import encoders, files, reading
from lib.store import identify_source


def whole(source, registered=None):
    """({split: labels}, classes) of a source."""
    encoded, labels, classes = reading.read_dataset("pets", str(source), registered, encoders.Encoder)
    assert {split: len(cells) for split, cells in encoded.items()} == \
        {split: len(found) for split, found in labels.items()}
    return labels, classes


# --------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("folder", ["train", "", "data/all", "valid"])
def test_of_one_split_a_fifth_of_each_class_is_test_always_the_same(tmp_path, capsys, folder):
    image_folder(tmp_path / "set", n_train=90, n_test=0, classes=("a", "b", "c"))
    (tmp_path / "pets" / folder).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "set/train").rename(tmp_path / "pets" / folder)
    labels, classes = whole(tmp_path / "pets")
    assert np.bincount(labels["test"]).tolist() == [6, 6, 6]
    assert np.bincount(labels["train"]).tolist() == [24, 24, 24]
    assert [each.rpartition("/")[2] for each in classes] == ["a", "b", "c"]
    assert "a random fifth of each class is test, 72 and 18 images" in capsys.readouterr().out


def test_the_cut_is_pinned_and_loses_no_row():
    classes = [*"aabbbbbbbbbbcccccccccccccccccccccccccccccccccccccccccccccccccc"]
    parts = reading.eighty_twenty("x", classes)
    assert parts["test"] == [6, 8, 16, 22, 23, 30, 35, 39, 40, 46, 48, 58]
    assert sorted(parts["train"] + parts["test"]) == list(range(len(classes)))


@pytest.mark.parametrize("splits, tested", [
    ("train validation", "validation"), ("train valid", "valid"), ("train val test", "test"),
    ("test train extra", "test"),
])
def test_validation_is_tested_on_where_there_is_no_test(tmp_path, splits, tested, capsys):
    for number, split in enumerate(splits.split()):
        image_folder(tmp_path / "set", n_train=20 + 2 * number, n_test=0)
        (tmp_path / "pets").mkdir(exist_ok=True)
        (tmp_path / "set/train").rename(tmp_path / "pets" / split)
    labels, _ = whole(tmp_path / "pets")
    counts = {split: 20 + 2 * number for number, split in enumerate(splits.split())}
    assert (len(labels["train"]), len(labels["test"])) == (counts["train"], counts[tested])
    said = capsys.readouterr().out
    assert ("has no test split, validation is tested on" in said) == (tested != "test")
    assert ("24 pictures below no folder named test or train are left out" in said) == ("extra" in splits)


def test_validation_of_parquet_files(tmp_path):
    values = {"label": [0, 1]}
    folder = tables(tmp_path / "pets", train=values, validation={"label": [1, 0]})
    assert read(folder) == ([0, 1, 0], [1, 0, 1], [0, 1])


def test_a_test_split_alone_is_not_trained_on(tmp_path):
    image_folder(tmp_path / "pets", n_train=0, n_test=60)
    with pytest.raises(files.Refused, match="has splits test; train and test are needed"):
        whole(tmp_path / "pets")


def test_names_of_folders_and_endings_in_capitals_hidden_files_and_nested_classes(tmp_path):
    folder = image_folder(tmp_path / "pets", n_train=40, n_test=20)
    for split in ("train", "test"):
        for each in ("cat", "dog"):
            inner = folder / split / "indoor" / each
            inner.parent.mkdir(exist_ok=True)
            (folder / split / each).rename(inner)
            (folder / split / "outdoor").mkdir(exist_ok=True)
            (folder / split / "outdoor" / each).mkdir()
            for path in sorted(inner.iterdir())[::2]:
                path.rename(folder / split / "outdoor" / each / path.with_suffix(".PNG").name)
            (inner / "._000.png").write_bytes(b"of macOS")
            (inner / ".DS_Store").write_bytes(b"")
        (folder / split).rename(folder / split.capitalize())
    labels, classes = whole(folder)
    assert classes == ["indoor/cat", "indoor/dog", "outdoor/cat", "outdoor/dog"]
    assert np.bincount(labels["train"]).tolist() == [10] * 4
    assert np.bincount(labels["test"]).tolist() == [5] * 4


def test_a_class_without_test_pictures_is_a_class(tmp_path):
    folder = image_folder(tmp_path / "pets", n_train=30, n_test=20, classes=("a", "b", "c"))
    for path in (folder / "test/b").iterdir():
        path.rename(folder / "test/a" / f"b{path.name}")
    labels, classes = whole(folder)
    assert classes == ["a", "b", "c"] and set(labels["test"]) == {0, 2}


# --------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize("given, classes", [
    ({"fine_label": [0, 1], "coarse_label": [0, 0]}, [0, 1]),
    ({"cls": [3, 1], "__key__": ["a", "b"]}, [1, 3]),
    ({"kind": named([0, 1], "cat", "dog"), "id": [1, 2]}, ["cat", "dog"]),
    ({"label": [0, 1], "kind": named([0, 1], "cat", "dog")}, [0, 1]),
    ({"labels": ["b", "a"]}, ["a", "b"]),
])
def test_the_label_column_is_found_by_rule(tmp_path, given, classes, capsys):
    assert whole(tables(tmp_path / "pets", train=given, test=given))[1] == classes
    assert ("2 classes by name, sorted: a, b" in capsys.readouterr().out) == (classes == ["a", "b"])


@pytest.mark.parametrize("given", [
    {"label": [0, 1], "labels": [0, 1]}, {"breed": [0, 1]},
    {"breed": named([0, 1], "x", "y"), "kind": named([0, 1], "cat", "dog")},
])
def test_columns_that_no_rule_tells_apart_are_asked_for_and_named(tmp_path, given):
    folder = tables(tmp_path / "pets", train=given, test=given)
    with pytest.raises(files.Refused, match="one column `label`, found image .*NAME=PLACE:IMAGE:LABEL"):
        whole(folder)
    last = list(given)[-1]
    assert len(whole(f"{folder}:image:{last}")[1]) == 2
    with pytest.raises(files.Refused, match=f"no column '{last}s'; did you mean"):
        whole(f"{folder}:image:{last}s")
    with pytest.raises(files.Refused, match="has no column 'picture'"):
        whole(f"{folder}:picture:{last}")


def test_one_of_two_image_columns_by_name(tmp_path):
    folder = tmp_path / "pets"
    folder.mkdir()
    features = datasets.Features(left=datasets.Image(), right=datasets.Image(), label=datasets.Value("int64"))
    cell = {"bytes": png(), "path": None}
    rows = datasets.Dataset.from_dict({"left": [cell] * 60, "right": [cell] * 60, "label": [0, 1] * 30},
                                      features=features)
    rows.to_parquet(folder / "train.parquet")
    with pytest.raises(files.Refused, match="needs one image column"):
        whole(folder)
    assert len(whole(f"{folder}:right:label")[0]["test"]) == 12


PANDAS = {  # {what: (an image cell, a label)}, as people write tables without the library `datasets`
    "bytes and path": (lambda index: {"bytes": png(), "path": f"{index}.png"}, lambda index: index % 2),
    "no path": (lambda index: {"bytes": png(), "path": None}, lambda index: index % 2),
    "bytes in a struct": (lambda index: {"bytes": png()}, lambda index: index % 2),
    "bytes": (lambda index: png(), lambda index: index % 2),
    "bool": (lambda index: png(), lambda index: index % 2 == 1),
    "float": (lambda index: png(), lambda index: float(index % 2)),
}


@pytest.mark.parametrize("kind", PANDAS)
def test_tables_of_pandas(small_encoder, tmp_path, kind):
    cell, label = PANDAS[kind]
    (tmp_path / "pets").mkdir()
    for split, n in (("train", 20), ("test", 12)):
        table = {"image": list(map(cell, range(n))), "label": list(map(label, range(n)))}
        pandas.DataFrame(table).to_parquet(tmp_path / f"pets/{split}.parquet")
    task = common.load_task("pets", str(tmp_path / "pets"), small_encoder, tmp_path / "runs")
    assert task.classes == [0, 1] and task.splits["test"].labels.tolist() == [0, 1] * 6
    assert task.splits["test"].inputs.shape[:2] == (12, 3)


@pytest.mark.parametrize("names, left_out", [
    (["train", "test", "test_old"], "test_old.parquet"),
    (["train/a", "test/a", "test_old/a"], "test_old/a.parquet"),
    (["train-0", "train-1", "test-00000-of-00001", "contest"], None), (["my_train", "my_test"], None),
    (["train-00000-of-00001-b42a775f407cee45", "test", "old-train"], "old-train.parquet"),
])
def test_a_table_beside_those_named_as_a_split_is_left_out_and_said(tmp_path, capsys, names, left_out):
    for name in names:
        path = tmp_path / "pets" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pandas.DataFrame({"image": [png()] * 20, "label": [0, 1] * 10}).to_parquet(path)
    labels, _ = whole(tmp_path / "pets")
    rows = 20 * sum(f"{name}.parquet" != left_out and "contest" != name for name in names)
    assert len(labels["train"]) + len(labels["test"]) == rows
    said = capsys.readouterr().out
    assert ("1 files beside those named" in said) == bool(left_out) and (left_out or "") in said


def test_tables_that_a_readme_names_are_all_read(tmp_path):
    folder = tables(tmp_path / "pets", train={"label": [0, 1]}, test={"label": [0, 1]})
    shutil.copy(folder / "train.parquet", folder / "extra.parquet")
    names = "[{split: train, path: [train.parquet, extra.parquet]}, {split: test, path: test.parquet}]"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {names}\n---\n")
    labels, _ = whole(folder)
    assert len(labels["train"]) == 2 * len(labels["test"])


@pytest.mark.parametrize("images, bytes_too, found", [(1, True, ["a"]), (2, True, []), (0, True, ["raw"]),
                                                      (0, False, [])])
def test_bytes_are_pictures_only_where_nothing_else_is(images, bytes_too, found):
    columns = dict.fromkeys("ab"[:images], datasets.Image())
    columns |= {"raw": datasets.Value("binary")} if bytes_too else {}
    assert encoders.Encoder.input_columns(columns | {"label": datasets.Value("int64")}) == found


def test_two_columns_of_bytes_are_not_guessed_between(tmp_path):
    (tmp_path / "pets").mkdir()
    table = {"image": [png()] * 60, "mask": [png()] * 60, "label": [0, 1] * 30}
    pandas.DataFrame(table).to_parquet(tmp_path / "pets/train.parquet")
    with pytest.raises(files.Refused, match=r"needs one image column .*found image \(binary\), mask"):
        whole(tmp_path / "pets")
    assert len(whole(f"{tmp_path / 'pets'}:mask:label")[0]["test"]) == 12


def test_a_bracket_in_a_path(small_encoder, tmp_path):
    """Folders of pictures are read as they are; `datasets`, which reads all else, takes [1] for a pattern."""
    folder = image_folder(tmp_path / "pets [1]")
    assert len(common.load_task("pets", str(folder), small_encoder, tmp_path / "runs").splits["test"]) == 10
    values = {"label": [0, 1]}
    folder = tables(tmp_path / "more [2]", train=values, test=values)
    with pytest.raises(files.Refused, match=r"takes \[ in .* for a pattern: rename that folder"):
        whole(folder)


def test_columns_in_the_words_of_tasks(tmp_path):
    folder = tmp_path / "a:b"
    folder.mkdir()
    found = common.task_sources(f"pets={tmp_path}:img:kind,birds=user/birds:img:kind,odd={folder}")
    assert found == {"pets": f"{tmp_path}:img:kind", "birds": "user/birds:img:kind", "odd": str(folder)}
    assert common.task_sources("pets", recorded=found) == {"pets": found["pets"]}
    for words in ("pets=user/birds:img", "pets=user/birds:img:", f"pets={tmp_path}/none:img:kind"):
        with pytest.raises(files.Refused, match="two columns or more|is not a folder"):
            common.task_sources(words)


def test_other_columns_are_another_task(tmp_path):
    one, two = ([str(tmp_path), *columns] for columns in (["a", "b"], ["a", "c"]))
    assert identify_source(":".join(one), 0) != identify_source(":".join(two), 0)


# --------------------------------------------------------------------------------------- 8, 14, 20 tasks


def test_the_groups_of_tasks():
    assert len(common.GROUPS["paper8"]) == 8 and common.task_sources("paper8").keys() == common.TASKS.keys()
    fourteen, twenty = common.task_sources("paper14"), common.task_sources("paper20")
    assert (len(fourteen), len(twenty)) == (14, 20) and list(twenty)[:14] == list(fourteen)
    assert {"cifar100", "stl10", "flowers102", "oxford-iiit-pet", "pcam", "fer2013"} < set(fourteen)
    assert twenty["food101"] == "ethz/food101"
    with pytest.raises(files.Refused, match="names a task twice: mnist"):
        common.task_sources("paper8,mnist")
    with pytest.raises(files.Refused, match="did you mean paper20"):
        common.task_sources("paper21")


def test_counts_that_nobody_has_verified_are_only_told(tmp_path, monkeypatch, capsys):
    """And only of the copy that the row names: a folder of another size is another data set."""
    values = {"label": [0, 1]}
    folder = tables(tmp_path / "pets", train=values, test=values)
    found = datasets.load_dataset(str(folder))
    monkeypatch.setattr(reading, "fetch", lambda name, place, config: dict(found))
    row = common.MORE_TASKS["stl10"]
    assert not row.sure and whole(row.hub_id, row)[1] == [0, 1]
    assert ("task pets: tanganke/stl10 has 12 train and 12 test images in 2 classes; pets is 5000 and 8000 "
            "in 10 as published" in capsys.readouterr().out)
    for other in (row._replace(sure=True), row._replace(hub_id="other/stl10")):
        with pytest.raises(files.Refused, match="this is another data set"):
            whole(row.hub_id, other)


HUB = {  # the columns of the copies on the hub, and their splits
    "cifar100": ("img", {"fine_label": 100, "coarse_label": 20}, ["train", "test"]),
    "fer2013": ("jpg", {"cls": 7, "__key__": None}, ["train", "test"]),
    "food101": ("image", {"label": 101}, ["train", "validation"]),
    "rendered-sst2": ("image", {"label": 2}, ["train", "validation", "test"]),
    "oxford-iiit-pet": ("image", {"label": 37, "image_id": None, "label_cat_dog": 2}, ["train", "test"]),
}


@pytest.mark.parametrize("name", HUB)
def test_tasks_whose_copies_have_other_columns_and_splits(name, monkeypatch):
    image, labels, splits = HUB[name]
    row, n_classes = common.MORE_TASKS[name], next(iter(labels.values()))
    counts, found = {"train": 2 * n_classes + 10, row.test: n_classes + 10}, {}
    for split in splits:
        n = counts.get(split, 10)
        columns, kinds = {image: [{"bytes": png(), "path": None}] * n}, {image: datasets.Image()}
        for column, classes in labels.items():
            columns[column] = [index % classes if classes else str(index) for index in range(n)]
            kinds[column] = datasets.ClassLabel(classes) if classes else datasets.Value("string")
            if column == "cls":                             # a webdataset has its numbers only
                kinds[column] = datasets.Value("int64")
        found[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    monkeypatch.setattr(reading, "fetch", lambda name, place, config: found)
    small = row._replace(n_train=counts["train"], n_test=counts[row.test], sure=True)
    labels, classes = whole(row.hub_id, small)
    assert len(classes) == n_classes and len(labels["test"]) == counts[row.test]
