"""
What the hardware can do, and what the evaluator, a fine-tuning step, a merge and a heat map make of it.

    python bench.py                              # ViT-Ti/16 at 128 pixels, about ten minutes on two CPU cores
    python bench.py --quick                      # the same parts in a minute or two, noisier
    python bench.py --quick --study runs/tiny    # also the seconds of each stage of a finished study
    python bench.py timm:vit_base_patch16_224 --quick --image-size 64    # the merging rules at that size
    python bench.py timm:vit_base_patch16_224 --image-size 224 --images 2000 --train-batch 128    # for a GPU

Weights and images are random: nothing here depends on their values. Compiling and warm-up are timed apart;
a rate is a median of --repeats with its range; what is compared is measured in turn, every other time in
reverse, and a ratio is the median of pairs: machines drift. Rules that merge vectors, compiling from nothing
and peaks of memory are measured once.

Reads   with --study probe.json and */*.json of that folder, runs/ENCODER
Writes  bench.json
"""
import argparse
import copy
import functools
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import finetune
from common import Evaluator, Split, Task, head_tensors, random_head, save_head
from disentangle import error_rows
from lib import devices, encoders, flags, language, linearized, merging, plain, texts
from lib.files import Refused, fingerprint, read_json, write_json
from lib.parameters import choose_parameters
from lib.results import provenance
from lib.study import run
from lib.vectors import head_file, save_vector

TRAINED = ["aligned", "attention", "linearized"]            # the recipes whose training is timed
COMPILING = ["a block for all", "the whole encoder"]        # ways to compile it, ours and the usual one
CLASSES = list(range(10))                                   # of a random task
TEXT_SHAPE = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}    # all-MiniLM-L6-v2's
STEP = 1e-3                                                 # a random task vector's deviation


class Machine(NamedTuple):
    device: torch.device
    dtype: torch.dtype    # of the forward pass
    compiled: bool        # whether the evaluator compiles, and on a GPU the training step


def parse_args(argv=None):
    parser = flags.flag_parser(__doc__)
    add = parser.add_argument
    add("encoder", nargs="?", default="timm:vit_tiny_patch16_224",
        help="timm:NAME (default timm:vit_tiny_patch16_224)")
    add("--image-size", type=flags.positive, default=128, help="pixels (default 128)")
    add("--images", type=flags.positive, default=200, help="validation images per task (default 200)")
    add("--n-tasks", type=flags.positive, default=8, help="tasks in the search (default 8)")
    add("--lambdas", type=flags.positive, default=10, help="weight settings in the search (default 10)")
    add("--train-batch", type=flags.positive, default=32, help="images per fine-tuning step (default 32)")
    add("--repeats", type=flags.positive, default=5, help="runs of each measurement (default 5)")
    add("--device", default="auto", help="cpu, cuda or auto")
    add("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="of the forward pass")
    add("--compile", choices=["on", "off"], default="on", help="compile the forward pass (default on)")
    add("--quick", action="store_true", help="at most 16 images, 3 lambdas and 3 repeats; fewer steps")
    add("--study", type=Path, help="folder of a finished study, runs/ENCODER: adds its stages' seconds")
    add("--out", type=Path, default=Path("bench.json"), help="result file (default bench.json)")
    add("--part", help=argparse.SUPPRESS)                   # internal: what wants a process of its own
    args = parser.parse_args(argv)
    if args.quick:
        args.images, args.lambdas = min(args.images, 16), min(args.lambdas, 3)
        args.repeats = min(args.repeats, 3)
    return args


def main(args):
    # ---------------------------------------------------- open
    device, repeats, batch = devices.pick_device(args.device), args.repeats, args.train_batch
    encoder = random_encoder(args.encoder, args.image_size)
    compiled, _ = devices.compile_pays(args.compile, device, encoder, 0)
    machine = Machine(device, devices.pick_dtype(args.dtype, device)[0], compiled)
    if args.part:
        print(compiling(args.part, encoder, machine) if args.part in COMPILING
              else part_peak(args.part, encoder, machine, batch))
        return
    stages = study_seconds(args.study) if args.study else {}
    flops = devices.forward_flops(encoder)

    # ---------------------------------------------------- (a) the ceiling: matrix products and copies
    products, copies = ceiling(machine, repeats)            # FLOP/s, bytes/s

    # ---------------------------------------------------- (b) a lambda search: evaluator, bare, the plain way
    evaluator = Evaluator(encoder, *machine)
    evaluator.use_vectors(random_vectors(encoder, 1))
    splits = [random_split(args.images, encoder.size, seed) for seed in range(args.n_tasks)]
    heads = [a_head(encoder, device)] * args.n_tasks
    settings = [(lam,) for lam in np.linspace(0, 1, args.lambdas + 1)[1:]]
    n = args.n_tasks * args.images                          # images under one lambda
    compile_seconds = timed(lambda: evaluator.hits(splits[:1], heads[:1], settings[:1]), device)
    with tempfile.TemporaryDirectory() as folder:
        plain.write_images(Path(folder), splits)
        plain.write_weights(Path(folder), encoder, random_vectors(encoder, 1)[0])
        ways = {"evaluator": (n * args.lambdas, lambda: evaluator.hits(splits, heads, settings)),
                "bare forward": bare_forward(evaluator, evaluator.forward, splits, args.lambdas),
                "plain way": (n, lambda: plain.on_images(Path(folder), encoder, heads, device))}
        if compiled and devices.repeated_blocks(evaluator.module):
            whole = torch.compile(evaluator.module, dynamic=False)
            ways["bare forward, compiled whole"] = bare_forward(evaluator, whole, splits, args.lambdas)
            timed(bare_forward(evaluator, whole, splits[:1], 1)[1], device)
        rates = in_turn(ways, repeats, device)

    # ---------------------------------------------------- (c) fine-tuning under three recipes, and in fp32
    trainings = {name: training(finetune.RECIPES[name], encoder, machine, batch) for name in TRAINED}
    if machine.dtype != torch.float32:
        in_fp32 = machine._replace(dtype=torch.float32)
        trainings["aligned, fp32"] = training(finetune.RECIPES["aligned"], encoder, in_fp32, batch)
    steps = 4 if args.quick else 10
    trained = in_turn({name: (steps * batch, functools.partial(train, steps))
                       for name, train in trainings.items()}, repeats, device)      # images/s

    # ---------------------------------------------------- (d) merging, (e) a heat map
    writing = {}                                            # {vectors: seconds per lambda}
    for count in (1, 8):
        evaluator.use_vectors(random_vectors(encoder, count))
        writing[count] = repeated(lambda: evaluator.write((0.1,) * count), repeats, device)
    evaluator.use_vectors(evaluator.vectors[:2])
    lambdas = np.linspace(-1, 1, 3 if args.quick else 5)
    pair = [splits[0], splits[-1]], heads[:1] * 2, lambdas, ["prediction"]
    images = len(lambdas) ** 2 * 2 * args.images
    grid = [images / seconds for seconds
            in repeated(lambda: list(error_rows(evaluator, *pair)), repeats, device)]

    # ---------------------------------------------------- (f) a linearized encoder: one pass, or one a lambda
    linear = linearized.LinearizedEvaluator(encoder, device, machine.dtype)

    def search_linear(count):
        linear.use_vectors(evaluator.vectors[:1])           # forgets what it has computed
        linear.hits(splits, heads, settings[:count])

    linear_rates = in_turn({args.lambdas: (args.lambdas * n, lambda: search_linear(args.lambdas)),
                            1: (n, lambda: search_linear(1))}, repeats, device)

    # ---------------------------------------------------- (g) rules that merge vectors on disk
    rules = bench_rules(encoder, device)                    # {(rule, vectors): (seconds, bytes)}

    # ---------------------------------------------------- (h) texts
    text_rates, text_flops = bench_texts(machine, 64 if args.quick else 2048, repeats)

    # ---------------------------------------------------- start-up, compiling from nothing
    starting = in_turn({"a stage": (1, started("merge_eval.py", "--help")),
                        "torch alone": (1, started("-c", "import torch"))}, repeats, device)
    starting = {name: np.divide(1, values).tolist() for name, values in starting.items()}       # s
    cold = {way: own_process(args, way, "on") for way in COMPILING} if compiled else {}         # s

    # ---------------------------------------------------- peak memory, in processes of their own
    parts = ["search over 2 tasks", "search over 8 tasks", *(f"fine-tuning {name}" for name in TRAINED)]
    peaks = {part: own_process(args, part, "off") for part in parts}
    encoder_bytes = sum(tensor.numel() * 4 for tensor in evaluator.theta_pre.values())

    # ---------------------------------------------------- save
    about = provenance(device)
    write_json(args.out, {
        "config": {key: str(value) for key, value in vars(args).items()}, **about,
        "dtype": str(machine.dtype)[6:], "batch_size": evaluator.batch_size, "flops_per_image": flops,
        "matmul_flops_per_second": products, "copy_bytes_per_second": copies,
        "compile_seconds": compile_seconds, "cold_compile_seconds": cold, "start_seconds": starting,
        "images_per_second": rates, "train_images_per_second": trained,
        "seconds_per_merge": writing, "heat_map_images_per_second": grid,
        "linearized_images_per_second": linear_rates, "tokens_per_second": text_rates, "peak_bytes": peaks,
        "rules": [[*which, *measured] for which, measured in rules.items()],
        "encoder_bytes": encoder_bytes, "study_seconds": stages})

    # ---------------------------------------------------- say
    def share(values, passes=1):
        """Of the matrix product's FLOP/s, at so many forward passes an image."""
        return f"{np.median(values) * passes * flops / np.median(products):.2f}"

    rows = [["what", "unit", f"median of {repeats} (range)", "of the matrix product", "ratio"], ["---"] * 5,
            ["matrix product", "GFLOP/s", spread(np.divide(products, 1e9)), "1", ""],
            ["copy", "GB/s, read and written", spread(np.divide(copies, 1e9)), "", ""]]
    for name, values in rates.items():
        ratio = "" if name == "evaluator" else spread(np.divide(rates["evaluator"], values))
        rows.append([name, "img/s", spread(values), share(values), ratio])
    rows.append(["heat map", "img/s", spread(grid), share(grid), ""])
    for name, values in trained.items():
        against = "" if name == "aligned" else spread(np.divide(values, trained["aligned"]))
        rows.append([f"fine-tuning {name}, batch {batch}", "img/s; times aligned's", spread(values),
                     "" if against else share(values, 3), against])
    for count, values in linear_rates.items():
        label = f"linearized, {count} lambda{'s in one pass' if count > 1 else ''}"
        rows.append([label, "img/s, each lambda counted", spread(values), "", ""])
    for name, values in text_rates.items():
        of = np.median(values) * text_flops / np.median(products)
        ratio = "" if name == "evaluator" else spread(np.divide(text_rates["evaluator"], values))
        rows.append([f"texts, {name}", "tokens/s, without padding", spread(values), f"{of:.2f}", ratio])
    for count, values in writing.items():
        label = f"merging, {count} vector{'s' if count > 1 else ''} on the device"
        rows.append([label, "ms per lambda", spread(np.multiply(values, 1000)), "", ""])
    for (rule, count), (seconds, taken) in rules.items():
        rows.append([f"rule {rule}, {count} vectors on disk", "s; peak MiB besides", f"{seconds:.2f}", "",
                     f"{taken / 2 ** 20:.0f}"])
    for name, values in starting.items():
        rows.append([f"start-up, {name}", "s", spread(values), "", ""])
    for way, seconds in cold.items():
        rows.append([f"compiling from nothing, {way}", "s", f"{seconds:.1f}", "", ""])
    rows += [[f"peak memory, {part}", "MiB", f"{peak / 2 ** 20:.0f}", "", ""] for part, peak in peaks.items()]
    rows += [[f"study, {stage}", "s", f"{value:.0f}", "", ""] for stage, value in stages.items()]
    where = about["machine"]
    print(f"{args.encoder}, {encoder.size} pixels, {str(machine.dtype)[6:]}, batch {evaluator.batch_size}, "
          f"{where['device']}, {where['threads']} threads, torch {where['torch']}, {where['date']}; "
          f"{flops / 1e9:.2f} GFLOP an image; compiling and first batch {compile_seconds:.0f} s\n")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(f"\nencoder in fp32: {encoder_bytes / 2 ** 20:.0f} MiB")


# --------------------------------------------------------------------------------------- random material


def random_encoder(name, size):
    """A timm architecture with random weights as an Encoder."""
    if not name.startswith("timm:"):
        raise Refused(f"bench needs timm:NAME, not {name}")
    architecture = {"library": "timm", "name": name.removeprefix("timm:"),
                    "kwargs": {"img_size": size, "num_classes": 0}}
    torch.manual_seed(0)
    try:
        module = encoders.build_architecture(architecture).eval()
        description = encoders.describe(module, architecture, size, (0.5,) * 3, (0.5,) * 3, 1.0, encoder=name)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise Refused(f"timm has no {name} for images of {size} pixels ({error})") from error
    return encoders.as_encoder(lambda: module, description, "random")


def random_split(n, size, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 3, size, size), dtype=np.uint8)
    return Split(images, np.arange(n), rng.integers(0, len(CLASSES), n))


def a_head(encoder, device):
    return random_head(encoder.width, len(CLASSES), torch.Generator(device).manual_seed(0))


def random_vectors(encoder, count):
    """`count` task vectors, {name: tensor} each."""
    theta_pre, vectors = encoders.weights_of(encoder.module), []
    for _ in range(count):
        vectors.append({name: STEP * torch.randn_like(tensor) for name, tensor in theta_pre.items()})
    return vectors


def random_text_encoder(longest):
    """A BERT of TEXT_SHAPE with random weights, for so many tokens."""
    import transformers
    config = transformers.BertConfig(**TEXT_SHAPE)
    architecture = {"library": "transformers", "name": "bert", "pad": 0, "separator": None, "pooling": "mean",
                    "config": language.plain(language.without_dropout(config))}
    torch.manual_seed(0)
    module = encoders.build_architecture(architecture).eval()
    return language.TextEncoder("bert", lambda: module, TEXT_SHAPE["hidden_size"], "random",
                                {"architecture": architecture, "longest": longest}, None)


def random_texts(n):
    """[(L,) int64 tokens], as long as QQP's pairs of questions: 27 in the middle, 128 at most."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(27), 0.45, n).clip(4, 128).astype(int)
    return [torch.from_numpy(rng.integers(1000, 30000, length)) for length in lengths]


# --------------------------------------------------------------------------------------- timing


def timed(function, device):
    """Seconds of one call, the device's queue empty before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def repeated(function, repeats, device):
    """Seconds of each of `repeats` calls, after one that does not count."""
    return [timed(function, device) for _ in range(repeats + 1)][1:]


def in_turn(ways, repeats, device):
    """{name: images/s, `repeats` values} of {name: (images of a call, function)}, a call of each in turn.

    Every other time in reverse, so that none always comes after the same other.
    """
    rates = {name: [] for name in ways}
    for repeat in range(repeats):
        for name in list(ways)[::-1 if repeat % 2 else 1]:
            images, function = ways[name]
            rates[name].append(images / timed(function, device))
    return rates


def spread(values):
    """Median (range) with three digits or more."""
    digits = 0 if np.median(values) >= 100 else 1 if np.median(values) >= 10 else 2
    return f"{np.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


# --------------------------------------------------------------------------------------- what is timed


def ceiling(machine, repeats):
    """(FLOP/s of a large matrix product, bytes/s read and written by a large copy), `repeats` of each."""
    side, size, loops = (8192, 2 ** 30, 50) if machine.device.type == "cuda" else (2048, 2 ** 28, 10)
    a, b = torch.randn(2, side, side, device=machine.device).to(machine.dtype)
    source = torch.zeros(size, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    products = repeated(lambda: [a @ b for _ in range(loops)], repeats, machine.device)
    copies = repeated(lambda: [target.copy_(source) for _ in range(loops)], repeats, machine.device)
    return ([loops * 2 * side ** 3 / seconds for seconds in products],
            [loops * 2 * size / seconds for seconds in copies])


@torch.inference_mode()
def bare_forward(evaluator, module, splits, n_settings):
    """(images, function): a search's forward passes and nothing else, the evaluator's ceiling.

    They are those of `module`, the evaluator's own or the same compiled otherwise, on batches that are
    prepared and stay on the device.
    """
    _, inputs = next(evaluator.chunks(splits))          # the first chunk of the stream, again and again
    prepared = inputs.split(evaluator.batch_size)
    count = -(-n_settings * sum(len(split) for split in splits) // evaluator.batch_size)

    @torch.inference_mode()
    def forward():
        for i in range(count):
            module(prepared[i % len(prepared)])

    return count * evaluator.batch_size, forward


def bench_texts(machine, n, repeats):
    """({way: tokens/s}, FLOP a token) of the evaluator and the plain way on n texts, padding not counted."""
    encoder, device = random_text_encoder(128), machine.device
    rows, labels = random_texts(n), torch.randint(len(CLASSES), (n,), generator=torch.manual_seed(0))
    lengths = np.array([len(row) for row in rows])
    stored = np.zeros((n, texts.fitting_length(lengths, 128)), np.int32)
    for row, tokens in zip(stored, rows, strict=True):
        row[:len(tokens)] = tokens[:len(row)]
    split, head = Split(stored, np.arange(n), labels.numpy()), a_head(encoder, device)
    evaluator = Evaluator(encoder, *machine)
    evaluator.use_vectors(random_vectors(encoder, 1))
    evaluator.hits([split], [head], [(0.1,)])               # compiles, a graph a length
    typical = round(lengths.mean())
    flops = devices.forward_flops(random_text_encoder(typical)) / typical
    with tempfile.TemporaryDirectory() as folder:
        plain.write_weights(Path(folder), encoder, random_vectors(encoder, 1)[0])

        def evaluate():
            evaluator.hits([split], [head], [(0.1,), (0.2,)])

        def plainly():
            plain.on_texts(Path(folder), encoder, rows, labels, head, device)

        rates = in_turn({"evaluator": (2 * lengths.sum(), evaluate), "plain way": (lengths.sum(), plainly)},
                        repeats, device)
    return rates, flops


def bench_rules(encoder, device):
    """{(rule, vectors): (seconds, peak bytes besides what was there)}, of vectors of an encoder's size."""
    names, found = [f"task{t}" for t in range(8)], {}
    merging.spectrum(torch.eye(2, device=device))           # its library is loaded
    with tempfile.TemporaryDirectory() as folder:
        variant = Path(folder) / "aligned"
        write_vectors(variant, names, encoder)
        for rule, count in itertools.product(merging.RULES, (2, 8)):
            merge = functools.partial(merging.merge, rule, variant, names[:count], encoder, device=device)
            found[rule, count] = devices.cost_of(merge, device)[1:]
    return found


def training(recipe, encoder, machine, batch_size):
    """A function of a number of steps, warmed up: what finetune.train says of their cost on random images."""
    device = machine.device
    task = Task("bench", {"train": random_split(4 * batch_size, encoder.size)}, CLASSES, "", "")
    head, module = a_head(encoder, device), copy.deepcopy(encoder.module).to(device).train()
    choose_parameters(module, recipe.trained, encoder.name)
    forward, amp = module, machine.dtype == torch.bfloat16
    if amp and device.type == "cpu":
        devices.unfuse_attention(module)
    if recipe.linear:
        forward = linearized.forward(module, encoder, device, amp)
    elif machine.compiled and device.type == "cuda":
        forward = devices.compile_module(module)

    def train(steps):
        plan = {"lr": 1e-5, "steps": steps, "batch_size": batch_size, "micro_batch": batch_size, "seed": 0}
        _, _, cost = finetune.train(forward, module, encoder, task, head, recipe, plan, amp)
        return cost

    train(2)
    return train


# --------------------------------------------------------------------------------------- memory, a study


def started(*words):
    """A function that runs Python with these words, to its end."""
    return functools.partial(subprocess.run, [sys.executable, *words], check=True, cwd=Path(__file__).parent,
                             stdout=subprocess.DEVNULL)


def own_process(args, part, compile):
    """The number that --part prints of the same encoder, device and dtype, with an empty cache of code."""
    words = [sys.executable, __file__, args.encoder, "--image-size", args.image_size, "--device", args.device,
             "--dtype", args.dtype, "--train-batch", args.train_batch, "--compile", compile, "--part", part]
    with tempfile.TemporaryDirectory() as cache:
        said = subprocess.run(list(map(str, words)), check=True, stdout=subprocess.PIPE, text=True,
                              env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}).stdout
    return float(said.split()[-1])


def compiling(way, encoder, machine):
    """Seconds from nothing to code compiled in one of COMPILING, the first batch's own pass taken off."""
    eager = Evaluator(encoder, machine.device, machine.dtype)
    if machine.device.type == "cpu" and machine.dtype == torch.bfloat16:
        devices.unfuse_attention(eager.module)
    with torch.inference_mode():
        inputs = eager.as_dtype(encoder.example(eager.batch_size)).to(machine.device)
        compiled = (devices.compile_module(eager.module) if way == COMPILING[0]
                    else torch.compile(eager.module, dynamic=False))
        first = timed(lambda: compiled(inputs), machine.device)
        return first - timed(lambda: compiled(inputs), machine.device)


def part_peak(part, encoder, machine, train_batch):
    """Peak bytes of "fine-tuning RECIPE" or of a "search over N tasks" whose vectors are read from disk.

    Returns  on a GPU the bytes of its allocator, on a CPU those of the whole process
    """
    if part.startswith("fine-tuning"):
        train = training(finetune.RECIPES[part.split()[1]], encoder, machine, train_batch)
        return train(2)["peak_memory_bytes"]
    names = [f"task{t}" for t in range(int(part.split()[2]))]
    with tempfile.TemporaryDirectory() as folder:
        variant = Path(folder) / "aligned"
        write_vectors(variant, names, encoder)
        devices.reset_peak_memory(machine.device)
        evaluator = Evaluator(encoder, *machine)
        evaluator.use_vectors([merging.merge("sum", variant, names, encoder)])
        evaluator.hits([random_split(32, encoder.size)], [a_head(encoder, machine.device)], [(0.5,), (1.0,)])
    return devices.peak_memory(machine.device)


def write_vectors(variant, names, encoder):
    """A head and a task vector for each name, as probe.py and make_vectors.py write them."""
    head = a_head(encoder, torch.device("cpu"))
    recipe = {"name": "aligned", **finetune.RECIPES["aligned"]._asdict(), "probe": "paper"}
    about = {"theta_pre": encoder.fingerprint, "recipe": recipe, "data": "", "sha256": "",
             "head": fingerprint(head_tensors(head))}
    for name in names:
        task = Task(name, {}, CLASSES, "", "")
        save_head(head_file(variant, recipe, name, encoder.name)[0], head, task, encoder)
        [vector] = random_vectors(encoder, 1)
        save_vector(variant, vector, about | {"task": name})


def study_seconds(folder):
    """{stage: seconds} of a finished study's results; loading, compiling and pictures are not in them."""
    probe = read_json(folder / "probe.json", "python probe.py ENCODER")
    seconds = {"features": sum(row["feature_seconds"] for row in probe["tasks"].values()),
               "heads, paper": probe["search"]["seconds"]
               + sum(row["paper"]["seconds"] for row in probe["tasks"].values()),
               "heads, converged": sum(row["converged"]["seconds"] for row in probe["tasks"].values())}
    rows = {"finetune.json": ("fine-tuning", "tasks"), "scaling.json": ("subsets", "subsets"),
            "disentangle.json": ("heat maps", "pairs")}
    for path in sorted(folder.glob("*/*.json")):
        name = path.parent.name
        if path.name == "merge.json":
            seconds[f"{name}, lambda search"] = read_json(path, "python merge_eval.py ENCODER")["seconds"]
        elif path.name in rows:
            result, (stage, key) = read_json(path, "its stage"), rows[path.name]
            if "search" in result:
                seconds[f"{name}, learning-rate search"] = sum(result["search"]["seconds"].values())
            seconds[f"{name}, {stage}"] = sum(row["seconds"] for row in result[key].values())
    return seconds


if __name__ == "__main__":
    run(main, parse_args)
