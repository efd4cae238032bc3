"""Real architectures with random weights, real file layouts, downloads from a stand-in hub on loopback."""
import contextlib
import copy as copying
import hashlib
import io
import json
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

import common
import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, TIMM, image_folder, perform, refuse, stage
from PIL import Image
from safetensors.torch import save_file
from stand_in_hub import client_environment, serve, write_data_set, write_timm_model

from lib import encoders, images, linearized, reading
from lib.devices import forward_flops
from lib.encoders import load_encoder
from lib.files import Refused

HALF, IMAGENET = ((0.5,) * 3, (0.5,) * 3), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
OPEN_CLIP = "open_clip:ViT-S-32-alt/laion"
TIMM_NAME = TIMM.removeprefix("timm:")


# --------------------------------------------------------------------------------------- architectures


class Flat(torch.nn.Module):
    """(B, 3, S, S) -> (B, 3), the mean of each channel."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, images):
        return images.mean((2, 3)) * self.scale


@pytest.mark.parametrize("name, width, parameters, statistics, crop", [
    ("vit_b16_sup_in21k", 768, 85.8e6, HALF, 0.9), ("vit_b16_sup_in1k", 768, 85.8e6, HALF, 0.9),
    ("vit_b16_mae", 768, 85.8e6, IMAGENET, 0.9), ("vit_b16_dino", 768, 85.8e6, IMAGENET, 0.9),
    ("vit_b16_clip_laion400m", 512, 86.2e6, CLIP, 1.0), ("vit_b16_clip_laion2b", 512, 86.2e6, CLIP, 1.0),
    ("vit_l16_sup_in21k", 1024, 303.3e6, HALF, 0.9), ("vit_l14_clip_laion2b", 768, 304.0e6, HALF, 1.0),
])
def test_the_eight_named_encoders(name, width, parameters, statistics, crop, monkeypatch, tmp_path):
    """The real construction, but with random weights on the meta device, where ViT-L costs nothing."""
    create, asked = timm.create_model, {}

    def create_without_weights(model, pretrained, **kwargs):
        asked.update(kwargs, model=model, pretrained=pretrained)
        kwargs.pop("pretrained_cfg_overlay", None)
        with torch.device("meta"):
            return create(model, pretrained=False, **kwargs)

    def download(repo, file):
        asked.update(download=(repo, file))
        return tmp_path / file

    monkeypatch.setattr(timm, "create_model", create_without_weights)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    file = encoders.checkpoint_file(name, None)
    module, taken = encoders.build_timm(encoders.ENCODERS[name].removeprefix("timm:"), file, None)
    assert asked["pretrained"] and (name == "vit_b16_clip_laion400m") == ("download" in asked)
    assert ("pretrained_cfg_overlay" in asked) == ("download" in asked)
    assert module(torch.zeros(2, 3, 224, 224, device="meta")).shape == (2, width)
    assert sum(parameter.numel() for parameter in module.parameters()) == pytest.approx(parameters, rel=2e-3)
    assert (tuple(taken["mean"]), tuple(taken["std"])) == statistics
    assert taken["crop_pct"] == crop and taken["size"] == 224
    encoder = encoders.as_encoder(lambda: module, encoders.describe(module, **taken, encoder=name))
    assert (encoder.mean, encoder.std) == statistics and (encoder.size, encoder.width) == (224, width)
    assert encoder.frame.side == (248 if crop == 0.9 else 224)
    rebuilt = encoders.build_architecture(taken["architecture"])
    shapes = {key: tensor.shape for key, tensor in module.state_dict().items()}
    assert {key: tensor.shape for key, tensor in rebuilt.state_dict().items()} == shapes


def test_the_feature_is_the_class_token_after_the_final_norm(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    encoder = load_encoder(TIMM, tmp_path / "runs", tmp_path / "weights.pth")
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(encoder.module(images), model.forward_features(images)[:, 0])


def test_position_embeddings_are_resampled_and_the_size_is_remembered(tmp_path):
    runs, weights = tmp_path / "runs", tmp_path / "weights.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), weights)
    encoder = load_encoder(TIMM, runs, weights, 96)
    assert encoder.size == 96 and encoder.module(torch.zeros(1, 3, 96, 96)).shape == (1, 192)
    again = load_encoder(TIMM, runs)
    assert again.size == 96 and again.fingerprint == encoder.fingerprint
    with pytest.raises(Refused, match="96 pixels, not 224"):
        load_encoder(TIMM, runs, image_size=224)


def test_a_convolutional_encoder_at_another_size(tmp_path):
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("convnext_atto").state_dict(), weights)
    encoder = load_encoder("timm:convnext_atto.d2_in1k", tmp_path / "runs", weights, 64)
    assert encoder.module(torch.zeros(1, 3, 64, 64)).shape == (1, 320)


def test_an_open_clip_tower_from_a_local_file_gives_its_projected_feature(tmp_path, caplog):
    import open_clip
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-S-32-alt").eval()
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    caplog.clear()
    encoder = load_encoder(OPEN_CLIP, tmp_path / "runs", tmp_path / "clip.pt")
    pictures = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(encoder.module(pictures), model.encode_image(pictures))
    assert "randomly" not in caplog.text
    assert (encoder.mean, encoder.std) == CLIP
    assert encoder.frame.side == encoder.size == 224             # the whole picture, no margin cropped
    assert load_encoder(OPEN_CLIP, tmp_path / "runs").fingerprint == encoder.fingerprint


def test_a_file_of_weights_keeps_the_statistics_and_the_transform_of_its_tag(tmp_path):
    import open_clip
    tower, asked = SimpleNamespace(output_tokens=True), {}

    def create(arch, **kwargs):
        asked.update(kwargs)
        known = {"size": 256, "mean": CLIP[0], "std": CLIP[1], "interpolation": "bicubic",
                 "resize_mode": "shortest"}
        tower.preprocess_cfg = known | kwargs["force_preprocess_cfg"]
        return SimpleNamespace(visual=tower)

    center, squash = ("bicubic", "center"), ("bicubic", "squash")
    for name, statistics, transform in (
            ("ViT-B-16-SigLIP/webli", HALF, squash), ("ViT-B-32/laion2b_s34b_b79k", CLIP, center),
            ("ViT-B-32/of-ones-own", CLIP, center),
            ("ViT-L-14-CLIPA/datacomp1b", IMAGENET, ("bilinear", "squash"))):
        with mock.patch.object(open_clip, "create_model", create):
            _, taken = encoders.build_open_clip(name, tmp_path / "file.pt", None)
        assert (taken["mean"], taken["std"]) == statistics
        assert (taken["interpolation"], taken["crop_mode"]) == transform
        assert asked["pretrained"] == str(tmp_path / "file.pt") and not tower.output_tokens


def test_a_tower_of_coca_gives_its_feature_alone():
    architecture = {"library": "open_clip", "name": "coca_ViT-B-32", "kwargs": {"device": "meta"}}
    module = encoders.build_architecture(architecture).eval()
    assert module(torch.zeros(2, 3, 224, 224, device="meta")).shape == (2, 512)


def test_a_module_without_one_feature_per_image_is_refused():
    class Maps(torch.nn.Conv2d):
        def forward(self, images):
            maps = super().forward(images)
            return maps if self.groups == 1 else (maps, maps)

    for groups, said in ((1, r"\(1, 6, 3, 3\)"), (3, "tuple")):
        with pytest.raises(Refused, match=f"maps gives {said} for an image"):
            encoders.describe(Maps(3, 6, 2, groups=groups), {"name": "maps"}, 4, *HALF, 1.0)


@pytest.mark.parametrize("name, frame", [
    ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", images.Frame(248)),
    ("cspdarknet53.ra_in1k", images.Frame(288, "bilinear")),
    ("dm_nfnet_f0.dm_in1k", images.Frame(213, squash=True)),
    ("vit_base_patch16_lingbot.robbyant", images.Frame(512, "bilinear", squash=True))])
def test_a_picture_is_framed_as_the_checkpoints_own_transform_has_it(name, frame):
    config = timm.models.get_pretrained_cfg(name)
    size = config.input_size[-1]
    description = encoders.describe(Flat(), {}, size, config.mean, config.std, config.crop_pct,
                                    config.interpolation, config.crop_mode, encoder=name)
    encoder = encoders.as_encoder(Flat, description)
    assert encoder.frame == frame
    smooth = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    for shape in ((400, 400), (400, 300)):
        picture = Image.fromarray(smooth).resize(shape, Image.Resampling.BICUBIC)
        look = timm.data.create_transform(config.input_size, interpolation=config.interpolation,
                                          mean=config.mean, std=config.std, crop_pct=config.crop_pct,
                                          crop_mode=config.crop_mode)
        stored = torch.tensor(images.as_stored(picture, encoder.frame))[None]
        worst = (encoder.prepare(stored)[0] - look(picture)).abs()
        assert worst.mean() < 0.03 and worst.quantile(0.99) < 0.15
    other = torch.tensor(images.as_stored(picture, frame._replace(squash=not frame.squash)))[None]
    assert (encoder.prepare(other)[0] - look(picture)).abs().mean() > 0.1


def test_a_transform_that_is_not_known_is_refused():
    with pytest.raises(Refused, match="bicubic and border: known are"):
        encoders.describe(Flat(), {"name": "x"}, 224, *HALF, 1.0, crop_mode="border")


@pytest.mark.parametrize("name", ["pit_ti_224", "cait_xxs24_224", "coat_lite_tiny"])
def test_the_work_of_modules_that_take_tuples_or_parameters_is_counted(name):
    module = timm.create_model(name, num_classes=0).eval()
    description = {"encoder": name, "size": 224, "side": 224, "width": 1, "mean": HALF[0], "std": HALF[1]}
    assert 1e9 < forward_flops(encoders.as_encoder(lambda: module, description)) < 8e9


def test_a_module_in_several_places_is_saved_and_linearized(tmp_path):
    """CoaT's parameters have several names each."""
    torch.manual_seed(0)
    name, size, cpu = "coat_lite_tiny", 64, torch.device("cpu")
    architecture = {"library": "timm", "name": name, "kwargs": {"num_classes": 0, "img_size": size}}
    module = encoders.build_architecture(architecture).eval()
    encoders.save_encoder(tmp_path / f"timm_{name}/pretrained.safetensors", module,
                          encoders.describe(module, architecture, size, *HALF, 0.9, encoder=f"timm:{name}"))
    encoder, images = load_encoder(f"timm:{name}", tmp_path), torch.randn(2, 3, size, size)
    theta, tau, moved = encoders.weights_of(encoder.module), {}, copying.deepcopy(encoder.module)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += 1e-5 * torch.randn(parameter.shape)
    for key, tensor in encoders.weights_of(moved).items():
        tau[key] = tensor - theta[key]
    assert len(tau) > len(list(module.parameters()))
    value, tangent = linearized.expand(encoder.module, theta, tau, images)
    with torch.no_grad():
        torch.testing.assert_close(value, encoder.module(images), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(moved(images) - value, tangent, atol=1e-5, rtol=0.05)
    assert tangent.abs().max() > 1e-4
    evaluator, split = common.Evaluator(encoder, cpu, torch.float32), np.zeros((2, 3, size, size), np.uint8)
    evaluator.use_vectors([tau])
    [features] = evaluator.features([common.Split(split, np.arange(2), np.arange(2))], [(1.0,)])
    with torch.no_grad():
        by_hand = moved(encoder.prepare(torch.from_numpy(split)))
    torch.testing.assert_close(features[0], by_hand, atol=1e-5, rtol=1e-4)
    unused = []
    for forward in (moved, linearized.forward(moved, encoder, cpu)):
        moved.zero_grad()
        forward(images).sum().backward()
        unused.append({key for key, parameter in moved.named_parameters() if parameter.grad is None})
    assert unused[0] == unused[1]


def test_the_scaling_laws_checkpoint_loads_into_timm_and_agrees_with_open_clip(tmp_path):
    """A file in the layout of laion/scaling-laws-openclip: {"state_dict": {"module.visual....": ...}}."""
    import open_clip
    torch.manual_seed(0)
    model, layout = open_clip.create_model("ViT-B-16").eval(), {}
    for key, tensor in model.state_dict().items():
        if key.startswith("visual."):
            layout[f"module.{key}"] = tensor
    torch.save({"epoch": 1, "state_dict": layout}, tmp_path / "clip.pt")
    encoder = load_encoder("vit_b16_clip_laion400m", tmp_path / "runs", tmp_path / "clip.pt")
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(encoder.module(images), model.encode_image(images), atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------------- downloads


@pytest.fixture(scope="module")
def dtd(tmp_path_factory):
    """A stand-in for tanganke/dtd: its row and class counts and columns, noise for pictures."""
    import datasets
    rng = np.random.default_rng(0)
    names, splits = [f"texture {c}" for c in range(47)], {}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    for split, n in (("train", 3760), ("test", 1880)):
        cells = []
        for index in range(n):
            buffer = io.BytesIO()
            pixels = rng.integers(0, 256, (6, 6 + index % 3, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "JPEG")
            cells.append({"bytes": buffer.getvalue(), "path": None})
        columns = {"image": cells, "label": [index % 47 for index in range(n)]}
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    folder = tmp_path_factory.mktemp("dtd")
    write_data_set(folder, {"default": datasets.DatasetDict(splits)})
    return folder


def test_probe_runs_from_a_hub_under_the_real_names(dtd, tmp_path):
    torch.manual_seed(0)
    model, runs = timm.create_model("vit_tiny_patch16_224"), tmp_path / "runs"
    write_timm_model(tmp_path / "hub/model", model)
    hub = {"datasets/tanganke/dtd": dtd, f"timm/{TIMM_NAME}": tmp_path / "hub/model"}
    with serve(hub) as (url, seen):
        finished = stage(sys.executable, "probe.py", TIMM, "--runs", runs, "--tasks", "dtd",
                         "--image-size", "32", "--probe-steps", "20",
                         env=client_environment(url, tmp_path / "home"))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert ("GET", f"/timm/{TIMM_NAME}/resolve/main/model.safetensors", 200) in seen
    row = json.loads((runs / f"timm_{TIMM_NAME}/probe.json").read_text())["tasks"]["dtd"]
    assert (row["paper"]["n_val"], row["converged"]["n_test"], row["classes"]) == (376, 1880, 47)
    theta_pre, written = load_encoder(TIMM, runs).module.state_dict(), model.state_dict()
    assert all(torch.equal(theta_pre[key], written[key]) for key in theta_pre if key != "pos_embed")


def test_an_encoder_of_texts_and_a_task_of_glue_come_from_a_hub(tmp_path):
    """GLUE's validation is the test split; the hub's own has labels of -1."""
    import datasets
    from small_language import sentences, small_bert_folder
    splits = {}
    for split, n in (("train", 2490), ("validation", 277), ("test", 30)):
        labels = [-1] * n if split == "test" else [0, 1] * (n // 2) + [0] * (n % 2)
        columns = {"sentence1": sentences(n, 4, 0), "sentence2": sentences(n, 4, 1), "label": labels}
        features = datasets.Features({
            "sentence1": datasets.Value("string"), "sentence2": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["entailment", "not_entailment"])})
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    bert = small_bert_folder(tmp_path / "bert")
    write_data_set(tmp_path / "glue", {"rte": datasets.DatasetDict(splits)})
    with serve({"datasets/nyu-mll/glue": tmp_path / "glue", "tiny/bert": bert}) as (url, seen):
        finished = stage(sys.executable, "probe.py", "transformers:tiny/bert", "--runs",
                         tmp_path / "runs", "--tasks", "rte", "--probe-steps", "5", "--probe-lr", "0.1",
                         env=client_environment(url, tmp_path / "home"))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    loaded = {path.rpartition("/")[2] for verb, path, status in seen if (verb, status) == ("GET", 200)}
    assert {"model.safetensors", "tokenizer.json"} <= loaded
    row = json.loads((tmp_path / "runs/transformers_tiny_bert/probe.json").read_text())["tasks"]["rte"]
    assert (row["paper"]["n_val"], row["paper"]["n_test"], row["classes"]) == (249, 277, 2)


def test_damaged_downloads_are_deleted_and_refused(tmp_path, monkeypatch):
    import huggingface_hub

    from lib.hub import checked_download
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    blobs, content = tmp_path / "datasets--tanganke--dtd/blobs", b"parquet" * 1000
    damaged = blobs / hashlib.sha256(content).hexdigest()
    blobs.mkdir(parents=True)
    damaged.write_bytes(content)
    (blobs / hashlib.sha1(b"README").hexdigest()).write_bytes(b"git names its small files otherwise")
    with checked_download("tanganke/dtd", "dataset"):
        pass
    damaged.write_bytes(content[:-1] + b"T")
    with pytest.raises(Refused, match="tanganke/dtd is damaged"), checked_download("tanganke/dtd", "dataset"):
        raise ValueError("no parquet file")                # damage that breaks loading is damage all the same
    assert len(list(blobs.iterdir())) == 1 and not damaged.exists()


TWICE = """  # one process that tries when a line comes, and once more: imports take most of the time
import sys
from pathlib import Path
import common
from lib import encoders, files, reading

def read():
    encoded, _, _ = reading.read_dataset("dtd", "tanganke/dtd", common.TASKS["dtd"], encoders.Encoder)
    return f"{len(encoded['test'])} images"

def load():
    return encoders.load_encoder(sys.argv[3], Path(sys.argv[2]), image_size=32).name

for _ in range(2):
    sys.stdin.readline()
    try:
        print("made", globals()[sys.argv[1]](), flush=True)
    except files.Refused as refusal:
        print("refused", " ".join(str(refusal).split()), flush=True)
"""


@contextlib.contextmanager
def trying(*words, **options):
    """A function that makes one process try, from when it is called on, and returns what it says of that."""
    command = [sys.executable, "-u", "-c", TWICE, *map(str, words)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)

    def tried():
        process.stdin.write("try\n")
        process.stdin.flush()
        return next(line for line in process.stdout if line.startswith(("made", "refused")))

    with process:
        yield tried


def test_a_damaged_download_of_a_data_set_is_refused_then_fetched_again(dtd, tmp_path):
    shutil.copytree(dtd, tmp_path / "hub")
    parquet = next((tmp_path / "hub/data").glob("test-*"))
    here = image_folder(tmp_path / "here/tanganke/dtd").parent.parent      # is not what the hub's name means
    whole = parquet.read_bytes()
    with serve({"datasets/tanganke/dtd": tmp_path / "hub"}) as (url, _):
        environment = client_environment(url, tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
        parquet.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
        with trying("read", env=environment, cwd=here) as tried:
            assert "a download from tanganke/dtd is damaged" in (said := tried()) and "refused" in said
            parquet.write_bytes(whole)
            assert "made 1880 images" in tried()


def test_a_damaged_download_of_an_encoder_is_refused_then_fetched_again(tmp_path):
    write_timm_model(tmp_path / "hub", timm.create_model("vit_tiny_patch16_224", depth=12))
    weights, home, runs = tmp_path / "hub/model.safetensors", tmp_path / "home", tmp_path / "runs"
    whole = weights.read_bytes()
    with serve({f"timm/{TIMM_NAME}": tmp_path / "hub"}) as (url, _):
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))    # a bit of the last weight, on the way
        environment = client_environment(url, home) | {"PYTHONPATH": str(ROOT)}
        with trying("load", runs, TIMM, env=environment) as tried:
            assert f"refused a download from timm/{TIMM_NAME} is damaged" in tried()
            assert not list(home.rglob(hashlib.sha256(whole).hexdigest())) and not runs.exists()
            weights.write_bytes(whole)
            assert "made" in tried()
    assert list(runs.glob("*/pretrained.safetensors"))


# --------------------------------------------------------------------------------------- no network


def test_without_a_network_what_is_wanted_and_how_to_give_it_is_said_at_once(tmp_path):
    environment = client_environment("http://127.0.0.1:9", tmp_path / "home")
    start, runs = time.perf_counter(), tmp_path / "runs"
    finished = stage(sys.executable, "probe.py", "vit_b16_dino", "--runs", runs, env=environment)
    assert finished.returncode == 2, finished.stderr
    for said in ("vit_b16_dino", "--weights FILE", "LocalEntryNotFoundError"):
        assert said in finished.stderr
    assert time.perf_counter() - start < 40                # not the clients' retries on top of the imports
    assert not list(runs.rglob("*.*"))


def test_without_a_network_tiny_works_and_a_hub_task_says_what_it_wanted(copy, monkeypatch):
    import datasets
    import huggingface_hub
    shared = ["tiny", "--runs", copy, "--probe-steps", "300", "--tasks"]
    with monkeypatch.context() as offline:
        offline.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        offline.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        message = refuse("probe", *shared, "letters,svhn")
    assert "ufldl-stanford/svhn" in message and "--data DIR" in message and "ConnectionError" in message
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("tiny asks a network"))
    perform("probe", *shared, "letters")
    assert "letters" in json.loads((copy / "tiny/probe.json").read_text())["tasks"]


# --------------------------------------------------------------------------------------- local folders


@pytest.mark.parametrize("name", ["json", "csv", "text", "imagefolder", "parquet"])
def test_a_folder_named_like_a_loader_of_datasets_is_that_folder(tmp_path, monkeypatch, name):
    image_folder(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    [source] = common.task_sources(f"pets={name}").values()
    assert reading.fetch("pets", source, None)["test"].num_rows == 10
    (tmp_path / name).rename(tmp_path / "other")            # the loader would now read what is in this folder
    [source] = common.task_sources(f"pets={name}").values()
    with pytest.raises(Refused, match=f"{name} is no folder here"):
        reading.fetch("pets", source, None)


def test_an_image_folder_and_a_parquet_folder_of_the_same_pictures_are_the_same_task(study, tmp_path):
    import datasets
    encoder, runs = load_encoder("tiny", study), tmp_path / "runs"
    folder = image_folder(tmp_path / "pets", size=(20, 24))
    (tmp_path / "parquet").mkdir()
    for split in ("train", "test"):
        datasets.load_dataset(str(folder), split=split).to_parquet(tmp_path / f"parquet/{split}.parquet")
    a = common.load_task("a", str(folder), encoder, runs)
    b = common.load_task("b", str(tmp_path / "parquet"), encoder, runs)
    assert a.fingerprint == b.fingerprint and a.classes == b.classes == ["cat", "dog"]
    assert a.splits["test"].inputs.shape == (10, 3, 32, 32) and len(a.splits["val"]) == 1


def test_one_small_square_size_is_kept_as_it_is(study, tmp_path):
    encoder = load_encoder("tiny", study)
    folder = image_folder(tmp_path / "pets", size=(20, 20))
    task = common.load_task("pets", str(folder), encoder, tmp_path / "runs")
    assert task.splits["test"].inputs.shape == (10, 3, 20, 20)
    first = np.asarray(Image.open(sorted((folder / "test").rglob("*.png"))[0])).transpose(2, 0, 1)
    assert np.array_equal(task.splits["test"].inputs[0], first)
