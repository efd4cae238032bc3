"""One small study on `tiny`, made by the real run_all.sh, shared by all tests that need results."""
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import filelock
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import files

TASKS = ["glyphs", "signs", "textures"]
SMALL = ["--tasks", ",".join(TASKS), "--pretrain-steps", "80", "--probe-steps", "300", "--steps", "20", "--batch-size", "32",
         "--points", "5", "--samples", "100"]


def stage(*words, env=None):
    """Run a command in the repository as a user would; returns the finished process with its text output."""
    return subprocess.run([str(word) for word in words], cwd=ROOT, env=env or os.environ, capture_output=True, text=True)


TIMM = "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k"
STAGES = {  # the settings of conftest.SMALL, stage by stage
    "probe": ["--probe-steps", "300"], "finetune": ["--steps", "20", "--batch-size", "32", "--lr", "5e-4"], "make_vectors": [], "merge_eval": [],
    "disentangle": ["--points", "5", "--samples", "100"],
}
RESULT = {"probe": "tiny/probe.json", "finetune": "tiny/aligned/finetune.json", "make_vectors": "tiny/aligned/vectors.json",
          "merge_eval": "tiny/aligned/merge.json", "disentangle": "tiny/aligned/disentangle.json"}


def snapshot(folder):
    """{file: (size, mtime)} of everything below, temporary files too."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*")) if path.is_file()}


def refuse(name, *words):
    """Call a stage's main in this process; returns the refusal's text. Any other exception, or none, fails the test."""
    with pytest.raises(files.Refused) as refusal:
        perform(name, *words)
    return str(refusal.value)


def perform(name, *words):
    """Call a stage's main in this process with command-line words."""
    module, words = importlib.import_module(name), [str(word) for word in words]
    with mock.patch.object(sys, "argv", [f"{name}.py", *words]):
        try:
            module.main(module.parse_args())
        finally:
            files.CLAIMS.clear()                                           # closed, as when a process ends


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """The runs folder of a finished small study; tests must leave it as it is (copy it to change it)."""
    base = tmp_path_factory.getbasetemp()
    runs = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "study" / "runs"
    with filelock.FileLock(runs.parent.with_suffix(".lock")):              # one study for all of xdist's workers
        if not runs.exists():
            finished = stage("bash", "run_all.sh", "tiny", "--runs", runs, *SMALL)
            if finished.returncode:
                shutil.rmtree(runs, ignore_errors=True)
            assert finished.returncode == 0, finished.stdout + finished.stderr
    return runs


@pytest.fixture
def copy(study, tmp_path):
    """A private copy of the finished study."""
    return Path(shutil.copytree(study, tmp_path / "runs"))


def image_folder(folder, n_train=12, n_test=10, size=(20, 24), classes=("cat", "dog")):
    """A small data set of PNG files, train/CLASS/*.png and test/CLASS/*.png."""
    from PIL import Image
    rng = np.random.default_rng(0)
    for split, n in (("train", n_train), ("test", n_test)):
        for index in range(n):
            path = folder / split / classes[index % len(classes)] / f"{index:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return folder


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
