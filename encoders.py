"""
Vision encoders: the eight of the paper by name, `tiny`, and any other through timm or open_clip.

    encoder = load_encoder(args)      # args.encoder, .weights, .image_size, .runs

theta_pre is fetched once, checked, and kept in runs/ENCODER/pretrained.safetensors with all that is needed to build it again.
"""
import difflib
import hashlib
import re
from typing import NamedTuple

import torch

import ranks
from files import Refused, checked_download, go_offline_if_unreachable, load_tensors, save_tensors


class Encoder(NamedTuple):
    name: str
    module: torch.nn.Module  # (B, 3, S, S) normalised -> (B, D)
    size: int                # S, pixels
    mean: tuple              # of pixels in [0, 1], per channel
    std: tuple
    crop_pct: float          # evaluation resizes to S / crop_pct and takes the centre S
    theta_pre: str           # fingerprint of the pre-trained weights


TINY = {"library": "timm", "name": "vit_tiny_patch16_224", "kwargs": {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 4,
                                                                      "num_heads": 4, "num_classes": 0}}
CLIP_400M_FILE = ("laion/scaling-laws-openclip", "Model-B-16_Data-400M_Samples-34B_lr-1e-3_bs-88k.pt")
ENCODERS = {
    "tiny": None,  # trained by pretrain.py
    "vit_b16_sup_in21k": "timm:vit_base_patch16_224.augreg_in21k",
    "vit_b16_sup_in1k": "timm:vit_base_patch16_224.augreg_in1k",
    "vit_b16_mae": "timm:vit_base_patch16_224.mae",
    "vit_b16_dino": "timm:vit_base_patch16_224.dino",
    "vit_b16_clip_laion400m": "timm:vit_base_patch16_clip_224.laion2b",  # this architecture, with CLIP_400M_FILE's weights
    "vit_b16_clip_laion2b": "timm:vit_base_patch16_clip_224.laion2b",
    "vit_l16_sup_in21k": "timm:vit_large_patch16_224.orig_in21k",
    "vit_l14_clip_laion2b": "timm:vit_large_patch14_clip_224.laion2b",
}


def check_encoder_name(name):
    """Refused, with near names, unless `name` is a known encoder, timm:NAME or open_clip:ARCH/TAG."""
    if name in ENCODERS or re.fullmatch(r"(timm|open_clip):[A-Za-z0-9_][A-Za-z0-9_.\-/]*", name) and ".." not in name:
        return
    near = difflib.get_close_matches(name, ENCODERS, n=3, cutoff=0.4)
    raise Refused(f"unknown encoder {name!r}{'; did you mean ' + ' or '.join(near) + '?' if near else ''} "
                  f"(known: {', '.join(ENCODERS)}; any other as timm:NAME or open_clip:ARCH/TAG)")


def run_folder(args):
    """runs/ENCODER for this encoder; `:` and `/` in the name become `_`."""
    check_encoder_name(args.encoder)
    return args.runs / re.sub("[:/]", "_", args.encoder)


def load_encoder(args):
    """theta_pre from runs/ENCODER/pretrained.safetensors; made on first use from --weights or the hub.

    Returns  Encoder, module in eval mode, fp32, on the CPU
    Errors   Refused: unknown name, unreachable hub, a file that is no checkpoint of this architecture, weights or image size
             other than those runs/ENCODER was begun with
    """
    path = run_folder(args) / "pretrained.safetensors"
    source = file_sha256(args.weights) if args.weights else None
    with ranks.first():
        if not path.exists():
            if args.encoder == "tiny":
                raise Refused(f'{path} is missing: run "python pretrain.py tiny" first')
            save_encoder(path, *build_pretrained(args), source=source)
    theta, about = load_tensors(path, f"python probe.py {args.encoder}", encoder=args.encoder)
    if source and source != about["source"]:
        raise Refused(f"{path} was not made from --weights {args.weights} (SHA-256 {source[:12]}): use another --runs")
    if args.image_size and args.image_size != about["size"]:
        raise Refused(f"{path} is for images of {about['size']} pixels, not {args.image_size}: use another --runs")
    module = build_architecture(about["architecture"])
    module.load_state_dict(theta, strict=True)
    return Encoder(args.encoder, module.eval(), about["size"], tuple(about["mean"]), tuple(about["std"]), about["crop_pct"], about["sha256"])


def save_encoder(path, module, about, source=None):
    """Write theta_pre and what is needed to build its module again."""
    save_tensors(path, module.state_dict(), **about, source=source)


def file_sha256(path):
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Refused(f"--weights {path} cannot be read ({error.strerror})") from error


def build_architecture(architecture):
    """The module of a description {"library", "name", "kwargs"}, randomly initialised."""
    if architecture["library"] == "timm":
        import timm
        return timm.create_model(architecture["name"], pretrained=False, **architecture["kwargs"])
    import open_clip
    return open_clip.create_model(architecture["name"], pretrained=None, **architecture["kwargs"]).visual


def build_pretrained(args):
    """(module with its pre-trained weights loaded strictly, description) for any name but tiny, through timm or open_clip."""
    library, _, name = (ENCODERS.get(args.encoder) or args.encoder).partition(":")
    build = build_timm if library == "timm" else build_open_clip
    try:
        if not args.weights:
            go_offline_if_unreachable()
        module, about = build(args, name)
    except Refused:
        raise
    except Exception as error:  # the hub client and torch's unpickler raise many types
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
        raise Refused(f"--weights {args.weights} is no checkpoint of {args.encoder} ({reason})" if args.weights else
                      f"encoder {args.encoder} wants its checkpoint from the hub and could not get it ({reason}): "
                      f"give it as a local file with --weights FILE") from error
    try:
        with torch.no_grad():
            module.eval()(torch.zeros(1, 3, about["size"], about["size"]))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise Refused(f"{args.encoder} does not take images of {about['size']} pixels ({error}): give another --image-size") from error
    broken = [key for key, tensor in module.state_dict().items() if not torch.isfinite(tensor).all()]
    if broken:
        raise Refused(f"{args.weights or args.encoder}: {broken[0]} holds values that are not finite")
    return module.float(), about | {"encoder": args.encoder}


def build_timm(args, name):
    """A timm encoder whose feature is its pooled output; CLIP image towers keep their projection to the joint space."""
    import timm
    from timm.models import get_pretrained_cfg, is_model
    if not is_model(name.partition(".")[0]):
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
        raise Refused(f"unknown encoder timm:{name}{'; did you mean ' + ' or '.join(near) + '?' if near else ''}")
    config = get_pretrained_cfg(name)
    size = args.image_size or config.input_size[-1]
    kwargs = {"img_size": size} if config.fixed_input_size and size != config.input_size[-1] else {}
    file = args.weights
    if args.encoder == "vit_b16_clip_laion400m" and not file:
        from huggingface_hub import hf_hub_download
        with checked_download(CLIP_400M_FILE[0]):
            file = hf_hub_download(*CLIP_400M_FILE)
    overlay = {"pretrained_cfg_overlay": {"file": str(file)}} if file else {}
    with checked_download(None if file else config.hf_hub_id):
        module = timm.create_model(name, pretrained=True, **kwargs, **overlay)  # its own number of classes, so timm loads strictly
    if "_clip_" in name and "_ft_" not in name:
        kwargs["num_classes"] = module.num_classes
    else:
        module.reset_classifier(0)
        kwargs["num_classes"] = 0
    return module, {"architecture": {"library": "timm", "name": name, "kwargs": kwargs}, "size": size,
                    "mean": config.mean, "std": config.std, "crop_pct": config.crop_pct}


def build_open_clip(args, name):
    """An open_clip image tower with its projection; ARCH/TAG, or ARCH alone with --weights."""
    import open_clip
    arch, _, tag = name.partition("/")
    if arch not in open_clip.list_models():
        near = difflib.get_close_matches(arch, open_clip.list_models(), n=3)
        raise Refused(f"unknown encoder open_clip:{name}{'; did you mean ' + ' or '.join(near) + '?' if near else ''}")
    kwargs, config = {"force_image_size": args.image_size} if args.image_size else {}, open_clip.get_pretrained_cfg(arch, tag)
    if config.get("quick_gelu"):
        kwargs["force_quick_gelu"] = True
    with checked_download(None if args.weights else config.get("hf_hub")):
        module = open_clip.create_model(arch, pretrained=str(args.weights) if args.weights else tag, **kwargs).visual
    config = module.preprocess_cfg
    size = config["size"] if isinstance(config["size"], int) else config["size"][0]
    return module, {"architecture": {"library": "open_clip", "name": arch, "kwargs": kwargs}, "size": size,
                    "mean": config["mean"], "std": config["std"], "crop_pct": 1.0}


def width_of(encoder):
    """D, the length of its features."""
    with torch.no_grad():
        return encoder.module(torch.zeros(1, 3, encoder.size, encoder.size)).shape[1]


def weights_of(module):
    """{name: tensor} of everything a task vector covers: parameters and floating-point buffers, not copied."""
    return {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}
