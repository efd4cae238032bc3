"""
What the hardware can do, and what the evaluator, a fine-tuning step, a merge and a heat map make of it.

    python bench.py                                              # ViT-Ti/16 at 128 pixels, about ten minutes on two CPU cores
    python bench.py --quick                                      # the same parts in a minute or two, noisier
    python bench.py timm:vit_base_patch16_224 --image-size 224 --images 2000 --train-batch 128     # for a data-centre GPU
    python bench.py --study runs/vit_b16_dino                    # also the seconds of each stage of a finished study

Weights and images are random: nothing here depends on their values. Compiling and warm-up are timed apart; every figure is a median
of --repeats with its range, the parts that are compared measured in turn, since machines drift.
Writes  bench.json
"""
import argparse
import copy
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
import disentangle
import encoders
import files
import finetune
import linearized

TRAINED = ["aligned", "attention", "linearized"]  # the recipes whose training is timed


def parse_args(argv=None):
    parser = files.flag_parser(__doc__)
    add = parser.add_argument
    add("encoder", nargs="?", default="timm:vit_tiny_patch16_224", help="timm:NAME (default timm:vit_tiny_patch16_224)")
    add("--image-size", type=common.positive, default=128, help="pixels (default 128)")
    add("--images", type=common.positive, default=200, help="validation images per task (default 200)")
    add("--n-tasks", type=common.positive, default=8, help="tasks in the search (default 8)")
    add("--lambdas", type=common.positive, default=10, help="weight settings in the search (default 10)")
    add("--train-batch", type=common.positive, default=32, help="images per fine-tuning step (default 32)")
    add("--repeats", type=common.positive, default=3, help="runs of each measurement (default 3)")
    add("--device", default="auto", help="cpu, cuda or auto")
    add("--dtype", choices=["auto", "bf16", "fp32"], default="auto")
    add("--compile", choices=["on", "off"], default="on")
    add("--quick", action="store_true", help="fewer images, lambdas and steps")
    add("--study", type=Path, help="folder of a finished study, runs/ENCODER: adds the seconds of its stages")
    add("--out", type=Path, default=Path("bench.json"), help="result file (default bench.json)")
    add("--part", help=argparse.SUPPRESS)  # internal: measure one part's peak memory in a process of its own
    return parser.parse_args(argv)


def main(args):
    if args.quick:
        args.images, args.lambdas, args.repeats = min(args.images, 16), min(args.lambdas, 3), min(args.repeats, 2)
    encoder, device = random_encoder(args), common.pick_device(args.device)
    if args.part:
        print(peak_memory(args, encoder, device))
        return
    flops, n, steps = common.forward_flops(encoder), args.n_tasks * args.images, 4 if args.quick else 10

    # ------------------------------------------------------------------ (a) the ceiling: matrix products and copies
    evaluator, splits, heads, settings = search(args, encoder, args.n_tasks)
    peak_flops, peak_copy = ceiling(args, device, evaluator.dtype)

    # ------------------------------------------------------------------ (b) the evaluator in a lambda search, the bare forward pass, the plain way
    compile_seconds = timed(lambda: evaluator.hits(splits[:1], heads[:1], settings[:1]), device)
    forward, batches = bare_forward(encoder, evaluator, n * len(settings))
    with tempfile.TemporaryDirectory() as folder:
        prepare_plain(Path(folder), encoder, splits)
        ways = {"evaluator": (lambda: evaluator.hits(splits, heads, settings), n * len(settings)), "bare forward": (forward, batches * evaluator.batch_size),
                "plain way": (lambda: plain_way(Path(folder), encoder, heads, device), n)}
        rates = {name: [] for name in ways}
        for _ in range(args.repeats):
            for name, (way, images) in ways.items():
                rates[name].append(images / timed(way, device))

    # ------------------------------------------------------------------ (c) fine-tuning, (d) merging, (e) a heat map
    train, steps_per_second = {recipe: training(args, encoder, device, recipe) for recipe in TRAINED}, {recipe: [] for recipe in TRAINED}
    for _ in range(args.repeats):
        for recipe in TRAINED:
            steps_per_second[recipe].append(train[recipe](steps)["images_per_second"] / args.train_batch)
    merging = {}
    for vectors in (1, 8):
        evaluator.use_vectors(evaluator.vectors[:1] * vectors)
        merging[vectors] = repeat(args, lambda: evaluator.write((0.1,) * vectors), device)
    evaluator.use_vectors(evaluator.vectors[:2])
    lambdas = np.linspace(-1, 1, 3 if args.quick else 5)
    cells = len(lambdas) ** 2 * 2 * args.images                            # images evaluated for the grid
    grid = [cells / seconds for seconds in repeat(args, lambda: list(disentangle.error_rows(evaluator, splits[:2], heads[:2], lambdas, ["prediction"])), device)]

    # ------------------------------------------------------------------ (f) the search of a linearized encoder: one pass, or a pass for each lambda
    linear = linearized.evaluator(encoder, argparse.Namespace(**vars(args) | {"recipe": "linearized"}), 0)
    linear_rates = {len(settings): [], 1: []}
    for _ in range(args.repeats):
        for k in linear_rates:
            linear.use_vectors(evaluator.vectors[:1])                      # forgets what it has computed
            linear_rates[k].append(k * n / timed(lambda: linear.hits(splits, heads, settings[:k]), device))

    # ------------------------------------------------------------------ peak memory, in processes of their own
    peaks = {part: own_process(args, part) for part in ("search over 2 tasks", "search over 8 tasks", *(f"fine-tuning {recipe}" for recipe in TRAINED))}
    encoder_bytes = sum(tensor.numel() * 4 for tensor in evaluator.theta_pre.values())

    # ------------------------------------------------------------------ results
    result = {"config": {key: str(value) for key, value in vars(args).items()}, **files.provenance(device), "dtype": str(evaluator.dtype)[6:],
              "batch_size": evaluator.batch_size, "flops_per_image": flops, "matmul_flops_per_second": peak_flops, "copy_bytes_per_second": peak_copy,
              "compile_seconds": compile_seconds, "images_per_second": rates, "train_steps_per_second": steps_per_second,
              "seconds_per_merge": merging, "heat_map_images_per_second": grid, "linearized_images_per_second": linear_rates, "peak_bytes": peaks, "encoder_bytes": encoder_bytes}
    if args.study:
        result["study_seconds"] = study_seconds(args.study)
    files.write_json(args.out, result)
    top = float(np.median(peak_flops))
    print(f"{args.encoder}, {encoder.size} pixels, {result['dtype']}, batch {evaluator.batch_size}, {result['machine']['device']}, {result['machine']['threads']} threads, "
          f"torch {torch.__version__}, {result['machine']['date']}; {flops / 1e9:.2f} GFLOP an image; compiling and first batch {compile_seconds:.0f} s\n")
    rows = [["matrix product", "GFLOP/s", spread([value / 1e9 for value in peak_flops]), "1", ""], ["copy", "GB/s, read and written", spread([value / 1e9 for value in peak_copy]), "", ""]]
    for name, values in rates.items():
        against = "" if name == "evaluator" else spread([a / b for a, b in zip(rates["evaluator"], values)])
        rows.append([name, "img/s", spread(values), f"{np.median(values) * flops / top:.2f}", against])
    rows += [["heat map", "img/s", spread(grid), f"{np.median(grid) * flops / top:.2f}", ""],
             [f"fine-tuning aligned, batch {args.train_batch}", "img/s", spread([value * args.train_batch for value in steps_per_second["aligned"]]),
              f"{np.median(steps_per_second['aligned']) * args.train_batch * 3 * flops / top:.2f}", ""]]
    for recipe in TRAINED[1:]:
        rows.append([f"fine-tuning {recipe}", "img/s; times aligned's", spread([value * args.train_batch for value in steps_per_second[recipe]]), "",
                     spread([a / b for a, b in zip(steps_per_second[recipe], steps_per_second["aligned"])])])
    rows += [[f"linearized, {k} lambda{'s in one pass' if k > 1 else ''}", "img/s, each lambda counted", spread(values), "", ""] for k, values in linear_rates.items()]
    rows += [[f"merging, {vectors} vector{'s' if vectors > 1 else ''} on the device", "ms per lambda", spread([1000 * value for value in seconds]), "", ""] for vectors, seconds in merging.items()]
    rows += [[f"peak memory, {part}", "MiB", f"{peak / 2**20:.0f}", "", ""] for part, peak in peaks.items()]
    rows += [[f"study, {stage}", "s", f"{seconds:.0f}", "", ""] for stage, seconds in result.get("study_seconds", {}).items()]
    for row in [["what", "unit", f"median of {args.repeats} (range)", "of the matrix product", "ratio"], ["---"] * 5, *rows]:
        print("| " + " | ".join(row) + " |")
    print(f"\nencoder in fp32: {encoder_bytes / 2**20:.0f} MiB")


def random_encoder(args):
    """The architecture with random weights as an Encoder."""
    if not args.encoder.startswith("timm:"):
        raise files.Refused(f"bench needs timm:NAME, not {args.encoder}")
    torch.manual_seed(0)
    architecture = {"library": "timm", "name": args.encoder.removeprefix("timm:"), "kwargs": {"img_size": args.image_size, "num_classes": 0}}
    return encoders.Encoder(args.encoder, encoders.build_architecture(architecture).eval(), args.image_size, (0.5,) * 3, (0.5,) * 3, 1.0, "random")


# ---------------------------------------------------------------------------------------------- timing


def timed(function, device):
    """Seconds of one call, the device's queue empty before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def repeat(args, function, device):
    """Seconds of --repeats calls after one that does not count."""
    return [timed(function, device) for _ in range(args.repeats + 1)][1:]


def spread(values):
    """Median (range) with three digits or more."""
    digits = 0 if np.median(values) >= 100 else 1 if np.median(values) >= 10 else 2
    return f"{np.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


# ---------------------------------------------------------------------------------------------- what is timed


def ceiling(args, device, dtype):
    """(FLOP/s of a large matrix product in dtype, bytes/s read and written by a large copy), --repeats values of each."""
    side, size, loops = (8192, 2 ** 30, 50) if device.type == "cuda" else (2048, 2 ** 28, 10)
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    products = repeat(args, lambda: [a @ b for _ in range(loops)], device)
    copies = repeat(args, lambda: [target.copy_(source) for _ in range(loops)], device)
    return [loops * 2 * side ** 3 / seconds for seconds in products], [loops * 2 * size / seconds for seconds in copies]


def search(args, encoder, n_tasks):
    """(evaluator with one summed vector, splits, heads, settings) of a lambda search on random images."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    splits = [common.Split(rng.integers(0, 256, (args.images, 3, encoder.size, encoder.size), dtype=np.uint8), np.arange(args.images),
                           rng.integers(0, 10, args.images)) for _ in range(n_tasks)]
    evaluator = common.Evaluator(encoder, args, 0)
    heads = [{name: tensor.to(evaluator.device) for name, tensor in common.random_head(encoder.module.num_features, 10, generator).items()} for _ in splits]
    evaluator.use_vectors([{name: 1e-3 * torch.randn(tensor.shape, generator=generator) for name, tensor in evaluator.theta_pre.items()}])
    return evaluator, splits, heads, [(lam,) for lam in np.linspace(0, 1, args.lambdas + 1)[1:]]


def bare_forward(encoder, evaluator, images):
    """(the same encoder, dtype and batch on data that is resident and normalised, nothing else; batches in a call of it)."""
    module = copy.deepcopy(evaluator.module)
    if evaluator.forward is not evaluator.eager:
        module = torch.compile(module, dynamic=False)
    pixels = torch.randn(evaluator.batch_size, 3, encoder.size, encoder.size, device=evaluator.device, dtype=evaluator.dtype)
    batches = -(-images // evaluator.batch_size)

    @torch.inference_mode()
    def forward():
        for _ in range(batches):
            module(pixels)

    with torch.inference_mode():
        module(pixels)
    return forward, batches


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
    module, hits = copy.deepcopy(encoder.module).to(device), 0
    module.load_state_dict({name: pre[name] + 0.3 * vector[name] for name in pre})
    for t, head in enumerate(heads):
        paths = sorted((folder / str(t)).glob("*.jpg"))
        rows = [(path, int(path.name.split("_")[0])) for path in paths]
        loader = torch.utils.data.DataLoader(Pictures(rows, transform), batch_size=128, num_workers=2)
        with torch.no_grad():
            for images, labels in loader:
                logits = F.linear(module(images.to(device)), head["weight"], head["bias"])
                hits += (logits.argmax(1) == labels.to(device)).sum().item()
    return hits


def training(args, encoder, device, recipe):
    """A function of a number of steps that says what finetune.train does of their cost on random images; two steps have warmed it up."""
    rng = np.random.default_rng(0)
    split = common.Split(rng.integers(0, 256, (4 * args.train_batch, 3, encoder.size, encoder.size), dtype=np.uint8), np.arange(4 * args.train_batch),
                         rng.integers(0, 10, 4 * args.train_batch))
    task, head = common.Task("bench", {"train": split}, list(range(10)), ""), common.random_head(encoders.width_of(encoder), 10, torch.Generator().manual_seed(0))
    head = {name: tensor.to(device) for name, tensor in head.items()}
    module = copy.deepcopy(encoder.module).to(device, torch.float32).train()
    settings = argparse.Namespace(recipe=recipe, encoder=args.encoder, batch_size=args.train_batch, seed=0, dtype=args.dtype)
    finetune.choose_parameters(module, settings)
    if common.RECIPES[recipe].linear:
        forward = linearized.forward(module, encoder, device)
    else:
        forward = torch.compile(module, dynamic=False) if device.type == "cuda" and args.compile == "on" else module

    def train(steps):
        return finetune.train(forward, module, encoder, task, head, 1e-5, argparse.Namespace(**vars(settings), steps=steps))[2]

    train(2)
    return train


def own_process(args, part):
    """peak_memory of a part, measured in a process of its own."""
    words = [sys.executable, __file__, args.encoder, "--image-size", args.image_size, "--images", 32, "--lambdas", 2, "--compile", "off", "--repeats", 1,
             "--train-batch", args.train_batch, "--device", args.device, "--dtype", args.dtype, "--part", part]
    return int(subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True).stdout.split()[-1])


def peak_memory(args, encoder, device):
    """Peak bytes of fine-tuning, or of a search whose vectors are read from disk; on a GPU of its allocator, on a CPU of the whole process."""
    if args.part.startswith("fine-tuning"):
        return training(args, encoder, device, args.part.split()[1])(2)["peak_memory_bytes"]
    theta, names = encoders.weights_of(encoder.module), [f"task{t}" for t in range(int(args.part.split()[2]))]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        head = common.random_head(encoder.module.num_features, 10, torch.Generator().manual_seed(0))
        for name in names:
            files.save_tensors(folder / "heads" / f"{name}.safetensors", head, theta_pre=encoder.theta_pre)
            files.save_tensors(folder / "aligned" / "vectors" / f"{name}.safetensors", {key: tensor * 1e-3 for key, tensor in theta.items()},
                               theta_pre=encoder.theta_pre, recipe="aligned", head=files.fingerprint(head))
        evaluator, splits, heads, settings = search(args, encoder, 1)
        total, _ = common.sum_of_vectors(folder, "aligned", names, encoder)
        evaluator.use_vectors([total])
        evaluator.hits(splits, heads, settings)
    return common.peak_memory(device)


def study_seconds(folder):
    """{stage: seconds} of a finished study from its JSON files; loading, compiling and pictures are not in them."""
    probe = files.read_json(folder / "probe.json", "python probe.py ENCODER")
    seconds = {"features": sum(row["feature_seconds"] for row in probe["tasks"].values()),
               "heads": probe["search"]["seconds"] + sum(row["seconds"] for row in probe["tasks"].values())}
    for path in sorted(folder.glob("*/*.json")):
        result, recipe = files.read_json(path, "its stage"), path.parent.name
        if path.name == "finetune.json":
            if "search" in result:
                seconds[f"{recipe}, learning-rate search"] = sum(result["search"]["seconds"].values())
            seconds[f"{recipe}, fine-tuning"] = sum(row["seconds"] for row in result["tasks"].values())
        elif path.name == "merge.json":
            seconds[f"{recipe}, lambda search"] = result["seconds"]
        elif path.name == "scaling.json":
            seconds[f"{recipe}, subsets"] = sum(row["seconds"] for row in result["subsets"])
        elif path.name == "disentangle.json":
            seconds[f"{recipe}, heat maps"] = sum(row["seconds"] for row in result["pairs"].values())
    return seconds


if __name__ == "__main__":
    files.run(main, parse_args)
