"""
Speed of the evaluator against the bare forward pass and against the plain way, and the memory of a lambda search.

    python bench.py                                              # ViT-Ti/16 at 128 pixels, a few minutes on two CPU cores
    python bench.py timm:vit_base_patch16_224 --image-size 224 --images 2000        # for a data-centre GPU

Weights and images are random: nothing here depends on their values. Compiling and warm-up are timed apart.
Writes  bench.json
"""
import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import common
import encoders
import files


def parse_args(argv=None):
    parser = files.flag_parser(__doc__)
    add = parser.add_argument
    add("encoder", nargs="?", default="timm:vit_tiny_patch16_224", help="timm:NAME (default timm:vit_tiny_patch16_224)")
    add("--image-size", type=common.positive, default=128, help="pixels (default 128)")
    add("--images", type=common.positive, default=60, help="validation images per task (default 60)")
    add("--n-tasks", type=common.positive, default=8, help="tasks in the search (default 8)")
    add("--lambdas", type=common.positive, default=20, help="weight settings in the search (default 20; lambda 0 is cached)")
    add("--repeats", type=common.positive, default=3, help="runs of each measurement (default 3)")
    add("--device", default="auto", help="cpu, cuda or auto")
    add("--dtype", choices=["auto", "bf16", "fp32"], default="auto")
    add("--compile", choices=["on", "off"], default="on")
    add("--out", type=Path, default=Path("bench.json"), help="result file (default bench.json)")
    add("--peak-of", type=int, help=argparse.SUPPRESS)  # internal: print the peak memory of a search over this many tasks
    return parser.parse_args(argv)


def main(args):
    encoder = random_encoder(args)
    if args.peak_of:
        print(peak_memory(args, encoder))
        return
    device = common.pick_device(args.device)
    n = args.n_tasks * args.images

    # ------------------------------------------------------------------ the evaluator, over a whole lambda search
    evaluator, splits, heads, settings = search(args, encoder, args.n_tasks)
    compile_seconds = timed(lambda: evaluator.hits(splits[:1], heads[:1], settings[:1]), device)
    lambda_seconds = [timed(lambda: evaluator.write(settings[0]), device) for _ in range(10 * args.repeats)]

    # ------------------------------------------------------------------ the same encoder, dtype, batch and number of images, nothing else
    module = encoder.module.to(device, evaluator.dtype)
    bare = torch.compile(module, dynamic=False) if evaluator.forward is not evaluator.eager else module
    pixels = torch.randn(evaluator.batch_size, 3, encoder.size, encoder.size, device=device, dtype=evaluator.dtype)
    batches = -(-n * len(settings) // evaluator.batch_size)

    @torch.inference_mode()
    def forward():
        for _ in range(batches):
            bare(pixels)

    with torch.inference_mode():
        bare(pixels)
    ours, bare_seconds = [], []
    for _ in range(args.repeats):                                          # in turn, since machines drift
        ours.append(timed(lambda: evaluator.hits(splits, heads, settings), device))
        bare_seconds.append(timed(forward, device))

    # ------------------------------------------------------------------ the plain way: fp32, eager, files and pictures read again for each lambda
    with tempfile.TemporaryDirectory() as folder:
        prepare_plain(Path(folder), encoder, splits)
        plain = [timed(lambda: plain_way(Path(folder), encoder, heads, device), device) for _ in range(args.repeats)]

    # ------------------------------------------------------------------ peak memory of the search, in processes of their own
    peaks = {}
    for tasks in (2, 8):
        words = [sys.executable, __file__, args.encoder, "--image-size", args.image_size, "--images", 32, "--lambdas", 2, "--compile", "off",
                 "--device", args.device, "--dtype", args.dtype, "--peak-of", tasks]
        peaks[tasks] = int(subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True).stdout.split()[-1])
    encoder_bytes = sum(tensor.numel() * 4 for tensor in evaluator.theta_pre.values())

    # ------------------------------------------------------------------ results
    flops = common.forward_flops(random_encoder(args))
    rows = {"evaluator": [n * len(settings) / seconds for seconds in ours], "bare forward": [batches * evaluator.batch_size / s for s in bare_seconds],
            "plain way": [n / seconds for seconds in plain]}
    result = {"config": {key: str(value) for key, value in vars(args).items()}, **files.provenance(device), "dtype": str(evaluator.dtype)[6:],
              "batch_size": evaluator.batch_size, "compile_seconds": compile_seconds, "images_per_second": rows, "flops_per_image": flops,
              "seconds_per_lambda": float(np.median(lambda_seconds)), "peak_bytes_by_tasks": peaks, "encoder_bytes": encoder_bytes}
    files.write_json(args.out, result)
    median = {name: float(np.median(values)) for name, values in rows.items()}
    print(f"{args.encoder}, {encoder.size} pixels, {result['dtype']}, batch {evaluator.batch_size}, {result['machine']['device']}, torch {torch.__version__}")
    print("| | img/s, median of", args.repeats, "(range) | GFLOP/s | evaluator against it, pair by pair |\n|---|---|---|---|")
    for name, values in rows.items():
        pairs = [a / b for a, b in zip(rows["evaluator"], values)]
        against = f"{np.median(pairs):.2f} x ({min(pairs):.2f}-{max(pairs):.2f})" if name != "evaluator" else ""
        print(f"| {name} | {median[name]:.0f} ({min(values):.0f}-{max(values):.0f}) | {median[name] * flops / 1e9:.0f} | {against} |")
    print(f"compile and first batch {compile_seconds:.1f} s; writing one merge {1000 * result['seconds_per_lambda']:.1f} ms; "
          f"peak memory with 2 and 8 tasks {peaks[2] / 2**20:.0f} and {peaks[8] / 2**20:.0f} MiB (encoder in fp32: {encoder_bytes / 2**20:.0f} MiB)")


def random_encoder(args):
    """The architecture with random weights as an Encoder."""
    if not args.encoder.startswith("timm:"):
        raise files.Refused(f"bench needs timm:NAME, not {args.encoder}")
    torch.manual_seed(0)
    architecture = {"library": "timm", "name": args.encoder.removeprefix("timm:"), "kwargs": {"img_size": args.image_size, "num_classes": 0}}
    return encoders.Encoder(args.encoder, encoders.build_architecture(architecture).eval(), args.image_size, (0.5,) * 3, (0.5,) * 3, 1.0, "random")


def search(args, encoder, n_tasks):
    """(evaluator with one summed vector, splits, heads, settings) of a lambda search on random images."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    splits = [common.Split(rng.integers(0, 256, (args.images, 3, encoder.size, encoder.size), dtype=np.uint8), np.arange(args.images),
                           rng.integers(0, 10, args.images)) for _ in range(n_tasks)]
    evaluator = common.Evaluator(encoder, args, 0)
    heads = [{name: tensor.to(evaluator.device) for name, tensor in common.random_head(encoder.module.num_features, 10, generator).items()} for _ in splits]
    evaluator.use_vectors([{name: 1e-3 * torch.randn(tensor.shape, generator=generator) for name, tensor in evaluator.theta_pre.items()}])
    return evaluator, splits, heads, [(lam,) for lam in np.linspace(0, 1, args.lambdas + 1)[1:]]


def timed(function, device):
    """Seconds of one call, the device's queue empty before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def prepare_plain(folder, encoder, splits):
    """JPEG files, a checkpoint and a vector on disk, as the usual scripts find them."""
    from PIL import Image
    for t, split in enumerate(splits):
        for index, image in enumerate(split.images):
            (folder / str(t)).mkdir(exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(folder / str(t) / f"{split.labels[index]}_{index}.jpg", quality=90)
    theta = {name: tensor.float().cpu() for name, tensor in encoder.module.state_dict().items()}
    save_file(theta, folder / "pretrained.safetensors")
    save_file({name: 1e-3 * torch.randn_like(tensor) for name, tensor in theta.items()}, folder / "vector.safetensors")


class Pictures(torch.utils.data.Dataset):
    """(path, label) rows, each picture decoded and transformed when it is asked for."""

    def __init__(self, rows, transform):
        self.rows, self.transform = rows, transform

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        from PIL import Image
        path, label = self.rows[index]
        return self.transform(Image.open(path).convert("RGB")), label


def plain_way(folder, encoder, heads, device):
    """One lambda as public scripts evaluate it: load_state_dict, a DataLoader that decodes every picture, fp32, eager."""
    from torchvision.transforms import v2
    transform = v2.Compose([v2.Resize(encoder.size, v2.InterpolationMode.BICUBIC), v2.CenterCrop(encoder.size), v2.ToImage(),
                            v2.ToDtype(torch.float32, scale=True), v2.Normalize(encoder.mean, encoder.std)])
    pre, vector = load_file(folder / "pretrained.safetensors"), load_file(folder / "vector.safetensors")
    encoder.module.float().load_state_dict({name: pre[name] + 0.3 * vector[name] for name in pre})
    module, hits = encoder.module.to(device), 0
    for t, head in enumerate(heads):
        paths = sorted((folder / str(t)).glob("*.jpg"))
        rows = [(path, int(path.name.split("_")[0])) for path in paths]
        loader = torch.utils.data.DataLoader(Pictures(rows, transform), batch_size=128, num_workers=2)
        with torch.no_grad():
            for images, labels in loader:
                logits = F.linear(module(images.to(device)), head["weight"], head["bias"])
                hits += (logits.argmax(1) == labels.to(device)).sum().item()
    return hits


def peak_memory(args, encoder):
    """Peak bytes of a search whose vectors are read from disk; on a GPU of its allocator, on a CPU of the whole process."""
    theta = encoders.weights_of(encoder.module)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        names = [f"task{t}" for t in range(args.peak_of)]
        head = common.random_head(encoder.module.num_features, 10, torch.Generator().manual_seed(0))
        for name in names:
            files.save_tensors(folder / "heads" / f"{name}.safetensors", head, theta_pre=encoder.theta_pre)
            files.save_tensors(folder / "aligned" / "vectors" / f"{name}.safetensors", {key: tensor * 1e-3 for key, tensor in theta.items()},
                               theta_pre=encoder.theta_pre, recipe="aligned", head=files.fingerprint(head))
        evaluator, splits, heads, settings = search(args, encoder, 1)
        total, _ = common.sum_of_vectors(folder, "aligned", names, encoder)
        evaluator.use_vectors([total])
        evaluator.hits(splits, heads, settings)
        if evaluator.device.type == "cuda":
            return torch.cuda.max_memory_allocated(evaluator.device)
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    files.run(main, parse_args)
