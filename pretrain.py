"""
Train a small encoder from scratch: `tiny`, the offline stand-in for a real checkpoint.

    python pretrain.py tiny                                      # a ViT of 0.8 M parameters, 32 x 32 generated images

The pictures (tiny.py) share neither classes nor drawing style with the eight downstream tasks. Any other checkpoint of your
own needs no stage: give it to probe.py with --weights.

Writes  runs/tiny/pretrained.safetensors, pretrain.json
"""
import time

import torch
import torch.nn.functional as F

import common
import encoders
import files
import tiny


def parse_args(argv=None):
    parser = common.stage_parser(__doc__)
    parser.add_argument("--pretrain-steps", type=common.positive, default=1500, help="optimizer steps (default 1500)")
    parser.add_argument("--batch-size", type=common.positive, default=32, help="images per step (default 32)")
    parser.add_argument("--lr", type=common.positive_float, default=1e-3, help="peak learning rate (default 1e-3)")
    return parser.parse_args(argv)


def main(args):
    # ------------------------------------------------------------------ what is to be done
    if args.encoder != "tiny":
        raise files.Refused(f"only tiny is trained from scratch; {args.encoder} comes from the hub or from --weights FILE")
    folder, device = encoders.run_folder(args), common.pick_device(args.device)
    config = {"encoder": args.encoder, "architecture": encoders.TINY, "steps": args.pretrain_steps, "batch_size": args.batch_size,
              "lr": args.lr, "seed": args.seed}
    result = files.open_result(folder / "pretrain.json", config, args.overwrite, device)
    if "accuracy" in result and (folder / "pretrained.safetensors").exists():
        print(f"pretrain: {folder / 'pretrained.safetensors'} is there, nothing to do (--overwrite to redo)")
        return
    if args.image_size not in (None, encoders.TINY["kwargs"]["img_size"]) or args.weights:
        raise files.Refused("tiny has 32-pixel images and makes its own weights: leave out --image-size and --weights")

    # ------------------------------------------------------------------ images, module, head
    start = time.perf_counter()
    images, labels = (torch.from_numpy(array).to(device) for array in tiny.draw_pretraining(args.seed))
    drawing_seconds = time.perf_counter() - start
    torch.manual_seed(args.seed)                                           # timm initialises from the global generator
    module = encoders.build_architecture(encoders.TINY).to(device).train()
    with torch.no_grad():
        module.pos_embed.mul_(15)                                          # std .02 to .3: a short training never finds it otherwise
    generator = torch.Generator(device).manual_seed(args.seed)
    held_out = len(labels) // 20
    order = torch.randperm(len(labels), device=device, generator=generator)
    train_rows, test_rows = order[held_out:], order[:held_out]
    head = common.random_head(module.num_features, int(labels.max()) + 1, generator)
    encoder = encoders.Encoder("tiny", module, images.shape[-1], (0.5,) * 3, (0.25,) * 3, 1.0, "")
    normalise = common.normaliser(encoder, device)
    parameters = [*module.parameters(), *(tensor.requires_grad_() for tensor in head.values())]

    # ------------------------------------------------------------------ AdamW, warm-up, cosine to 0
    start = time.perf_counter()
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=0.05, fused=True)
    bar = common.progress(common.batches(len(train_rows), args.batch_size, args.pretrain_steps, generator), "pretrain", "step")
    for step, rows in enumerate(bar):
        optimizer.param_groups[0]["lr"] = common.learning_rate(step, args.pretrain_steps, args.lr)
        rows = train_rows[rows]
        features = module(normalise(images[rows]))                         # (B, D)
        loss = F.cross_entropy(F.linear(features, head["weight"], head["bias"]), labels[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    seconds = time.perf_counter() - start

    # ------------------------------------------------------------------ results
    module.eval()
    with torch.no_grad():
        features = torch.cat([module(normalise(images[rows])) for rows in test_rows.split(256)])
    hits = int((common.predict(features, head) == labels[test_rows]).sum())
    about = {"encoder": "tiny", "architecture": encoders.TINY, "size": encoder.size, "mean": encoder.mean, "std": encoder.std, "crop_pct": 1.0}
    encoders.save_encoder(folder / "pretrained.safetensors", module, about)
    result |= {"accuracy": hits / held_out, "hits": hits, "n": held_out, "classes": len(head["bias"]), "drawing_seconds": drawing_seconds,
               "seconds": seconds, "images_per_second": args.pretrain_steps * args.batch_size / seconds,
               "parameters": sum(parameter.numel() for parameter in module.parameters())}
    files.write_json(folder / "pretrain.json", result)
    print(f"pretrain: {result['parameters']} parameters, held-out accuracy {result['accuracy']:.4f} (n = {held_out}, {result['classes']} classes), "
          f"{seconds:.0f} s, {result['images_per_second']:.0f} img/s")


if __name__ == "__main__":
    files.run(main, parse_args)
