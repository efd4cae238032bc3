"""
Zero-shot heads: a linear classifier made of a CLIP text tower's embeddings of class names in templates.

    weight = exp(logit_scale) * normalise(mean over templates of normalise(text(template of class)))   (C, D)

It acts on image features of unit length and has no bias (common.logits). Only encoders with a text tower have
one: open_clip's, or the small one that pretrain_contrastive.py keeps beside its encoder. Of a T5, which
answers in words, the head are lm_head's rows for the first tokens of the classes' words.
Source  arXiv:2511.14569 appendix B; arXiv:2407.07089 (Flan-T5)
"""
import functools
import re

import torch
import torch.nn.functional as F

from common import Head
from lib import language, texts
from lib.captions import TEMPLATES as CAPTION_TEMPLATES
from lib.encoders import download_clip_400m
from lib.files import Refused, load_tensors, save_tensors
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


def maker(encoder, weights, folder, device):
    """The function from a common.Task to its Head for an encoder that has one from text.

    weights, folder   as text_tower takes them
    """
    if encoder.description["text_tower"] == language.LM_HEAD_FILE:
        return functools.partial(answering_head, encoder, language.load_lm_head(folder, encoder), device)
    model, tokenizer, templates = text_tower(encoder, weights, folder)
    return functools.partial(text_head, model=model, tokenizer=tokenizer, templates=templates, device=device)


def answering_head(encoder, lm_head, device, task):
    """The Head of one task from lm_head (V, D): its rows for the classes' words, (C, D)."""
    rows = texts.label_tokens(task.name, task.classes, encoder.description["words"], encoder.tokenizer)
    print(f"task {task.name}: its classes answer by {', '.join(map(encoder.tokenizer.id_to_token, rows))}",
          flush=True)
    return Head(lm_head[rows].float().to(device), None, normalise=False)


def text_tower(encoder, weights=None, folder=None):
    """(model, tokenizer, templates): the open_clip model whose image tower an encoder is, or the small tower.

    The templates are those of the small tower's captions, None for open_clip.

    weights  file of the whole CLIP checkpoint, for machines without a hub
    folder   runs/ENCODER, where a small text tower is
    Errors   Refused: an encoder without a text tower, another checkpoint's tower, an unreachable hub, a small
             tower that is missing
    """
    name = encoder.description["text_tower"]
    if name == TOWER_FILE:
        tower = load_small_tower(folder, encoder)
        return tower, tower.tokenize, CAPTION_TEMPLATES
    if not name:
        raise Refused(f"{encoder.name} has no text tower: a recipe whose head is from text needs a CLIP "
                      f"encoder (vit_b16_clip_laion400m, vit_b16_clip_laion2b, vit_l14_clip_laion2b, "
                      f"open_clip:ARCH/TAG, or of pretrain_contrastive.py), or for tasks of texts a T5")
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
    return model, open_clip.get_tokenizer(arch), None


def stem(module):
    """The weights of the first convolution, by which two image towers are told apart."""
    return next(tensor for tensor in module.state_dict().values() if tensor.ndim == 4)


@torch.no_grad()
def text_head(task, model, tokenizer, templates, device):
    """The common.Head of one task, weight (C, D), by what text_tower returns.

    templates   for all tasks; None: TEMPLATES, the task's own

    Errors  Refused: classes that have numbers for names
    """
    if any(isinstance(name, int) for name in task.classes):
        raise Refused(f"task {task.name}: its classes are numbers without names, and a head from text needs "
                      f"names: store its labels as a ClassLabel feature (datasets), or as an image folder "
                      f"train/CLASS/*.jpg")
    model, rows = model.to(device), []
    templates = templates or TEMPLATES.get(task.name, GENERAL_TEMPLATES)
    for name in task.classes:
        prompts = tokenizer([template.format(clean(name)) for template in templates]).to(device)
        embedded = F.normalize(model.encode_text(prompts), dim=1)
        rows.append(F.normalize(embedded.mean(0), dim=0))
    return Head((model.logit_scale.exp() * torch.stack(rows)).float(), None, normalise=True)


# --------------------------------------------------------------------------------------- the small tower

TOWER_FILE = "text_tower.safetensors"                      # beside the encoder of pretrain_contrastive.py
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


class SmallTextTower(torch.nn.Module):
    """A text -> a feature as long as the image encoder's, by a transformer over words.

    words   the captions' own, sorted; any other word is spelled, in letters that no training has met
    """

    def __init__(self, words, output_width, width, depth, heads, length=40):
        super().__init__()
        self.words, self.length = list(words), length
        self.shape = {"output_width": output_width, "width": width, "depth": depth, "heads": heads,
                      "length": length}
        known = dict.fromkeys([*LETTERS, *self.words])       # each once, "a" is a letter and a word
        self.number = {word: index for index, word in enumerate(known, 1)}         # 0 is padding
        self.embed = torch.nn.Embedding(1 + len(self.number), width)
        self.positions = torch.nn.Parameter(0.1 * torch.randn(length, width))
        layer = torch.nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0, activation="gelu",
                                                 batch_first=True, norm_first=True)
        self.blocks = torch.nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = torch.nn.LayerNorm(width)
        self.project = torch.nn.Linear(width, output_width)
        self.logit_scale = torch.nn.Parameter(torch.tensor(1 / 0.07).log())

    def tokenize(self, texts):
        """(N, length) int64 word numbers of N texts, 0 behind their ends; what is longer is cut."""
        rows = torch.zeros(len(texts), self.length, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            numbers = []
            for word in split_words(text):
                spelled = [word] if word in self.number else [letter for letter in word if letter in LETTERS]
                numbers += [self.number[piece] for piece in spelled]
            row[:len(numbers)] = torch.tensor(numbers[:self.length])
        return rows

    def encode_text(self, tokens):
        """(N, length) word numbers -> (N, output_width)."""
        tokens = tokens[:, :max(1, int((tokens > 0).sum(1).max()))]                # as long as the longest
        there = tokens > 0                                                         # (N, L)
        embedded = self.embed(tokens) + self.positions[:tokens.shape[1]]
        read = self.norm(self.blocks(embedded, src_key_padding_mask=~there))       # (N, L, width)
        return self.project((read * there[..., None]).sum(1) / there.sum(1, keepdim=True).clamp_min(1))


def split_words(text):
    return re.findall(r"\w+", text.lower())


def words_of(phrases, templates):
    """The words that occur in phrases and templates, sorted."""
    words = set()
    for text in [*phrases, *(template.format("") for template in templates)]:
        words.update(split_words(text))
    return sorted(words)


def save_small_tower(folder, tower, theta_pre):
    """Write a small text tower beside its encoder, whose SHA-256 is theta_pre."""
    save_tensors(folder / TOWER_FILE, tower.state_dict(), theta_pre=theta_pre, words=tower.words,
                 shape=tower.shape)


def load_small_tower(folder, encoder):
    """The small text tower of an encoder; Refused if it is missing or another encoder's."""
    made_by = f"python pretrain_contrastive.py {encoder.name}"
    weights, about = load_tensors(folder / TOWER_FILE, made_by, theta_pre=encoder.fingerprint)
    tower = SmallTextTower(about["words"], **about["shape"])
    tower.load_state_dict(weights)
    return tower.eval()
