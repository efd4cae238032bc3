"""
Encoders: the eight of the paper by name, `tiny`, and any other through timm, open_clip or transformers.

    encoder = load_encoder("vit_b16_dino", runs, weights=None, image_size=None)

theta_pre is fetched once, checked, and kept in runs/ENCODER/pretrained.safetensors with a description of all
that later stages need: architecture, input, feature width, text tower, and the settings that stages take from
it as defaults.
"""
import difflib
import functools
import hashlib
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lib import images, language, ranks, texts
from lib.files import Refused, check_metadata, file_metadata, load_tensors, save_tensors
from lib.hub import checked_download, go_offline_if_unreachable

CLIP_400M_FILE = ("laion/scaling-laws-openclip", "Model-B-16_Data-400M_Samples-34B_lr-1e-3_bs-88k.pt")
ENCODERS = {
    "tiny": None,                                           # trained by pretrain.py
    "vit_b16_sup_in21k": "timm:vit_base_patch16_224.augreg_in21k",
    "vit_b16_sup_in1k": "timm:vit_base_patch16_224.augreg_in1k",
    "vit_b16_mae": "timm:vit_base_patch16_224.mae",
    "vit_b16_dino": "timm:vit_base_patch16_224.dino",
    # the architecture of CLIP_400M_FILE's weights
    "vit_b16_clip_laion400m": "timm:vit_base_patch16_clip_224.laion2b",
    "vit_b16_clip_laion2b": "timm:vit_base_patch16_clip_224.laion2b",
    "vit_l16_sup_in21k": "timm:vit_large_patch16_224.orig_in21k",
    "vit_l14_clip_laion2b": "timm:vit_large_patch14_clip_224.laion2b",
    "flan_t5_base": "transformers:google/flan-t5-base",
}
TEXT_TOWERS = {
    "vit_b16_clip_laion400m": "open_clip:ViT-B-16/",        # with CLIP_400M_FILE
    "vit_b16_clip_laion2b": "open_clip:ViT-B-16/laion2b_s34b_b88k",
    "vit_l14_clip_laion2b": "open_clip:ViT-L-14/laion2b_s32b_b82k",
    "flan_t5_base": language.LM_HEAD_FILE,                  # which answers in words itself
}


@dataclass(frozen=True)
class Encoder:
    """An image encoder with its input.

    What is stored becomes what the module takes by `prepare`, in training by `augment`.
    """
    name: str
    build: Callable          # () -> the module, once
    size: int                # S, pixels
    mean: tuple              # of pixels in [0, 1], per channel
    std: tuple
    frame: images.Frame      # the square that a picture becomes before the centre S x S is taken
    width: int               # D, the length of a feature
    fingerprint: str         # of theta_pre
    description: dict        # all that pretrained.safetensors says of it

    @functools.cached_property
    def module(self):
        """(B, 3, S, S) normalised -> (B, D). Built when first asked for: what is there already needs none."""
        return self.build()

    def prepare(self, stored):
        """(N, 3, s, s) uint8 on its device -> (N, 3, S, S) float32, resized, centre-cropped, normalised."""
        return images.normalise(images.fit(stored, self.size, self.frame), self.mean, self.std)

    def augment(self, stored, generator):
        """(B, 3, s, s) uint8 on its device -> (B, 3, S, S) float32, each a random crop, normalised."""
        return images.normalise(images.random_resized_crop(stored, self.size, generator), self.mean, self.std)

    def training_parts(self, stored, labels, size, generator):
        """[((b, 3, S, S), (b,))]: a step's images, augmented, and labels, no more than `size` at a time."""
        return zip(self.augment(stored, generator).split(size), labels.split(size), strict=True)

    def example(self, n, stored=None):
        """Input of the right shape and dtype for the module, n of them, whatever shape is stored."""
        return torch.zeros(n, 3, self.size, self.size)

    def store(self, name, encoded, folder):
        """A data set's undecoded cells {split: cells}, decoded once to be kept: see images.store."""
        return images.store(name, encoded, self.frame, folder)

    def stored_as(self, name):
        """What decides, besides the data set, how a task is stored."""
        return self.frame.side if self.frame == images.Frame(self.frame.side) else self.frame

    @property
    def settings(self):
        """What a result's config says of the input."""
        return {"image_size": self.size}

    def parts(self, split):
        """[(rows (n,), inputs)]: which of a split's inputs are stored where, those of one shape together."""
        return [(np.arange(len(split)), split.inputs)]

    takes, unit, wants = "images", "img", "one image column"
    input_columns, cells = staticmethod(images.input_columns), staticmethod(images.cells)


def describe(module, architecture, size, mean, std, crop_pct, interpolation="bicubic", crop_mode="center",
             **more):
    """The description of an encoder's file; evaluation resizes to size / crop_pct and takes the centre.

    crop_mode   timm's word: center cuts a picture to a square first, squash resizes both edges
    """
    if interpolation not in ("bicubic", "bilinear") or crop_mode not in ("center", "squash"):
        raise Refused(f"{architecture.get('name')} wants its pictures {interpolation} and {crop_mode}: known "
                      f"are bicubic and bilinear, center and squash")
    with torch.no_grad():
        feature = module(torch.zeros(1, 3, size, size, device=next(module.parameters()).device))
    if not torch.is_tensor(feature) or feature.ndim != 2:
        found = tuple(feature.shape) if torch.is_tensor(feature) else type(feature).__name__
        raise Refused(f"{architecture.get('name')} gives {found} for an image, not one feature (1, D)")
    width = feature.shape[1]
    return {"architecture": architecture, "size": size, "mean": list(mean), "std": list(std), "width": width,
            "side": int(size / crop_pct), "interpolation": interpolation, "squash": crop_mode == "squash",
            "text_tower": None, "tasks": None, "defaults": {}} | more


def as_encoder(build, description, fingerprint="", folder=None):
    """The Encoder of a description and a function () -> module; of texts the TextEncoder of runs/ENCODER."""
    if "tokenizer" in description:
        return language.as_encoder(build, description, fingerprint, folder)
    own = {key: description[key] for key in ("size", "width")}
    own["frame"] = images.Frame(*[description[key] for key in images.Frame._fields if key in description])
    statistics = {key: tuple(description[key]) for key in ("mean", "std")}
    return Encoder(description["encoder"], build, **own, **statistics, fingerprint=fingerprint,
                   description=description)


# --------------------------------------------------------------------------------------- theta_pre in runs/


def run_folder(runs, name):
    """runs/ENCODER for this encoder; `:` and `/` in the name become `_`. Refused if unknown.

    Known are ENCODERS, timm:NAME, open_clip:ARCH/TAG, transformers:NAME, and folders of runs/ with a
    pretrained.safetensors.
    """
    form = r"(timm:|open_clip:|transformers:)?[A-Za-z0-9_][A-Za-z0-9_.\-/]*"
    sound = re.fullmatch(form, name) and ".." not in name
    folder = runs / re.sub("[:/]", "_", name)
    if sound and (name in ENCODERS or ":" in name or (folder / "pretrained.safetensors").exists()):
        return folder
    raise Refused(f"unknown encoder {name!r}{near(name, ENCODERS, 0.4)} (known: {', '.join(ENCODERS)}; "
                  f"any other as timm:NAME, open_clip:ARCH/TAG or transformers:NAME, and what pretrain.py "
                  f"and pretrain_*.py have made)")


def load_encoder(name, runs, weights=None, image_size=None, prompts=None):
    """theta_pre from runs/ENCODER/pretrained.safetensors; made on first use from `weights` or the hub.

    prompts  file of a T5's prompts and label words, see texts.read_prompts
    Returns  Encoder (of texts TextEncoder), module in eval mode, fp32, on the CPU
    Errors   Refused: unknown name, unreachable hub, a file that is no checkpoint of this architecture,
             weights, image size or prompts other than those runs/ENCODER was begun with
    """
    path = run_folder(runs, name) / "pretrained.safetensors"
    source, asked = None, texts.read_prompts(prompts)
    if weights:
        source = language.folder_sha256(weights) if weights.is_dir() else file_sha256(weights)
    with ranks.first(path):
        if not path.exists():
            if name == "tiny":
                raise Refused(f'{path} is missing: run "python pretrain.py tiny" first')
            module, description = build_pretrained(name, weights, image_size, path.parent)
            if description["text_tower"] == language.LM_HEAD_FILE:
                description |= asked
            save_encoder(path, module, description, source)
    made_by = f"python probe.py {name}"
    description = file_metadata(path, made_by)
    named = description.get("encoder", name)
    if named != name and re.sub("[:/]", "_", named) == path.parent.name:
        raise Refused(f"{path.parent} is the folder of encoder {named}: give that name")
    check_metadata(path, description, made_by, encoder=name)
    if source and source != description["source"]:
        raise Refused(f"{path} was not made from --weights {weights} (SHA-256 {source[:12]}): "
                      f"use another --runs")
    if image_size and "size" not in description:
        raise Refused(f"{name} takes texts: leave out --image-size")
    if image_size and image_size != description["size"]:
        raise Refused(f"{path} is for images of {description['size']} pixels, not {image_size}: "
                      f"use another --runs")
    if prompts and asked != {key: description.get(key) for key in asked}:
        raise Refused(f"--prompts: {name} does not answer in words" if "prompts" not in description else
                      f"{path} was begun with other prompts: use another --runs")

    def build():
        theta, _ = load_tensors(path, made_by, sha256=description["sha256"])
        module = build_architecture(description["architecture"])
        module.load_state_dict(theta, strict=True)
        return module.eval()

    return as_encoder(build, description, description["sha256"], path.parent)


def save_encoder(path, module, description, source=None):
    """Write theta_pre and what is needed to build its module again."""
    save_tensors(path, separate_weights(module), **description, source=source)


def file_sha256(path, flag="--weights"):
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Refused(f"{flag} {path} cannot be read ({error.strerror})") from error


def weights_of(module):
    """{name: tensor} of all that a task vector covers: parameters and floating-point buffers, not copied."""
    return {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}


def separate_weights(module):
    """A copy of a module's state_dict whose tensors share no memory, as safetensors wants them."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# --------------------------------------------------------------------------------------- timm and open_clip


def text_tower(name):
    """What makes heads from text: open_clip:ARCH/TAG, whose image tower an encoder is; None: nothing."""
    return name if name.startswith("open_clip:") else TEXT_TOWERS.get(name)


def build_architecture(architecture):
    """The module of a description {"library", "name", "kwargs"}, randomly initialised."""
    if architecture["library"] == "timm":
        import timm
        return timm.create_model(architecture["name"], pretrained=False, **architecture["kwargs"])
    if architecture["library"] == "transformers":
        return language.build_architecture(architecture)
    import open_clip
    logging.disable(logging.WARNING)                       # "initialized randomly", until weights are loaded
    try:
        model = open_clip.create_model(architecture["name"], pretrained=None, **architecture["kwargs"])
    finally:
        logging.disable(logging.NOTSET)
    return only_the_feature(model.visual)


def build_pretrained(name, weights, image_size, folder):
    """(module with its pre-trained weights loaded strictly, description) for any name but tiny.

    folder   runs/ENCODER, for what goes beside an encoder of texts
    """
    library, _, model = (ENCODERS.get(name) or name).partition(":")

    def build(image_size):
        if library == "transformers":
            return language.build(model, weights, folder)
        if library == "open_clip":
            return build_open_clip(model, weights, image_size)
        return build_timm(model, checkpoint_file(name, weights), image_size)

    try:
        if not weights:
            go_offline_if_unreachable()
        module, taken = build(image_size)
    except Refused:
        raise
    except Exception as error:  # the hub client and torch's unpickler raise many types
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
        if image_size and succeeds(lambda: build(None)):
            raise Refused(f"{name} does not take images of {image_size} pixels ({reason}): give another "
                          f"--image-size") from error
        raise Refused(f"--weights {weights} is no checkpoint of {name} ({reason})" if weights else
                      f"encoder {name} wants its checkpoint from the hub and could not get it ({reason}): "
                      f"give it as a local file with --weights FILE") from error
    module = module.eval()
    if library == "transformers":
        description = taken | {"encoder": name}
    else:
        description = describe_images(name, module, taken)
    for key, tensor in module.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise Refused(f"{weights or name}: {key} holds values that are not finite")
    return module.float(), description


def succeeds(function):
    try:
        function()
    except Exception:  # of the same many types: it is the outcome that is asked for
        return False
    return True


def describe_images(name, module, taken):
    """The description of a pre-trained encoder of images; Refused where it takes none of that size."""
    try:
        return describe(module, **taken, encoder=name) | {"text_tower": text_tower(name)}
    except (AssertionError, RuntimeError, ValueError) as error:
        raise Refused(f"{name} does not take images of {taken['size']} pixels ({error}): "
                      f"give another --image-size") from error


def checkpoint_file(name, weights):
    """The file that holds an encoder's weights, where timm is not left to find them itself."""
    if name == "vit_b16_clip_laion400m" and not weights:
        return download_clip_400m()
    return weights


def download_clip_400m():
    from huggingface_hub import hf_hub_download
    with checked_download(CLIP_400M_FILE[0]):
        return hf_hub_download(*CLIP_400M_FILE)


def build_timm(name, file, image_size):
    """(module, arguments of describe): a timm encoder whose feature is its pooled output.

    CLIP image towers keep their projection to the joint space.
    """
    import timm
    from timm.models import get_pretrained_cfg, is_model
    if not is_model(name.partition(".")[0]):
        raise Refused(f"unknown encoder timm:{name}{near(name.partition('.')[0], timm.list_models(), 0.6)}")
    config = get_pretrained_cfg(name)
    size = image_size or config.input_size[-1]
    kwargs = {"img_size": size} if config.fixed_input_size and size != config.input_size[-1] else {}
    keeps_head = "_clip_" in name and "_ft_" not in name
    own = {} if keeps_head or not file else head_of(file, config)
    overlay = {"pretrained_cfg_overlay": {"file": str(file), **own}} if file else {}
    with checked_download(None if file else config.hf_hub_id):
        module = timm.create_model(name, pretrained=True, **kwargs, **own, **overlay)     # a strict load
    if keeps_head:
        kwargs["num_classes"] = module.num_classes
    else:
        module.reset_classifier(0)
        kwargs["num_classes"] = 0
    return module, {"architecture": {"library": "timm", "name": name, "kwargs": kwargs}, "size": size,
                    "mean": config.mean, "std": config.std, "crop_pct": config.crop_pct,
                    "interpolation": config.interpolation, "crop_mode": config.crop_mode}


def head_of(file, config):
    """{"num_classes": of a file's own classifier, 0 without one}; {} where it has as many as its name says.

    It is not kept, but has to fit for the rest to be loaded strictly.
    """
    from timm.models import load_state_dict
    if file.suffix == ".npz":                               # of JAX, which timm reads in its own way
        return {}
    classifier = config.classifier
    if not classifier:
        return {}
    tensors = {name: value for name, value in load_state_dict(str(file)).items() if torch.is_tensor(value)}
    weight = tensors.get(f"{classifier if isinstance(classifier, str) else classifier[0]}.weight")
    by_another_name = any(tensor.shape[:1] == (config.num_classes,) for tensor in tensors.values())
    if weight is None and by_another_name or weight is not None and len(weight) == config.num_classes:
        return {}
    return {"num_classes": 0 if weight is None else len(weight)}


def build_open_clip(name, weights, image_size):
    """(module, arguments of describe): an open_clip image tower; ARCH/TAG, or ARCH and a file of weights."""
    import open_clip
    arch, _, tag = name.partition("/")
    if arch not in open_clip.list_models():
        raise Refused(f"unknown encoder open_clip:{name}{near(arch, open_clip.list_models(), 0.6)}")
    kwargs = {"force_image_size": image_size} if image_size else {}
    config = open_clip.get_pretrained_cfg(arch, tag)
    if config.get("quick_gelu"):
        kwargs["force_quick_gelu"] = True
    # the tag's own, which open_clip forgets where a file is given
    own = {key: config[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in config}
    with checked_download(None if weights else config.get("hf_hub")):
        model = open_clip.create_model(arch, pretrained=str(weights) if weights else tag,
                                       force_preprocess_cfg=own, **kwargs)
    module = only_the_feature(model.visual)
    config = module.preprocess_cfg
    size = config["size"] if isinstance(config["size"], int) else config["size"][0]
    return module, {"architecture": {"library": "open_clip", "name": arch, "kwargs": kwargs}, "size": size,
                    "mean": config["mean"], "std": config["std"], "crop_pct": 1.0,
                    "interpolation": config["interpolation"],
                    "crop_mode": {"shortest": "center"}.get(config["resize_mode"], config["resize_mode"])}


def only_the_feature(tower):
    """An open_clip image tower that gives its feature alone; CoCa's gives (feature, tokens) by itself."""
    if hasattr(tower, "output_tokens"):
        tower.output_tokens = False
    return tower


def near(word, known, cutoff):
    """"; did you mean ...?" with what comes close to a word, or nothing."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=cutoff)
    return f"; did you mean {' or '.join(close)}?" if close else ""
