"""Zero-shot heads against open_clip's own text encoder, and the recipes that use them."""
import json
from pathlib import Path

import common
import pytest
import torch
from conftest import image_folder, perform, refuse

from lib import encoders, text_heads
from lib.files import Refused

ARCH = "ViT-S-32-alt"
HALF = (0.5,) * 3


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """(a small CLIP of random weights, its checkpoint file)"""
    import open_clip
    torch.manual_seed(0)
    model = open_clip.create_model(ARCH).eval()
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(model.state_dict(), path)
    return model, path


def image_tower(model):
    """A CLIP's image tower as the encoder open_clip:ARCH, which names no checkpoint."""
    name = f"open_clip:{ARCH}"
    description = encoders.describe(model.visual, {}, 224, HALF, HALF, 1.0, encoder=name)
    return encoders.as_encoder(lambda: model.visual, description | {"text_tower": encoders.text_tower(name)})


@pytest.mark.parametrize("raw, written", [
    ("/a/abbey", "abbey"), ("annual_crop", "annual crop"), ("AnnualCrop", "Annual Crop"),
    ("Acura TL Sedan 2012", "Acura TL Sedan 2012"), ("7", "7")])
def test_class_names_are_cleaned(raw, written):
    assert text_heads.clean(raw) == written


def test_a_text_head_agrees_with_open_clips_own_zero_shot_classifier(clip):
    import open_clip
    model, path = clip
    task = common.Task("gtsrb", {}, ["speed_limit", "stop", "no entry"], "", "")
    tower = text_heads.text_tower(image_tower(model), path)
    head = text_heads.text_head(task, *tower, torch.device("cpu"))
    written, templates = ["speed limit", "stop", "no entry"], []
    for template in text_heads.TEMPLATES["gtsrb"]:
        templates.append(lambda name, template=template: template.format(name))
    tokenizer = open_clip.get_tokenizer(ARCH)
    reference = open_clip.build_zero_shot_classifier(model, tokenizer, written, templates)    # (D, C)
    scale = model.logit_scale.exp()
    torch.testing.assert_close(head.weight, (scale * reference.T).detach(), atol=1e-4, rtol=1e-4)
    images = torch.randn(4, 3, 224, 224)
    with torch.no_grad():
        ours = common.logits(model.encode_image(images), head)
        theirs = scale * model.encode_image(images, normalize=True) @ reference
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("given, said", [(True, "another image tower"), (False, "names no checkpoint")])
def test_a_text_tower_of_another_checkpoint_is_refused(clip, given, said):
    import open_clip
    other = image_tower(open_clip.create_model(ARCH))
    with pytest.raises(Refused, match=said):
        text_heads.text_tower(other, clip[1] if given else None)


def test_an_encoder_without_a_text_tower_is_refused(copy):
    message = refuse("finetune", "tiny", "--runs", copy, "--tasks", "glyphs", "--recipe", "zeroshot")
    assert "tiny has no text tower" in message


@pytest.fixture(scope="module")
def probed(clip, tmp_path_factory):
    """Shared flags of a probed study of two small image folders with the small CLIP."""
    folder = tmp_path_factory.mktemp("data")
    for name, classes in (("pets", ("cat", "dog")), ("beds", ("rose", "tulip"))):
        image_folder(folder / name, n_train=60, n_test=40, classes=classes)
    shared = [f"open_clip:{ARCH}", "--weights", str(clip[1]), "--runs", str(folder / "runs"),
              "--image-size", "32", "--data", str(folder), "--tasks", "pets,beds", "--device", "cpu"]
    perform("probe", *shared, "--probe-steps", "2", "--probe-lr", "0.01")
    return shared


@pytest.mark.parametrize("recipe", ["zeroshot", "zeroshot-full"])
def test_zero_shot_recipes_run_and_start_from_the_text_head(probed, recipe):
    """With the head frozen, merging at lambda 0 is zero-shot classification."""
    perform("finetune", *probed, "--recipe", recipe, "--steps", "2", "--batch-size", "8", "--lr", "1e-5")
    runs = Path(probed[probed.index("--runs") + 1])
    folder = encoders.run_folder(runs, f"open_clip:{ARCH}") / recipe
    tuned = json.loads((folder / "finetune.json").read_text())["tasks"]
    module = encoders.load_encoder(f"open_clip:{ARCH}", runs).module
    tower = sum(parameter.numel() for parameter in module.parameters())
    if recipe == "zeroshot":
        perform("make_vectors", *probed, "--name", recipe)
        perform("merge_eval", *probed, "--name", recipe, "--lambdas", "2")
        merge = json.loads((folder / "merge.json").read_text())
        assert merge["test_lambda0"]["tasks"] == {name: row["zero_shot"] for name, row in tuned.items()}
        assert {row["trainable_params"] for row in tuned.values()} == {tower}
    else:
        assert all(row["trainable_params"] > tower for row in tuned.values())
