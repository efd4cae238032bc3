"""Real architectures with random weights, real file layouts, and downloads from a stand-in hub on loopback."""
import io
import json
import sys
import time

import common
import encoders
import numpy as np
import pytest
import torch
from conftest import stage
from files import Refused
from stand_in_hub import client_environment, serve, write_data_set, write_timm_model

HALF, IMAGENET = ((0.5,) * 3, (0.5,) * 3), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def shared_flags(name, tmp_path, *more):
    return common.stage_parser("").parse_args([name, "--runs", str(tmp_path / "runs"), *map(str, more)])


@pytest.mark.parametrize("name, width, parameters, statistics, crop", [
    ("vit_b16_sup_in21k", 768, 85.8e6, HALF, 0.9), ("vit_b16_sup_in1k", 768, 85.8e6, HALF, 0.9), ("vit_b16_mae", 768, 85.8e6, IMAGENET, 0.9),
    ("vit_b16_dino", 768, 85.8e6, IMAGENET, 0.9), ("vit_b16_clip_laion400m", 512, 86.2e6, CLIP, 1.0), ("vit_b16_clip_laion2b", 512, 86.2e6, CLIP, 1.0),
    ("vit_l16_sup_in21k", 1024, 303.3e6, HALF, 0.9), ("vit_l14_clip_laion2b", 768, 304.0e6, HALF, 1.0),
])
def test_the_eight_named_encoders(name, width, parameters, statistics, crop, monkeypatch, tmp_path):
    """The real construction, with timm's own loader handed random weights; on the meta device, so that ViT-L costs nothing."""
    import timm
    create, asked = timm.create_model, {}

    def create_without_weights(model, pretrained, **kwargs):
        asked.update(kwargs, model=model, pretrained=pretrained)
        kwargs.pop("pretrained_cfg_overlay", None)
        with torch.device("meta"):
            return create(model, pretrained=False, **kwargs)

    monkeypatch.setattr(timm, "create_model", create_without_weights)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, file: asked.update(download=(repo, file)) or tmp_path / file)
    module, about = encoders.build_timm(shared_flags(name, tmp_path), encoders.ENCODERS[name].removeprefix("timm:"))
    assert asked["pretrained"] and (name == "vit_b16_clip_laion400m") == ("download" in asked)
    assert module(torch.zeros(2, 3, 224, 224, device="meta")).shape == (2, width)
    assert sum(parameter.numel() for parameter in module.parameters()) == pytest.approx(parameters, rel=2e-3)
    assert (tuple(about["mean"]), tuple(about["std"])) == statistics and about["crop_pct"] == crop and about["size"] == 224
    assert common.resized_side(encoders.Encoder(name, None, 224, *statistics, crop, "")) == (248 if crop == 0.9 else 224)
    rebuilt = encoders.build_architecture(about["architecture"])
    assert {key: tensor.shape for key, tensor in rebuilt.state_dict().items()} == {key: tensor.shape for key, tensor in module.state_dict().items()}


def test_the_feature_is_the_class_token_after_the_final_norm(tmp_path):
    import timm
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    encoder = encoders.load_encoder(shared_flags("timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k", tmp_path, "--weights", tmp_path / "weights.pth"))
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(encoder.module(images), model.forward_features(images)[:, 0])


def test_position_embeddings_are_resampled_and_the_size_is_remembered(tmp_path):
    import timm
    from safetensors.torch import save_file
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "weights.safetensors")
    name = "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    encoder = encoders.load_encoder(shared_flags(name, tmp_path, "--weights", tmp_path / "weights.safetensors", "--image-size", "96"))
    assert encoder.size == 96 and encoder.module(torch.zeros(1, 3, 96, 96)).shape == (1, 192)
    again = encoders.load_encoder(shared_flags(name, tmp_path))
    assert again.size == 96 and again.theta_pre == encoder.theta_pre
    with pytest.raises(Refused, match="96 pixels, not 224"):
        encoders.load_encoder(shared_flags(name, tmp_path, "--image-size", "224"))


def test_a_convolutional_encoder_at_another_size(tmp_path):
    import timm
    from safetensors.torch import save_file
    save_file(timm.create_model("convnext_atto").state_dict(), tmp_path / "weights.safetensors")
    encoder = encoders.load_encoder(shared_flags("timm:convnext_atto.d2_in1k", tmp_path, "--weights", tmp_path / "weights.safetensors", "--image-size", "64"))
    assert encoder.module(torch.zeros(1, 3, 64, 64)).shape == (1, 320)


def test_an_open_clip_tower_from_a_local_file_gives_its_projected_feature(tmp_path):
    import open_clip
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-S-32-alt").eval()
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    encoder = encoders.load_encoder(shared_flags("open_clip:ViT-S-32-alt/laion", tmp_path, "--weights", tmp_path / "clip.pt"))
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(encoder.module(images), model.encode_image(images))
    assert (encoder.mean, encoder.std) == CLIP and encoder.crop_pct == 1.0
    assert encoders.load_encoder(shared_flags("open_clip:ViT-S-32-alt/laion", tmp_path)).theta_pre == encoder.theta_pre


def test_the_scaling_laws_checkpoint_loads_into_timm_and_agrees_with_open_clip(tmp_path):
    """A file in the layout of laion/scaling-laws-openclip: {"state_dict": {"module.visual....": ...}}."""
    import open_clip
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-16").eval()
    torch.save({"epoch": 1, "state_dict": {f"module.{key}": tensor for key, tensor in model.state_dict().items() if key.startswith("visual.")}}, tmp_path / "clip.pt")
    encoder = encoders.load_encoder(shared_flags("vit_b16_clip_laion400m", tmp_path, "--weights", tmp_path / "clip.pt"))
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(encoder.module(images), model.encode_image(images), atol=1e-4, rtol=1e-4)


def generated_dtd():
    """A stand-in for tanganke/dtd: its row and class counts and columns, noise for pictures."""
    import datasets
    from PIL import Image
    rng = np.random.default_rng(0)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=[f"texture {c}" for c in range(47)]))
    splits = {}
    for split, n in (("train", 3760), ("test", 1880)):
        cells = []
        for index in range(n):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (6, 6 + index % 3, 3), dtype=np.uint8)).save(buffer, "JPEG")
            cells.append({"bytes": buffer.getvalue(), "path": None})
        splits[split] = datasets.Dataset.from_dict({"image": cells, "label": [index % 47 for index in range(n)]}, features=features)
    return datasets.DatasetDict(splits)


def test_probe_runs_from_a_hub_under_the_real_names(tmp_path):
    import timm
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224")
    write_timm_model(tmp_path / "hub/model", model)
    write_data_set(tmp_path / "hub/data", {"default": generated_dtd()})
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    with serve({"datasets/tanganke/dtd": tmp_path / "hub/data", f"timm/{name}": tmp_path / "hub/model"}) as (url, seen):
        finished = stage(sys.executable, "probe.py", f"timm:{name}", "--runs", tmp_path / "runs", "--tasks", "dtd", "--image-size", "32",
                         "--probe-steps", "20", env=client_environment(url, tmp_path / "home"))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert ("GET", f"/timm/{name}/resolve/main/model.safetensors", 200) in seen
    row = json.loads((tmp_path / f"runs/timm_{name}/probe.json").read_text())["tasks"]["dtd"]
    assert (row["n_val"], row["n_test"], row["classes"]) == (376, 1880, 47)
    theta_pre = encoders.load_encoder(shared_flags(f"timm:{name}", tmp_path)).module.state_dict()
    assert all(torch.equal(theta_pre[key], model.state_dict()[key]) for key in theta_pre if key != "pos_embed")


def test_damaged_downloads_are_deleted_and_refused(tmp_path, monkeypatch):
    import hashlib

    import files
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    blobs, content = tmp_path / "datasets--tanganke--dtd/blobs", b"parquet" * 1000
    blobs.mkdir(parents=True)
    (blobs / hashlib.sha256(content).hexdigest()).write_bytes(content)
    (blobs / hashlib.sha1(b"README").hexdigest()).write_bytes(b"git names its small files otherwise")
    with files.checked_download("tanganke/dtd", "dataset"):
        pass
    damaged = blobs / hashlib.sha256(content).hexdigest()
    damaged.write_bytes(content[:-1] + b"T")
    with pytest.raises(Refused, match="tanganke/dtd is damaged"), files.checked_download("tanganke/dtd", "dataset"):
        raise ValueError("no parquet file")                                # damage that breaks loading is damage all the same
    assert len(list(blobs.iterdir())) == 1 and not damaged.exists()


def test_a_damaged_download_of_a_data_set_is_refused_then_fetched_again(tmp_path):
    write_data_set(tmp_path / "hub", {"default": generated_dtd()})
    parquet = next((tmp_path / "hub/data").glob("test-*"))
    whole, home = parquet.read_bytes(), tmp_path / "home"
    words = [sys.executable, "-c", "import common, files\nfiles.run(lambda _: print(len(common.read_dataset('dtd', common.TASKS['dtd'])[0]['test']), 'images'), dict)"]
    with serve({"datasets/tanganke/dtd": tmp_path / "hub"}) as (url, seen):
        parquet.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
        first = stage(*words, env=client_environment(url, home))
        assert first.returncode == 2 and "a download from tanganke/dtd is damaged" in first.stderr, first.stderr
        parquet.write_bytes(whole)
        second = stage(*words, env=client_environment(url, home))
    assert second.returncode == 0 and "1880 images" in second.stdout, second.stderr


def test_a_damaged_download_of_an_encoder_is_refused_then_fetched_again(tmp_path):
    import hashlib

    import timm
    write_timm_model(tmp_path / "hub", timm.create_model("vit_tiny_patch16_224", depth=12))
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    whole = (tmp_path / "hub/model.safetensors").read_bytes()
    home, words = tmp_path / "home", [sys.executable, "-c", "import sys, encoders, common, files\nfiles.run(encoders.load_encoder, lambda: common.stage_parser('').parse_args(sys.argv[1:]))",
                                      f"timm:{name}", "--runs", tmp_path / "runs", "--image-size", "32"]
    with serve({f"timm/{name}": tmp_path / "hub"}) as (url, seen):
        (tmp_path / "hub/model.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # a bit of the last weight, on the way
        first = stage(*words, env=client_environment(url, home))
        assert first.returncode == 2 and f"a download from timm/{name} is damaged" in first.stderr, first.stderr
        assert not list(home.rglob(hashlib.sha256(whole).hexdigest())) and not (tmp_path / "runs").exists()
        (tmp_path / "hub/model.safetensors").write_bytes(whole)
        second = stage(*words, env=client_environment(url, home))
    assert second.returncode == 0, second.stderr
    assert list(tmp_path.glob("runs/*/pretrained.safetensors"))


def test_without_a_network_what_is_wanted_and_how_to_give_it_is_said_at_once(tmp_path):
    environment = client_environment("http://127.0.0.1:9", tmp_path / "home")
    start = time.perf_counter()
    finished = stage(sys.executable, "probe.py", "vit_b16_dino", "--runs", tmp_path / "runs", env=environment)
    assert finished.returncode == 2 and "vit_b16_dino" in finished.stderr and "--weights FILE" in finished.stderr
    assert "LocalEntryNotFoundError" in finished.stderr
    assert time.perf_counter() - start < 40  # not the clients' retries on top of the imports
    assert not list((tmp_path / "runs").rglob("*.*"))


def test_without_a_network_tiny_works_and_a_hub_task_says_what_it_wanted(study, tmp_path, monkeypatch):
    import shutil

    import datasets
    import huggingface_hub
    from conftest import refuse
    runs = shutil.copytree(study, tmp_path / "runs")
    environment = client_environment("http://127.0.0.1:9", tmp_path / "home")
    with monkeypatch.context() as offline:
        offline.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        offline.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        message = refuse("probe", "tiny", "--runs", runs, "--tasks", "letters,svhn", "--probe-steps", "300")
    assert "ufldl-stanford/svhn" in message and "--data DIR" in message and "ConnectionError" in message
    finished = stage(sys.executable, "probe.py", "tiny", "--runs", runs, "--tasks", "letters", "--probe-steps", "300", env=environment)
    assert finished.returncode == 0, finished.stderr


def test_an_image_folder_and_a_parquet_folder_of_the_same_pictures_are_the_same_task(study, tmp_path):
    import datasets
    from conftest import image_folder
    args = common.stage_parser("").parse_args(["tiny", "--runs", str(study)])
    encoder, args.runs = encoders.load_encoder(args), tmp_path / "runs"
    folder = image_folder(tmp_path / "pets", size=(20, 24))
    for split in ("train", "test"):
        (tmp_path / "parquet").mkdir(exist_ok=True)
        datasets.load_dataset(str(folder), split=split).to_parquet(tmp_path / f"parquet/{split}.parquet")
    a, b = common.load_task("a", folder, encoder, args), common.load_task("b", tmp_path / "parquet", encoder, args)
    assert a.fingerprint == b.fingerprint and a.classes == b.classes == ["cat", "dog"]
    assert a.splits["test"].images.shape == (10, 3, 32, 32) and len(a.splits["val"].rows) == 1


def test_one_small_square_size_is_kept_as_it_is(study, tmp_path):
    from PIL import Image
    from conftest import image_folder
    args = common.stage_parser("").parse_args(["tiny", "--runs", str(study)])
    encoder, args.runs = encoders.load_encoder(args), tmp_path / "runs"
    folder = image_folder(tmp_path / "pets", size=(20, 20))
    task = common.load_task("pets", folder, encoder, args)
    assert task.splits["test"].images.shape == (10, 3, 20, 20)
    first = np.asarray(Image.open(sorted((folder / "test").rglob("*.png"))[0])).transpose(2, 0, 1)
    assert np.array_equal(task.splits["test"].images[0], first)
