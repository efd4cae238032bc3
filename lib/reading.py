"""
Reading a data set: from the hub, from parquet files, or from an image folder, splits and classes as its own
files say.
"""
import errno
import glob
import math
import unicodedata
import warnings
from pathlib import Path

import numpy as np

from lib import hub
from lib.encoders import near
from lib.files import Refused

READING = 2        # raise it where the same files would be read as other inputs or labels than before
LABEL_COLUMNS = "label", "labels"
SPLIT_FOLDERS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test",
                 "evaluation": "test"}


def read_dataset(name, source, registered, encoder):
    """({split: undecoded inputs}, {split: (N,) int64 labels}, class names) of a hub data set or a folder.

    encoder  what inputs it takes, and how their columns are found (input_columns) and read (cells)
    The classes are those that train's feature names, else the names or numbers that occur in train, in order.
    """
    found = fetch(name, source, registered.config if registered else None)
    if registered and registered.test in found:
        found = found | {"test": found[registered.test]}
    if not {"train", "test"} <= set(found):
        raise Refused(f"task {name}: {source} has splits {', '.join(found)}; train and test are needed")
    encoded, named, classes, columns = {}, {}, None, None
    for split in ("train", "test"):
        features = found[split].features
        missing = [column for column in columns or () if column not in features]
        if missing:
            raise Refused(f"task {name}: split {split} of {source} has no column {missing[0]!r} as train has"
                          f"{near(missing[0], list(features), 0.5)}")
        columns = columns or encoder.input_columns(features)
        label_columns = [column for column in features if column in LABEL_COLUMNS]
        if not columns or len(label_columns) != 1:
            hint = "" if label_columns else near("label", list(features), 0.7)
            raise Refused(f"task {name}: split {split} of {source} needs {encoder.wants} and one column "
                          f"`label`, found {', '.join(features)}{hint}")
        named[split], declared = read_labels(f"task {name}: split {split}", found[split], *label_columns,
                                             encoder.takes, registered and registered.scores)
        classes = classes or declared or sorted(set(named["train"]))
        encoded[split] = encoder.cells(found[split], columns)
    labels = {split: class_numbers(name, split, named[split], classes) for split in named}
    counts = (len(labels["train"]), len(labels["test"]), len(classes))
    if registered and counts != registered[2:5]:
        there = (f"task {name}: {source} has {counts[0]} train and {counts[1]} test {encoder.takes} in "
                 f"{counts[2]} classes; {name} is {registered.n_train} and {registered.n_test} in "
                 f"{registered.n_classes}")
        # by a name of GLUE go prompts and label words, which hold for a piece of it too
        piece = encoder.takes == "texts" and source != registered.hub_id and counts[2] == registered.n_classes
        if not piece:
            raise Refused(f"{there}: this is another data set, give it another name (OTHER={source})")
        print(there, flush=True)
    return encoded, labels, classes


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
    if {type(value) for value in values} not in ({int}, {str}):
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
        reason = f"{type(error).__name__}: {error}"[:300]
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
    """{split: Dataset} of the pictures SPLIT/CLASS/*.jpg below a folder; {} where it holds no such pictures.

    The first folder on the way down that is named like a split is the split, a picture's own its class.
    `datasets` itself would find the split in names of classes (train_station) and of files.
    """
    import datasets
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
    pictures, depths = {}, {}
    for path in sorted(Path(source).rglob("*"), key=str):
        folders = path.relative_to(source).parts[:-1]
        if path.suffix == ".parquet" or path.name in ImageFolder.METADATA_FILENAMES:
            return {}                                       # labels are in a table
        hidden = any(part.startswith((".", "__")) for part in (*folders, path.name))
        place = next((place for place, part in enumerate(folders) if part in SPLIT_FOLDERS), None)
        if place is None or hidden or path.suffix.lower() not in ImageFolder.EXTENSIONS:
            continue
        pictures.setdefault(SPLIT_FOLDERS[folders[place]], []).append(path)
        depths.setdefault(len(folders) - place, path)
    if len(depths) > 1:
        raise Refused(f"{source}: pictures lie at different depths below their split, as "
                      f"{' and '.join(map(str, depths.values()))}; SPLIT/CLASS/*.jpg is needed")
    if 1 in depths:                                         # no folder between split and picture: no classes
        return {}
    found = {}
    for split, paths in pictures.items():
        # one class whether its letters carry their accents (NFC) or are followed by them (NFD, of macOS)
        classes = [unicodedata.normalize("NFC", path.parent.name) for path in paths]
        features = datasets.Features(image=datasets.Image(),
                                     label=datasets.ClassLabel(names=sorted(set(classes))))
        columns = {"image": [str(path) for path in paths], "label": classes}
        found[split] = datasets.Dataset.from_dict(columns, features=features)
    return found


def data_files(source):
    """{split: Dataset} of parquet files and what else `datasets` finds in a folder, each read by itself.

    Together, all splits would be read as train's files describe their columns.
    """
    import datasets
    builder, found = datasets.load_dataset_builder(source), {}
    files = {str(split): paths for split, paths in builder.config.data_files.items()}
    twice = set(files.get("train", ())) & set(files.get("test", ()))
    if twice:
        raise Refused(f"{source}: by its name {min(twice)} belongs to train and to test: "
                      f"name files train-*.parquet and test-*.parquet, or folders train and test")
    for split, paths in files.items():
        features = None
        if builder.name == "parquet":
            features = parquet_features(split, paths) or builder.info.features
        escaped = {split: [glob.escape(path) for path in paths]}
        found[split] = datasets.load_dataset(source, data_files=escaped, split=split, features=features)
    return found


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
        classes = [getattr(features.get(column), "names", None) for column in LABEL_COLUMNS]
        names.setdefault(str(classes), path)
    if len(names) > 1:
        raise Refused(f"{' and '.join(names.values())} of split {split} name other classes or in another "
                      f"order: write them with the same ClassLabel")
    return features if b"huggingface" in (schemas[0].metadata or {}) else None
