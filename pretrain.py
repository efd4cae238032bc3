"""
Train a small encoder from scratch: `tiny`, the offline stand-in for a real checkpoint.

    python pretrain.py tiny                      # a ViT of 0.8 M parameters, 32 x 32 generated images
    python pretrain.py tiny-short --pretrain-steps 300     # another, by this name an encoder of all stages

The pictures (lib/generated.py) share neither classes nor drawing style with the eight downstream tasks. Any
other checkpoint of your own needs no stage: give it to probe.py with --weights.

Writes  runs/ENCODER/pretrained.safetensors with its description: the tasks and the settings that later stages
        take from it as defaults; pretrain.json
"""
import re
import time

import torch
import torch.nn.functional as F

from common import predict, random_head
from lib import encoders, flags, generated
from lib.devices import pick_device
from lib.files import Refused
from lib.progress import progress
from lib.results import Result
from lib.study import run
from lib.training import batches, learning_rate

WEIGHT_DECAY, CLIP_NORM = 0.05, 1.0
ARCHITECTURE = {"library": "timm", "name": "vit_tiny_patch16_224",
                "kwargs": {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4,
                           "num_classes": 0}}
SETTINGS = {  # of later stages, sized for two CPU cores
    "finetune": {"steps": 120, "batch_size": 64, "lr": {"aligned": 5e-4}},    # other recipes search theirs
    "disentangle": {"points": 13, "samples": 128},
    "subsets": {"images_per_task": 60},
}


def parse_args(argv=None):
    parser = flags.stage_parser(__doc__)
    add = parser.add_argument
    add("--pretrain-steps", type=flags.positive, default=1500, help="optimizer steps (default 1500)")
    add("--batch-size", type=flags.positive, default=32, help="images per step (default 32)")
    add("--lr", type=flags.positive_float, default=1e-3, help="peak learning rate (default 1e-3)")
    return parser.parse_args(argv)


def main(args):
    # ---------------------------------------------------- open
    folder, device = args.runs / args.encoder, pick_device(args.device)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", args.encoder) or encoders.ENCODERS.get(args.encoder):
        raise Refused(f"{args.encoder} comes from the hub or from --weights FILE: "
                      f"only tiny, or an encoder of a new name, is trained here")
    if args.image_size not in (None, generated.SIDE) or args.weights:
        raise Refused("tiny has 32-pixel images and makes its own weights: "
                      "leave out --image-size and --weights")
    config = {"encoder": args.encoder, "architecture": ARCHITECTURE, "steps": args.pretrain_steps,
              "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed}
    result = Result(folder / "pretrain.json", config, {}, __file__, device, args.overwrite, protected=True,
                    weights=lambda row: [folder / "pretrained.safetensors"])
    if not result.todo:
        return

    # ---------------------------------------------------- images, module, head
    start = time.perf_counter()
    images, labels = (torch.from_numpy(array).to(device) for array in generated.draw_pretraining(args.seed))
    drawing_seconds = time.perf_counter() - start
    torch.manual_seed(args.seed)                           # timm initialises from the global generator
    module = encoders.build_architecture(ARCHITECTURE).to(device).train()
    with torch.no_grad():
        module.pos_embed.mul_(15)            # std .02 to .3: a short training never finds it otherwise
    description = encoders.describe(module, ARCHITECTURE, generated.SIDE, (0.5,) * 3, (0.25,) * 3, 1.0,
                                    encoder=args.encoder, tasks=list(generated.TASKS), defaults=SETTINGS)
    encoder = encoders.as_encoder(module, description)
    generator = torch.Generator(device).manual_seed(args.seed)
    held_out = len(labels) // 20
    order = torch.randperm(len(labels), device=device, generator=generator)
    train, test = order[held_out:], order[:held_out]
    head = random_head(encoder.width, int(labels.max()) + 1, generator)
    parameters = [*module.parameters(), head.weight.requires_grad_(), head.bias.requires_grad_()]

    # ---------------------------------------------------- AdamW, warm-up, cosine to 0
    start = time.perf_counter()
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=WEIGHT_DECAY, fused=True)
    bar = progress(batches(len(train), args.batch_size, args.pretrain_steps, generator), "pretrain", "step")
    for step, batch in enumerate(bar):
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.pretrain_steps, args.lr)
        rows = train[batch]
        features = module(encoder.prepare(images[rows]))   # (B, D)
        loss = F.cross_entropy(F.linear(features, head.weight, head.bias), labels[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    seconds = time.perf_counter() - start

    # ---------------------------------------------------- save, say
    module.eval()
    with torch.no_grad():
        features = torch.cat([module(encoder.prepare(images[rows])) for rows in test.split(256)])
    hits = int((predict(features, head) == labels[test]).sum())
    count = sum(parameter.numel() for parameter in module.parameters())
    with result.saving():
        encoders.save_encoder(folder / "pretrained.safetensors", module, description)
        result.values |= {"accuracy": hits / held_out, "hits": hits, "n": held_out, "classes": len(head.bias),
                          "parameters": count, "drawing_seconds": drawing_seconds, "seconds": seconds,
                          "images_per_second": args.pretrain_steps * args.batch_size / seconds}
    values = result.values
    print(f"pretrain: {count} parameters, held-out accuracy {values['accuracy']:.4f} (n = {held_out}, "
          f"{values['classes']} classes), {seconds:.0f} s, {values['images_per_second']:.0f} img/s")


if __name__ == "__main__":
    run(main, parse_args)
