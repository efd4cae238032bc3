"""One small study on `tiny`, made by the real run_all.sh, shared by all tests that need results."""
import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import filelock
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
# lib is imported where it is used: the process that only deals tests out need not wait for torch

TASKS = ["glyphs", "signs", "textures"]
SMALL = ["--tasks", ",".join(TASKS), "--pretrain-steps", "40", "--probe-steps", "300",
         "--steps", "20", "--batch-size", "32", "--lambdas", "11", "--points", "5", "--samples", "100"]
TIMM = "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k"
STAGES = {  # the settings of SMALL, stage by stage
    "probe": ["--probe-steps", "300"], "finetune": ["--steps", "20", "--batch-size", "32", "--lr", "1e-3"],
    "make_vectors": [], "merge_eval": ["--lambdas", "11"],
    "disentangle": ["--points", "5", "--samples", "100"],
}
RESULT = {"probe": "tiny/probe.json", "finetune": "tiny/aligned/finetune.json",
          "make_vectors": "tiny/aligned/vectors.json", "merge_eval": "tiny/aligned/merge.json",
          "disentangle": "tiny/aligned/disentangle.json"}


def stage(*words, env=None, cwd=ROOT, input=None):
    """Run a command in the repository as a user would; returns the finished process with its text output."""
    return subprocess.run([str(word) for word in words], cwd=cwd, env=env or os.environ, capture_output=True,
                          text=True, input=input)


def snapshot(folder):
    """{file: (size, mtime)} of everything below, temporary files too."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


def contents(folder):
    """{file: bytes} of all but locks, relative to the folder."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".lock":
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


def refuse(name, *words):
    """Call a stage's main in this process; returns the refusal's text. Anything else fails the test."""
    from lib import files
    with pytest.raises(files.Refused) as refusal:
        perform(name, *words)
    return str(refusal.value)


def perform(name, *words):
    """Call a stage's main in this process with command-line words; a stage of a copied tree by its path."""
    module, words = stage_module(name), [str(word) for word in words]
    with mock.patch.object(sys, "argv", [f"{module.__name__}.py", *words]), as_a_process():
        module.main(module.parse_args())


@contextlib.contextmanager
def as_a_process():
    """The locks that the body claims are let go of at its end, as when a process ends, however it ends."""
    from lib import results
    held, claim = [], results.claim

    def remembering(path, name):
        held.append(claim(path, name))
        return held[-1]

    with mock.patch.object(results, "claim", remembering):
        try:
            yield
        finally:
            for lock in filter(None, held):
                lock.release(force=True)


def stage_module(name):
    """A stage's module by its name, or made anew of the file at a path; its imports are the repository's."""
    if isinstance(name, str):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name.stem, name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LONGEST = ["killed_anywhere", "the_recipes_run", "go_through_every_stage"]


def pytest_collection_modifyitems(items):
    """One worker makes the study at once, another runs meanwhile what needs none; the longest first."""
    def order(item):
        return "study" in item.fixturenames, not any(name in item.nodeid for name in LONGEST)

    items.sort(key=order)
    first = next((item for item in items if "study" in item.fixturenames), None)
    if first:
        items.remove(first)
        items.insert(0, first)


FEW = {"train": (0, 1000), "test": (1, 400)}               # generated.SPLITS of the small study


def draw_few(runs):
    """Smaller splits of the study's tasks in runs/inputs, where every stage finds them drawn already."""
    from lib import generated, store
    with mock.patch.object(generated, "SPLITS", FEW):
        for name in TASKS:
            pictures = types.SimpleNamespace(takes="images", stored_as=lambda name: generated.SIDE)
            store.stored_folder(name, "generated", None, pictures, runs, 0)


@pytest.fixture(scope="session", autouse=True)
def pictures_drawn_once():
    """Of each kind of picture this process draws the first, and writes that for all: drawing is slow."""
    import matplotlib.pyplot as plt

    from lib import files, plots
    drawn, save = {}, plots.save

    def save_once(path, fig):
        kind = sys._getframe(1).f_code.co_name
        if kind not in drawn:
            save(path, fig)
            drawn[kind] = path.read_bytes()
            return path
        plt.close(fig)
        with files.replacing(path) as temporary:
            temporary.write_bytes(drawn[kind])
        print(f"picture: {path}", flush=True)
        return path

    save_once.in_full = save                               # for tests of files' sizes
    with mock.patch.object(plots, "save", save_once):
        yield


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """The runs folder of a finished small study; tests must leave it as it is (copy it to change it)."""
    base = tmp_path_factory.getbasetemp()
    runs = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "study" / "runs"
    with filelock.FileLock(runs.parent.with_suffix(".lock")):    # one study for all of xdist's workers
        if not runs.exists():
            draw_few(runs)
            elsewhere = os.environ | {"MPLBACKEND": "module://of_a_notebook"}          # not installed
            finished = stage("bash", "run_all.sh", "tiny", "--runs", runs, *SMALL, env=elsewhere)
            if finished.returncode:
                shutil.rmtree(runs, ignore_errors=True)
            assert finished.returncode == 0, finished.stdout + finished.stderr
    return runs


@pytest.fixture(scope="session")
def both(study):
    """The small study with the variant full and the subsets of tasks added; tests must leave it as it is."""
    runs = study.parent / "both"
    with filelock.FileLock(runs.with_suffix(".lock")):
        if not (runs / "report/report.md").exists():
            shutil.rmtree(runs, ignore_errors=True)
            shutil.copytree(study, runs)
            shared = ["tiny", "--runs", runs, "--name"]
            perform("finetune", *shared, "full", "--steps", "20", "--batch-size", "32", "--lr", "1e-3")
            perform("make_vectors", *shared, "full")
            perform("merge_eval", *shared, "full", "--lambdas", "5")
            perform("disentangle", *shared, "full", "--points", "5", "--samples", "60")
            for name in ("aligned", "full"):
                small = ["--lambdas", "3", "--per-size", "1", "--images-per-task", "40"]
                perform("subsets", *shared, name, *small)
            perform("report", "--runs", runs)
    return runs


@pytest.fixture
def copy(study, tmp_path):
    """A private copy of the finished study."""
    return Path(shutil.copytree(study, tmp_path / "runs"))


def edit(path, before, after):
    """Replace a piece of a file that is there once."""
    text = path.read_text()
    assert text.count(before) == 1, f"{path.name} has {before!r} {text.count(before)} times"
    path.write_text(text.replace(before, after))


@pytest.fixture
def code_copy(tmp_path):
    """A copy of the repository's Python files, for a test to change."""
    root = tmp_path / "code"
    shutil.copytree(ROOT / "lib", root / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, root)
    return root


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
    words = ["--device", "cpu", "--compile", "off", "--dtype", "fp32"]
    from lib import flags
    return flags.stage_parser("").parse_args(["tiny", "--runs", str(tmp_path / "runs"), *words])


@pytest.fixture
def small_encoder():
    """A one-block ViT with random weights, 16-pixel images."""
    import torch

    from lib import encoders, files
    architecture = {"library": "timm", "name": "vit_tiny_patch16_224",
                    "kwargs": {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2,
                               "num_classes": 0}}
    torch.manual_seed(0)
    module = encoders.build_architecture(architecture).eval()
    description = encoders.describe(module, architecture, 16, (0.5,) * 3, (0.5,) * 3, 1.0, encoder="small")
    return encoders.as_encoder(lambda: module, description, files.fingerprint(encoders.weights_of(module)))
