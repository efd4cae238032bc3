"""
A data set read once: its inputs and labels as memory-mapped arrays in runs/inputs/, with checksums.
"""
import hashlib
import json
from pathlib import Path

import numpy as np

from lib import generated, ranks
from lib.files import Refused, block_checksums, checksum, replacing, save_array
from lib.reading import READING, files_below, place_and_columns, read_dataset


def stored_folder(name, source, registered, encoder, runs, seed):
    """The folder of a task's arrays, made now if it is not there.

    registered  common.Registered where the task is one of the paper's, else None
    encoder     decides how inputs are kept
    """
    refuse_other_inputs(name, source, registered, encoder)
    identity = json.dumps([name, identify_source(source, seed), encoder.stored_as(name)])
    folder = runs / "inputs" / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:10]}"
    with ranks.first(folder):
        if not folder.exists():
            build_cache(folder, name, source, registered, encoder, seed)
    return folder


def refuse_other_inputs(name, source, registered, encoder):
    """Refused: a task known to be of images for an encoder of texts, or the other way round."""
    known = registered.takes if registered else encoder.takes
    known = "images" if source == "generated" else known
    if known != encoder.takes:
        raise Refused(f"task {name} is of {known}, and {encoder.name} takes {encoder.takes}: "
                      f"give --tasks of {encoder.takes}, or an encoder of {known}")


def identify_source(source, seed):
    """What names a cache: the generator's code and seed, else READING with local files' times or a hub id."""
    if source == "generated":
        return ["generated", generated.code_fingerprint(), seed]
    place, _ = place_and_columns(source)
    if not Path(place).is_absolute():
        return [source, READING]
    files = []
    for path in sorted(files_below(place)):
        if path.is_file():
            files.append([str(path.relative_to(place)), path.stat().st_size, path.stat().st_mtime_ns])
    return [source, READING, files]


def build_cache(folder, name, source, registered, encoder, seed):
    """Write folder/{train,test}_{inputs,labels}.npy and about.json; the folder appears when it is whole."""
    if source != "generated":
        encoded, labels, classes = read_dataset(name, source, registered, encoder)
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
        raise Refused(f"input cache {folder} cannot be read ({error}): {redo}") from error
    if not sound:
        raise Refused(f"input cache {folder} does not match its own checksums: {redo}")
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
        raise Refused(f"input cache {folder} cannot be read ({error}): {redo}") from error
    if not sound:
        raise Refused(f"input cache {folder} does not match its own checksums: {redo}")
    return arrays, about
