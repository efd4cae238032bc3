"""
What defines a number, once: tasks and splits, heads, the one evaluator, weight arithmetic.

    evaluator = common.Evaluator(encoder, args, images_ahead)
    evaluator.use_vectors([tau_a, tau_b])
    hits = evaluator.hits([split], [head], [(0.1, 0.1), (0.2, 0.2)])     # [[hits at .1, hits at .2]], over len(split.rows)

Every stage imports this file; nothing here trains. The parts, in order: flags and devices, tasks, images on the device, heads
and accuracies, evaluator, pictures. Shapes: N images, B a batch, C classes, D feature width, K weight settings, S pixels a side.
Source  arXiv:2511.14569; the choices it leaves open are listed in the README
"""
import argparse
import copy
import difflib
import hashlib
import io
import json
import os
import re
import resource
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import ranks
import tiny
from encoders import ENCODERS, weights_of, width_of
from files import (Refused, block_checksums, checked_download, checksum, file_metadata, fingerprint, flag_parser, go_offline_if_unreachable, load_tensors, make_room,
                   replacing, save_tensors)

# ---------------------------------------------------------------------------------------------- flags and devices


def stage_parser(docstring):
    """The flags every stage shares, spelt alike; `--help` shows the stage's docstring with its pasteable commands."""
    parser = flag_parser(docstring)
    add = parser.add_argument
    add("encoder", help=f"{', '.join(ENCODERS)}, timm:NAME or open_clip:ARCH/TAG")
    add("--tasks", help="comma-separated; NAME of a known task or of a folder in --data, or NAME=HUB_ID_OR_FOLDER "
                        "(default: the eight generated tasks for tiny, else the paper's eight)")
    add("--data", type=Path, help="folder of data sets; DIR/NAME is looked for before the hub")
    add("--weights", type=Path, help="checkpoint file of the encoder, for machines without a hub")
    add("--image-size", type=positive, help="pixels; position embeddings are resampled (default: the checkpoint's own)")
    add("--runs", type=Path, default=Path("runs"), help="where results go (default: runs)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto")
    add("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="of the forward pass (auto: bf16 where the hardware has it; disentangle.py fp32)")
    add("--compile", choices=["auto", "on", "off"], default="auto", help="auto: when the work ahead repays compiling")
    add("--seed", type=natural, default=0, help="reaches everything random except the pinned validation split")
    add("--overwrite", action="store_true", help="redo this stage even where its result exists")
    return parser


def add_recipe(parser):
    parser.add_argument("--recipe", choices=list(RECIPES), default="aligned", metavar="NAME", help="how theta_t comes about: aligned (probed head, frozen; the default), "
                        "full (random head, trained along), zeroshot, zeroshot-full (head from class names, CLIP only); attention, attention-bias, attention-mlp, "
                        "attention-mlp-bias (those weights only), linearized (in the tangent space), each with a probed head or as NAME-zeroshot, NAME-random")


class Recipe(NamedTuple):
    head: str             # where it comes from: "probed" (probe.py), "random", or "text" (text_heads.py)
    train_head: bool      # along with the encoder, else it stays frozen
    trained: str = ""     # regular expression of the encoder's parameters that train; all of them
    linear: bool = False  # the encoder is its first-order Taylor expansion at theta_pre


RECIPES = {"aligned": Recipe("probed", False), "full": Recipe("random", True), "zeroshot": Recipe("text", False), "zeroshot-full": Recipe("text", True)}
ATTENTION, MLP = r"attn\.(qkv|[qkv]_proj|proj|in_proj|out_proj)[._]", r"mlp\.(fc1|fc2|c_fc|c_proj)\."  # as timm and open_clip name them
for name, trained, linear in [("attention", f"{ATTENTION}weight$", False), ("attention-bias", f"{ATTENTION}(weight|bias)$", False),
                              ("attention-mlp", f"({ATTENTION}|{MLP})weight$", False), ("attention-mlp-bias", f"({ATTENTION}|{MLP})(weight|bias)$", False),
                              ("linearized", "", True)]:
    RECIPES |= {name: Recipe("probed", False, trained, linear), f"{name}-zeroshot": Recipe("text", False, trained, linear),
                f"{name}-random": Recipe("random", True, trained, linear)}


def natural(text):
    """argparse type: a whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def positive(text):
    """argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def positive_float(text):
    """argparse type: a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def progress(items, what, unit):
    """tqdm: a bar on a terminal, a plain line every half minute elsewhere. items is an iterable, or a number to update by hand."""
    counted = {"total": items} if isinstance(items, int) else {"iterable": items}
    plain = {} if sys.stderr.isatty() else {"mininterval": 30, "maxinterval": 60, "delay": 30,
                                            "bar_format": "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} gone, {remaining} left, {rate_fmt}{postfix}\n"}
    return tqdm(**counted, disable=ranks.rank() > 0, desc=what, unit=unit, unit_scale=unit == "img", leave=False, **plain)


def pick_device(name):
    """torch.device for --device, each process of torchrun its own GPU; Refused if it is unknown or not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and ranks.world() > 1:
        name = f"cuda:{torch.cuda.current_device()}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Refused(f"--device {name} is not usable here ({str(error).splitlines()[0]}); try --device cpu") from error
    return device


def pick_dtype(name, device):
    """(dtype, reason) of the forward pass: bf16 where the hardware multiplies matrices in it, fp32 elsewhere."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[name], f"--dtype {name}"
    if device.type == "cuda":
        has_bf16, unit = torch.cuda.is_bf16_supported(including_emulation=False), "bf16 tensor cores"
    elif device.type == "cpu":
        has_bf16, unit = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(), "AMX or AVX512-bf16"
    else:
        has_bf16, unit = False, "measured bf16 units"
    return (torch.bfloat16, f"{device.type} with {unit}") if has_bf16 else (torch.float32, f"{device.type} without {unit}")


def reset_peak_memory(device):
    """Start peak_memory anew. On a CPU Linux can do so; elsewhere it stays the process's whole life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """Peak bytes since reset_peak_memory: of a GPU's allocator, or of the resident process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # not ru_maxrss, which a process inherits from the one that started it
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss              # bytes on macOS


# ---------------------------------------------------------------------------------------------- tasks


class Registered(NamedTuple):
    hub_id: str
    config: str | None
    n_train: int
    n_test: int
    n_classes: int


TASKS = {
    "cars": Registered("tanganke/stanford_cars", None, 8144, 8041, 196),
    "dtd": Registered("tanganke/dtd", None, 3760, 1880, 47),
    "eurosat": Registered("tanganke/eurosat", None, 21600, 2700, 10),
    "gtsrb": Registered("tanganke/gtsrb", None, 26640, 12630, 43),
    "mnist": Registered("ylecun/mnist", None, 60000, 10000, 10),
    "resisc45": Registered("tanganke/resisc45", None, 18900, 6300, 45),
    "sun397": Registered("tanganke/sun397", None, 19850, 19850, 397),
    "svhn": Registered("ufldl-stanford/svhn", "cropped_digits", 73257, 26032, 10),
}


class Split(NamedTuple):
    images: np.ndarray  # (N_all, 3, side, side) uint8, memory-mapped
    rows: np.ndarray    # (N,) int64, which of them belong to this split
    labels: np.ndarray  # (N,) int64


class Task(NamedTuple):
    name: str
    splits: dict        # {"train", "val", "test"} -> Split
    classes: list       # C class names; their numbers where the data set names none
    fingerprint: str    # SHA-256 of all pixels and labels


def task_names(args):
    """[(name, source)] for --tasks; source is a folder (Path), a Registered row, a hub id (str) or "generated"."""
    default = list(tiny.TASKS) if args.encoder == "tiny" else list(TASKS)
    chosen = []
    if args.data and not args.data.is_dir():
        raise Refused(f"--data {args.data} is not a folder")
    for word in default if args.tasks is None else args.tasks.split(","):
        name, _, given = word.strip().partition("=")
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise Refused(f"--tasks: {name!r} is no task name (letters, digits, _ . - only)")
        folder = args.data / name if args.data else None
        if given:
            source = Path(given) if Path(given).exists() or given.startswith((".", "/", "~")) else given
        elif folder and folder.is_dir():
            source = folder
        elif name in TASKS:
            source = TASKS[name]
        elif name in tiny.TASKS:
            source = "generated"
        else:
            known = [*TASKS, *tiny.TASKS, *([path.name for path in args.data.iterdir()] if args.data else [])]
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            raise Refused(f"unknown task {name!r}{'; did you mean ' + ' or '.join(near) + '?' if near else ''} "
                          f"(known: {', '.join(known)}; any other as NAME=HUB_ID_OR_FOLDER)")
        if isinstance(source, Path) and not source.expanduser().is_dir():
            raise Refused(f"task {name}: {source} is not a folder")
        chosen.append((name, source))
    names = [name for name, _ in chosen]
    if len(set(names)) < len(names):
        raise Refused(f"--tasks names a task twice: {', '.join(names)}")
    return chosen


def search_task(names):
    """The task whose validation split picks a learning rate: cars, or else the first."""
    return "cars" if "cars" in names else names[0]


def check_search(path, result, task):
    """Refused if an earlier run picked its learning rate elsewhere although cars is now there to pick it on."""
    searched = result.get("search", {}).get("task")
    if task == "cars" and searched not in (None, "cars"):
        raise Refused(f"{path} has its learning rate from a search on {searched}, but cars is among the tasks now: give --overwrite or another --runs")


def load_task(name, source, encoder, args):
    """One task's splits as uint8 pixels, decoded once into runs/images/.

    name, source   a pair from task_names
    encoder        Encoder; sets the side to which larger or unequal images are resized (a data set of one small square
                   size keeps it and is resized on the device)
    Returns        Task; validation is the pinned min(10 %, 5000) of train, whatever the seed
    Errors         Refused: unreachable hub, no data set in the folder, other row or class counts than registered, an image
                   that cannot be decoded (named with its index), labels that are not 0..C-1, a full disk, a cut cache
    """
    side = resized_side(encoder)
    identity = json.dumps([name, describe_source(source, args.seed), side])
    folder = args.runs / "images" / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:10]}"
    with ranks.first():
        if not folder.exists():
            build_image_cache(folder, name, source, side, args.seed)
    redo = f"delete {folder} and run the same command again"
    try:
        about = json.loads((folder / "about.json").read_text())
        sound = about.pop("checksum", None) == checksum(about) and all(block_checksums(folder / file) == sums for file, sums in about["blocks"].items())
        arrays = {key: np.load(folder / f"{key}.npy", mmap_mode="r" if "images" in key else None)
                  for key in ("train_images", "train_labels", "test_images", "test_labels")}
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"image cache {folder} cannot be read ({error}): {redo}") from error
    if not sound:
        raise Refused(f"image cache {folder} does not match its own checksums: {redo}")
    for key, array in arrays.items():
        if list(array.shape) != about["shapes"][key]:
            raise Refused(f"image cache {folder}/{key}.npy has shape {array.shape}, not {about['shapes'][key]}: {redo}")
    train_rows, val_rows = validation_split(len(arrays["train_labels"]))
    rows = {"train": train_rows, "val": val_rows, "test": np.arange(len(arrays["test_labels"]))}
    splits = {}
    for split, index in rows.items():
        stem = "test" if split == "test" else "train"
        splits[split] = Split(arrays[f"{stem}_images"], index, arrays[f"{stem}_labels"][index])
    return Task(name, splits, about["classes"], about["sha256"])


def sample(split, n, seed):
    """At most n random images of a split (None: all), without replacement, in random order."""
    chosen = np.random.default_rng(seed).permutation(len(split.rows))[:n]
    return Split(split.images, split.rows[chosen], split.labels[chosen])


def validation_split(n):
    """(train rows, validation rows) of n training images: torch's random_split with seed 0, validation min(10 %, 5000)."""
    n_val = min(n // 10, 5000)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).numpy()
    return order[: n - n_val], order[n - n_val:]


def describe_source(source, seed):
    """What identifies a source for the cache: the hub id, the local files with sizes and times, or the generator and its seed."""
    if source == "generated":
        return ["generated", hashlib.sha256(Path(tiny.__file__).read_bytes()).hexdigest(), seed]
    if isinstance(source, Path):
        files = sorted(path for path in source.expanduser().rglob("*") if path.is_file())
        return [str(source.expanduser().resolve()), [[str(f.relative_to(source.expanduser())), f.stat().st_size, f.stat().st_mtime_ns] for f in files]]
    return list(source) if isinstance(source, Registered) else source


def build_image_cache(folder, name, source, side, seed):
    """Decode a task into folder/{train,test}_{images,labels}.npy and about.json; the folder appears when it is whole."""
    if source == "generated":
        drawn = {split: tiny.draw_task(name, split, seed) for split in ("train", "test")}
        classes = list(tiny.TASKS[name])
        native, encoded = True, None
    else:
        encoded, labels, classes = read_dataset(name, source)
        native = one_small_square_size(encoded, side)
        n_images = sum(map(len, encoded.values()))
        make_room(folder.parent, n_images * 3 * (native or side) ** 2, f"decoded images of task {name}")
    digest, shapes = hashlib.sha256(), {}
    with replacing(folder) as temporary:
        temporary.mkdir()
        for split in ("train", "test"):
            if encoded:
                np.save(temporary / f"{split}_labels.npy", labels[split])
                pixels = decode_split(name, split, encoded[split], native, side, temporary / f"{split}_images.npy")
            else:
                pixels, targets = drawn[split]
                np.save(temporary / f"{split}_labels.npy", targets)
                np.save(temporary / f"{split}_images.npy", pixels)
            for block in range(0, len(pixels), 4096):
                digest.update(np.ascontiguousarray(pixels[block:block + 4096]).data)
            targets = labels[split] if encoded else targets
            digest.update(np.ascontiguousarray(targets).data)
            shapes |= {f"{split}_images": list(pixels.shape), f"{split}_labels": list(targets.shape)}
        about = {"task": name, "source": describe_source(source, seed), "side": shapes["train_images"][-1], "classes": classes,
                 "shapes": shapes, "sha256": digest.hexdigest(), "blocks": {path.name: block_checksums(path) for path in sorted(temporary.glob("*.npy"))}}
        about |= {"checksum": checksum(about)}
        (temporary / "about.json").write_text(json.dumps(about, indent=1) + "\n")


def read_dataset(name, source):
    """({split: column of undecoded images}, {split: (N,) int64 labels}, class names) of a hub data set or a local folder."""
    is_local = isinstance(source, Path)
    if not is_local:
        go_offline_if_unreachable()
    import datasets
    datasets.disable_progress_bars()
    registered = TASKS.get(name)
    path, config = (str(source.expanduser()), None) if is_local else (source, None) if isinstance(source, str) else source[:2]
    print(f"task {name}: reading {path}", flush=True)
    try:
        with warnings.catch_warnings(action="ignore"):
            found = datasets.load_dataset(path, config) if is_local else load_from_hub(path, config)
    except Refused:
        raise
    except Exception as error:  # datasets and its backends raise a dozen types for a bad folder or an unreachable hub
        reason = f"{type(error).__name__}: {error}"[:300]
        raise Refused(f"task {name}: {path} does not load as a data set of parquet files or image folders ({reason})" if is_local else
                      f"task {name} wants data set {path} from the hub and could not get it ({reason}): "
                      f"put its parquet files or an image folder in DIR/{name} and give --data DIR, or {name}=FOLDER in --tasks") from error
    if not {"train", "test"} <= set(found):
        raise Refused(f"task {name}: {path} has splits {', '.join(found)}; train and test are needed")
    features = found["train"].features
    image_columns = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    label_columns = [column for column in features if column in ("label", "labels")]
    if len(image_columns) != 1 or len(label_columns) != 1:
        raise Refused(f"task {name}: {path} needs one image column and one column `label`, found {', '.join(features)}")
    image, label = image_columns[0], label_columns[0]
    labels = {}
    for split in ("train", "test"):
        column = found[split].with_format("numpy")[label][:] if len(found[split]) else np.zeros(0, int)
        if column.dtype.kind not in "iu":
            raise Refused(f"task {name}: the labels of split {split} are not all whole numbers")
        labels[split] = column.astype(np.int64)
        if len(column) < 10:
            raise Refused(f"task {name}: split {split} of {path} has {len(column)} images; at least 10 are needed")
    if isinstance(features[label], datasets.ClassLabel):
        classes = list(features[label].names)
    else:
        classes = list(range(int(labels["train"].max()) + 1))
    for split, column in labels.items():
        if column.min() < 0 or column.max() >= len(classes):
            raise Refused(f"task {name}: split {split} has labels {column.min()} to {column.max()}, but there are {len(classes)} classes (0 to {len(classes) - 1})")
    counts = (len(labels["train"]), len(labels["test"]), len(classes))
    if registered and counts != registered[2:]:
        raise Refused(f"task {name}: {path} has {counts[0]} train and {counts[1]} test images in {counts[2]} classes; {name} is "
                      f"{registered[2]} and {registered[3]} in {registered[4]}: this is another data set, give it another name (OTHER={path})")
    encoded = {split: found[split].cast_column(image, datasets.Image(decode=False))[image] for split in ("train", "test")}
    return encoded, labels, classes


def load_from_hub(path, config):
    """datasets.load_dataset whose download is checked; what the library made of a damaged one is deleted too."""
    import datasets
    found = {}
    try:
        with checked_download(path, "dataset"):
            found = datasets.load_dataset(path, config)
    except Refused:
        for folder in {Path(file["filename"]).parent for split in found.values() for file in split.cache_files}:
            shutil.rmtree(folder)
        raise
    return found


def open_image(cell):
    """PIL image of an undecoded cell {"bytes", "path"}."""
    from PIL import Image
    return Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"])


def one_small_square_size(encoded, side):
    """The common side of all images if they are square, alike and at most `side` pixels; else 0. Reads headers only."""
    first = None
    for cells in encoded.values():
        for cell in cells:
            try:
                size = open_image(cell).size
            except Exception:  # decode_split names the broken image; a set with one is resized like any other until then
                return 0
            first = first or size
            if size != first or size[0] != size[1] or size[0] > side:
                return 0
    return first[0]


def decode_split(name, split, cells, native, side, path):
    """Decode `cells` in threads into an .npy file of (N, 3, s, s) uint8: the centre square, bicubic to `side` unless native."""
    from PIL import Image
    target = native or side

    def decode(index, cell):
        try:
            image = open_image(cell).convert("RGB")
        except Exception as error:  # pillow and its codecs raise many types on a broken file
            raise Refused(f"task {name}: image {index} of split {split} cannot be decoded ({type(error).__name__}: {error})"[:300]) from error
        width, height = image.size
        if not native:
            square = min(width, height)
            left, top = (width - square) / 2, (height - square) / 2
            image = image.resize((target, target), Image.Resampling.BICUBIC, box=(left, top, left + square, top + square))
        return np.asarray(image).transpose(2, 0, 1)

    pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(len(cells), 3, target, target))
    with ThreadPoolExecutor() as pool, progress(len(cells), f"decode {name} {split}", "img") as bar:
        for start in range(0, len(cells), 512):
            block = cells[start:start + 512]
            for offset, decoded in enumerate(pool.map(decode, range(start, start + len(block)), block)):
                pixels[start + offset] = decoded
            bar.update(len(block))
    pixels.flush()
    return pixels


# ---------------------------------------------------------------------------------------------- images on the device


def resized_side(encoder):
    """Side of the square an image is resized to before the centre crop, pixels."""
    return int(encoder.size / encoder.crop_pct)


def fit(images, encoder):
    """(N, 3, s, s) uint8 -> (N, 3, S, S) uint8: bicubic with antialiasing to S / crop_pct, then the centre S x S."""
    from torchvision.transforms.v2 import InterpolationMode, functional
    side = resized_side(encoder)
    if images.shape[-1] != side:
        images = functional.resize(images, [side, side], InterpolationMode.BICUBIC, antialias=True)
    return functional.center_crop(images, [encoder.size, encoder.size])


def normaliser(encoder, device):
    """A function from (B, 3, S, S) pixels in [0, 255], any dtype, to float32 normalised by the encoder's own mean and deviation."""
    mean = torch.tensor(encoder.mean, device=device).view(3, 1, 1) * 255
    std = torch.tensor(encoder.std, device=device).view(3, 1, 1) * 255
    return lambda images: (images.float() - mean) / std


def random_resized_crop(images, size, generator):
    """torchvision's RandomResizedCrop(size, scale=(.9, 1), ratio=(3/4, 4/3), bicubic) for a whole batch on its device.

    images   (B, 3, s, s) uint8
    Returns  (B, 3, size, size) float32 in [0, 255]; every image its own box, a whole image where ten draws miss
    """
    batch, device = len(images), images.device
    uniform = torch.rand(4, 10, batch, device=device, generator=generator)
    area = 0.9 + 0.1 * uniform[0]
    ratio = torch.exp((2 * uniform[1] - 1) * np.log(4 / 3))
    width, height = (area * ratio).sqrt(), (area / ratio).sqrt()          # (10, B), fractions of the side
    fits = (width <= 1) & (height <= 1)
    first = fits.float().argmax(0, keepdim=True)                           # first draw that fits, as torchvision tries them
    found = fits.any(0)
    width = torch.where(found, width.gather(0, first)[0], 1.0)             # (B,)
    height = torch.where(found, height.gather(0, first)[0], 1.0)
    left = uniform[2, 0] * (1 - width)
    top = uniform[3, 0] * (1 - height)
    box = torch.zeros(batch, 2, 3, device=device)
    box[:, 0, 0], box[:, 0, 2] = width, 2 * left + width - 1
    box[:, 1, 1], box[:, 1, 2] = height, 2 * top + height - 1
    grid = F.affine_grid(box, [batch, 3, size, size], align_corners=False)
    crops = F.grid_sample(images.float(), grid, mode="bicubic", padding_mode="border", align_corners=False)
    return crops.clamp(0, 255)


# ---------------------------------------------------------------------------------------------- heads and accuracies


def random_head(width, n_classes, generator):
    """{"weight" (C, D), "bias" (C,)} float32 on the generator's device, drawn as torch.nn.Linear draws them."""
    bound = width ** -0.5
    return {name: (torch.rand(shape, device=generator.device, generator=generator) * 2 - 1) * bound
            for name, shape in (("weight", (n_classes, width)), ("bias", (n_classes,)))}


def head_file(folder, recipe, task_name, encoder_name):
    """(path of a task's head under a recipe, command that makes it): every recipe but those on probed heads has its own."""
    if RECIPES[recipe].head == "probed":
        return folder / "heads" / f"{task_name}.safetensors", f"python probe.py {encoder_name}"
    return folder / recipe / "heads" / f"{task_name}.safetensors", f"python finetune.py {encoder_name} --recipe {recipe}"


def load_head(folder, recipe, task, encoder, device):
    """The head of one task, refused if it belongs to other weights or data; see logits for its form."""
    head, _ = load_tensors(*head_file(folder, recipe, task.name, encoder.name), theta_pre=encoder.theta_pre, data=task.fingerprint)
    return {name: tensor.to(device) for name, tensor in head.items()}


def save_vector(folder, recipe, task, vector, about):
    """Write tau_t with the metadata of its theta_t's file, unless this very vector is there already."""
    path = folder / recipe / "vectors" / f"{task}.safetensors"
    if not (path.exists() and file_metadata(path, "the same command").get("finetuned") == about["sha256"]):
        kept = {key: about[key] for key in ("theta_pre", "recipe", "task", "data", "head")}
        save_tensors(path, vector, **kept, finetuned=about["sha256"])


def load_vector(folder, recipe, task, encoder):
    """(tau_t {name: tensor} float32 on the CPU, metadata); Refused if it is of another encoder, recipe or probed head."""
    vector, about = load_tensors(folder / recipe / "vectors" / f"{task}.safetensors",
                                 f"python make_vectors.py {encoder.name} --recipe {recipe}", theta_pre=encoder.theta_pre, recipe=recipe)
    tuned = folder / recipe / "finetuned" / f"{task}.safetensors"
    if tuned.exists() and file_metadata(tuned, f"python finetune.py {encoder.name} --recipe {recipe}")["sha256"] != about["finetuned"]:
        raise Refused(f'{folder / recipe / "vectors" / task}.safetensors is not of {tuned}: run "python make_vectors.py {encoder.name} --recipe {recipe}" first')
    path, made_by = head_file(folder, recipe, task, encoder.name)
    head, _ = load_tensors(path, made_by, theta_pre=encoder.theta_pre)
    if fingerprint(head) != about["head"]:
        raise Refused(f'{folder / recipe / "vectors" / task}.safetensors was trained against another head than {path}: '
                      f'run finetune.py with --overwrite and make_vectors.py again')
    return vector, about


def sum_of_vectors(folder, recipe, names, encoder):
    """(sum_t tau_t, {task: SHA-256 of its vector}) read one file at a time: two vectors in memory, however many tasks."""
    total, used = None, {}
    for name in names:
        vector, about = load_vector(folder, recipe, name, encoder)
        total = vector if total is None else {key: total[key].add_(vector[key]) for key in total}
        used[name] = about["sha256"]
        del vector                                                         # before the next one is read
    return total, used


def learning_rate(step, steps, peak):
    """Linear warm-up over the first tenth of the steps, then cosine to 0 (200 of 2,000 steps in the paper)."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + np.cos(np.pi * (step - warm_up) / max(1, steps - warm_up)))


def batches(n, batch_size, steps, generator):
    """(steps, batch_size) int64 rows of a training set of n: one random order of all rows after another, cut into batches."""
    epochs = -(-batch_size * steps // n)
    order = torch.cat([torch.randperm(n, device=generator.device, generator=generator) for _ in range(epochs)])
    return order[: batch_size * steps].view(steps, batch_size)


def logits(features, head):
    """(N, D) features and a head -> (N, C) float32.

    head  {"weight" (C, D), "bias" (C,)}; a head from text has no bias and acts on features of unit length
    """
    features = features.float() if "bias" in head else F.normalize(features.float(), dim=1)
    return F.linear(features, head["weight"], head.get("bias"))


def predict(features, head):
    """(N, D) features and a head -> (N,) int64 predicted classes."""
    return logits(features, head).argmax(1)


def count_hits(features, head, split):
    """Correct predictions of a head on the features (N, D) of a whole split."""
    return int((predict(features, head) == torch.from_numpy(split.labels).to(features.device)).sum())


def normalized_accuracy(accuracy, single_task):
    """Mean over tasks of accuracy / single-task accuracy; dicts {task: fraction} (arXiv:2511.14569 appendix E). Refused where one is 0."""
    for task in accuracy:
        if single_task[task] == 0:
            raise Refused(f"task {task}: its single-task accuracy is 0, so there is no normalized accuracy; fine-tune it longer or leave it out of --tasks")
    return sum(accuracy[task] / single_task[task] for task in accuracy) / len(accuracy)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


# ---------------------------------------------------------------------------------------------- evaluator

CHUNK_BYTES = 2 ** 29  # of uint8 images on the device at a time; weights are written once per setting and chunk


class Evaluator:
    """The one place where images meet weights: a compiled, fixed-shape encoder whose weights are written in place.

    encoder     Encoder; its own module is left alone, a copy in `dtype` does the work
    vectors     none at first: `use_vectors` sets the T task vectors; a weight setting is then theta_pre + sum_t c_t tau_t,
                formed in float32 and cast once, for a row c of T coefficients
    work        images ahead, decides with --compile auto whether compiling pays
    alone       under torchrun: evaluate all of it in this process, instead of a share that is added up with the others'
    """

    def __init__(self, encoder, args, work, alone=False):
        self.encoder, self.device = encoder, pick_device(args.device)
        self.dtype, reason = pick_dtype(args.dtype, self.device)
        self.theta_pre = {name: tensor.to(self.device) for name, tensor in weights_of(encoder.module).items()}
        self.vectors, self.changed = [], []
        module = copy.deepcopy(encoder.module).to(self.device, self.dtype).eval().requires_grad_(False)
        self.module, self.slots = module, weights_of(module)

        self.normalise = normalise = normaliser(encoder, self.device)

        def forward(images):  # (B, 3, S, S) uint8 -> (B, D)
            return module(normalise(images).to(self.dtype))

        self.rank, self.world = (0, 1) if alone else (ranks.rank(), ranks.world())
        ranks.wait()                                                       # none writes before all have read what is there
        compiled, why = compile_pays(args.compile, self.device, encoder, work / self.world)
        if compiled and self.device.type == "cpu" and self.dtype == torch.bfloat16:
            for part in module.modules():
                if hasattr(part, "fused_attn"):
                    part.fused_attn = False                                # inductor's softmax between two bf16 products is the faster one
        self.eager, self.batch_size = forward, min(ranks.gather(evaluation_batch(forward, encoder, self.device)))
        self.forward = torch.compile(forward, dynamic=False) if compiled else forward
        print(f"evaluator: {str(self.dtype)[6:]} ({reason}), batch {self.batch_size}, {'compiled' if compiled else 'eager'} ({why})", flush=True)

    def use_vectors(self, vectors):
        """Set the task vectors, a list of {name: tensor}; names of theta_pre that a vector lacks it leaves as they are."""
        self.vectors = [{name: tensor.to(self.device) for name, tensor in vector.items()} for vector in vectors]
        for name, slot in self.slots.items():
            slot.copy_(self.theta_pre[name])
        self.changed = [name for name in self.slots if any(name in vector for vector in self.vectors)]

    def write(self, coefficients):
        """Write theta_pre + sum_t c_t tau_t into the encoder, one tensor at a time; no coefficients write theta_pre."""
        for name in self.changed:
            slot, merged = self.slots[name], self.theta_pre[name]
            for coefficient, vector in zip(coefficients, self.vectors, strict=len(coefficients) > 0):
                if name in vector:
                    merged = torch.add(merged, vector[name], alpha=float(coefficient))
            slot.copy_(merged.clamp_min(0) if name.endswith("running_var") else merged)  # a batch norm's variance

    @torch.inference_mode()
    def run(self, splits, settings, consume):
        """Features of every image of every split under every weight setting, once each, in this process's share.

        splits    list of Split; their images form one stream, so that only its very last batch is padded
        settings  K rows of coefficients; processes take turns at them, or share the batches where there are fewer settings
        consume   called as consume(k, split index, rows slice, features (n, D)) for each piece
        """
        ends = np.cumsum([len(split.rows) for split in splits])
        starts, total = ends - [len(split.rows) for split in splits], int(ends[-1])
        chunk = max(1, CHUNK_BYTES // (3 * self.encoder.size ** 2) // self.batch_size) * self.batch_size
        bar = progress(total * len(settings), f"evaluate {len(splits)} splits x {len(settings)} weights", "img")
        for begin in range(0, total, chunk):
            pieces = [(t, slice(max(begin, starts[t]) - starts[t], min(begin + chunk, ends[t]) - starts[t]))
                      for t in range(len(splits)) if starts[t] < begin + chunk and ends[t] > begin]
            images = torch.cat([self.resident(splits[t], rows) for t, rows in pieces])
            n = len(images)
            padding = -n % self.batch_size
            images = torch.cat([images, images[:1].expand(padding, -1, -1, -1)]) if padding else images
            for k, first, features in self.outputs(images, settings):
                begin_row, end_row = first * self.batch_size, min(first * self.batch_size + len(features), n)
                at = 0                                                     # where a piece begins in this chunk
                for t, rows in pieces:
                    low, high = max(at, begin_row), min(at + rows.stop - rows.start, end_row)
                    if low < high:
                        consume(k, t, slice(rows.start + low - at, rows.start + high - at), features[low - begin_row:high - begin_row])
                    at += rows.stop - rows.start
                bar.update((end_row - begin_row) * self.world)
        bar.close()

    def outputs(self, images, settings):
        """Yield (k, first batch, features) of a chunk (n batches, C, S, S) under every setting, in this process's share."""
        for k, coefficients in enumerate(settings):
            first, last = self.share(k, len(settings), len(images) // self.batch_size)
            if first < last:
                self.write(coefficients)
                # a compiled graph may reuse its output buffer, so each batch is copied out by cat
                yield k, first, torch.cat([self.forward(images[i * self.batch_size:(i + 1) * self.batch_size]) for i in range(first, last)])

    def share(self, k, n_settings, n_batches):
        """(first, last) batch of a chunk that this process evaluates under setting k: all or none, or its part of them."""
        if n_settings >= self.world:
            return (0, n_batches) if k % self.world == self.rank else (0, 0)
        return n_batches * self.rank // self.world, n_batches * (self.rank + 1) // self.world

    def resident(self, split, rows):
        """(n, 3, S, S) uint8 on the device for some rows of a split, ready for the encoder."""
        return torch.cat([fit(torch.from_numpy(np.ascontiguousarray(split.images[split.rows[i:min(i + 1024, rows.stop)]])).to(self.device),
                              self.encoder) for i in range(rows.start, rows.stop, 1024)])

    def features(self, splits, settings=((),)):
        """One (K, N_t, D) tensor per split, in the evaluator's dtype, under K weight settings (default: theta_pre alone)."""
        width = width_of(self.encoder)
        out = [torch.zeros(len(settings), len(split.rows), width, dtype=self.dtype, device=self.device) for split in splits]

        def consume(k, t, rows, features):
            out[t][k, rows] = features

        self.run(splits, settings, consume)
        if self.world > 1:
            ranks.add_up(out)
        return out

    def predictions(self, splits, heads, settings):
        """Predicted classes, one tensor (K, N_t) int64 for each split, under K weight settings; heads go with splits."""
        out = [torch.zeros(len(settings), len(split.rows), dtype=torch.int64, device=self.device) for split in splits]

        def consume(k, t, rows, features):
            out[t][k, rows] = predict(features, heads[t])

        self.run(splits, settings, consume)
        if self.world > 1:
            ranks.add_up(out)
        return out

    def hits(self, splits, heads, settings):
        """Correct predictions, one list of K counts for each split; divide by len(split.rows) once."""
        predicted = self.predictions(splits, heads, settings)
        return [(p == torch.from_numpy(split.labels).to(self.device)).sum(1).tolist() for p, split in zip(predicted, splits)]


def evaluation_batch(forward, encoder, device):
    """Images per batch: 32 on a CPU, where a batch should fit the caches; on a GPU the largest power of two up to 512 whose activations,
    measured on eight images, take at most a quarter of the free memory."""
    if device.type != "cuda":
        return 32
    images, batch = torch.zeros(8, 3, encoder.size, encoder.size, dtype=torch.uint8, device=device), 512
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with torch.inference_mode():
        forward(images)
    per_image = (torch.cuda.max_memory_allocated(device) - before) / len(images)
    while batch > 8 and batch * per_image > torch.cuda.mem_get_info(device)[0] / 4:
        batch //= 2
    return batch


def cached_features(folder, task, evaluator, overwrite=False):
    """{"train", "val", "test"} -> (N, D) features under theta_pre on the evaluator's device; computed once, then read back.

    Features of other weights, data or dtype are refused, or with `overwrite` computed again.
    """
    path = folder / "features" / f"{task.name}.safetensors"
    about = {"theta_pre": evaluator.encoder.theta_pre, "data": task.fingerprint, "dtype": str(evaluator.dtype)[6:]}
    if ranks.gather(path.exists())[0]:                                     # rank 0 may have written it a moment ago
        try:
            features, _ = load_tensors(path, f"python probe.py {evaluator.encoder.name}", **about)
            return {split: tensor.to(evaluator.device) for split, tensor in features.items()}
        except Refused:
            if not overwrite:
                raise
    features = {split: found[0] for split, found in zip(task.splits, evaluator.features(list(task.splits.values())))}
    save_tensors(path, features, **about)
    return features


def task_vector(theta_pre, theta_t):
    """(theta_t, tau_t) with theta_pre + tau_t == theta_t bit for bit in float32, for the names in theta_t.

    A plain difference loses up to half a unit in the last place where the two differ by more than a factor of two; rounding
    theta_t to theta_pre + (theta_t - theta_pre) twice reaches a value from which nothing is lost.
    """
    tau_t = {}
    for name in theta_t:
        pre = theta_pre[name]
        for _ in range(2):
            theta_t = theta_t | {name: pre + (theta_t[name] - pre)}
        tau_t[name] = theta_t[name] - pre
    return theta_t, tau_t


def length(tensors):
    """Euclidean norm of a dict of tensors taken as one vector."""
    return sum(tensor.double().square().sum() for tensor in tensors.values()).sqrt().item()


def compile_pays(mode, device, encoder, images):
    """(whether to torch.compile the encoder, why). auto compiles where the forward work ahead is long against compiling.

    Compiling a 12-block ViT took 22 s on two CPU cores and then made each forward pass 16 to 27 % faster, so `auto` asks for
    COMPILE_FLOPS of work, about three minutes there; on a GPU for about as many seconds as compiling takes.
    """
    if mode == "off":
        return False, "--compile off"
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++") or os.environ.get("CXX")):
        return False, "no C++ compiler here"
    if device.type == "mps":
        return False, "not compiled on mps"
    if mode == "on":
        return True, "--compile on"
    work = images * forward_flops(encoder)
    enough = COMPILE_FLOPS[device.type]
    return work >= enough, f"{work:.1e} FLOP ahead, compiling pays from {enough:.0e}"


COMPILE_FLOPS = {"cpu": 2e13, "cuda": 5e15}


def forward_flops(encoder):
    """Floating-point operations of one image's forward pass (2 per multiply-add)."""
    from torch.utils.flop_counter import FlopCounterMode
    image = torch.zeros(1, 3, encoder.size, encoder.size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder.module(image)
    return counter.get_total_flops()


# ---------------------------------------------------------------------------------------------- pictures


def figure(width, height, rows=1, columns=1, squeeze=True):
    """A matplotlib figure of width x height inches and its axes (an array of them where there are several or squeeze is False), without a window system."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(rows, columns, figsize=(width, height), squeeze=squeeze, layout="constrained")


def heat_map(axes, xi, lambdas, top=2):
    """xi (points, points) as in the paper's Figure 1: light where it is small, dark at `top`, the box of usual coefficients in red."""
    from matplotlib.patches import Rectangle
    limit, half = lambdas[-1], (lambdas[1] - lambdas[0]) / 2
    image = axes.imshow(xi.T, origin="lower", extent=(-limit - half, limit + half) * 2, cmap="Blues", vmin=0, vmax=top)
    axes.add_patch(Rectangle((-1, -1), 2, 2, fill=False, edgecolor="red", linewidth=1.5))
    return image


def save_figure(path, fig):
    import matplotlib.pyplot as plt
    if ranks.rank() == 0:
        with replacing(path) as temporary:
            fig.savefig(temporary, format="png", dpi=150, bbox_inches="tight")
    plt.close(fig)
    print(f"picture: {path}", flush=True)
