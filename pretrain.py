"""
Train a small encoder from scratch: `tiny`, the offline stand-in for a real checkpoint.

    python pretrain.py tiny                      # a ViT of 0.8 M parameters, 32 x 32 generated images
    python pretrain.py tiny-short --pretrain-steps 300     # another, by this name an encoder of all stages
    python pretrain.py slow --checkpoints 0,25,100,400,1500    # also runs/slow-step0, slow-step25, ...
    python pretrain.py own --tasks pets=FOLDER             # on your own pictures, {train,test}/CLASS/*.jpg
    python pretrain.py noisy --label-noise 0.5             # half of the labels mean nothing: a control

The pictures (lib/generated.py) share neither classes nor drawing style with the eight downstream tasks. This
is the supervised scheme; pretrain_mae.py, pretrain_dino.py and pretrain_contrastive.py train the same encoder
on the same pictures, each another way. Any other checkpoint of your own needs no stage: give it to probe.py
with --weights.

Writes  runs/ENCODER/pretrained.safetensors with its description: scheme, step, images seen, and the tasks and
        settings that later stages take from it as defaults; pretrain.json; for every step of --checkpoints
        runs/ENCODER-stepSTEP/pretrained.safetensors, an encoder like any other; while it trains state/, from
        which the same command continues after a kill, bit for bit on a CPU
"""
import time

import torch
import torch.nn.functional as F

from common import Head, head_tensors, predict, random_head
from lib import encoders, flags, pretraining
from lib.study import run
from lib.training import batches, learning_rate

WEIGHT_DECAY, CLIP_NORM = 0.05, 1.0
ARCHITECTURE = {"library": "timm", "name": "vit_tiny_patch16_224",
                "kwargs": {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4,
                           "class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0}}
SETTINGS = {  # of later stages, sized for two CPU cores
    "finetune": {"steps": 120, "batch_size": 64, "lr": {"aligned": 1e-3}},    # other recipes search theirs
    "disentangle": {"points": 13, "samples": 128},
    "subsets": {"images_per_task": 60},
}


def parse_args(argv=None):
    parser = pretraining.pretraining_parser(__doc__)
    parser.add_argument("--label-noise", type=flags.share, default=0.0, metavar="SHARE",
                        help="share of the pictures, from 0 to 1, that have their labels dealt out again "
                             "among themselves: a control (default 0)")
    return parser.parse_args(argv)


def permuted(labels, share, generator):
    """Labels (N,) of which a random share has changed places."""
    chosen = torch.randperm(len(labels), device=labels.device, generator=generator)
    chosen = chosen[:round(share * len(labels))]
    order = torch.randperm(len(chosen), device=labels.device, generator=generator)
    labels = labels.clone()
    labels[chosen] = labels[chosen[order]]
    return labels


def main(args):
    # ---------------------------------------------------- open
    architecture = pretraining.sized(ARCHITECTURE, args.large)
    noise = {"label_noise": args.label_noise} if args.label_noise else {}
    result, device = pretraining.open_result(args, __file__, architecture, **noise)
    if result is None:
        return

    # ---------------------------------------------------- module, images, head
    torch.manual_seed(args.seed)                           # timm initialises from the global generator
    module = encoders.build_architecture(architecture).to(device).train()
    with torch.no_grad():
        module.pos_embed.mul_(15)            # std .02 to .3: a short training never finds it otherwise
    description = pretraining.describe(args, module, architecture, SETTINGS, "supervised") | noise
    encoder = encoders.as_encoder(lambda: module, description)
    start = time.perf_counter()
    pictures = pretraining.open_pictures(args, encoder, device, need_labels=True)
    images, labels = pictures.images, pictures.labels
    drawing_seconds = time.perf_counter() - start
    generator = torch.Generator(device).manual_seed(args.seed)
    if args.label_noise:
        labels = permuted(labels, args.label_noise, generator)
    train, test = pretraining.hold_out(len(images), device, generator)
    drawn = random_head(encoder.width, int(labels.max()) + 1, generator)
    trained_head = torch.nn.ParameterDict(head_tensors(drawn))
    head = Head(trained_head["weight"], trained_head["bias"], normalise=False)

    # ---------------------------------------------------- AdamW, warm-up, cosine to 0
    parameters = [*module.parameters(), head.weight, head.bias]
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=WEIGHT_DECAY, fused=True)
    order = batches(len(train), args.batch_size, args.pretrain_steps, generator)
    parts = {"module": module, "head": trained_head, "optimizer": optimizer}
    training = pretraining.Training(args, result, pictures, encoder, generator, parts)
    for step, batch in training.steps(order):
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.pretrain_steps, args.lr)
        rows = train[batch]
        features = module(encoder.prepare(images[rows]))   # (B, D)
        loss = F.cross_entropy(F.linear(features, head.weight, head.bias), labels[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        training.after(step, loss)

    # ---------------------------------------------------- save, say
    module.eval()
    with torch.no_grad():
        features = torch.cat([module(encoder.prepare(images[rows])) for rows in test.split(256)])
    hits, count = int((predict(features, head) == labels[test]).sum()), len(test)
    said = training.finish({"accuracy": hits / count, "hits": hits, "n": count, "classes": len(head.bias),
                            "drawing_seconds": drawing_seconds})
    print(f"pretrain: held-out accuracy {hits / count:.4f} (n = {count}, {len(head.bias)} classes), {said}")


if __name__ == "__main__":
    run(main, parse_args)
