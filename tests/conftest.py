"""One small study on `tiny`, made by the real run_all.sh, shared by all tests that need results."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
TASKS = ["glyphs", "signs", "textures"]
SMALL = ["--tasks", ",".join(TASKS), "--pretrain-steps", "80", "--probe-steps", "300", "--steps", "20", "--batch-size", "32",
         "--points", "5", "--samples", "100"]


def stage(*words, env=None):
    """Run a command in the repository as a user would; returns the finished process with its text output."""
    return subprocess.run([str(word) for word in words], cwd=ROOT, env=env or os.environ, capture_output=True, text=True)


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """The runs folder of a finished small study; tests must leave it as it is (copy it to change it)."""
    runs = tmp_path_factory.mktemp("study") / "runs"
    finished = stage("bash", "run_all.sh", "tiny", "--runs", runs, *SMALL)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return runs


@pytest.fixture
def args(tmp_path):
    """Shared flags of a stage, for calling the library part without a command line."""
    import common
    return common.stage_parser("").parse_args(["tiny", "--runs", str(tmp_path / "runs"), "--device", "cpu", "--compile", "off", "--dtype", "fp32"])


@pytest.fixture
def small_encoder():
    """A one-block ViT with random weights, 16-pixel images."""
    import timm
    import torch
    from encoders import Encoder, weights_of
    from files import fingerprint
    torch.manual_seed(0)
    module = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0).eval()
    return Encoder("small", module, 16, (0.5,) * 3, (0.5,) * 3, 1.0, fingerprint(weights_of(module)))
