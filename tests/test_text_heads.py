"""Zero-shot heads against open_clip's own text encoder, and the recipes that use them."""
import json

import pytest
import torch
from files import Refused
from conftest import image_folder, refuse

import common
import encoders
import finetune
import text_heads

ARCH = "ViT-S-32-alt"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """(a small CLIP of random weights, its checkpoint file)"""
    import open_clip
    torch.manual_seed(0)
    model = open_clip.create_model(ARCH).eval()
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(model.state_dict(), path)
    return model, path


@pytest.mark.parametrize("raw, written", [("/a/abbey", "abbey"), ("annual_crop", "annual crop"), ("AnnualCrop", "Annual Crop"), ("Acura TL Sedan 2012", "Acura TL Sedan 2012"), ("7", "7")])
def test_class_names_are_cleaned(raw, written):
    assert text_heads.clean(raw) == written


def test_a_text_head_agrees_with_open_clips_own_zero_shot_classifier(clip):
    import open_clip
    model, path = clip
    classes = ["speed_limit", "stop", "no entry"]
    task = common.Task("gtsrb", {}, classes, "")
    args = common.stage_parser("").parse_args([f"open_clip:{ARCH}", "--weights", str(path)])
    encoder = encoders.Encoder("clip", model.visual, 224, (0.5,) * 3, (0.5,) * 3, 1.0, "")
    head = text_heads.text_head(task, *text_heads.text_tower(args, encoder), torch.device("cpu"))
    reference = open_clip.build_zero_shot_classifier(model, open_clip.get_tokenizer(ARCH), ["speed limit", "stop", "no entry"],
                                                     [lambda c, t=t: t.format(c) for t in text_heads.TEMPLATES["gtsrb"]])  # (D, C)
    torch.testing.assert_close(head["weight"], (model.logit_scale.exp() * reference.T).detach(), atol=1e-4, rtol=1e-4)
    images = torch.randn(4, 3, 224, 224)
    with torch.no_grad():
        features = model.encode_image(images)
        torch.testing.assert_close(common.logits(features, head), model.logit_scale.exp() * model.encode_image(images, normalize=True) @ reference, atol=1e-3, rtol=1e-3)


def test_a_text_tower_of_another_checkpoint_is_refused(clip):
    import open_clip
    other = encoders.Encoder("clip", open_clip.create_model(ARCH).visual, 224, (0.5,) * 3, (0.5,) * 3, 1.0, "")
    for weights, said in ((["--weights", str(clip[1])], "another image tower"), ([], "names no checkpoint")):
        with pytest.raises(Refused, match=said):
            text_heads.text_tower(common.stage_parser("").parse_args([f"open_clip:{ARCH}", *weights]), other)


def test_an_encoder_without_a_text_tower_is_refused(study):
    assert "tiny has no text tower" in refuse("finetune", "tiny", "--runs", study, "--tasks", "glyphs", "--recipe", "zeroshot")


@pytest.fixture(scope="module")
def probed(clip, tmp_path_factory):
    """Shared flags of a probed study of two small image folders with the small CLIP."""
    import probe
    folder = tmp_path_factory.mktemp("data")
    for name, classes in (("pets", ("cat", "dog")), ("beds", ("rose", "tulip"))):
        image_folder(folder / name, n_train=60, n_test=40, classes=classes)
    shared = [f"open_clip:{ARCH}", "--weights", str(clip[1]), "--runs", str(folder / "runs"), "--image-size", "32", "--data", str(folder), "--tasks", "pets,beds", "--device", "cpu"]
    probe.main(probe.parse_args([*shared, "--probe-steps", "2", "--probe-lr", "0.01"]))
    return shared


@pytest.mark.parametrize("recipe", ["zeroshot", "zeroshot-full"])
def test_zero_shot_recipes_run_and_start_from_the_text_head(probed, recipe):
    """With the head frozen, merging at lambda 0 is zero-shot classification."""
    import make_vectors
    import merge_eval
    finetune.main(finetune.parse_args([*probed, "--recipe", recipe, "--steps", "2", "--batch-size", "8", "--lr", "1e-5"]))
    args = common.stage_parser("").parse_args(probed)
    folder = encoders.run_folder(args) / recipe
    tuned = json.loads((folder / "finetune.json").read_text())["tasks"]
    tower = sum(parameter.numel() for parameter in encoders.load_encoder(args).module.parameters())
    if recipe == "zeroshot":
        make_vectors.main(make_vectors.parse_args([*probed, "--recipe", recipe]))
        merge_eval.main(merge_eval.parse_args([*probed, "--recipe", recipe, "--lambdas", "2"]))
        merge = json.loads((folder / "merge.json").read_text())
        assert merge["test_lambda0"]["tasks"] == {name: row["zero_shot"] for name, row in tuned.items()}
        assert {row["trainable_params"] for row in tuned.values()} == {tower}
    else:
        assert all(row["trainable_params"] > tower for row in tuned.values())
