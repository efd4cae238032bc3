"""
What the pre-training schemes share (pretrain.py, pretrain_mae.py, pretrain_dino.py, pretrain_contrastive.py):
flags, pictures, checkpoints along the way, and going on after a kill, bit for bit on a CPU.

    result, device = open_result(args, __file__, ARCHITECTURE)  # None: made already
    pictures = open_pictures(args, encoder, device, need_labels=True)
    training = Training(args, result, pictures, encoder, generator, parts)
    for step, rows in training.steps(order):
        ...
        training.after(step, loss)

Shapes: N pictures, B a batch, S pixels a side.
"""
import argparse
import hashlib
import json
import re
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import common
from lib import captions, encoders, flags, generated, images, store
from lib.devices import pick_device
from lib.files import Refused, checksum, fingerprint, load_state, replacing, save_state
from lib.progress import progress
from lib.results import WHOLE, Result

LARGE = {"embed_dim": 192, "depth": 6, "num_heads": 6}     # of --large
BATCH_SIZE = 32
EVERY = 50                                                 # steps between two losses that are kept


def pretraining_parser(docstring, lr=1e-3):
    """The flags of a pre-training; `lr` is the scheme's own peak learning rate."""
    parser = flags.stage_parser(docstring)
    add = parser.add_argument
    add("--pretrain-steps", type=flags.positive, default=1500, help="optimizer steps (default 1500)")
    add("--batch-size", type=flags.positive, default=BATCH_SIZE,
        help=f"images per step (default {BATCH_SIZE})")
    add("--lr", type=flags.positive_float, default=lr, help=f"peak learning rate (default {lr:g})")
    add("--pictures", type=flags.positive, metavar="N", help="train on N random ones (default: all)")
    add("--large", action="store_true",
        help=f"an encoder of {LARGE['depth']} blocks of width {LARGE['embed_dim']} instead of 4 of 128")
    add("--checkpoints", type=ascending_steps, default=[], metavar="STEP,STEP,...",
        help="steps after which the encoder is also saved as runs/ENCODER-stepSTEP, an encoder like any "
             "other; 0 is random initialisation")
    add("--save-minutes", type=flags.positive_float, default=5.0,
        help="minutes between two savings of the training state (default 5)")
    return parser


def ascending_steps(text):
    """"0,25,100": a list of whole numbers in ascending order, each once."""
    steps = [flags.natural(word) for word in text.split(",")]
    if steps != sorted(set(steps)):
        raise argparse.ArgumentTypeError(f"{text!r} is not in ascending order")
    return steps


# --------------------------------------------------------------------------------------- open


def open_result(args, script, architecture, towers=(), **settings):
    """(Result of a pre-training in runs/ENCODER/pretrain.json, device); None for one that is made already.

    towers     files that are saved beside the encoder
    settings   of the scheme, what else changes its numbers
    Errors     Refused: a name that is not of an own encoder, another image size, a step beyond the last
    """
    folder, device = args.runs / args.encoder, pick_device(args.device)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", args.encoder) or encoders.ENCODERS.get(args.encoder):
        raise Refused(f"{args.encoder} comes from the hub or from --weights FILE: "
                      f"only tiny, or an encoder of a new name, is trained here")
    if args.image_size not in (None, generated.SIDE) or args.weights or args.prompts:
        raise Refused("tiny has 32-pixel images and makes its own weights: "
                      "leave out --image-size, --weights and --prompts")
    if args.checkpoints and args.checkpoints[-1] > args.pretrain_steps:
        raise Refused(f"--checkpoints {args.checkpoints[-1]} is beyond the last step, {args.pretrain_steps}")
    sources = common.task_sources(args.tasks, args.data) if args.tasks else None    # None: generated
    config = {"encoder": args.encoder, "architecture": architecture, "steps": args.pretrain_steps,
              "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed, "pictures": sources,
              "at_most": args.pictures} | settings
    made = [encoder_file(folder), *(folder / name for name in towers)]
    result = Result(folder / "pretrain.json", config, {}, script, device, args.overwrite, protected=True,
                    weights=lambda row: made)
    missing = []
    for step in args.checkpoints:
        if not encoder_file(checkpoint_folder(folder, step)).exists():
            missing.append(step)
    if missing and not result.todo:
        print(f"{Path(script).stem}: trained again for checkpoints {missing}", flush=True)
    return (result if result.todo or missing else None), device


def sized(architecture, large):
    """An architecture as it is, or LARGE."""
    return architecture | {"kwargs": architecture["kwargs"] | LARGE} if large else architecture


def encoder_file(folder):
    return folder / "pretrained.safetensors"


def checkpoint_folder(folder, step):
    """runs/ENCODER-stepSTEP, beside runs/ENCODER."""
    return folder.with_name(f"{folder.name}-step{step}")


def describe(args, module, architecture, defaults, scheme):
    """The description of an encoder that is trained here, as encoders.describe has it."""
    return encoders.describe(module, architecture, generated.SIDE, (0.5,) * 3, (0.25,) * 3, 1.0,
                             encoder=args.encoder, tasks=list(generated.TASKS), defaults=defaults,
                             scheme=scheme, step=args.pretrain_steps, steps=args.pretrain_steps,
                             images_seen=args.pretrain_steps * args.batch_size, seed=args.seed)


# --------------------------------------------------------------------------------------- pictures


class Pictures(NamedTuple):
    images: torch.Tensor         # (N, 3, S, S) uint8, on the device
    labels: torch.Tensor | None  # (N,) int64, on the device; None where some have none
    captions: list | None        # N noun phrases, for captions.TEMPLATES; None where some have none
    fingerprint: str             # SHA-256 of the images


def open_pictures(args, encoder, device, need_labels):
    """The pictures to train on: generated ones, or the training splits of --tasks one after another.

    need_labels   whether the scheme takes labels or captions; without, folders of mere pictures do too
    Errors        Refused: no labels where they are needed, one class only, fewer pictures than are asked
                  for, what load_task refuses
    """
    if not args.tasks:
        pixels, labels, drawn = generated.draw_pretraining(args.seed)
        phrases = captions.captions(labels, drawn, args.seed)
        return gathered([pixels], labels, phrases, encoder, device, args.pictures, args.seed)
    sources = common.task_sources(args.tasks, args.data)
    unlabelled = [name for name, source in sources.items() if mere_pictures(source)]
    if unlabelled and need_labels:
        raise Refused(f"task {unlabelled[0]}: the pictures of {sources[unlabelled[0]]} have no labels, which "
                      f"this scheme needs: sort them as {{train,test}}/CLASS/*.jpg, or take pretrain_mae.py "
                      f"or pretrain_dino.py")
    parts, labels, phrases, classes = [], [], [], 0
    for name, source in sources.items():
        if name in unlabelled:
            parts.append(decoded(name, source, encoder, args.runs))
            continue
        task = common.load_task(name, source, encoder, args.runs, args.seed)
        for split in (task.splits["train"], task.splits["val"]):
            parts.append(split.inputs[split.indices])
            labels.append(split.labels + classes)
            phrases += [clean_name(task.classes[label]) for label in split.labels]
        classes += len(task.classes)
    if unlabelled:
        return gathered(parts, None, None, encoder, device, args.pictures, args.seed)
    if classes == 1 and need_labels:
        raise Refused(f"--tasks {args.tasks} has one class only: there is nothing to tell apart")
    labels = np.concatenate(labels)
    return gathered(parts, labels, phrases, encoder, device, args.pictures, args.seed)


def clean_name(name):
    from lib.text_heads import clean
    return clean(str(name))


def gathered(parts, labels, phrases, encoder, device, at_most=None, seed=0):
    """Pictures of uint8 arrays (N, 3, s, s), each of its own s, at the encoder's size; all, or `at_most`."""
    fitted = []
    for part in parts:
        for block in torch.from_numpy(np.array(part)).split(4096):
            fitted.append(images.fit(block, encoder.size, encoder.frame))
    pixels = torch.cat(fitted)
    if at_most:
        if at_most > len(pixels):
            raise Refused(f"--pictures {at_most}: there are {len(pixels)}")
        chosen = np.random.default_rng(seed).permutation(len(pixels))[:at_most]
        pixels, labels = pixels[chosen], None if labels is None else labels[chosen]
        phrases = None if phrases is None else [phrases[index] for index in chosen]
    digest = hashlib.sha256(pixels.numpy()).hexdigest()
    labels = None if labels is None else torch.from_numpy(labels).to(device)
    return Pictures(pixels.to(device), labels, phrases, digest)


def mere_pictures(source):
    """The picture files that lie in a local folder itself, in order: a data set without labels."""
    if not Path(source).is_absolute():
        return []
    endings = images.endings()
    return sorted(path for path in Path(source).iterdir() if path.suffix.lower() in endings)


def decoded(name, source, encoder, runs):
    """The pictures of a folder without labels, (N, 3, s, s) uint8, decoded once into runs/inputs/."""
    cells = [{"bytes": None, "path": str(path)} for path in mere_pictures(source)]
    identity = json.dumps([name, "unlabelled", store.identify_source(source, None),
                           encoder.stored_as(name)])
    folder = runs / "inputs" / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:10]}"
    if not folder.exists():
        with replacing(folder) as temporary:
            temporary.mkdir()
            encoder.store(name, {"pictures": cells}, temporary)
    return np.load(folder / "pictures_inputs.npy", mmap_mode="r")


def hold_out(n, device, generator):
    """(training, held-out) indices of n pictures in random order: one in twenty is held out."""
    order, count = torch.randperm(n, device=device, generator=generator), max(1, n // 20)
    return order[count:], order[:count]


# --------------------------------------------------------------------------------------- augmentation


def random_views(stored, encoder, scale, strength, generator):
    """(B, 3, s, s) uint8 -> (B, 3, S, S) float32, normalised: random crops in other colours.

    scale      (least, most) share of the picture's area in a crop
    strength   of what happens to the colours: their deviations from the picture's mean are mixed by a random
               matrix, which turns hues and may invert, and the mean moves by a quarter of the range; a fifth
               of the crops becomes grey
    """
    crops = images.random_resized_crop(stored, encoder.size, generator, scale)
    n, device = len(crops), crops.device
    mix = strength * torch.randn(n, 3, 3, device=device, generator=generator)
    mix = (torch.eye(3, device=device) + mix) / (1 + 3 * strength ** 2) ** 0.5     # keeps greys' contrast
    shift = 255 / 4 * strength * torch.randn(n, 3, 1, 1, device=device, generator=generator)
    mean = crops.mean((2, 3), keepdim=True)                # (B, 3, 1, 1)
    crops = torch.einsum("bij,bjyx->biyx", mix, crops - mean) + mean + shift
    grey = torch.rand(n, 1, 1, 1, device=device, generator=generator) < 0.2
    crops = torch.where(grey, crops.mean(1, keepdim=True), crops).clamp(0, 255)
    return images.normalise(crops, encoder.mean, encoder.std)


# --------------------------------------------------------------------------------------- on the way


class Training:
    """Where a pre-training stands, and what it leaves on the way: checkpoints, training states, losses.

    encoder    what is saved, by its description
    parts      {name: what has a state_dict and changes: modules and the optimizer}
    save_also  function (folder, SHA-256 of the encoder): writes what goes beside an encoder
    curve      [{"step", "loss", ...}] every EVERY steps, for pretrain.json
    """

    def __init__(self, args, result, pictures, encoder, generator, parts, save_also=None):
        self.args, self.result, self.pictures, self.encoder = args, result, pictures, encoder
        self.generator, self.parts, self.save_also = generator, parts, save_also
        identity = [result.config, result.version, args.checkpoints, pictures.fingerprint,
                    generator.device.type]
        self.state = result.training_state(WHOLE, checksum(identity))
        self.begun, self.seconds_before, self.curve = 0, 0.0, []
        if self.state.exists():
            self.restore(load_state(self.state))

    def restore(self, saved):
        """Go back to a saved training state."""
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        self.generator.set_state(saved["generator"])
        self.begun, self.seconds_before, self.curve = saved["step"], saved["seconds"], saved["curve"]

    def steps(self, order):
        """(step, rows (B,)) from where the training stands; before the first, the checkpoint of step 0."""
        self.start = self.saved = time.perf_counter()
        if self.begun == 0 and 0 in self.args.checkpoints:
            self.checkpoint(0)
        what = "pretrain" + (f" from step {self.begun}" if self.begun else "")
        self.bar = progress(order[self.begun:], what, "step")
        yield from enumerate(self.bar, self.begun)
        self.seconds = self.seconds_before + time.perf_counter() - self.start

    def after(self, step, loss, **more):
        """Keep what is due when a step is done; `more` are tensors to keep beside the loss."""
        done, steps = step + 1, self.args.pretrain_steps
        if done % EVERY == 0 or done == steps:
            values = {name: tensor.item() for name, tensor in {"loss": loss, **more}.items()}
            self.curve.append({"step": done} | values)
            self.bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)
            if not np.isfinite(values["loss"]):
                raise Refused(f"pre-training diverged before step {done}: give a smaller --lr")
        if done in self.args.checkpoints:
            self.checkpoint(done)
        due = time.perf_counter() - self.saved > 60 * self.args.save_minutes
        if done < steps and (due or done in self.args.checkpoints):
            self.save_state(done)

    def checkpoint(self, step):
        """Save the encoder as it is after a step: an encoder of its own."""
        folder = checkpoint_folder(self.result.path.parent, step)
        self.save(folder, {"encoder": folder.name, "step": step, "images_seen": step * self.args.batch_size})

    def save(self, folder, differs):
        """Write the encoder as it is now and what goes beside it; `differs` goes into its description."""
        weights = encoders.separate_weights(self.encoder.module)
        encoders.save_encoder(encoder_file(folder), self.encoder.module, self.encoder.description | differs)
        if self.save_also:
            self.save_also(folder, fingerprint(weights))

    def save_state(self, step):
        self.saved = time.perf_counter()
        state = {name: part.state_dict() for name, part in self.parts.items()}
        save_state(self.state, state | {"step": step, "curve": self.curve,
                                        "seconds": self.seconds_before + self.saved - self.start,
                                        "generator": self.generator.get_state()})

    def finish(self, values):
        """Save the encoder and pretrain.json: the scheme's values, and what all schemes record.

        Where only checkpoints were missing the encoder is there, and stays as it is.
        """
        parameters = sum(parameter.numel() for parameter in self.encoder.module.parameters())
        seen = self.args.pretrain_steps * self.args.batch_size
        if self.result.todo:
            with self.result.saving():
                self.save(self.result.path.parent, {})
                self.result.values |= values | {
                    "scheme": self.encoder.description["scheme"], "parameters": parameters,
                    "images_seen": seen, "pictures": len(self.pictures.images),
                    "pictures_sha256": self.pictures.fingerprint, "curve": self.curve,
                    "seconds": self.seconds, "images_per_second": seen / self.seconds}
        self.result.forget(WHOLE)
        return f"{parameters} parameters, {self.seconds:.0f} s, {seen / self.seconds:.0f} img/s"
