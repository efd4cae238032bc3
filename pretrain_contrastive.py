"""
Pre-train the small encoder on pictures and captions, as CLIP is: which of a batch's captions is a picture's?

    python pretrain_contrastive.py tiny-clip                       # two minutes on one core
    python pretrain_contrastive.py slow-clip --checkpoints 0,25,100,400,1500   # also runs/slow-clip-step0 ...
    python pretrain_contrastive.py own-clip --tasks pets=FOLDER    # your own pictures, classes as captions

A small text tower (lib/text_heads.py) reads captions made of what was drawn (lib/captions.py); pictures of
equal captions, as of one class, count as each other's. The tower is kept beside the encoder: finetune.py
--recipe zeroshot takes its heads from it. The captions use none of the eight tasks' class words, so there
zero-shot is at chance. Architecture, pictures and number of images seen are those of pretrain.py.

Writes  runs/ENCODER/pretrained.safetensors, pretrain.json and the rest as pretrain.py does; beside every
        encoder text_tower.safetensors
Source  arXiv:2103.00020; arXiv:2204.03610 for captions that occur more than once
"""
import numpy as np
import torch
import torch.nn.functional as F

from lib import encoders, pretraining, text_heads
from lib.captions import TEMPLATES
from lib.study import run
from lib.training import batches, learning_rate
from pretrain import ARCHITECTURE, CLIP_NORM, SETTINGS, WEIGHT_DECAY

TOWER = {"width": 128, "depth": 2, "heads": 4}
LARGEST_SCALE = 100.0                                      # of the cosines, exp(logit_scale)
AMONG = 100                                                # captions that a held-out picture chooses from


def parse_args(argv=None):
    return pretraining.pretraining_parser(__doc__).parse_args(argv)


def contrastive_loss(images, texts, scale, same):
    """Mean of two cross entropies: each picture's among the captions, each caption's among the pictures.

    images, texts   (B, D) features          same   (B, B) bool, symmetric: whose captions are equal
    """
    logits = scale * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T      # (B, B)
    target = same / same.sum(1, keepdim=True)              # equal captions share, others have one picture
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def retrieved(images, texts):
    """How many pictures of (N, D) features have their own caption (N, D) nearest, among AMONG at a time."""
    hits = 0
    for own_images, own_texts in zip(images.split(AMONG), texts.split(AMONG), strict=True):
        nearest = (own_images @ F.normalize(own_texts, dim=1).T).argmax(1)
        hits += int((nearest == torch.arange(len(nearest), device=nearest.device)).sum())
    return hits


def main(args):
    # ---------------------------------------------------- open
    architecture = pretraining.sized(ARCHITECTURE, args.large)
    tower_name = text_heads.TOWER_FILE
    result, device = pretraining.open_result(args, __file__, architecture, [tower_name], tower=TOWER)
    if result is None:
        return

    # ---------------------------------------------------- module, images and captions, text tower
    torch.manual_seed(args.seed)                           # as in pretrain.py: the same random initialisation
    module = encoders.build_architecture(architecture).to(device).train()
    with torch.no_grad():
        module.pos_embed.mul_(15)
    description = pretraining.describe(args, module, architecture, SETTINGS, "contrastive")
    description["text_tower"] = tower_name
    encoder = encoders.as_encoder(lambda: module, description)
    pictures = pretraining.open_pictures(args, encoder, device, need_labels=True)
    phrases, phrase_of = np.unique(pictures.captions, return_inverse=True)
    phrase_of = torch.from_numpy(phrase_of).to(device)     # (N,) which phrase is a picture's
    tower = text_heads.SmallTextTower(text_heads.words_of(phrases, TEMPLATES), encoder.width, **TOWER)
    tower = tower.to(device)
    tokens = []
    for template in TEMPLATES:
        tokens.append(tower.tokenize([template.format(phrase) for phrase in phrases]))
    tokens = torch.stack(tokens).to(device)                # (templates, phrases, L)
    generator = torch.Generator(device).manual_seed(args.seed)
    train, test = pretraining.hold_out(len(phrase_of), device, generator)

    def save_tower(folder, theta_pre):
        text_heads.save_small_tower(folder, tower, theta_pre)

    # ---------------------------------------------------- AdamW, warm-up, cosine to 0
    parameters = [*module.parameters(), *tower.parameters()]
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=WEIGHT_DECAY, fused=True)
    order = batches(len(train), args.batch_size, args.pretrain_steps, generator)
    parts = {"module": module, "tower": tower, "optimizer": optimizer}
    training = pretraining.Training(args, result, pictures, encoder, generator, parts, save_tower)
    for step, batch in training.steps(order):
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.pretrain_steps, args.lr)
        rows = train[batch]
        template = torch.randint(len(TEMPLATES), rows.shape, device=device, generator=generator)
        features = module(encoder.augment(pictures.images[rows], generator))       # (B, D)
        texts = tower.encode_text(tokens[template, phrase_of[rows]])
        same = phrase_of[rows] == phrase_of[rows][:, None]
        loss = contrastive_loss(features, texts, tower.logit_scale.exp(), same)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            tower.logit_scale.clamp_(max=np.log(LARGEST_SCALE))
        training.after(step, loss, scale=tower.logit_scale.exp())

    # ---------------------------------------------------- save, say
    with torch.no_grad():
        features = torch.cat([module(encoder.prepare(pictures.images[rows])) for rows in test.split(AMONG)])
        texts = torch.cat([tower.encode_text(tokens[0, phrase_of[rows]]) for rows in test.split(AMONG)])
    hits, n = retrieved(features, texts), len(test)
    said = training.finish({"retrieval": hits / n, "hits": hits, "n": n, "among": AMONG,
                            "words": len(tower.words)})
    print(f"pretrain_contrastive: of {AMONG} captions a held-out picture's own is the nearest in "
          f"{hits / n:.4f} (n = {n}), {said}")


if __name__ == "__main__":
    run(main, parse_args)
