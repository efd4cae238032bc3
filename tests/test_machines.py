"""Machines unlike this one, by emulation and stand-ins: what a GPU's memory, units and drivers decide."""
import json
import os
import subprocess
import sys

import common
import disentangle
import finetune
import merge_eval
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TASKS, perform, refuse
from tf32 import Ampere, to_tf32

from lib import devices, encoders, files, linearized, training
from lib import study as study_module
from lib.study import open_study

CPU = torch.device("cpu")
MIB = 2 ** 20


def opened(runs, *words):
    """What a stage after finetune.py works on."""
    args = merge_eval.parse_args(["tiny", "--runs", str(runs), "--compile", "off", *words])
    return open_study(args, merge_eval.__file__, "finetune.json")


# --------------------------------------------------------------------------------------- devices


def test_fp32_is_fp32_in_convolutions_and_products(monkeypatch):
    for backend in (torch.backends.cudnn, torch.backends.cuda.matmul):
        backend.allow_tf32 = True
    devices.pick_device("cpu")
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_a_gpu_that_torch_cannot_use_is_refused_and_not_replaced_by_months_of_cpu(monkeypatch):
    """On this machine torch finds no GPU: as with a driver too old for it, or torch's build for CPUs."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(devices, "nvidia_driver", lambda: "NVIDIA UNIX x86_64 Kernel Module  470.1")
    for name in ("auto", "cuda"):
        unusable = rf"--device {name}: cuda is not usable.*470\.1.*install a torch"
        with pytest.raises(files.Refused, match=unusable):
            devices.pick_device(name)
    assert devices.pick_device("cpu").type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")         # whoever hides the GPU wants the CPU
    assert devices.pick_device("auto").type == "cpu"


def test_a_device_without_code_for_products_is_found_out_at_once(monkeypatch):
    """As a V100 under a build without sm_70: it allocates, and fails at its first kernel."""
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda *_: (_ for _ in ()).throw(
        RuntimeError("CUDA error: no kernel image is available for execution on the device")))
    with pytest.raises(files.Refused, match="no kernel image is available"):
        devices.pick_device("cpu")


def test_a_gpu_by_its_number_is_refused_under_torchrun(monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(files.Refused, match="cuda:1 under torchrun: give --device cuda"):
        devices.pick_device("cuda:1")


def test_nothing_is_compiled_without_a_compiler_or_the_headers_of_python(monkeypatch, small_encoder):
    for device in (CPU, torch.device("cuda")):
        assert devices.compile_pays("on", device, small_encoder, 1)[0]
        with monkeypatch.context() as without:
            without.setattr(devices.sysconfig, "get_path", lambda _: "/nowhere")
            assert devices.compile_pays("on", device, small_encoder, 1) == \
                (False, "no Python.h here, as of a package python3-dev")
        with monkeypatch.context() as without:
            without.setenv("PATH", "/nowhere")
            for variable in ("CC", "CXX"):
                without.delenv(variable, raising=False)
            assert "no compiler here" in devices.compile_pays("on", device, small_encoder, 1)[1]


def test_operations_that_cannot_be_counted_leave_it_eager(monkeypatch, small_encoder):
    def fail(*_):
        raise KeyError("an operation of its own")

    monkeypatch.setattr("torch.utils.flop_counter.FlopCounterMode.get_total_flops", fail)
    compiled, why = devices.compile_pays("auto", torch.device("cpu"), small_encoder, 10 ** 9)
    assert not compiled and "could not be counted ('an operation of its own')" in why


def test_a_compiler_that_fails_leaves_the_evaluator_eager_with_a_line(study, monkeypatch, capsys, tmp_path):
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))            # where nothing is compiled yet
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/bin/false",))
    there = opened(study, "--tasks", "signs")
    there.compile = "auto"
    monkeypatch.setattr(devices, "COMPILE_FLOPS", {"cpu": 0})
    evaluator = there.evaluator(1)
    assert "eager (compiling failed:" in capsys.readouterr().out
    [[hits]] = evaluator.hits([there.tasks["signs"].splits["test"]], [there.heads["signs"]], [()])
    assert hits == files.read_json(study / "tiny/probe.json", "")["tasks"]["signs"]["paper"]["hits_test"]
    there.compile = "on"
    with pytest.raises(files.Refused, match="--compile on: compiling failed"):
        there.evaluator(1)
    torch._dynamo.reset()

# --------------------------------------------------------------------------------------- bf16 in training


class Operations(torch.utils._python_dispatch.TorchDispatchMode):
    """Inside, the names of all operations are kept, each with the dtype of its first argument."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        dtype = getattr(args[0], "dtype", "") if args else ""
        self.seen.add(f"{function} {dtype}".replace("torch.", ""))
        return function(*args, **kwargs or {})


def test_training_in_bf16_on_a_cpu_has_plain_attention_and_fp32_gradients(small_encoder):
    module, images = small_encoder.module.train(), torch.randn(16, 3, 16, 16)
    gradients, operations = {}, {}
    for amp in (False, True):
        with Operations() as ran:
            with training.mixed_precision(CPU, amp):
                features = module(images)
            F.cross_entropy(features.float()[:, :4], torch.arange(16) % 4).backward()
        gradients[amp] = {name: parameter.grad for name, parameter in module.named_parameters()}
        operations[amp] = " ".join(ran.seen)
        module.zero_grad()
    assert "aten.addmm.default bfloat16" in operations[True] and "bfloat16" not in operations[False]
    assert "flash_attention" in operations[False] and "flash_attention" not in operations[True]
    for name, exact in gradients[False].items():
        assert gradients[True][name].dtype == torch.float32
        assert (gradients[True][name] - exact).norm() < 0.03 * exact.norm() + 1e-6, name
    assert len(devices.unfuse_attention(module)) == 1 and devices.unfuse_attention(module) == []


# --------------------------------------------------------------------------------------- TF32


def test_tf32_rounds_to_ten_bits():
    assert to_tf32(torch.tensor([1.0, 1 + 2 ** -10, 1 + 2 ** -11, 1 + 3 * 2 ** -11, -3.0])).tolist() == \
        [1.0, 1 + 2 ** -10, 1.0, 1 + 2 ** -9, -3.0]


def test_tf32_is_on_in_the_encoder_and_off_in_the_head_and_afterwards(study):
    there = opened(study)
    task, head = there.tasks["glyphs"], there.heads["glyphs"]
    plain = common.Evaluator(there.encoder, CPU, torch.float32)
    rounded = common.Evaluator(there.encoder, CPU, torch.float32, tf32=True)
    with Ampere() as gpu:
        [fp32] = plain.features([task.splits["test"]])
        assert gpu.products == 0
        [tf32] = rounded.features([task.splits["test"]])
        encoder_products = gpu.products
        rounded.hits([task.splits["test"]], [head], [()])
        assert gpu.products == 2 * encoder_products > 0     # none in the head
    error = ((tf32 - fp32).norm() / fp32.norm()).item()
    assert 2 ** -15 < error < 2 ** -7
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    linear = linearized.LinearizedEvaluator(there.encoder, CPU, torch.float32, tf32=True)
    linear.use_vectors([linear.theta_pre])
    with Ampere() as gpu:
        linear.features([task.splits["test"]], [(0.1,)])
        assert gpu.products > 0


def test_tf32_is_a_precision_of_heat_maps_on_gpus_that_have_it(study, monkeypatch, copy, capsys):
    words = ["disentangle", "tiny", "--runs", copy, "--points", "3", "--samples", "20"]
    assert "--dtype tf32 is for NVIDIA GPUs from Ampere on" in refuse(*words, "--dtype", "tf32")
    for capability, there in (((7, 0), False), ((8, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert devices.has_tf32(torch.device("cuda")) == there and not devices.has_tf32(CPU)
    for there, dtype in ((False, "float32"), (True, "tf32")):              # the default
        for module in (devices, study_module):
            monkeypatch.setattr(module, "has_tf32", lambda _, found=there: found)
        with Ampere() as gpu:
            perform(*words)
        result = files.read_json(copy / "tiny/aligned/disentangle.json", "")
        assert result["config"]["dtype"] == dtype and (gpu.products > 0) == there
        assert f"evaluator: {dtype} (--dtype {dtype.replace('float', 'fp')}" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- memory


def test_the_linear_evaluator_measures_the_memory_of_what_it_runs(small_encoder, monkeypatch):
    """Its derivative takes more than the forward pass by which the ordinary one chooses its batch."""
    shapes, expand = [], linearized.expand
    monkeypatch.setattr(common, "evaluation_batch",
                        lambda forward, *_: (forward(small_encoder.example(3)), 32)[1])
    monkeypatch.setattr(linearized, "expand",
                        lambda *given: shapes.append(given[3].shape) or expand(*given))
    common.Evaluator(small_encoder, CPU, torch.float32)
    assert not shapes
    assert linearized.LinearizedEvaluator(small_encoder, CPU, torch.float32).batch_size == 32
    assert shapes == [(3, 3, 16, 16), (1, 3, 16, 16)]      # and whether there is a derivative


@pytest.mark.parametrize("batch, each, free, fits", [
    (128, 10, 24_000, 128), (128, 100, 24_000, 64), (128, 300, 24_000, 32), (100, 300, 24_000, 25),
    (30, 5_000, 24_000, 2), (128, 50_000, 1, 1)])
def test_what_trains_at_a_time_on_a_gpu_follows_from_its_memory(monkeypatch, batch, each, free, fits):
    """A stand-in for torch's allocator: 700 MiB of gradients, and so many MiB for each input."""
    seen, each, free = [], each * MIB, free * MIB
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 500 * MIB)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1200 * MIB + seen[-1] * each)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    assert devices.training_batch(seen.append, batch, torch.device("cuda")) == fits
    assert devices.training_batch(seen.append, batch, CPU) == batch


def test_micro_batches_train_as_the_whole_batch_does(small_encoder):
    """The mean loss of the step, one clip and one update: only the order of additions differs."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 3, 16, 16), dtype=np.uint8)
    split = common.Split(pixels, np.arange(60), rng.integers(0, 4, 60))
    task = common.Task("t", {"train": split}, list("abcd"), "", "generated")
    head = common.random_head(32, 4, torch.Generator().manual_seed(0))
    theta, losses = {}, {}
    for recipe in ("aligned", "full", "linearized"):
        chosen = finetune.RECIPES[recipe]
        for size in (10, 5, 4, 1):                          # 4: the last part has two
            module = encoders.build_architecture(small_encoder.description["architecture"]).train()
            forward = linearized.forward(module, small_encoder, CPU) if chosen.linear else module
            plan = {"lr": 1e-3, "steps": 5, "batch_size": 10, "micro_batch": size, "seed": 0}
            theta[size], _, about = finetune.train(forward, module, small_encoder, task, head, chosen, plan)
            losses[size] = about["final_loss"]
            assert about["micro_batch"] == size
        for size in (5, 4, 1):
            assert losses[size] == pytest.approx(losses[10], rel=1e-4)
            for name, tensor in theta[10].items():
                torch.testing.assert_close(theta[size][name], tensor, rtol=0, atol=1e-4)
        moved = max((theta[10][name] - tensor).abs().max()
                    for name, tensor in encoders.weights_of(small_encoder.module).items())
        assert moved > 1e-3                                 # far more than they differ by


def test_micro_batches_of_a_batch_norm_are_refused(small_encoder):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4), torch.nn.BatchNorm2d(8))
    assert training.choose_micro_batch(9, module, module, small_encoder, 8, CPU, False) == 8
    with pytest.raises(files.Refused, match="batch norms.*give a --batch-size of 4"):
        training.choose_micro_batch(4, module, module, small_encoder, 8, CPU, False)


def test_micro_batches_are_said_and_no_setting(copy, capsys):
    """Fine-tuned in parts, a finished task stays finished: the definition of its numbers is the same."""
    words = ["finetune", "tiny", "--runs", copy, "--tasks", ",".join(TASKS), "--steps", "3", "--batch-size",
             "8", "--lr", "1e-3", "--name", "parts", "--micro-batch", "3"]
    perform(*words)
    assert "steps of 8, 3 at a time" in capsys.readouterr().out
    rows = files.read_json(copy / "tiny/parts/finetune.json", "")["tasks"]
    assert [row["micro_batch"] for row in rows.values()] == [3] * len(TASKS)
    perform(*words[:-2])
    assert "nothing to do" in capsys.readouterr().out


PEAK = """
import sys
import numpy as np
import torch
from lib import devices
cpu, mib = torch.device("cpu"), 2 ** 20
devices.reset_peak_memory(cpu)
before, pixels = devices.peak_memory(cpu), np.load(sys.argv[1], mmap_mode="r")
assert pixels[::4096].sum() == 32 * 1024               # touches every page
assert abs(devices.peak_memory(cpu) - before) < 32 * mib
allocated = np.ones(128 * mib, dtype=np.uint8)
del allocated
assert 96 * mib < devices.peak_memory(cpu) - before < 160 * mib
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak starts anew on Linux")
def test_peak_memory_counts_what_was_allocated_and_no_mapped_files(tmp_path):
    np.save(tmp_path / "pixels.npy", np.ones(128 * 2 ** 20, dtype=np.uint8))
    # in a process of its own: here another test's memory may be given back in between
    subprocess.run([sys.executable, "-c", PEAK, tmp_path / "pixels.npy"], cwd=ROOT, check=True)


# --------------------------------------------------------------------------------------- gpu_checks


def test_gpu_checks_prove_on_a_cpu_what_they_can_and_name_what_they_skip(tmp_path, capsys, monkeypatch):
    import gpu_checks
    words = ["environment", "study", "ranks", "--device", "cpu", "--out", str(tmp_path / "checks.json")]
    own, asked = gpu_checks.in_its_own_process, []

    def process(name, device):
        asked.append(name)
        if name == "study":
            return own(name, device)                        # a process indeed
        if name == "ranks":
            return {"status": "failed", "said": "Traceback"}
        return {"status": "done", **gpu_checks.PARTS[name](torch.device(device))}

    monkeypatch.setattr(gpu_checks, "in_its_own_process", process)
    assert gpu_checks.main(gpu_checks.parse_args(words)) == 1
    found = json.loads(capsys.readouterr().out)
    parts = found["parts"]
    assert parts["study"]["status"] == "skipped" and "needs a GPU" in parts["study"]["skipped"]
    assert parts["environment"]["status"] == "done" and parts["environment"]["tf32"] is False
    assert found["does not hold"] == ["ranks: failed"]
    assert gpu_checks.main(gpu_checks.parse_args(words)) == 1
    assert asked == ["environment", "study", "ranks", "ranks"]              # what failed is tried again


def test_gpu_checks_compare_pixels_random_states_and_optimizers():
    import gpu_checks
    claims = gpu_checks.units(CPU)["claims"]
    assert len(claims) == 5 and all(claim["holds"] for claim in claims.values())
    assert not gpu_checks.claim(3, 2)["holds"]
