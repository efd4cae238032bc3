"""
What a machine can do: device, dtype, whether compiling pays, memory and disk.
"""
import contextlib
import copy
import importlib.metadata
import itertools
import os
import platform
import re
import resource
import shutil
import sysconfig
import time
from pathlib import Path

import torch

from lib import ranks
from lib.files import Refused


def pick_device(name):
    """torch.device for --device, each process of torchrun its own GPU; Refused if unknown or not there."""
    asked = name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if name == "cpu" and nvidia_driver() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
            name = "cuda"                                  # hours of CPU are not what its owner wants
    if name.startswith("cuda:") and ranks.world() > 1:
        raise Refused(f"--device {name} under torchrun: give --device cuda, each process takes its own GPU")
    if name == "cuda" and ranks.world() > 1:
        name = f"cuda:{torch.cuda.current_device()}"
    try:
        device = torch.device(name)
        ones = torch.ones(8, 8, device=device)
        (ones @ ones).sum().item()                         # what has no code for this GPU fails only here
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        remedy = "try --device cpu"
        if name.startswith("cuda") and nvidia_driver():
            remedy = (f"torch {torch.__version__} under {nvidia_driver()}: install a torch made for that "
                      f"driver and GPU (pip's indexes: pytorch.org/get-started/previous-versions), or give "
                      f"--device cpu")
        raise Refused(f"--device {asked}: {name} is not usable here ({reason}); {remedy}") from error
    # fp32 means fp32: from Ampere on convolutions would round to TF32's ten bits, products where told to
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return device


def nvidia_driver():
    """The line in which a loaded NVIDIA driver says its version, "" without one."""
    version = Path("/proc/driver/nvidia/version")
    return version.read_text().splitlines()[0].removeprefix("NVRM version: ") if version.exists() else ""


def pick_dtype(name, device):
    """(dtype, reason) of the forward pass: bf16 where the hardware multiplies matrices in it, else fp32.

    Errors  Refused: "tf32", which is fp32 whose products a GPU rounds, where the device has no such units
    """
    if name == "tf32":
        if not has_tf32(device):
            raise Refused(f"--dtype tf32 is for NVIDIA GPUs from Ampere on, and this is {device}: "
                          f"give --dtype fp32")
        return torch.float32, "--dtype tf32: products of fp32 numbers rounded to TF32"
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[name], f"--dtype {name}"
    if device.type == "cuda":
        has_bf16, unit = torch.cuda.is_bf16_supported(including_emulation=False), "bf16 tensor cores"
    elif device.type == "cpu":
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        unit = "AMX or AVX512-bf16"
    else:
        has_bf16, unit = False, "measured bf16 units"
    return ((torch.bfloat16, f"{device.type} with {unit}") if has_bf16
            else (torch.float32, f"{device.type} without {unit}"))


def has_tf32(device):
    """Whether it multiplies matrices of fp32 numbers rounded to TF32's ten bits: NVIDIA's from Ampere on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@contextlib.contextmanager
def tensor_float(on):
    """Inside, fp32 products and convolutions of a GPU round their factors to TF32's ten bits where `on`."""
    libraries = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [library.allow_tf32 for library in libraries]
    for library in libraries:
        library.allow_tf32 = on
    try:
        yield
    finally:
        for library, value in zip(libraries, before, strict=True):
            library.allow_tf32 = value


COMPILE_FLOPS = {"cpu": 1e13, "cuda": 5e15}


def compile_pays(mode, device, encoder, images):
    """(whether to torch.compile the encoder, why).

    `auto` compiles where the forward work ahead is long against compiling. Compiling a 12-block ViT took 8 s
    on a CPU core, 16 s where nothing had been compiled before, and then made each forward pass 16 to 27 %
    faster: `auto` asks for COMPILE_FLOPS of work, 80 s there. The GPU's figure is not measured.
    """
    if mode == "off":
        return False, "--compile off"
    if device.type == "mps":
        return False, "not compiled on mps"
    compilers = ("g++", "clang++") if device.type == "cpu" else ("cc", "gcc", "clang")    # Triton's is for C
    if not (any(map(shutil.which, compilers)) or os.environ.get("CXX" if device.type == "cpu" else "CC")):
        return False, f"no compiler here ({', '.join(compilers)})"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return False, "no Python.h here, as of a package python3-dev"
    if mode == "on":
        return True, "--compile on"
    try:
        work, enough = images * forward_flops(encoder), COMPILE_FLOPS[device.type]
    except Exception as error:  # of the counter itself, which goes through any module's operations
        return False, f"its operations could not be counted ({' '.join(str(error).split())[:100]})"
    return work >= enough, f"{work:.1e} FLOP ahead, compiling pays from {enough:.0e}"


def compile_module(module):
    """A module compiled for one shape of input, sharing its weights with the one that is given.

    Where it consists of blocks alike, one block is compiled and its code serves all: compiling takes less
    than half as long. Weights are written in place: neither they nor the outputs' memory may be frozen into
    the code, which TORCHINDUCTOR_FREEZING and the like in the environment ask for.
    """
    import torch._inductor.config as inductor
    inductor.freezing = inductor.triton.cudagraphs = False
    torch._dynamo.config.recompile_limit = 64              # kinds of blocks times shapes of input; else 8
    shared = {id(tensor): tensor for tensor in itertools.chain(module.parameters(), module.buffers())}
    twin = copy.deepcopy(module, shared)                   # the module's own blocks stay eager
    blocks = repeated_blocks(twin)
    for block in blocks:
        block.compile(dynamic=False)
    return twin if blocks else torch.compile(module, dynamic=False)


def unfuse_attention(module):
    """Have timm's attention of a module made of two products and a softmax; returns the parts it changed."""
    unfused = [part for part in module.modules() if getattr(part, "fused_attn", False)]
    for part in unfused:
        part.fused_attn = False
    return unfused


def repeated_blocks(module):
    """The blocks a module consists of, in lists of one class with at most half as many kinds (by shapes) as
    blocks; [] where not nearly all of its layers are in such blocks.
    """
    found, lists = [], [module]
    while lists:
        part = lists.pop()
        members, shapes = list(part.children()), set()
        for member in members:
            shapes.add(tuple((name, tensor.shape) for name, tensor in member.state_dict().items()))
        in_list = isinstance(part, (torch.nn.ModuleList, torch.nn.Sequential))
        alike = len(set(map(type, members))) == 1 and 2 * len(shapes) <= len(members)
        if in_list and alike and has_parts(members[0]):
            found += members
        else:
            lists += members
    inside = sum(number_of_layers(block) for block in found)
    return found if inside >= 0.8 * number_of_layers(module) else []


def number_of_layers(module):
    return sum(not has_parts(part) for part in module.modules())


def has_parts(module):
    return next(module.children(), None) is not None


def forward_flops(encoder):
    """Floating-point operations of one input's forward pass (2 per multiply-add)."""
    from torch.utils.flop_counter import FlopCounterMode
    # detached: the counter's hooks fail where a module takes parameters that want gradients
    weights = {name: parameter.detach() for name, parameter in encoder.module.named_parameters()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.func.functional_call(encoder.module, weights, (encoder.example(1),))
    return counter.get_total_flops()


def evaluation_batch(forward, encoder, device, dtype):
    """Inputs per evaluated batch.

    32 on a CPU, where a batch should fit the caches; on a GPU the largest power of two up to 512 whose
    activations, measured on eight inputs, take at most a quarter of the free memory.
    """
    if device.type != "cuda":
        return 32
    inputs, batch = encoder.example(8).to(device), 512
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with torch.inference_mode():
        forward(inputs)
    each = (torch.cuda.max_memory_allocated(device) - before) / len(inputs)
    while batch > 8 and batch * each > torch.cuda.mem_get_info(device)[0] / 4:
        batch //= 2
    return batch


def training_batch(step, batch_size, device):
    """Inputs that train at a time: all of a step's, or on a GPU a half, a quarter ... of them, where all do
    not fit.

    step     function of a number of inputs: their forward and backward pass. What one more input takes is
             measured at 4 and 8; all may take half of the memory that is free
    """
    if device.type != "cuda":
        return batch_size
    peaks = []
    for n in (4, 8):
        step(n)                                            # the first call also loads kernels
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step(n)
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
    torch.cuda.empty_cache()
    each, free = (peaks[1] - peaks[0]) / 4, torch.cuda.mem_get_info(device)[0]
    while batch_size > 1 and batch_size * each > free / 2:
        batch_size = -(-batch_size // 2)
    return batch_size


# --------------------------------------------------------------------------------------- memory and disk


def reset_peak_memory(device):
    """Start peak_memory anew. On a CPU Linux can do so; elsewhere it stays the process's whole life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """Peak bytes since reset_peak_memory: of a GPU's allocator, or of the resident process.

    On Linux without the pages of memory-mapped files, as many as are resident now.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():    # not ru_maxrss, which a process inherits from its parent
        kib = dict(re.findall(r"(VmHWM|RssAnon|RssFile):\s*(\d+)", status.read_text()))
        return 1024 * max(int(kib["VmHWM"]) - int(kib["RssFile"]), int(kib["RssAnon"]))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss    # bytes on macOS


def cost_of(function, device):
    """(what a function returns, its seconds, peak bytes besides those that were there before)."""
    reset_peak_memory(device)
    before, start = peak_memory(device), time.perf_counter()
    found = function()
    return found, time.perf_counter() - start, peak_memory(device) - before


def make_room(folder, need, what):
    """Say what is to be written under `folder` (bytes) and what is free there; Refused if it does not fit."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    print(f"disk: up to {need / 1e9:.2f} GB of {what} under {folder}, {free / 1e9:.0f} GB free", flush=True)
    if need > free:
        raise Refused(f"{what} need {need / 1e9:.2f} GB under {folder}, which has {free / 1e9:.2f} GB free")


def check_memory(device, need, what):
    """Refused where `what` needs more bytes than the device or this machine has left; said where it fits."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif Path("/proc/meminfo").exists():
        free = 1024 * int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1])
    else:
        return
    print(f"memory: {what} need {need / 1e9:.2f} GB and their activations, {free / 1e9:.0f} GB free",
          flush=True)
    if need > free:
        raise Refused(f"{what} need {need / 1e9:.2f} GB, {device} has {free / 1e9:.2f} GB free: "
                      f"leave out the largest tasks, or give another --device")


def describe_machine(device):
    """{"device", "threads", "processes", library versions}: where a number was made."""
    name = f"{platform.machine()} {cpu_name()}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {"device": name, "threads": torch.get_num_threads(), "processes": ranks.world(),
            "python": platform.python_version(), "torch": torch.__version__,
            **{name: importlib.metadata.version(name) for name in ("timm", "transformers")}}


def cpu_name():
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0].strip() if names else platform.processor()
