"""
A data set read once: its inputs and labels as memory-mapped arrays in runs/inputs/, with checksums.
"""
import hashlib
import json
import warnings
from pathlib import Path

import numpy as np

from lib import generated, hub, ranks
from lib.files import Refused, block_checksums, checksum, replacing, save_array


def stored_folder(name, source, registered, encoder, runs, seed):
    """The folder of a task's arrays, made now if it is not there.

    registered  common.Registered where the task is one of the paper's, else None
    encoder     decides how inputs are kept
    """
    identity = json.dumps([name, identify_source(source, seed), encoder.side])
    folder = runs / "inputs" / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:10]}"
    with ranks.first():
        if not folder.exists():
            build_cache(folder, name, source, registered, encoder, seed)
    return folder


def identify_source(source, seed):
    """What names a cache: the generator's code and seed, the local files' sizes and times, or a hub id."""
    if source == "generated":
        return ["generated", generated.code_fingerprint(), seed]
    if not Path(source).is_absolute():
        return source
    files = []
    for path in sorted(Path(source).rglob("*")):
        if path.is_file():
            files.append([str(path.relative_to(source)), path.stat().st_size, path.stat().st_mtime_ns])
    return [source, files]


def build_cache(folder, name, source, registered, encoder, seed):
    """Write folder/{train,test}_{inputs,labels}.npy and about.json; the folder appears when it is whole."""
    if source != "generated":
        encoded, labels, classes = read_dataset(name, source, registered, encoder.input_column)
    with replacing(folder) as temporary:
        temporary.mkdir()
        if source == "generated":
            inputs, labels, classes = {}, {}, list(generated.TASKS[name])
            for split in ("train", "test"):
                inputs[split], labels[split] = generated.draw_task(name, split, seed)
                save_array(temporary / f"{split}_inputs.npy", inputs[split])
        else:
            inputs = encoder.store(name, encoded, temporary)
        digest, shapes = hashlib.sha256(), {}
        for split in ("train", "test"):
            save_array(temporary / f"{split}_labels.npy", labels[split])
            for block in range(0, len(inputs[split]), 4096):
                digest.update(np.ascontiguousarray(inputs[split][block:block + 4096]).data)
            digest.update(np.ascontiguousarray(labels[split]).data)
            shapes[f"{split}_inputs"] = list(inputs[split].shape)
            shapes[f"{split}_labels"] = list(labels[split].shape)
        about = {"task": name, "source": source, "classes": classes, "shapes": shapes,
                 "sha256": digest.hexdigest(),
                 "blocks": {path.name: block_checksums(path) for path in sorted(temporary.glob("*.npy"))}}
        about["checksum"] = checksum(about)
        (temporary / "about.json").write_text(json.dumps(about, indent=1) + "\n")


def read_about(folder):
    """What about.json says of a stored task: {"classes", "shapes", "sha256", ...}; no array is read."""
    redo = f"delete {folder} and run the same command again"
    try:
        about = json.loads((folder / "about.json").read_text())
        sound = about.pop("checksum", None) == checksum(about)
    except (FileNotFoundError, ValueError, AttributeError, RecursionError) as error:
        raise Refused(f"image cache {folder} cannot be read ({error}): {redo}") from error
    if not sound:
        raise Refused(f"image cache {folder} does not match its own checksums: {redo}")
    return about


def read_arrays(folder):
    """({"train_inputs", "train_labels", "test_inputs", "test_labels"}, what about.json says), all checked."""
    redo = f"delete {folder} and run the same command again"
    about, arrays, sound = read_about(folder), {}, True
    try:
        for file, sums in about["blocks"].items():
            sound = sound and block_checksums(folder / file) == sums
        for key, shape in about["shapes"].items():
            arrays[key] = np.load(folder / f"{key}.npy", mmap_mode="r" if key.endswith("_inputs") else None)
            sound = sound and list(arrays[key].shape) == shape
    except (FileNotFoundError, ValueError, EOFError, KeyError, TypeError) as error:
        raise Refused(f"image cache {folder} cannot be read ({error}): {redo}") from error
    if not sound:
        raise Refused(f"image cache {folder} does not match its own checksums: {redo}")
    return arrays, about


def read_dataset(name, source, registered, input_column):
    """({split: undecoded inputs}, {split: (N,) int64 labels}, class names) of a hub data set or a folder.

    input_column  function of a data set's features: the names of the columns that hold inputs
    """
    found = fetch(name, source, registered.config if registered else None)
    import datasets
    if not {"train", "test"} <= set(found):
        raise Refused(f"task {name}: {source} has splits {', '.join(found)}; train and test are needed")
    features = found["train"].features
    columns = input_column(features)
    label_columns = [column for column in features if column in ("label", "labels")]
    if len(columns) != 1 or len(label_columns) != 1:
        raise Refused(f"task {name}: {source} needs one image column and one column `label`, "
                      f"found {', '.join(features)}")
    [column], [label] = columns, label_columns
    labels = {split: read_labels(name, split, found[split], label) for split in ("train", "test")}
    if isinstance(features[label], datasets.ClassLabel):
        classes = list(features[label].names)
    else:
        classes = list(range(int(labels["train"].max()) + 1))
    for split, values in labels.items():
        if values.min() < 0 or values.max() >= len(classes):
            raise Refused(f"task {name}: split {split} has labels {values.min()} to {values.max()}, but "
                          f"there are {len(classes)} classes (0 to {len(classes) - 1})")
    counts = (len(labels["train"]), len(labels["test"]), len(classes))
    if registered and counts != registered[2:]:
        raise Refused(f"task {name}: {source} has {counts[0]} train and {counts[1]} test images in "
                      f"{counts[2]} classes; {name} is {registered.n_train} and {registered.n_test} in "
                      f"{registered.n_classes}: this is another data set, give it another name "
                      f"(OTHER={source})")
    encoded = {}
    for split in ("train", "test"):
        encoded[split] = found[split].cast_column(column, datasets.Image(decode=False))[column]
    return encoded, labels, classes


def fetch(name, source, config):
    """The `datasets` splits of a folder (an absolute path) or a hub id; Refused where they cannot be had."""
    local = Path(source).is_absolute()
    if not local:
        hub.go_offline_if_unreachable()
    import datasets
    datasets.disable_progress_bars()
    print(f"task {name}: reading {source}", flush=True)
    try:
        with warnings.catch_warnings(action="ignore"):
            return datasets.load_dataset(source) if local else hub.load_dataset(source, config)
    except Refused:
        raise
    except Exception as error:  # datasets and its backends raise a dozen types for a bad folder or no hub
        reason = f"{type(error).__name__}: {error}"[:300]
        remedy = (f"put its parquet files or an image folder in DIR/{name} and give --data DIR, "
                  f"or {name}=FOLDER in --tasks")
        raise Refused(
            f"task {name}: {source} does not load as a data set of parquet files or image folders ({reason})"
            if local else
            f"task {name} wants data set {source} from the hub and could not get it ({reason}): {remedy}"
        ) from error


def read_labels(name, split, found, column):
    """(N,) int64 labels of a data set's split; Refused where they are too few or no whole numbers."""
    labels = found.with_format("numpy")[column][:] if len(found) else np.zeros(0, int)
    if labels.dtype.kind not in "iu":
        raise Refused(f"task {name}: the labels of split {split} are not all whole numbers")
    if len(labels) < 10:
        raise Refused(f"task {name}: split {split} has {len(labels)} images; at least 10 are needed")
    return labels.astype(np.int64)
