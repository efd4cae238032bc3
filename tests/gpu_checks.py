"""
What the project claims of a GPU, proved or disproved on one: parts of less than ten minutes, one JSON.

    python tests/gpu_checks.py                    # all parts; what needs a GPU is skipped by name without one
    python tests/gpu_checks.py units --device cpu

Each part is a process of its own, so that one that fails or hangs leaves the others their time. A part that
has finished is not repeated (--overwrite). Exit code 1 where a claim does not hold or a part failed.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np
import torch
from two_processes import STAGES, draw_folders

import bench
import finetune
from common import Evaluator, Task
from disentangle import error_rows
from lib import devices, encoders, files, images
from lib.flags import flag_parser
from lib.results import provenance
from lib.study import run
from lib.training import choose_micro_batch

SECONDS = 590                                               # a part's at most


def parse_args(argv=None):
    parser = flag_parser(__doc__)
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    add("--device", default="auto", help="cpu, cuda or auto")
    add("--out", type=Path, default=Path("gpu_checks.json"), help="result file (default gpu_checks.json)")
    add("--overwrite", action="store_true", help="also parts that have finished")
    add("--only", choices=PARTS, help=argparse.SUPPRESS)    # internal: the part that this process is for
    args = parser.parse_args(argv)
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part is called {', '.join(sorted(unknown))}: {', '.join(PARTS)}")
    return args


def main(args):
    device = devices.pick_device(args.device)
    if args.only:
        print(json.dumps(PARTS[args.only](device)))
        return 0
    about, done = provenance(device), {}
    if args.out.exists() and not args.overwrite:
        before = files.read_json(args.out, "bash tests/gpu_checks.sh")
        done = before["parts"] if before["machine"]["device"] == about["machine"]["device"] else {}
    for name in args.parts or PARTS:
        if done.get(name, {}).get("status") in ("done", "skipped"):
            continue
        start = time.perf_counter()
        done[name] = in_its_own_process(name, str(device))
        done[name]["seconds"] = time.perf_counter() - start
        files.write_json(args.out, {"config": {"device": str(device)}, **about, "parts": done})
        print(f"gpu_checks {name}: {done[name]['status']}, {done[name]['seconds']:.0f} s", file=sys.stderr,
              flush=True)
    broken = [f"{name}: {claim}" for name, part in done.items()
              for claim, found in part.get("claims", {}).items() if not found["holds"]]
    broken += [f"{name}: {part['status']}" for name, part in done.items()
               if part["status"] not in ("done", "skipped")]
    print(json.dumps({**about, "parts": done, "does not hold": broken}, indent=1))
    return 1 if broken else 0


def in_its_own_process(name, device):
    """{"status", and what the part found}."""
    words = [sys.executable, __file__, "--only", name, "--device", device]
    try:
        finished = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                  timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"status": f"not finished in {SECONDS} s"}
    if finished.returncode:
        return {"status": "failed", "said": (finished.stdout + finished.stderr)[-2000:]}
    found = json.loads(finished.stdout.splitlines()[-1])
    return {"status": "skipped" if "skipped" in found else "done"} | found


def claim(value, at_most):
    return {"value": value, "at_most": at_most, "holds": bool(value <= at_most)}


# --------------------------------------------------------------------------------------- what is checked


def environment(device):
    """The machine, and what the project makes of it."""
    encoder = bench.random_encoder("timm:vit_tiny_patch16_224", 64)
    about = provenance(device)["machine"] | {"driver": devices.nvidia_driver(),
                                             "dtype": devices.pick_dtype("auto", device),
                                             "tf32": devices.has_tf32(device),
                                             "compile": devices.compile_pays("on", device, encoder, 1)}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        about |= {"capability": torch.cuda.get_device_capability(device), "bytes": total, "free": free,
                  "gpus": torch.cuda.device_count(), "cuda": torch.version.cuda}
    about["dtype"] = list(map(str, about["dtype"]))
    return about


def units(device):
    """Pixels, crops, random states and optimizers are on the device what they are on a CPU."""
    from PIL import Image
    rng, claims = np.random.default_rng(0), {}

    # resizing, against Pillow, of pictures of two values: the hardest
    worst = 0
    for low, high in ((12, 20), (28, 224), (40, 32), (31, 93)):
        pictures = 255 * rng.integers(0, 2, (4, low, low, 3), dtype=np.uint8)
        theirs = np.stack([Image.fromarray(picture).resize((high, high), Image.Resampling.BICUBIC)
                           for picture in pictures]).astype(int)
        ours = images.fit(torch.from_numpy(pictures).permute(0, 3, 1, 2).to(device), high, images.Frame(high))
        worst = max(worst, np.abs(ours.permute(0, 2, 3, 1).cpu().numpy() - theirs).max().item())
    claims["grey levels between fit and Pillow"] = claim(worst, 2)

    # random crops: the same boxes give the same pixels, TF32 or not
    pictures = torch.from_numpy(rng.integers(0, 256, (8, 3, 64, 64), dtype=np.uint8))
    drawn = torch.rand(4, 10, 8, generator=torch.Generator().manual_seed(0))
    crops = [cropped(pictures.to(there), drawn.to(there)).cpu() for there in ("cpu", device)]
    claims["grey levels between crops on both devices"] = claim((crops[0] - crops[1]).abs().max().item(), 0.1)
    with devices.tensor_float(True):
        rounded = cropped(pictures.to(device), drawn.to(device)).cpu()
    tf32_error = (rounded - crops[0]).abs().max().item()

    # a generator and an optimizer after a training state's round trip
    generator = torch.Generator(device).manual_seed(3)
    torch.rand(5, device=device, generator=generator)
    weight = torch.ones(4, 4, device=device, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], 0.1, fused=True)
    weight.square().sum().backward()
    optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        files.save_state(Path(folder) / "state", {"generator": generator.get_state(), "weight": weight,
                                                  "optimizer": optimizer.state_dict()})
        state = files.load_state(Path(folder) / "state")
    other, twin = torch.Generator(device), state["weight"].detach().to(device).requires_grad_()
    other.set_state(state["generator"])
    draws = [torch.rand(5, device=device, generator=each) for each in (generator, other)]
    claims["draws after a round trip that differ"] = claim((draws[0] != draws[1]).sum().item(), 0)
    again = torch.optim.AdamW([twin], 0.1, fused=True)
    again.load_state_dict(state["optimizer"])
    for each, its in ((weight, optimizer), (twin, again)):
        its.zero_grad()
        each.square().sum().backward()
        its.step()
    claims["weights after an optimizer's round trip that differ"] = claim((weight != twin).sum().item(), 0)

    # the same merge by fp32 on both devices
    encoder = bench.random_encoder("timm:vit_tiny_patch16_224", 64)
    split, found = bench.random_split(256, 64), []
    for there in (torch.device("cpu"), device):
        evaluator = Evaluator(encoder, there, torch.float32)
        torch.manual_seed(1)
        evaluator.use_vectors(bench.random_vectors(encoder, 1))
        [features] = evaluator.features([split], [(0.5,)])
        found.append(features.cpu())
    error = ((found[0] - found[1]).norm() / found[0].norm()).item()
    claims["relative error of fp32 features between devices"] = claim(error, 1e-4)
    return {"claims": claims, "grey levels that TF32 would move a crop by": tf32_error}


def cropped(pictures, drawn):
    """random_resized_crop of pictures by numbers that were drawn elsewhere."""
    def rand(*shape, device, generator):
        return drawn

    before, torch.rand = torch.rand, rand
    try:
        return images.random_resized_crop(pictures, 48, None)
    finally:
        torch.rand = before


def sizes(device):
    """(encoder, images per task, training batch) that fill a GPU, or keep a CPU busy for a moment."""
    if device.type == "cuda":
        return bench.random_encoder("timm:vit_base_patch16_224", 224), 4096, 128
    return bench.random_encoder("timm:vit_tiny_patch16_224", 64), 64, 8


def evaluator(device):
    """Compiled against eager: the same classes but for rounding; img/s at K = 1 and 20, of the ceiling."""
    encoder, n, _ = sizes(device)
    dtype, _ = devices.pick_dtype("auto", device)
    products, _ = bench.ceiling(bench.Machine(device, dtype, False), 3)
    split, head = bench.random_split(n, encoder.size), bench.a_head(encoder, device)
    vector, predicted, rates, compile_seconds = bench.random_vectors(encoder, 1), {}, {}, 0.0
    for compiled in (False, True):
        it = Evaluator(encoder, device, dtype, compiled)
        start = time.perf_counter()
        failed = it.compile_now() if compiled else ""
        compile_seconds = time.perf_counter() - start
        it.use_vectors(vector)
        way = "compiled" if compiled else "eager"
        predicted[way] = it.predictions([split], [head], [(0.5,)])[0][0]
        for settings in (1, 20):
            lambdas = [(lam,) for lam in np.linspace(0.05, 1, settings)]
            seconds = bench.timed(lambda: it.hits([split], [head], lambdas), device)
            rates[f"{way}, K = {settings}"] = n * settings / seconds
    flops = devices.forward_flops(encoder)
    shares = {way: rate * flops / np.median(products) for way, rate in rates.items()}
    differ = (predicted["eager"] != predicted["compiled"]).float().mean().item()
    return {"encoder": encoder.name, "pixels": encoder.size, "images": n, "dtype": str(dtype),
            "batch": it.batch_size, "compile_seconds": compile_seconds, "compiling_failed": failed,
            "matmul_flops_per_second": products, "images_per_second": rates, "of_the_ceiling": shares,
            "claims": {"share of predictions that compiling changes": claim(differ, 0.05)}}


def training(device):
    """60 steps of three recipes: img/s, peak memory, what trains at a time; two runs, and bit for bit?"""
    encoder, _, batch = sizes(device)
    dtype, _ = devices.pick_dtype("auto", device)
    steps, found = (60 if device.type == "cuda" else 3), {}
    amp = device.type == "cuda" and dtype == torch.bfloat16
    for name in bench.TRAINED:
        recipe = finetune.RECIPES[name]
        train = bench.training(recipe, encoder, bench.Machine(device, dtype, device.type == "cuda"), batch)
        cost = train(steps)
        found[name] = {key: cost[key] for key in ("images_per_second", "peak_memory_bytes", "final_loss")}
        found[name]["again"] = train(steps)["final_loss"]    # equal on a CPU; not promised on a GPU
    module = encoders.build_architecture(encoder.description["architecture"]).to(device).train()
    task = Task("check", {"train": bench.random_split(2 * batch, encoder.size)}, bench.CLASSES, "", "")
    losses = []
    for size in (batch, batch // 4):
        plan = {"lr": 1e-5, "steps": 4, "batch_size": batch, "micro_batch": size, "seed": 0}
        _, _, cost = finetune.train(module, module, encoder, task, bench.a_head(encoder, device),
                                    finetune.RECIPES["aligned"], plan, amp)
        found[f"aligned, {size} at a time"] = {key: cost[key] for key in ("peak_memory_bytes", "final_loss")}
        losses.append(cost["final_loss"])
    chosen = choose_micro_batch(None, module, module, encoder, batch, device, amp)
    return {"encoder": encoder.name, "batch": batch, "steps": steps, "recipes": found, "micro_batch": chosen,
            "claims": {"relative loss between micro-batches and a whole batch":
                       claim(abs(losses[0] / losses[1] - 1), 0.02 if amp else 1e-4)}}


def heat_map(device):
    """A row of a heat map in bf16, TF32 and fp32: img/s, and what two paths of each flip: its floor."""
    encoder, n, _ = sizes(device)
    splits = [bench.random_split(n // 4, encoder.size, seed) for seed in (0, 1)]
    heads, lambdas, found = [bench.a_head(encoder, device)] * 2, np.linspace(-1, 1, 5), {}
    torch.manual_seed(0)
    vectors = bench.random_vectors(encoder, 2)
    for name in ("bf16", "tf32", "fp32"):
        if name == "tf32" and not devices.has_tf32(device):
            found[name] = {"skipped": f"TF32 needs a GPU from Ampere on, this is {device}"}
            continue
        dtype, paths = torch.bfloat16 if name == "bf16" else torch.float32, []
        for batch in (None, 48):
            it = Evaluator(encoder, device, dtype, tf32=name == "tf32")
            it.batch_size = batch or it.batch_size
            it.use_vectors(vectors)
            paths.append(torch.cat(it.predictions(splits, heads, [(0.1, 0.1)]), dim=1)[0])
        seconds = bench.timed(lambda: next(error_rows(it, splits, heads, lambdas, ["prediction"])), device)
        flips = (paths[0] != paths[1]).float().mean().item()
        found[name] = {"images_per_second": len(lambdas) * 3 * len(splits[0]) / seconds,
                       "xi_floor": 2 * flips}
    return {"encoder": encoder.name, "images": n // 4, "precisions": found}


def benchmark(device):
    """bench.py, whole on a GPU, --quick on a CPU."""
    words = ["--quick"]
    if device.type == "cuda":
        words = ["timm:vit_base_patch16_224", "--image-size", "224", "--images", "1000", "--train-batch",
                 "128"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench.json"
        command("bench.py", *words, "--device", device, "--out", out)
        return {"bench": json.loads(out.read_text())}


def tests(device):
    """The tests, on a machine with a GPU."""
    if device.type != "cuda":
        return {"skipped": "needs a GPU: without one these are the tests"}
    said = subprocess.run(["bash", "tests/run.sh"], cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
    last = said.splitlines()[-1]
    return {"said": last, "failed": [line for line in said.splitlines() if line.startswith("FAILED")],
            "claims": {"tests that fail": claim(int("failed" in last or "error" in last), 0)}}


def study(device):
    """`tiny` on the GPU: the README's numbers but for training's rounding."""
    if device.type != "cuda":
        return {"skipped": "needs a GPU: without one this is run_all.sh"}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run(["bash", "run_all.sh", "tiny", "--runs", folder], cwd=ROOT, check=True,
                       stdout=sys.stderr)
        merge = json.loads((Path(folder) / "tiny/aligned/merge.json").read_text())
        seconds = time.perf_counter() - start
        command("precision.py", "tiny", "--runs", folder)
        precision = json.loads((Path(folder) / "tiny/aligned/precision.json").read_text())
    floors = {key: precision[key] for key in ("xi_floor", "xi_floor_tf32") if key in precision}
    return {"run_all_seconds": seconds, **floors, "lambda": merge["best_lambda"],
            "addition": merge["test"]["absolute"], "single_task": merge["single_task_mean"],
            "probing": merge["probing"]["paper"]["absolute"],
            "claims": {"points between single-task accuracy here and on a CPU":
                       claim(abs(100 * merge["single_task_mean"] - 86.1), 2),
                       "floor under xi in TF32, the default of heat maps":
                       claim(floors.get("xi_floor_tf32", 0), 0.01)}}


def ranks(device):
    """Every heavy stage by two processes, on one GPU where there is one: the counts of one process."""
    with tempfile.TemporaryDirectory() as folder:
        draw_folders(Path(folder) / "data")
        found = []
        for processes in (1, 2):
            runs = Path(folder) / f"by_{processes}"
            encoder = bench.random_encoder("timm:vit_tiny_patch16_224", 32)
            encoders.save_encoder(runs / "tiny/pretrained.safetensors", encoder.module,
                                  encoder.description | {"encoder": "tiny", "tasks": None})
            launcher = [sys.executable]
            if processes == 2:
                launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                            "--nproc-per-node", "2"]
            subprocess.run([*launcher, "tests/two_processes.py", str(runs)], cwd=ROOT, check=True,
                           stdout=sys.stderr)
            merge = json.loads((runs / "tiny/full/merge.json").read_text())
            probe = json.loads((runs / "tiny/probe.json").read_text())["tasks"]
            found.append({"probe": {name: row["paper"]["hits_test"] for name, row in probe.items()},
                          "addition": merge["test"]["hits"], "lambda": merge["best_lambda"]})
    gap = max(abs(found[0][key][name] - found[1][key][name]) for key in ("probe", "addition")
              for name in found[0]["probe"])
    return {"one": found[0], "two": found[1], "stages": [name for name, _ in STAGES],
            "claims": {"hits between one and two processes": claim(gap, 0 if device.type == "cpu" else 3)}}


def command(script, *words):
    subprocess.run([sys.executable, script, *map(str, words)], cwd=ROOT, check=True, stdout=sys.stderr)


PARTS = {"environment": environment, "units": units, "evaluator": evaluator, "training": training,
         "heat_map": heat_map, "bench": benchmark, "tests": tests, "study": study, "ranks": ranks}


if __name__ == "__main__":
    run(lambda args: sys.exit(main(args)), parse_args)
