"""make_vectors.py --from: checkpoints of elsewhere in the usual wrappings, and what is none of an encoder."""
import json
import shutil

import pytest
import torch
from conftest import TASKS, perform, refuse
from safetensors.torch import save_file
from stand_in_hub import client_here, serve

from lib import brought, encoders, files, vectors

SHARED = "tiny", "--tasks", ",".join(TASKS)


def theta_of_task(runs, name, variant="aligned"):
    """theta_t {name: tensor} as finetune.py keeps it, in all that theta_pre has."""
    theta_pre = encoders.load_encoder("tiny", runs).module.state_dict()
    return dict(theta_pre) | files.load_tensors(runs / f"tiny/{variant}/finetuned/{name}.safetensors", "")[0]


def prefixed(state, prefix):
    return {prefix + key: tensor for key, tensor in state.items()}


WRAPPINGS = {
    "plain.safetensors": lambda theta, pre: theta,
    "state_dict.pth": lambda theta, pre: {"state_dict": prefixed(theta, "module."), "epoch": 3},
    "model.pt": lambda theta, pre: {"model": theta | {"head.weight": torch.zeros(7, 128)}, "lr": .1},
    "teacher.pth": lambda theta, pre: {"student": prefixed(pre, "module.backbone."),
                                       "teacher": prefixed(theta, "backbone.")},
    "ema.pth.tar": lambda theta, pre: {"model": pre, "model_ema": theta,
                                       "optimizer": {"state": {0: {"exp_avg": pre["norm.bias"]}}}},
    "visual.bin": lambda theta, pre: prefixed(theta, "visual.trunk.") | {"logit_scale": torch.ones(())},
    "compiled.safetensors": lambda theta, pre: prefixed(theta, "_orig_mod.model."),
}


def write(path, state):
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


@pytest.mark.parametrize("file", WRAPPINGS)
def test_theta_t_in_every_wrapping_gives_the_vector_of_finetune(study, tmp_path, file):
    encoder = encoders.load_encoder("tiny", study)
    pre = encoder.module.state_dict()
    path = write(tmp_path / file, WRAPPINGS[file](theta_of_task(study, "signs"), pre))
    theta_t, about = brought.theta_of("signs", file, brought.read_checkpoint("signs", path), encoder)
    assert about["said"].startswith(f"{len(pre)} tensors of {file}")
    _, tau_t = vectors.task_vector(encoders.weights_of(encoder.module), theta_t)
    ours, _ = files.load_tensors(study / "tiny/aligned/vectors/signs.safetensors", "")
    assert tau_t.keys() == ours.keys() and all(torch.equal(tau_t[key], ours[key]) for key in ours)


def merge_of(runs, name):
    return json.loads((runs / f"tiny/{name}/merge.json").read_text())


def test_a_brought_variant_goes_through_every_stage_as_one_of_finetunes(copy, tmp_path, capsys):
    for name in TASKS:
        write(tmp_path / f"best_{name}.safetensors", theta_of_task(copy, name))
    shared = ["tiny", "--runs", copy, "--name", "theirs"]
    words = ["--from", f"{tmp_path}/best_{{}}.safetensors", "--tasks", ",".join(TASKS)]
    perform("make_vectors", *shared, *words)
    perform("merge_eval", *shared, "--lambdas", "11")
    perform("report", "--runs", copy)
    theirs, ours = (merge_of(copy, name) for name in ("theirs", "aligned"))
    for key in ("val", "test", "single_task", "best_lambda"):
        assert theirs[key] == ours[key]
    for name in TASKS:
        one, two = (files.load_tensors(copy / f"tiny/{variant}/vectors/{name}.safetensors", "")[0]
                    for variant in ("theirs", "aligned"))
        assert all(torch.equal(one[key], two[key]) for key in one)
    report = (copy / "report/report.md").read_text()
    assert "fine-tuned elsewhere" in report and "| tiny | theirs |" in report
    capsys.readouterr()
    perform("make_vectors", *shared, *words)
    assert capsys.readouterr().out.count("nothing to do") == 2
    write(tmp_path / "best_signs.safetensors", theta_of_task(copy, "glyphs"))
    assert "was made of other inputs (checkpoint" in refuse("make_vectors", *shared, *words)


def test_a_checkpoints_own_classifier_is_the_head(both, tmp_path):
    """Encoders and heads of `full`, brought back, have its accuracies."""
    runs = shutil.copytree(both, tmp_path / "runs")
    for name in TASKS:
        head, _ = files.load_tensors(runs / f"tiny/full/heads/{name}.safetensors", "")
        state = prefixed(theta_of_task(runs, name, "full"), "vit.") | prefixed(head, "classifier.")
        write(tmp_path / f"{name}.bin", state)
    shared = ["tiny", "--runs", runs, "--name", "own"]
    words = ["--from", *[f"{name}={tmp_path}/{name}.bin" for name in TASKS], "--head", "own"]
    perform("make_vectors", *shared, *words)
    perform("merge_eval", *shared, "--lambdas", "5")
    own, full = (merge_of(runs, name) for name in ("own", "full"))
    assert own["test"]["hits"] == full["test"]["hits"] and own["single_task"] == full["single_task"]
    message = refuse("make_vectors", "tiny", "--runs", runs, "--name", "other", "--head", "own", "--from",
                     f"signs={tmp_path}/glyphs.bin")
    assert "needs one classifier of" in message and "classifier.weight [10, 128]" in message


def cut(path, content):
    path.write_bytes(content[:len(content) // 2])


class Pickled:
    """What torch.save writes of it cannot be read as tensors."""


def test_what_is_no_fine_tuned_encoder_is_refused_in_one_line(copy, tmp_path, capsys):
    theta = theta_of_task(copy, "glyphs")
    pre = encoders.load_encoder("tiny", copy).module.state_dict()
    torch.manual_seed(0)
    other = {key: torch.randn_like(tensor) * tensor.std() if tensor.ndim > 1 else tensor
             for key, tensor in theta.items()}
    lacking = {key: tensor for key, tensor in theta.items() if key != "blocks.1.norm1.bias"}
    wide = theta | {"blocks.0.mlp.fc1.weight": torch.zeros(300, 128)}
    deep = theta | {"blocks.9.norm1.weight": torch.ones(128)}
    broken = theta | {"norm.bias": theta["norm.bias"] * float("nan")}
    torch.save(Pickled(), tmp_path / "pickled.pt")
    write(tmp_path / "whole.safetensors", theta)
    cut(tmp_path / "cut.safetensors", (tmp_path / "whole.safetensors").read_bytes())
    torch.save(theta, tmp_path / "whole.pt")
    cut(tmp_path / "cut.pt", (tmp_path / "whole.pt").read_bytes())
    (tmp_path / "folder").mkdir()
    cases = {
        write(tmp_path / "other.pt", other): "is no fine-tuned tiny: |theta_t - theta_pre| / |theta_pre| is",
        write(tmp_path / "pre.pt", pre): "is theta_pre itself: fine-tuning has changed nothing",
        write(tmp_path / "lacking.pt", lacking): f"lacks blocks.1.norm1.bias (1 tensors of {len(theta)})",
        write(tmp_path / "wide.pt", wide): "another architecture: blocks.0.mlp.fc1.weight [300, 128]",
        write(tmp_path / "deep.pt", deep): "another architecture: tiny has no blocks.9.norm1.weight",
        write(tmp_path / "nan.pt", broken): "norm.bias holds values that are not finite",
        write(tmp_path / "two.pt", {"a": theta, "b": theta}): "holds 2 encoders, behind `a.` and `b.`",
        write(tmp_path / "none.pt", {"x": torch.zeros(2)}): "no such encoder in it: its 1 tensors (x)",
        tmp_path / "pickled.pt": "cannot be read as tensors by name",
        tmp_path / "cut.safetensors": "cannot be read as tensors by name",
        tmp_path / "cut.pt": "cannot be read as tensors by name",
        tmp_path / "folder": "the folder has none of model.safetensors",
        tmp_path / "nowhere.pt": "nowhere.pt cannot be read (No such file",
    }
    for path, said in cases.items():
        message = refuse("make_vectors", "tiny", "--runs", copy, "--from", f"glyphs={path}")
        assert said in message and "glyphs" in message + str(path), message
    words = ["--runs", copy, "--from"]
    assert "give NAME=CHECKPOINT" in refuse("make_vectors", "tiny", *words, tmp_path / "whole.pt")
    assert "names a task twice" in refuse("make_vectors", "tiny", *words, "glyphs=a", "glyphs=b")
    assert not (copy / "tiny/brought/finetune.json").exists()
    whole = f"glyphs={tmp_path / 'whole.pt'}"
    for flags, said in ((["--head", "own"], "are for --from"), (["--from", whole, "--of", "x"], "--of")):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            perform("make_vectors", "tiny", "--runs", copy, *flags)
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.count("\n") == 1 and said in error


def test_a_checkpoint_comes_from_a_hub(copy, tmp_path, capsys):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text("{}")
    write(tmp_path / "theirs/model.safetensors", theta_of_task(copy, "signs"))
    words = ["tiny", "--runs", copy, "--from", "user/vit-tiny_{}", "--tasks"]
    hub = {"user/vit-tiny_signs": tmp_path / "theirs", "user/vit-tiny_glyphs": tmp_path / "empty"}
    with serve(hub) as (url, _), client_here(url, tmp_path / "home"):
        perform("make_vectors", *words, "signs")
        assert "the repository has none of model.safetensors" in refuse("make_vectors", *words, "glyphs")
        missing = refuse("make_vectors", *words, "textures")
    assert " tensors of user/vit-tiny_signs; relative" in capsys.readouterr().out
    assert "user/vit-tiny_textures is no file here, and could not be had from the hub" in missing


# --------------------------------------------------------------------------------------- names of libraries


def of_timm(name, size=224, **kwargs):
    import timm
    architecture = {"library": "timm", "name": name, "kwargs": {"num_classes": 0, **kwargs}}
    module = timm.create_model(name, **architecture["kwargs"]).eval()
    return as_encoder(module, architecture, size)


def as_encoder(module, architecture, size):
    about = encoders.describe(module, architecture, size, (.5,) * 3, (.5,) * 3, 1.0, encoder="x")
    return encoders.as_encoder(lambda: module, about)


def agrees(encoder, theirs, feature, state=None):
    """What is said of a library's model, that disturbed a little comes through as its own feature."""
    state = state or theirs.state_dict
    torch.manual_seed(0)
    layout, prefix = brought.layout_of("x", state(), encoders.weights_of(encoder.module))
    inner = {key.removeprefix(prefix): tensor for key, tensor in state().items() if key.startswith(prefix)}
    named = brought.as_named_by(encoder, layout, inner)
    own = {key: named[key] for key in encoder.module.state_dict() if key in named}
    encoder.module.load_state_dict(own, strict=False)      # theta_pre, as theirs begins
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += .01 * parameter.abs().mean() * torch.randn_like(parameter)
    theta_t, about = brought.theta_of("task", "file", state(), encoder)
    picture = torch.randn(2, 3, encoder.size, encoder.size)
    with torch.no_grad():
        before = encoder.module(picture)
        encoder.module.load_state_dict(theta_t, strict=False)
        after, expected = encoder.module(picture), feature(theirs, picture)
    torch.testing.assert_close(after, expected, atol=2e-4, rtol=1e-3)
    assert .001 < about["distance"] < .03 and not torch.allclose(before, after, atol=1e-3)
    return about["said"]


def old_names(state):
    """transformers' names of a ViT before its version 5, as most checkpoints on the hub have them."""
    renamed = {}
    for key, tensor in state.items():
        key = key.replace("vit.layers.", "vit.encoder.layer.")
        key = key.replace("attention.o_proj", "attention.output.dense")
        for part in ("query", "key", "value"):
            key = key.replace(f"attention.{part[0]}_proj", f"attention.attention.{part}")
        renamed[key.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")] = tensor
    return renamed


@pytest.mark.parametrize("old", [False, True])
def test_a_vit_of_transformers(old):
    import transformers
    config = transformers.ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32,
                                    intermediate_size=128, patch_size=8, layer_norm_eps=1e-6)
    theirs = transformers.ViTForImageClassification(config).eval()
    encoder = of_timm("vit_tiny_patch16_224", 32, img_size=32, patch_size=8, embed_dim=64, depth=2,
                      num_heads=4, mlp_ratio=2)
    said = agrees(encoder, theirs, lambda model, x: model.vit(x).last_hidden_state[:, 0],
                  lambda: old_names(theirs.state_dict()) if old else theirs.state_dict())
    assert "behind `vit.` by the names of transformers' ViT" in said and "ignored classifier.bias" in said


SMALL_CLIP = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1,
              "image_size": 32, "patch_size": 8, "hidden_act": "quick_gelu"}
OPENAI = "vit_base_patch16_clip_quickgelu_224.openai"


def small_tower():
    """An open_clip image tower of SMALL_CLIP's size."""
    import open_clip
    return open_clip.transformer.VisionTransformer(32, 8, 64, 2, 1, 4, output_dim=16,
                                                   act_layer=open_clip.transformer.QuickGELU).eval()


def of_open_clip(tower, size):
    return as_encoder(tower, {"library": "open_clip", "name": "ViT-B-16", "kwargs": {}}, size)


def test_a_clip_of_transformers_comes_into_timm_and_open_clip():
    """Without its projection, as FusionBench's clip-vit-base-patch16_TASK."""
    import transformers
    theirs = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SMALL_CLIP)).eval()
    encoder = of_timm(OPENAI, 32, img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1,
                      num_classes=16)

    def projected(model, x):
        return encoder.module.head(model(x).pooler_output)

    said = agrees(encoder, theirs, projected, lambda: prefixed(theirs.state_dict(), "vision_model."))
    assert "behind `vision_model.` by the names of transformers' CLIP" in said
    assert "as in theta_pre, not in the file: head.bias, head.weight" in said
    tower = small_tower()
    said = agrees(of_open_clip(tower, 32), theirs, lambda model, x: model(x).pooler_output @ tower.proj)
    assert "as in theta_pre, not in the file: proj" in said


def test_an_image_tower_of_open_clip_comes_into_timm():
    theirs, text = small_tower(), {"transformer.resblocks.0.attn.in_proj_weight": torch.zeros(9, 3),
                                   "positional_embedding": torch.zeros(77, 3), "logit_scale": torch.zeros(())}
    encoder = of_timm(OPENAI, 32, img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1,
                      num_classes=16)
    said = agrees(encoder, theirs, lambda model, x: model(x),
                  lambda: prefixed(theirs.state_dict(), "visual.") | text)
    assert "behind `visual.` by the names of OpenAI's CLIP" in said
    assert "ignored logit_scale, positional_embedding, transformer.resblocks.0.attn" in said


def test_a_convnext_of_transformers():
    import transformers
    config = transformers.ConvNextConfig(depths=[1, 1, 2, 1], hidden_sizes=[16, 32, 64, 128], num_labels=10,
                                         layer_norm_eps=1e-6)
    theirs = transformers.ConvNextForImageClassification(config).eval()
    encoder = of_timm("convnext_base.fb_in1k", 64, depths=[1, 1, 2, 1], dims=[16, 32, 64, 128])
    said = agrees(encoder, theirs, lambda model, x: model.convnext(x).pooler_output)
    assert "behind `convnext.` by the names of transformers' ConvNeXt" in said
    state = theirs.state_dict()
    weight, bias = brought.classifier("task", state, 10, 128, "cpu")
    assert torch.equal(weight, state["classifier.weight"]) and torch.equal(bias, state["classifier.bias"])


def test_the_real_layouts_of_fusionbench_have_the_names_and_shapes_of_timm_and_open_clip():
    """clip-vit-base-patch16_TASK and convnext-base-224_TASK_..., without memory for their weights."""
    import open_clip
    import timm
    import transformers
    with torch.device("meta"):
        shape = transformers.CLIPVisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                              num_attention_heads=12, patch_size=16)
        clip = transformers.CLIPVisionModel(shape)
        shape = transformers.ConvNextConfig(depths=[3, 3, 27, 3], hidden_sizes=[128, 256, 512, 1024])
        convnext = transformers.ConvNextForImageClassification(shape)
        tower = open_clip.transformer.VisionTransformer(224, 16, 768, 12, 12, 4, output_dim=512)
        ours = [("timm", timm.create_model(OPENAI), clip, {"head.weight", "head.bias"}),
                ("open_clip", tower, clip, {"proj"}),
                ("timm", timm.create_model("convnext_base.fb_in1k", num_classes=0), convnext, set())]
    assert clip.config.hidden_act == "quick_gelu"
    for library, module, theirs, own in ours:
        encoder = encoders.Encoder("x", lambda: module, *[None] * 6, {"architecture": {"library": library}})
        wanted = {key: tensor.shape for key, tensor in module.state_dict().items()}
        state = prefixed(theirs.state_dict(), "vision_model." if theirs is clip else "")
        layout, prefix = brought.layout_of("x", state, wanted)
        inner = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
        named = brought.as_named_by(encoder, layout, inner)
        found = {key: tensor.shape for key, tensor in named.items()}
        assert {key: shape for key, shape in wanted.items() if key not in own} == found


def test_names_of_fusionbench():
    class Given:
        checkpoints, tasks, data = ["tanganke/clip-vit-base-patch16_{}"], "cars,eurosat", None
    assert brought.sources_of(Given) == ("cars,eurosat", {
        "cars": "tanganke/clip-vit-base-patch16_stanford_cars",
        "eurosat": "tanganke/clip-vit-base-patch16_eurosat"})
