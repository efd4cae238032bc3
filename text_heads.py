"""
Zero-shot heads: a linear classifier made of a CLIP text tower's embeddings of class names in prompt templates.

    weight = exp(logit_scale) * normalise(mean over templates of normalise(text(template with class)))   (C, D)

It acts on image features of unit length and has no bias (common.logits). Only encoders with a text tower have one.
Source  arXiv:2511.14569 appendix B
"""
import re

import torch
import torch.nn.functional as F

from files import Refused, checked_download, go_offline_if_unreachable

TEMPLATES = {
    "cars": ["a photo of a {}.", "a photo of the {}.", "a photo of my {}.", "a photo of my new {}.", "a photo of my old {}."],
    "dtd": ["a photo of a {} texture.", "a photo of a {} pattern.", "a photo of a {} thing.", "a close-up of a {} surface."],
    "eurosat": ["a satellite photo of {}.", "a centered satellite photo of {}.", "an aerial view of {}."],
    "gtsrb": ["a photo of a traffic sign: {}.", "a zoomed in photo of a \"{}\" traffic sign.", "a close up photo of a \"{}\" traffic sign."],
    "mnist": ["a photo of the number: \"{}\".", "a handwritten digit {}."],
    "resisc45": ["satellite imagery of {}.", "aerial imagery of {}.", "a satellite photo of {}.", "an aerial photo of {}."],
    "sun397": ["a photo of a {}.", "a photo of the {}."],
    "svhn": ["a photo of the number: \"{}\".", "a photo of the house number {}."],
}
GENERAL_TEMPLATES = ["a photo of a {}.", "a photo of the {}.", "a picture of {}."]
TEXT_TOWERS = {"vit_b16_clip_laion2b": "open_clip:ViT-B-16/laion2b_s34b_b88k", "vit_l14_clip_laion2b": "open_clip:ViT-L-14/laion2b_s32b_b82k",
               "vit_b16_clip_laion400m": "open_clip:ViT-B-16/"}  # the last with the file of encoders.CLIP_400M_FILE


def clean(name):
    """A class name as a person would write it: "/a/abbey" -> "abbey", "annual_crop" and "AnnualCrop" -> "annual crop" (towers ignore case)."""
    name = re.sub(r"^/?[a-z]/", "", name)
    if " " not in name:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return re.sub(r"[_/\s]+", " ", name).strip()


def text_tower(args, encoder):
    """(open_clip model, tokenizer) whose image tower the encoder is; Refused for an encoder without a text tower, or another's."""
    import open_clip
    name = TEXT_TOWERS.get(args.encoder, args.encoder)
    if not name.startswith("open_clip:"):
        raise Refused(f"{args.encoder} has no text tower: recipes zeroshot and zeroshot-full need a CLIP encoder "
                      f"({', '.join(TEXT_TOWERS)}, open_clip:ARCH/TAG)")
    arch, _, tag = name.removeprefix("open_clip:").partition("/")
    try:
        if not args.weights:
            go_offline_if_unreachable()
        source = str(args.weights) if args.weights else tag
        if not source and args.encoder != "vit_b16_clip_laion400m":
            raise Refused(f"{args.encoder} names no checkpoint: give the whole CLIP checkpoint with --weights FILE")
        if not source:
            from encoders import CLIP_400M_FILE
            from huggingface_hub import hf_hub_download
            with checked_download(CLIP_400M_FILE[0]):
                source = hf_hub_download(*CLIP_400M_FILE)
        config = open_clip.get_pretrained_cfg(arch, tag)
        kwargs = {"force_quick_gelu": True} if config.get("quick_gelu") else {}
        with checked_download(config.get("hf_hub") if source == tag else None):
            model = open_clip.create_model(arch, pretrained=source, **kwargs).eval()
    except Refused:
        raise
    except Exception as error:  # the hub client and torch's unpickler raise many types
        raise Refused(f"the text tower of {args.encoder} could not be had ({type(error).__name__}: {error}): give the whole CLIP checkpoint with --weights FILE") from error
    stem, own = (next(tensor for tensor in module.state_dict().values() if tensor.ndim == 4) for module in (model.visual, encoder.module))
    if not torch.equal(stem, own):
        raise Refused(f"the text tower's checkpoint has another image tower than runs/ENCODER/pretrained.safetensors of {args.encoder}: "
                      f"give the checkpoint that one was made from with --weights FILE")
    return model, open_clip.get_tokenizer(arch)


@torch.no_grad()
def text_head(task, model, tokenizer, device):
    """{"weight" (C, D)} float32 for one task, by the model and tokenizer of text_tower; Refused where classes have no names."""
    if any(isinstance(name, int) for name in task.classes):
        raise Refused(f"task {task.name}: its classes are numbers without names, and a head from text needs names: store its labels as a "
                      f"ClassLabel feature (datasets), or as an image folder train/CLASS/*.jpg")
    model, rows = model.to(device), []
    for name in task.classes:
        prompts = tokenizer([template.format(clean(name)) for template in TEMPLATES.get(task.name, GENERAL_TEMPLATES)]).to(device)
        rows.append(F.normalize(F.normalize(model.encode_text(prompts), dim=1).mean(0), dim=0))
    return {"weight": (model.logit_scale.exp() * torch.stack(rows)).float()}
