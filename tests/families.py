"""
Do encoders of other structure go through the stages? Each with random weights of its real architecture, on
two tasks of coloured squares: probe, one step of fine-tuning, vectors, merge; then a step of attention, one
of linearized.

    python tests/families.py                        # all of FAMILIES, a line of a table each
    python tests/families.py pvt_v2_b0 levit_128s   # some, or others of timm

A refusal is shown as it is said; what ends otherwise is shown with its last line, and the exit code is 1.
"""
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from lib.encoders import separate_weights

FAMILIES = """
vit_tiny_patch16_224 deit3_small_patch16_224 beitv2_base_patch16_224 eva02_tiny_patch14_224 cait_xxs24_224
xcit_nano_12_p16_224 swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 twins_svt_small pvt_v2_b0 pit_ti_224
convit_tiny crossvit_tiny_240 coat_lite_tiny coat_tiny tnt_s_legacy_patch16_224 levit_128s visformer_tiny
poolformer_s12 mvitv2_tiny hiera_tiny_224 maxvit_pico_rw_256 coatnet_nano_rw_224 gcvit_xxtiny davit_tiny
focalnet_tiny_srf nextvit_small tiny_vit_5m_224 edgenext_xx_small mobilevit_xxs fastvit_t8 efficientvit_m0
efficientvit_b0 repvit_m0_9 efficientformer_l1 swiftformer_xs sequencer2d_s mixer_s16_224 resmlp_12_224
convnext_atto convnextv2_atto resnet18 resnetv2_50x1_bit regnety_002 densenet121 inception_v3 vgg11
efficientnet_b0 mobilenetv3_small_050 mobilenetv4_conv_small ghostnet_050 hrnet_w18_small dla34 nfnet_l0
res2net50_26w_4s volo_d1_224 naflexvit_base_patch16_gap
""".split()
COLOURS = {"warm": ((220, 60, 40), (230, 200, 40)), "cold": ((40, 60, 220), (40, 200, 90))}  # classes
SHORT = ["--compile", "off", "--device", "cpu"]


def make_tasks(folder):
    """Two image folders of 60 and 20 pictures: squares of two colours each, with noise."""
    draw = np.random.default_rng(0)
    for task, colours in COLOURS.items():
        for split, n in (("train", 60), ("test", 20)):
            for index in range(n):
                place = folder / task / split / "ab"[index % 2] / f"{index}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.array(colours[index % 2]) + draw.normal(0, 25, (32, 32, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place)


def outcome(*stages):
    """ "works", or the line in which stages run one after another refuse; (it, whether that is in order)."""
    words = [word for stage in stages for word in ("--", *stage)]
    done = subprocess.run([sys.executable, "lib/together.py", *map(str, words)], cwd=ROOT, text=True,
                          capture_output=True)
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return ("works", True) if done.returncode == 0 else (last, done.returncode == 2)


def through_the_stages(name, folder):
    """({what: outcome}, all in order, parameters, seconds) of one timm encoder."""
    start, runs = time.perf_counter(), folder / name
    weights = folder / "weights.safetensors"
    module = timm.create_model(name)
    for parameter in module.parameters():                   # layer scales of 1e-5 make all pictures alike
        if 0 < parameter.max() < 1e-2:
            torch.nn.init.constant_(parameter, 0.1)
    save_file(separate_weights(module), weights)
    shared = [f"timm:{name}", "--runs", runs, *SHORT]
    step = ["--steps", "1", "--batch-size", "8", "--lr", "1e-4"]
    probe = ["probe.py", *shared, "--weights", weights, "--data", folder, "--tasks", "warm,cold",
             "--probe-steps", "50"]
    found = {"aligned": outcome(probe, ["finetune.py", *shared, *step], ["make_vectors.py", *shared],
                                ["merge_eval.py", *shared, "--lambdas", "3"])}
    for recipe in ("attention", "linearized") if found["aligned"][0] == "works" else ():
        found[recipe] = outcome(["finetune.py", *shared, "--name", recipe, *step])
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return ({recipe: said for recipe, (said, _) in found.items()}, all(right for _, right in found.values()),
            parameters, time.perf_counter() - start)


if __name__ == "__main__":
    wrong = []
    print("| timm encoder | M | aligned, to the merge | attention | linearized | s |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        make_tasks(Path(folder))
        for name in sys.argv[1:] or FAMILIES:
            found, right, parameters, seconds = through_the_stages(name, Path(folder))
            cells = " | ".join(found.get(recipe, "") for recipe in ("aligned", "attention", "linearized"))
            print(f"| {name} | {parameters / 1e6:.1f} | {cells} | {seconds:.0f} |", flush=True)
            if not right:
                wrong.append(name)
    sys.exit(f"not in one line: {', '.join(wrong)}" if wrong else 0)
