"""
What defines a number, once: tasks and their splits, heads and accuracies, the one evaluator.

    evaluator = common.Evaluator(encoder, device, dtype, compile=True)
    evaluator.use_vectors([tau_a, tau_b])                      # {name: tensor} each, float32
    [hits] = evaluator.hits([split], [head], [(0.1, 0.1), (0.2, 0.2)])  # [hits at .1, at .2] of len(split)

Every stage imports this file. Nothing here trains or knows what an input is: the encoder brings that.
Shapes: N inputs, B a batch, C classes, D feature width, K weight settings, T tasks.
Source  arXiv:2511.14569; the choices it leaves open are listed in the README
"""
import copy
import difflib
import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from lib import generated, ranks, store
from lib.devices import compile_module, evaluation_batch, tensor_float, unfuse_attention
from lib.encoders import weights_of
from lib.files import Refused, load_tensors, save_tensors
from lib.progress import progress
from lib.reading import place_and_columns

# --------------------------------------------------------------------------------------- tasks


class Registered(NamedTuple):
    hub_id: str
    config: str | None
    n_train: int
    n_test: int
    n_classes: int
    takes: str = "images"  # or "texts"
    test: str = "test"     # the split that is tested on; GLUE keeps the labels of its own test splits
    scores: bool = False   # labels are numbers, the nearest whole one is the class
    sure: bool = True      # the counts are this copy's; else the published ones, and others are only told


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
MORE_TASKS = {             # with the eight the 14 and 20 tasks of arXiv:2405.07813
    "cifar100": Registered("uoft-cs/cifar100", None, 50000, 10000, 100),
    "stl10": Registered("tanganke/stl10", None, 5000, 8000, 10, sure=False),
    "flowers102": Registered("dpdl-benchmark/oxford_flowers102", None, 1020, 6149, 102, sure=False),
    "oxford-iiit-pet": Registered("timm/oxford-iiit-pet", None, 3680, 3669, 37, sure=False),
    "pcam": Registered("1aurent/PatchCamelyon", None, 262144, 32768, 2, sure=False),
    "fer2013": Registered("clip-benchmark/wds_fer2013", None, 28709, 7178, 7, sure=False),
    "emnist_letters": Registered("tanganke/emnist_letters", None, 88800, 14800, 26, sure=False),
    "cifar10": Registered("uoft-cs/cifar10", None, 50000, 10000, 10),
    "food101": Registered("ethz/food101", None, 75750, 25250, 101, test="validation"),
    "fashion_mnist": Registered("zalando-datasets/fashion_mnist", None, 60000, 10000, 10),
    "rendered-sst2": Registered("nateraw/rendered-sst2", None, 6920, 1821, 2, sure=False),
    "kmnist": Registered("tanganke/kmnist", None, 60000, 10000, 10, sure=False),
}
GROUPS = {"paper8": [*TASKS], "paper14": [*TASKS, *list(MORE_TASKS)[:6]], "paper20": [*TASKS, *MORE_TASKS]}
GLUE = "nyu-mll/glue"
TEXT_TASKS = {
    "cola": Registered(GLUE, "cola", 8551, 1043, 2, "texts", "validation"),
    "mnli": Registered(GLUE, "mnli", 392702, 9815, 3, "texts", "validation_matched"),
    "mrpc": Registered(GLUE, "mrpc", 3668, 408, 2, "texts", "validation"),
    "qqp": Registered(GLUE, "qqp", 363846, 40430, 2, "texts", "validation"),
    "rte": Registered(GLUE, "rte", 2490, 277, 2, "texts", "validation"),
    "sst2": Registered(GLUE, "sst2", 67349, 872, 2, "texts", "validation"),
    "stsb": Registered(GLUE, "stsb", 5749, 1500, 6, "texts", "validation", scores=True),
}
REGISTERED = TASKS | MORE_TASKS | TEXT_TASKS


@dataclass(frozen=True, eq=False)
class Split:
    inputs: np.ndarray   # (N_all, ...) as stored, memory-mapped: uint8 pixels (N_all, 3, s, s), or int32
                         # tokens (N_all, L)
    indices: np.ndarray  # (N,) int64, which of them belong to this split
    labels: np.ndarray   # (N,) int64

    def __len__(self):
        return len(self.indices)


class Task(NamedTuple):
    name: str
    splits: dict         # {"train", "val", "test"} -> Split
    classes: list        # C class names; their numbers where the data set names none
    fingerprint: str     # SHA-256 of all inputs and labels
    source: str          # "generated", a folder or a hub id


def task_sources(words, data=None, recorded=None):
    """{task: source} for the words of --tasks; a source is "generated", the path of a folder, or a hub id.

    words     NAME, NAME=PLACE, NAME=PLACE:IMAGE:LABEL (its columns, kept in the source), or one of GROUPS
    data      folder of --data, looked into before the hub
    recorded  {task: source} of an earlier stage, which a name alone means again
    Errors   Refused: an unknown name (near names are given), one that could not be a folder, one given twice
    """
    if data and not data.is_dir():
        raise Refused(f"--data {data} is not a folder")
    sources = {}
    words = [word.strip() for word in words.split(",")]
    for word in itertools.chain(*[GROUPS.get(word, [word]) for word in words]):
        name, _, given = word.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise Refused(f"--tasks: {name!r} is no task name (letters, digits, _ . - only)")
        if name in sources:
            raise Refused(f"--tasks names a task twice: {name}")
        given, columns = place_and_columns(given)
        if given and (given.startswith((".", "/", "~")) or Path(given).exists()):
            folder = str(Path(os.path.expanduser(given)).resolve())
            sources[name] = ":".join([folder, *columns])
        elif given:
            sources[name] = ":".join([given, *columns])
        elif data and (data / name).is_dir():
            sources[name] = str((data / name).resolve())
        elif recorded and name in recorded:
            sources[name] = recorded[name]
        elif name in REGISTERED:
            sources[name] = REGISTERED[name].hub_id
        elif name in generated.TASKS:
            sources[name] = "generated"
        else:
            known = [*REGISTERED, *generated.TASKS, *GROUPS]
            if data:
                known += sorted(path.name for path in data.iterdir())
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise Refused(f"unknown task {name!r}{hint} (known: {', '.join(known)}; "
                          f"any other as NAME=HUB_ID_OR_FOLDER)")
        place, _ = place_and_columns(sources[name])
        if Path(place).is_absolute() and not Path(place).is_dir():
            raise Refused(f"task {name}: {place} is not a folder")
    return sources


def load_task(name, source, encoder, runs, seed=0):
    """One task's splits, decoded or tokenised once into runs/inputs/.

    name, source   a pair of task_sources
    encoder        decides how an input is stored (Encoder.store)
    Returns        Task; validation is the pinned min(10 %, 5000) of train, whatever the seed
    Errors         Refused: unreachable hub, no data set in the folder, other row or class counts than
                   registered, an image that cannot be decoded or an empty text (named with its index),
                   labels that are no classes or not among train's, a full disk, a cut cache
    """
    folder = store.stored_folder(name, source, REGISTERED.get(name), encoder, runs, seed)
    arrays, about = store.read_arrays(folder)
    train, val = validation_split(len(arrays["train_labels"]))
    test = np.arange(len(arrays["test_labels"]))
    splits = {"train": Split(arrays["train_inputs"], train, arrays["train_labels"][train]),
              "val": Split(arrays["train_inputs"], val, arrays["train_labels"][val]),
              "test": Split(arrays["test_inputs"], test, arrays["test_labels"])}
    return Task(name, splits, about["classes"], about["sha256"], source)


def task_summary(name, source, encoder, runs, seed=0):
    """{"sha256" of all inputs and labels, "shapes", ...} of a task, itself not read where it is stored."""
    return store.read_about(store.stored_folder(name, source, REGISTERED.get(name), encoder, runs, seed))


def sample(split, n, seed):
    """At most n random inputs of a split (None: all), without replacement, in random order."""
    chosen = np.random.default_rng(seed).permutation(len(split))[:n]
    return Split(split.inputs, split.indices[chosen], split.labels[chosen])


def validation_split(n):
    """(train, validation) indices of n inputs: torch's random_split with seed 0, min(10 %, 5000) validate."""
    n_val = min(n // 10, 5000)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).numpy()
    return order[: n - n_val], order[n - n_val:]


# --------------------------------------------------------------------------------------- heads and accuracies


PROBES = ("paper", "converged")  # the ways in which probe.py obtains a head; see there


class Head(NamedTuple):
    weight: torch.Tensor       # (C, D) float32
    bias: torch.Tensor | None  # (C,) float32; a head from text has none
    normalise: bool            # whether it acts on features of unit length


def random_head(width, n_classes, generator):
    """A Head on the generator's device, drawn as torch.nn.Linear draws its weights."""
    drawn = []
    for shape in ((n_classes, width), (n_classes,)):
        drawn.append((torch.rand(shape, device=generator.device, generator=generator) * 2 - 1)
                     * width ** -0.5)
    return Head(*drawn, normalise=False)


def head_tensors(head):
    """{"weight", "bias"} of a head, without a bias where it has none."""
    return {"weight": head.weight} if head.bias is None else {"weight": head.weight, "bias": head.bias}


def save_head(path, head, task, encoder, from_any_rank=False):
    """Write a task's head."""
    save_tensors(path, head_tensors(head), from_any_rank, task=task.name, data=task.fingerprint,
                 theta_pre=encoder.fingerprint, classes=task.classes, normalise=head.normalise)


def load_head(path, made_by, task, encoder, device):
    """The Head of one task, refused if it belongs to other weights or data."""
    tensors, about = load_tensors(path, made_by, theta_pre=encoder.fingerprint, data=task.fingerprint)
    bias = tensors["bias"].to(device) if "bias" in tensors else None
    return Head(tensors["weight"].to(device), bias, about["normalise"])


def logits(features, head):
    """(N, D) features and a Head -> (N, C) float32."""
    features = F.normalize(features.float(), dim=1) if head.normalise else features.float()
    return F.linear(features, head.weight, head.bias)


def classes_of(features, head):
    """(N, D) features and a Head -> (N,) int64 classes, -1 where the largest logit is not finite."""
    largest, classes = logits(features, head).max(1)
    return torch.where(largest.isfinite(), classes, -1)


def predict(features, head):
    """(N, D) features and a Head -> (N,) int64 predicted classes; Refused where logits are not finite."""
    return all_predicted(classes_of(features, head), "a head on its features; try a smaller learning rate")


def all_predicted(classes, where):
    """Predicted classes (N,) as they are; Refused where one is -1. argmax of NaN is no class."""
    lost = int((classes < 0).sum())
    if lost:
        raise Refused(f"the logits of {lost} of {len(classes)} inputs are not finite under {where}")
    return classes


def count_hits(features, head, split):
    """Correct predictions of a head on the features (N, D) of a whole split."""
    return int((predict(features, head) == torch.from_numpy(split.labels).to(features.device)).sum())


def normalized_accuracy(accuracy, single_task):
    """Mean over tasks of accuracy / single-task accuracy, {task: fraction} (arXiv:2511.14569 appendix E)."""
    for task in accuracy:
        if single_task[task] == 0:
            raise Refused(f"task {task}: its single-task accuracy is 0, so there is no normalized accuracy; "
                          f"fine-tune it longer or leave it out of --tasks")
    return mean(accuracy[task] / single_task[task] for task in accuracy)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


# --------------------------------------------------------------------------------------- evaluator

# bytes of prepared inputs on the device at a time; weights are written once per setting and chunk
CHUNK_BYTES = 2 ** 29


class Evaluator:
    """The one place where inputs meet weights: a fixed-shape encoder, its weights written in place.

    encoder   Encoder; its own module is left alone, a copy in `dtype`, perhaps compiled, does the work
    vectors   set by use_vectors; a weight setting is then theta_pre + sum_t c_t tau_t for a row c of
              T coefficients, formed in float32 and cast once
    alone     under torchrun: evaluate all of it in this process, instead of a share that is added up with
              the others'
    tf32      on a GPU: the encoder's products round to TF32; heads stay in float32
    """

    def __init__(self, encoder, device, dtype, compile=False, alone=False, tf32=False):
        self.encoder, self.device, self.dtype, self.tf32 = encoder, device, dtype, tf32
        self.rank, self.world = (0, 1) if alone else (ranks.rank(), ranks.world())
        self.theta_pre = {name: tensor.to(device) for name, tensor in weights_of(encoder.module).items()}
        self.vectors, self.changed = [], []
        self.module = copy.deepcopy(encoder.module).to(device, dtype).eval().requires_grad_(False)
        self.slots = weights_of(self.module)                 # {name: the tensor that the forward pass reads}
        self.unfused = []
        if compile and device.type == "cpu" and dtype == torch.bfloat16:
            # inductor's own softmax between two products is faster than fused attention
            self.unfused = unfuse_attention(self.module)
        self.forward = compile_module(self.module) if compile else self.module
        self.batch_size = min(ranks.gather(evaluation_batch(self.example_pass, encoder, device, dtype)))

    def example_pass(self, inputs):
        """What a batch takes in memory at most: the forward pass, not compiled."""
        return self.module(inputs)

    def forward_pass(self, inputs):
        """(B, ...) prepared inputs -> (B, D) features under the weights that are written."""
        with tensor_float(self.tf32):
            return self.forward(inputs)

    def compile_now(self, stored=None):
        """Compile on an example batch; where that fails the forward pass is eager, and this returns why.

        stored   shape of one input as stored, where that decides the shape the module takes
        """
        try:
            with torch.inference_mode():                   # made in it, else the first chunk compiles anew
                example = self.as_dtype(self.encoder.example(self.batch_size, stored))
                self.forward_pass(example.to(self.device))
        except torch._dynamo.exc.TorchDynamoException as error:    # no working compiler, no cache folder
            self.forward = self.module
            for part in self.unfused:
                part.fused_attn = True
            return f"compiling failed: {str(error).splitlines()[0]}"
        return ""

    def use_vectors(self, vectors):
        """Set the task vectors, a list of {name: tensor}; what a vector lacks stays as in theta_pre."""
        self.vectors = []
        for vector in vectors:
            self.vectors.append({name: tensor.to(self.device) for name, tensor in vector.items()})
        named = set().union(*self.vectors)
        self.changed = [name for name in self.slots if name in named]
        for name, slot in self.slots.items():
            slot.copy_(self.theta_pre[name])

    def merged(self, coefficients):
        """Yield (name, float32 tensor) of theta_pre + sum_t c_t tau_t; no coefficients: of theta_pre.

        The one place that forms a merge: what is saved is bit for bit what was evaluated.
        """
        for name in self.changed:
            merged = self.theta_pre[name]
            for coefficient, vector in zip(coefficients, self.vectors, strict=len(coefficients) > 0):
                if name in vector:
                    merged = torch.add(merged, vector[name], alpha=float(coefficient))
            if name.endswith("running_var"):                 # a batch norm's variance
                merged = merged.clamp_min(0)
            yield name, merged

    def write(self, coefficients):
        """Write a merge into the encoder tensor by tensor."""
        for name, tensor in self.merged(coefficients):
            self.slots[name].copy_(tensor)

    def chunks(self, splits):
        """Yield (places, inputs): a chunk, prepared, padded to whole batches, and where in the stream it is.

        The stream are the splits end to end. A chunk is of one shape: those of one shape come together.
        """
        alike, start = {}, 0                                 # {shape the module takes: [(places, stored)]}
        for split in splits:
            for rows, inputs in self.encoder.parts(split):
                shape = self.encoder.example(1, inputs.shape[1:]).shape[1:]
                alike.setdefault(shape, []).append((start + rows, inputs, split.indices[rows]))
            start += len(split)
        for parts in alike.values():
            yield from self.chunks_alike(parts)

    def chunks_alike(self, parts):
        """chunks of [(places, inputs as stored, their indices)] that the module takes in one shape."""
        places, batch = np.concatenate([part[0] for part in parts]), self.batch_size
        example = self.as_dtype(self.encoder.example(1, parts[0][1].shape[1:]))
        size = max(1, CHUNK_BYTES // example.nbytes // batch) * batch
        for begin in range(0, len(places), size):
            n, filled, start = min(size, len(places) - begin), 0, 0
            inputs = torch.zeros(n + -n % batch, *example.shape[1:], dtype=example.dtype, device=self.device)
            for _, stored, indices in parts:
                low, high = max(begin - start, 0), min(begin + size - start, len(indices))
                for first in range(low, high, 1024):         # bounds the memory that preparing takes
                    block = stored[indices[first:min(first + 1024, high)]]
                    prepared = self.encoder.prepare(
                        torch.from_numpy(np.ascontiguousarray(block)).to(self.device))
                    inputs[filled:filled + len(prepared)] = prepared
                    filled += len(prepared)
                start += len(indices)
            yield places[begin:begin + n], inputs

    def stream(self, splits, settings):
        """Yield (k, places (n,), features (n, D)) of the stream's inputs in these places under setting k.

        Each input under each setting once, over all processes: they take turns at settings or share batches.
        """
        total, batch = sum(len(split) for split in splits), self.batch_size
        with progress(total * len(settings), f"evaluate {len(splits)} splits x {len(settings)} weights",
                      self.encoder.unit) as bar:
            for places, inputs in self.chunks(splits):
                for k, coefficients in enumerate(settings):
                    own = self.share(k, len(settings), len(inputs) // batch)
                    if own:
                        self.write(coefficients)
                        features = torch.cat([self.forward_pass(inputs[i * batch:(i + 1) * batch])
                                              for i in own])
                        here = places[own.start * batch:own.stop * batch]
                        yield k, here, features[:len(here)]       # without the padding
                        bar.update(len(here) * self.world)

    def share(self, k, n_settings, n):
        """The range of n things that this process does under setting k: all or none, or its part of them."""
        if n_settings >= self.world:
            return range(n if k % self.world == self.rank else 0)
        return range(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    def features(self, splits, settings=((),)):
        """One (K, N_t, D) tensor per split in the evaluator's dtype under K settings (default: theta_pre)."""
        shape = len(settings), sum(len(split) for split in splits), self.encoder.width
        out = torch.zeros(shape, dtype=self.dtype, device=self.device)
        with torch.inference_mode():
            for k, places, features in self.stream(splits, settings):
                out[k, places] = features
        return self.gathered(out, splits)

    def predictions(self, splits, heads, settings):
        """Predicted classes, one (K, N_t) int64 tensor per split, under K settings; heads go with splits."""
        shape = len(settings), sum(len(split) for split in splits)
        out = torch.zeros(shape, dtype=torch.int64, device=self.device)
        with torch.inference_mode():
            for k, places, features in self.stream(splits, settings):
                start = 0
                for split, head in zip(splits, heads, strict=True):
                    rows = np.flatnonzero((start <= places) & (places < start + len(split)))
                    if len(rows):
                        out[k, places[rows]] = classes_of(features[rows], head)
                    start += len(split)
        parts = self.gathered(out, splits)
        for classes, coefficients in zip(out, settings, strict=True):    # each process sees all of them
            all_predicted(classes, f"theta_pre + {[float(c) for c in coefficients]} x task vectors in "
                                   f"{str(self.dtype)[6:]}; try smaller lambdas, or --dtype fp32")
        return parts

    def hits(self, splits, heads, settings):
        """Correct predictions, one list of K counts per split; divide by len(split) once."""
        counts = []
        for split, predicted in zip(splits, self.predictions(splits, heads, settings), strict=True):
            counts.append((predicted == torch.from_numpy(split.labels).to(self.device)).sum(1).tolist())
        return counts

    def accuracies(self, splits, heads, settings):
        """[{task: accuracy}], one dict for each setting, of {task: Split} and {task: Head}."""
        counted = self.hits(list(splits.values()), [heads[name] for name in splits], settings)
        found = []
        for counts in zip(*counted, strict=True):
            found.append({name: hits / len(splits[name]) for name, hits in zip(splits, counts, strict=True)})
        return found

    def gathered(self, out, splits):
        """(K, N, ...) that each process has filled its share of, whole in all of them and cut into splits."""
        if self.world > 1:
            ranks.add_up([out])
        return out.split([len(split) for split in splits], dim=1)

    def as_dtype(self, inputs):
        """Inputs in the dtype of the forward pass; whole numbers stay whole."""
        return inputs.to(self.dtype) if inputs.is_floating_point() else inputs


def cached_features(folder, task, evaluator, overwrite=False):
    """{"train", "val", "test"} -> (N, D) features under theta_pre on the evaluator's device.

    Computed once, then read. Features of other weights, data or dtype are refused, or with `overwrite`
    computed again.
    """
    path, encoder = folder / "features" / f"{task.name}.safetensors", evaluator.encoder
    about = {"theta_pre": encoder.fingerprint, "data": task.fingerprint, "dtype": str(evaluator.dtype)[6:]}
    if ranks.gather(path.exists())[0]:                       # rank 0 may have written it a moment ago
        try:
            features, _ = load_tensors(path, f"python probe.py {encoder.name}", **about)
            return {split: tensor.to(evaluator.device) for split, tensor in features.items()}
        except Refused:
            if not overwrite:
                raise
    computed = evaluator.features(list(task.splits.values()))
    features = {split: found[0] for split, found in zip(task.splits, computed, strict=True)}
    for split, found in features.items():
        if not found.isfinite().all():
            raise Refused(f"task {task.name}: features of split {split} under theta_pre of {encoder.name} "
                          f"are not finite in {about['dtype']}: another checkpoint, or --dtype fp32")
    save_tensors(path, features, **about)
    return features
