"""
Zero-shot heads: a linear classifier made of a CLIP text tower's embeddings of class names in templates.

    weight = exp(logit_scale) * normalise(mean over templates of normalise(text(template of class)))   (C, D)

It acts on image features of unit length and has no bias (common.logits). Only encoders with a text tower have
one.
Source  arXiv:2511.14569 appendix B
"""
import re

import torch
import torch.nn.functional as F

from common import Head
from lib.encoders import download_clip_400m
from lib.files import Refused
from lib.hub import checked_download, go_offline_if_unreachable

TEMPLATES = {
    "cars": ["a photo of a {}.", "a photo of the {}.", "a photo of my {}.", "a photo of my new {}.",
             "a photo of my old {}."],
    "dtd": ["a photo of a {} texture.", "a photo of a {} pattern.", "a photo of a {} thing.",
            "a close-up of a {} surface."],
    "eurosat": ["a satellite photo of {}.", "a centered satellite photo of {}.", "an aerial view of {}."],
    "gtsrb": ["a photo of a traffic sign: {}.", "a zoomed in photo of a \"{}\" traffic sign.",
              "a close up photo of a \"{}\" traffic sign."],
    "mnist": ["a photo of the number: \"{}\".", "a handwritten digit {}."],
    "resisc45": ["satellite imagery of {}.", "aerial imagery of {}.", "a satellite photo of {}.",
                 "an aerial photo of {}."],
    "sun397": ["a photo of a {}.", "a photo of the {}."],
    "svhn": ["a photo of the number: \"{}\".", "a photo of the house number {}."],
}
GENERAL_TEMPLATES = ["a photo of a {}.", "a photo of the {}.", "a picture of {}."]


def clean(name):
    """A class name as a person would write it: "/a/abbey" -> "abbey", "annual_crop" and "AnnualCrop" ->
    "annual crop".

    Text towers ignore case.
    """
    name = re.sub(r"^/?[a-z]/", "", name)
    if " " not in name:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return re.sub(r"[_/\s]+", " ", name).strip()


def text_tower(encoder, weights=None):
    """(open_clip model, tokenizer) whose image tower the encoder is.

    weights  file of the whole CLIP checkpoint, for machines without a hub
    Errors   Refused: an encoder without a text tower, another checkpoint's tower, an unreachable hub
    """
    name = encoder.description["text_tower"]
    if not name:
        raise Refused(f"{encoder.name} has no text tower: a recipe whose head is from text needs a CLIP "
                      f"encoder (vit_b16_clip_laion400m, vit_b16_clip_laion2b, vit_l14_clip_laion2b, "
                      f"open_clip:ARCH/TAG)")
    import open_clip
    arch, _, tag = name.removeprefix("open_clip:").partition("/")
    try:
        if not weights:
            go_offline_if_unreachable()
        if weights:
            source = str(weights)
        elif encoder.name == "vit_b16_clip_laion400m":
            source = download_clip_400m()
        elif tag:
            source = tag
        else:
            raise Refused(f"{encoder.name} names no checkpoint: give the whole CLIP checkpoint with "
                          f"--weights FILE")
        config = open_clip.get_pretrained_cfg(arch, tag)
        kwargs = {"force_quick_gelu": True} if config.get("quick_gelu") else {}
        with checked_download(config.get("hf_hub") if source == tag else None):
            model = open_clip.create_model(arch, pretrained=source, **kwargs).eval()
    except Refused:
        raise
    except Exception as error:  # the hub client and torch's unpickler raise many types
        raise Refused(f"the text tower of {encoder.name} could not be had ({type(error).__name__}: {error}): "
                      f"give the whole CLIP checkpoint with --weights FILE") from error
    if not torch.equal(stem(model.visual), stem(encoder.module)):
        raise Refused(f"the text tower's checkpoint has another image tower than "
                      f"runs/ENCODER/pretrained.safetensors of {encoder.name}: "
                      f"give the checkpoint that one was made from with --weights FILE")
    return model, open_clip.get_tokenizer(arch)


def stem(module):
    """The weights of the first convolution, by which two image towers are told apart."""
    return next(tensor for tensor in module.state_dict().values() if tensor.ndim == 4)


@torch.no_grad()
def text_head(task, model, tokenizer, device):
    """The common.Head of one task, weight (C, D), by the model and tokenizer of text_tower.

    Errors  Refused: classes that have numbers for names
    """
    if any(isinstance(name, int) for name in task.classes):
        raise Refused(f"task {task.name}: its classes are numbers without names, and a head from text needs "
                      f"names: store its labels as a ClassLabel feature (datasets), or as an image folder "
                      f"train/CLASS/*.jpg")
    model, rows = model.to(device), []
    templates = TEMPLATES.get(task.name, GENERAL_TEMPLATES)
    for name in task.classes:
        prompts = tokenizer([template.format(clean(name)) for template in templates]).to(device)
        embedded = F.normalize(model.encode_text(prompts), dim=1)
        rows.append(F.normalize(embedded.mean(0), dim=0))
    return Head((model.logit_scale.exp() * torch.stack(rows)).float(), None, normalise=True)
