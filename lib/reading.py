"""
Reading a data set: from the hub, from parquet files, or from an image folder, splits and classes as its own
files say.
"""
import errno
import glob
import math
import os
import re
import unicodedata
import warnings
from pathlib import Path, PurePosixPath

import numpy as np

from lib import hub, images
from lib.encoders import near
from lib.files import Refused

READING = 5        # raise it where the same files would be read as other inputs or labels than before
# the columns that say what an input is: the first line of which a data set has one, then its only column of
# named classes; the last are of CIFAR-100 and of webdatasets
LABEL_COLUMNS = {"label", "labels"}, {"fine_label"}, {"cls"}
SPLIT_FOLDERS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test",
                 "evaluation": "test", "val": "validation", "valid": "validation",
                 "validation": "validation", "dev": "validation"}
# a file that is all or a part of a split, and nothing else: test.parquet, train-00000-of-00002.parquet
OF_A_SPLIT = re.compile(rf"({'|'.join(SPLIT_FOLDERS)})([-_.](\d+|of|[0-9a-f]{{16}}))*", re.IGNORECASE)
WORDS = re.compile(rf"(?<![a-z])({'|'.join(SPLIT_FOLDERS)})(?![a-z])", re.IGNORECASE)


def place_and_columns(source):
    """(folder or hub id, [input columns..., label column]) of a source PLACE or PLACE:INPUT:LABEL."""
    place, *columns = [source] if Path(source).is_dir() else source.split(":")
    if len(columns) == 1 or not all(columns):
        raise Refused(f"--tasks: {source} names other than two columns or more: NAME=PLACE:IMAGE:LABEL")
    return place, columns


def read_dataset(name, source, registered, encoder):
    """({split: undecoded inputs}, {split: (N,) int64 labels}, class names) of a hub data set or a folder.

    encoder  what inputs it takes, and how their columns are found (input_columns) and read (cells)
    The classes are those that train's feature names, else the names or numbers that occur in train, in order.
    Validation is tested on where there is no test; of a split alone a fifth of each class is.
    """
    place, asked = place_and_columns(source)
    found = two_splits(name, place, fetch(name, place, registered.config if registered else None),
                       registered.test if registered else "test")
    first = next(iter(found))
    columns, label = pick_columns(f"task {name}: split {first} of {place}", found[first].features, asked,
                                  encoder)
    named, classes = {}, None
    for split, rows in found.items():
        missing = [column for column in (*columns, label) if column not in rows.features]
        if missing:
            raise Refused(f"task {name}: split {split} of {place} has no column {missing[0]!r} as {first} has"
                          f"{near(missing[0], list(rows.features), 0.5)}")
        named[split], declared = read_labels(f"task {name}: split {split}", rows, label, encoder.takes,
                                             registered and registered.scores)
        classes = classes or declared or sorted(set(named[first]))
    if len(found) == 1:
        rows, each = found.pop(first), named.pop(first)
        parts = eighty_twenty(f"task {name}: split {first}", each)
        for split, part in parts.items():
            found[split], named[split] = rows.select(part), [each[row] for row in part]
        print(f"task {name}: {place} has one split, {first}: a random fifth of each class is test, "
              f"{len(parts['train']):,} and {len(parts['test']):,} {encoder.takes}", flush=True)
    encoded = {split: encoder.cells(rows, columns) for split, rows in found.items()}
    if not declared and isinstance(classes[0], str):
        print(f"task {name}: {len(classes)} classes by name, sorted: {', '.join(classes[:3])}"
              f"{', ...' if len(classes) > 3 else ''}", flush=True)
    labels = {split: class_numbers(name, split, named[split], classes) for split in named}
    check_counts(name, place, registered, (len(labels["train"]), len(labels["test"]), len(classes)), encoder)
    return encoded, labels, classes


def two_splits(name, place, found, wanted):
    """{"train": rows, "test": rows} of the splits {name: rows} of a data set; its only split as it is.

    wanted  the split that is tested on; where there is none, validation is
    """
    kinds = {split: SPLIT_FOLDERS.get(split) for split in found}
    if len(found) == 1 and "test" not in kinds.values():
        return found
    validation = next((split for split, kind in kinds.items() if kind == "validation"), None)
    test = wanted if wanted in found else "test" if "test" in found else validation
    if "train" not in found or not test:
        raise Refused(f"task {name}: {place} has splits {', '.join(found)}; train and test are needed "
                      f"(or validation in place of test, or one split to be cut in two)")
    if test != wanted:
        print(f"task {name}: {place} has no {wanted} split, {test} is tested on", flush=True)
    return {"train": found["train"], "test": found[test]}


def eighty_twenty(which, classes):
    """{"train", "test"}: row numbers, ascending; a random fifth of each class, rounded down, is test.

    classes  [class of each row]; the same classes are always cut alike
    Errors   Refused: fewer than 10 rows to test on
    """
    generator, rows_of, test = np.random.default_rng(0), {}, []
    for row, each in enumerate(classes):
        rows_of.setdefault(each, []).append(row)
    for each in sorted(rows_of):
        test += generator.permutation(rows_of[each])[:len(rows_of[each]) // 5].tolist()
    if len(test) < 10:
        raise Refused(f"{which} is the only one, and a fifth of each of its {len(rows_of)} classes is "
                      f"{len(test)} rows in all; at least 10 are needed to test on")
    return {"train": sorted(set(range(len(classes))) - set(test)), "test": sorted(test)}


def pick_columns(which, features, asked, encoder):
    """([input columns], label column) among a split's features: those asked for, else the rule's."""
    if asked:
        missing = [column for column in asked if column not in features]
        if missing:
            raise Refused(f"{which} has no column {missing[0]!r}{near(missing[0], list(features), 0.5)} "
                          f"(it has {', '.join(features)})")
        return asked[:-1], asked[-1]
    columns = encoder.input_columns(features)
    for names in (*LABEL_COLUMNS, {column for column, kind in features.items() if hasattr(kind, "names")}):
        labels = [column for column in features if column in names]
        if labels:
            break
    if not columns or len(labels) != 1:
        hint = "" if labels else near("label", list(features), 0.7)
        found = [f"{column} ({getattr(kind, 'dtype', type(kind).__name__)})"
                 for column, kind in features.items()]
        raise Refused(f"{which} needs {encoder.wants} and one column `label`, found {', '.join(found)}"
                      f"{hint}: name them, as in NAME=PLACE:IMAGE:LABEL")
    return columns, labels[0]


def check_counts(name, place, registered, counts, encoder):
    """Refused where (train, test, classes) are not those of a registered task; said where those are not sure.

    A piece of a task of GLUE may have its name: by it go prompts and label words.
    """
    if not registered or counts == registered[2:5]:
        return
    there = (f"task {name}: {place} has {counts[0]} train and {counts[1]} test {encoder.takes} in "
             f"{counts[2]} classes; {name} is {registered.n_train} and {registered.n_test} in "
             f"{registered.n_classes}")
    piece = encoder.takes == "texts" and place != registered.hub_id and counts[2] == registered.n_classes
    unsure = not registered.sure and place == registered.hub_id
    if not piece and not unsure:
        raise Refused(f"{there}: this is another data set, give it another name (OTHER={place})")
    print(there + " as published, which nobody has compared with this copy" * unsure, flush=True)


def read_labels(which, rows, column, takes="images", scores=False):
    """([class of each row], [all classes], None where the column's feature does not name them).

    A class is its name, or its number where there are no names; a list of one class is that class.

    scores  the column holds numbers, and the nearest whole one, of two the larger, is the class
    Errors  Refused: too few rows, more than one class or none in a row, what is no class
    """
    if len(rows) < 10:
        raise Refused(f"{which} has {len(rows)} {takes}; at least 10 are needed")
    values, feature = rows[column][:], rows.features[column]
    if scores and all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
        values = [math.floor(value + 0.5) for value in values]
    if hasattr(feature, "feature"):
        if not all(value and len(value) == 1 for value in values):
            raise Refused(f"{which} has other than one class in some rows of column `{column}`: "
                          f"one class a picture is needed")
        values, feature = [value[0] for value in values], feature.feature
    kinds = {type(value) for value in values}
    if kinds <= {bool, int, float} and all(float(value).is_integer() for value in values):
        values, kinds = [int(value) for value in values], {int}
    if kinds not in ({int}, {str}):
        raise Refused(f"{which}: the labels in column `{column}` are not all whole numbers, nor all names")
    names = getattr(feature, "names", None)
    if isinstance(values[0], str):
        return values, None
    if min(values) < 0 or names and max(values) >= len(names):
        there = f"there are {len(names)} classes (0 to {len(names) - 1})" if names else "no class is below 0"
        raise Refused(f"{which} has labels {min(values)} to {max(values)} in column `{column}`, but {there}")
    return ([names[value] for value in values], list(names)) if names else (values, None)


def class_numbers(name, split, named, classes):
    """(N,) int64: where each row's class stands among train's classes; Refused if it is not there."""
    number = {known: index for index, known in enumerate(classes)}
    strange = sorted(set(named) - set(number))
    if strange:
        raise Refused(f"task {name}: split {split} has {len(strange)} classes that train lacks: "
                      f"{', '.join(map(repr, strange[:3]))}{near(str(strange[0]), map(str, classes), 0.5)} "
                      f"({len(classes)} in train): spell them alike, or leave their images out")
    return np.array([number[known] for known in named], np.int64)


def fetch(name, source, config):
    """{split: Dataset} of a folder (an absolute path) or a hub id; Refused where they cannot be had."""
    import datasets
    from datasets.packaged_modules import _EXTENSION_TO_MODULE as tables
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as loaders
    local = Path(source).is_absolute()
    if source in loaders:
        raise Refused(f"task {name}: {source} is no folder here, and no data set of the hub but a loader of "
                      f"`datasets`: give the folder's path, {name}=FOLDER")
    if not local:
        hub.go_offline_if_unreachable()
    datasets.disable_progress_bars()
    print(f"task {name}: reading {source}", flush=True)
    try:
        with warnings.catch_warnings(action="ignore"):
            if not local:
                return hub.load_dataset(source, config)
            return image_folder(source) or data_files(source)
    except Refused as refusal:
        raise Refused(f"task {name}: {refusal}" if local else str(refusal)) from refusal
    except Exception as error:  # datasets and its backends raise a dozen types for a bad folder or no hub
        refuse_cache(f"task {name}: {source}", error)
        there = {path.suffix.lower() for path in files_below(source)} if local else set()
        if "[" in source and isinstance(error, FileNotFoundError) and there & tables.keys():
            raise Refused(f"task {name}: `datasets` takes [ in {source} for a pattern: rename that "
                          f"folder") from error
        while error.__cause__:                              # DatasetGenerationError says nothing itself
            error = error.__cause__
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        remedy = (f"put its parquet files or an image folder in DIR/{name} and give --data DIR, "
                  f"or {name}=FOLDER in --tasks")
        raise Refused(
            f"task {name}: {source} does not load as a data set of parquet files or image folders ({reason})"
            if local else
            f"task {name} wants data set {source} from the hub and could not get it ({reason}): {remedy}"
        ) from error


def refuse_cache(which, error):
    """Refused, naming the caches that data sets are copied to, where one of them is why reading failed."""
    import datasets
    import huggingface_hub
    caches = str(datasets.config.HF_DATASETS_CACHE), str(huggingface_hub.constants.HF_HUB_CACHE)
    cause, reason = error, ""
    while cause and not reason:
        full = getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        there = str(getattr(cause, "filename", None)).startswith(caches)
        if full or there and not isinstance(cause, FileNotFoundError) or "disk space" in str(cause):
            reason = " ".join(str(cause).split())[:200]
        cause = cause.__cause__ or cause.__context__
    try:
        for cache in caches:
            Path(cache).mkdir(parents=True, exist_ok=True)
    except OSError as problem:                              # a home that is not there, or not one's own
        reason = reason or f"{problem.strerror}: {problem.filename}"
    if reason:
        raise Refused(f"{which} cannot be copied to the caches {' and '.join(caches)} ({reason}): free space "
                      f"there, or let HF_HOME name a folder that can be written") from error


def image_folder(source):
    """{split: Dataset} of the pictures SPLIT/CLASS/*.jpg or CLASS/*.jpg below a folder; {}: there are none.

    The first folder on the way down that is named like a split is the split, all below it the class, which
    may be several folders: church/indoor is not casino/indoor.
    `datasets` itself would find the split in names of classes (train_station) and of files.
    """
    import datasets
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
    pictures, of_other_endings, endings = {}, [], images.endings()
    for path in files_below(source):
        folders = path.relative_to(source).parts[:-1]
        if path.suffix == ".parquet" or path.name in ImageFolder.METADATA_FILENAMES:
            return {}                                       # labels are in a table
        hidden = any(part.startswith((".", "__")) for part in (*folders, path.name))
        if hidden:
            continue
        if path.suffix.lower() not in endings:
            of_other_endings.append(path)
            continue
        place = next((place for place, part in enumerate(folders) if part.lower() in SPLIT_FOLDERS), None)
        split = "all" if place is None else SPLIT_FOLDERS[folders[place].lower()]
        inner = folders if place is None else folders[place + 1:]
        # one class whether its letters carry their accents (NFC) or are followed by them (NFD, of macOS)
        each = unicodedata.normalize("NFC", str(PurePosixPath(*inner)))
        pictures.setdefault(split, []).append((str(path), each))
    others = [each for _, each in pictures.get("all", ())
              if not ("/" in each and WORDS.search(each.partition("/")[0]))]
    if set(pictures) == {"all"} and not others:             # train_2017/CLASS: `datasets` knows such names
        return {}
    outside = pictures.pop("all") if len(pictures) > 1 and "all" in pictures else []
    if outside:
        print(f"{source}: {len(outside):,} pictures below no folder named {' or '.join(pictures)} are left "
              f"out, as {outside[0][0]}", flush=True)
    found = {}
    for split, pairs in pictures.items():
        paths, classes = zip(*pairs, strict=True)
        example = dict(zip(classes, paths, strict=True))
        if set(example) == {"."}:                           # no folder between split and picture: no classes
            return {}
        for each in example:
            above = [str(folder) for folder in PurePosixPath(each).parents if str(folder) in example]
            if above:
                raise Refused(f"{source}: pictures lie beside folders of pictures, as {example[above[0]]} "
                              f"and {example[each]}: which folder is the class?")
        features = datasets.Features(image=datasets.Image(),
                                     label=datasets.ClassLabel(names=sorted(example)))
        columns = {"image": list(paths), "label": list(classes)}
        found[split] = datasets.Dataset.from_dict(columns, features=features)
    if found and of_other_endings:
        print(f"{source}: {len(of_other_endings):,} files whose names do not end as pictures' are left out, "
              f"as {of_other_endings[0]}", flush=True)
    return found


def files_below(folder):
    """Paths of all files below a folder, in order, also through links, but not to folders above them."""
    found, folder = [], Path(folder)
    for here, folders, names in os.walk(folder, followlinks=True):
        place = Path(here)
        above = [folder, *(each for each in place.parents if each.is_relative_to(folder))]
        if place != folder and any(each.resolve().is_relative_to(place.resolve()) for each in above):
            folders.clear()
            continue
        found += [place / name for name in names]
    return sorted(found, key=str)


def data_files(source):
    """{split: Dataset} of parquet files and what else `datasets` finds in a folder, each read by itself.

    Together, all splits would be read as train's files describe their columns.
    """
    import datasets
    builder, found = datasets.load_dataset_builder(source), {}
    files = {str(split): paths for split, paths in builder.config.data_files.items()}
    card = Path(source, "README.md")
    listed = card.exists() and "data_files" in card.read_text(encoding="utf-8", errors="replace")
    twice = set(files.get("train", ())) & set(files.get("test", ()))
    if twice:
        raise Refused(f"{source}: by its name {min(twice)} belongs to train and to test: "
                      f"name files train-*.parquet and test-*.parquet, or folders train and test")
    for split, paths in files.items():
        named = [path for path in paths if named_as_a_split(os.path.relpath(path, source))]
        # test_old.parquet beside test.parquet, unless a README names its files
        if builder.name == "parquet" and not listed and 0 < len(named) < len(paths):
            others = sorted(set(paths) - set(named))
            print(f"{source}: {len(others):,} files beside those named {split} are left out, as {others[0]}",
                  flush=True)
            paths = named
        features = None
        if builder.name == "parquet":
            features = parquet_features(split, paths) or builder.info.features
        escaped = {split: [glob.escape(path) for path in paths]}
        found[split] = datasets.load_dataset(source, data_files=escaped, split=split, features=features)
    return found


def named_as_a_split(path):
    """Whether a file, or a folder on the way to it, is named as a split of it or a part of one."""
    *folders, name = Path(path).parts
    return any(folder.lower() in SPLIT_FOLDERS for folder in folders) or bool(
        OF_A_SPLIT.fullmatch(name.removesuffix(".parquet")))


def parquet_features(split, paths):
    """What a split's parquet files say of their columns, None where they do not: a README may.

    Errors  Refused: files whose classes are not the same
    """
    import datasets
    import pyarrow.parquet
    schemas = [pyarrow.parquet.read_schema(path) for path in paths]
    names = {}
    for path, schema in zip(paths, schemas, strict=True):
        features = datasets.Features.from_arrow_schema(schema)
        classes = [getattr(kind, "names", None) for kind in features.values()]
        names.setdefault(str(classes), path)
    if len(names) > 1:
        raise Refused(f"{' and '.join(names.values())} of split {split} name other classes or in another "
                      f"order: write them with the same ClassLabel")
    return features if b"huggingface" in (schemas[0].metadata or {}) else None
