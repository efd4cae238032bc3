"""Recipes of arXiv:2407.07089: attention-only parameters, and the encoder's linear expansion, against independent computations."""
import argparse
import json
import re
import shutil
from pathlib import Path

import common
import encoders
import files
import linearized
import numpy as np
import pytest
import timm
import torch
from conftest import TASKS, perform
from torch.nn.attention import SDPBackend, sdpa_kernel


def random_split(n, classes, seed, side=16):
    rng = np.random.default_rng(seed)
    return common.Split(rng.integers(0, 256, (n, 3, side, side), dtype=np.uint8), np.arange(n), rng.integers(0, classes, n))


def random_vector(encoder, seed, scale=0.05):
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(tensor.shape, generator=generator) for name, tensor in encoders.weights_of(encoder.module).items()}


@pytest.fixture
def linear_args(args):
    return argparse.Namespace(**vars(args) | {"recipe": "linearized"})


def test_the_expansion_is_the_derivative_and_linear_in_the_vector(small_encoder):
    module = small_encoder.module.double()
    theta = {name: tensor.clone() for name, tensor in encoders.weights_of(module).items()}
    tau, other = ({name: tensor.double() for name, tensor in random_vector(small_encoder, seed).items()} for seed in (0, 1))
    images = torch.randn(5, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def at(step):
        with torch.no_grad():
            return torch.func.functional_call(module, {name: theta[name] + step * tau[name] for name in theta}, (images,))

    value, tangent = linearized.expand(module, theta, tau, images)
    torch.testing.assert_close(value, at(0.0))
    torch.testing.assert_close(tangent, (at(1e-5) - at(-1e-5)) / 2e-5, rtol=1e-6, atol=1e-8)
    assert tangent.abs().max() > 0.1 and (at(1.0) - value - tangent).abs().max() > 1e-3  # it is no linear function
    _, second = linearized.expand(module, theta, other, images)
    _, both = linearized.expand(module, theta, {name: 2 * tau[name] - 3 * other[name] for name in tau}, images)
    torch.testing.assert_close(both, 2 * tangent - 3 * second)
    # an explicit Jacobian with respect to one parameter; names that a vector lacks do not move
    only = "blocks.0.attn.proj.bias"
    [jacobian] = torch.func.jacrev(lambda bias: torch.func.functional_call(module, theta | {only: bias}, (images,)), argnums=(0,))(theta[only])
    _, sparse = linearized.expand(module, theta, {only: tau[only]}, images)
    torch.testing.assert_close(sparse, torch.einsum("bdp,p->bd", jacobian, tau[only]))


def test_what_is_trained_is_the_expansion(small_encoder):
    """finetune.py's forward has the gradient of features at theta_pre, wherever the weights have moved."""
    import copy
    module = copy.deepcopy(small_encoder.module)
    forward = linearized.forward(module, small_encoder, torch.device("cpu"))
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    gradients = []
    for step in (0.0, 0.1):
        module.load_state_dict({name: tensor + step * random_vector(small_encoder, 0)[name] for name, tensor in encoders.weights_of(small_encoder.module).items()})
        module.zero_grad()
        forward(images).sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in module.named_parameters()})
    plain = copy.deepcopy(small_encoder.module)
    plain(images).sum().backward()
    for name, parameter in plain.named_parameters():
        for gradient in gradients:
            torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-3, atol=1e-4)


def test_one_pass_gives_the_counts_of_each_lambda_on_its_own(small_encoder, linear_args):
    splits, heads = [random_split(70, 4, 3), random_split(45, 4, 4)], [common.random_head(32, 4, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    vectors = [random_vector(small_encoder, 5, 0.3), random_vector(small_encoder, 6, 0.3)]
    settings = [(0.0, 0.0), (0.5, 0.0), (0.5, -1.0), (2.0, 1.0)]
    evaluator = linearized.evaluator(small_encoder, linear_args, 0)
    assert isinstance(evaluator, linearized.LinearizedEvaluator)
    evaluator.use_vectors(vectors)
    at_once = evaluator.hits(splits, heads, settings)

    def alone(split, head, setting):
        evaluator.use_vectors(vectors)                                     # forgets what it has computed
        return evaluator.hits([split], [head], [setting])[0][0]

    assert at_once == [[alone(split, head, setting) for setting in settings] for split, head in zip(splits, heads)]
    theta = encoders.weights_of(small_encoder.module)
    for split, head, counts in zip(splits, heads, at_once):
        pixels = (torch.from_numpy(split.images).float() / 255 - 0.5) / 0.5
        for setting, count in zip(settings, counts):
            tau = {name: sum(c * vector[name] for c, vector in zip(setting, vectors)) for name in theta}
            with sdpa_kernel(SDPBackend.MATH):
                value, jvp = torch.func.linearize(lambda weights: torch.func.functional_call(small_encoder.module, weights, (pixels,)), theta)
            assert abs(int((common.predict(value + jvp(tau), head) == torch.from_numpy(split.labels)).sum()) - count) <= 1
    assert len(set(at_once[0])) > 1


def test_a_linear_heat_map_takes_one_derivative_per_batch_and_vector(small_encoder, linear_args, monkeypatch):
    import disentangle
    splits, heads = [random_split(40, 4, seed) for seed in (0, 1)], [common.random_head(32, 4, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    evaluator, calls, expand = linearized.evaluator(small_encoder, linear_args, 0), [], linearized.expand
    monkeypatch.setattr(linearized, "expand", lambda *given: calls.append(1) or expand(*given))
    evaluator.use_vectors([random_vector(small_encoder, seed, 0.3) for seed in (5, 6)])
    rows = list(disentangle.error_rows(evaluator, splits, heads, np.linspace(-1, 1, 5), ["prediction", "representation"]))
    assert len(calls) == 2 * 2 * 2 and max(rows[0]["prediction"]) > 0               # two sets of images of two batches, two vectors
    assert evaluator.hits(splits[:1], heads[:1], [(0.5, 0.5)]) and len(calls) == 8
    evaluator.use_vectors([random_vector(small_encoder, 5, 0.3)])
    evaluator.hits(splits, heads, [(0.5,), (1.0,)])
    assert len(calls) == 8 + 3                                             # another vector: anew, 80 images in three batches


def test_representation_error_is_the_mean_kl_divergence_of_the_single_from_the_merged():
    import disentangle
    single, merged = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    by_hand = np.mean([sum(p * (p.log() - q.log())) for p, q in zip(single.softmax(1), merged.softmax(1))])
    assert disentangle.representation_error(single, merged) == pytest.approx(by_hand, rel=1e-5) != disentangle.representation_error(merged, single)
    assert disentangle.representation_error(single, single) == 0
    with pytest.raises(ValueError):
        disentangle.representation_error(single, merged[:3])


def test_the_grid_of_representations_agrees_with_a_loop_over_its_cells(small_encoder, args):
    import disentangle
    images, vectors, lambdas = [random_split(40, 4, seed) for seed in (0, 1)], [random_vector(small_encoder, seed, 0.2) for seed in (2, 3)], np.linspace(-1, 1, 3)
    evaluator = common.Evaluator(small_encoder, args, 0)
    evaluator.use_vectors(vectors)
    heads = [common.random_head(32, 4, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    single = [evaluator.features([images[t]], [tuple(lam * (t == own) for own in (0, 1)) for lam in lambdas])[0] for t in (0, 1)]

    def grid(metric, metrics):
        return np.array([row[metric] for row in disentangle.error_rows(evaluator, images, heads, lambdas, metrics)])

    xi = {metric: grid(metric, ["prediction", "representation"]) for metric in ("prediction", "representation")}
    for row, first in enumerate(lambdas):
        for column, second in enumerate(lambdas):
            merged = [evaluator.features([split], [(first, second)])[0][0] for split in images]
            terms = [disentangle.representation_error(single[0][row], merged[0]), disentangle.representation_error(single[1][column], merged[1])]
            assert xi["representation"][row, column] == pytest.approx(sum(terms), abs=1e-6)
    assert xi["representation"][1, 1] == 0 and xi["representation"].max() > 0.01
    for metric in xi:  # one pass for both gives what each gives on its own
        np.testing.assert_array_equal(grid(metric, [metric]), xi[metric])
    np.testing.assert_array_equal([row["prediction"] for row in disentangle.error_rows(evaluator, images, heads, lambdas, ["prediction"], 1)], xi["prediction"][1:])


@pytest.mark.parametrize("recipe, wanted", [
    ("attention", r"blocks\.\d+\.attn\.(qkv|proj)\.weight"), ("attention-bias", r"blocks\.\d+\.attn\.(qkv|proj)\.(weight|bias)"),
    ("attention-mlp", r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])\.weight"), ("attention-mlp-bias", r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)")])
def test_the_named_parameters_and_no_others_train(recipe, wanted):
    names = [name for name, _ in timm.create_model("vit_tiny_patch16_224", depth=2).named_parameters()]
    chosen = [name for name in names if re.search(common.RECIPES[recipe].trained, name)]
    assert chosen == [name for name in names if re.fullmatch(wanted, name)] and len(chosen) == 2 * {"attention": 2, "attention-bias": 4, "attention-mlp": 4, "attention-mlp-bias": 8}[recipe]


def test_open_clip_towers_have_the_named_parameters():
    import open_clip
    names = [name for name, _ in open_clip.transformer.VisionTransformer(16, 8, 32, 2, 2, 4).named_parameters()]
    chosen = [name for name in names if re.search(common.RECIPES["attention"].trained, name)]
    assert chosen == [f"transformer.resblocks.{block}.attn.{name}" for block in (0, 1) for name in ("in_proj_weight", "out_proj.weight")]


def test_attention_and_linearized_go_through_every_stage(study, tmp_path):
    runs = Path(shutil.copytree(study, tmp_path / "runs"))
    pre, _ = files.load_tensors(runs / "tiny/pretrained.safetensors", "")
    for recipe in ("attention", "linearized"):
        shared = ["tiny", "--runs", runs, "--tasks", ",".join(TASKS[:2]), "--recipe", recipe]
        perform("finetune", *shared, "--steps", "6", "--batch-size", "32", "--lr", "1e-3")
        perform("make_vectors", *shared)
        perform("merge_eval", *shared, "--lambdas", "5")
        for metric in ("prediction", "both"):                              # the second adds what the first left out
            perform("disentangle", *shared, "--points", "3", "--samples", "40", "--metric", metric)
    perform("posthoc", *shared[:-1], "attention", "--images-per-task", "100")
    with pytest.raises(files.Refused, match="linear already"):
        perform("posthoc", *shared)
    perform("report", "--runs", runs)
    report = (runs / "report/report.md").read_text()
    assert all(report.count(f"]({name}.png)") == 1 for name in ("metrics-tiny-glyphs-signs", "cosines-tiny", "advantage", "posthoc"))
    assert re.search(r"\| tiny \| linearized \| [\d,]+ \| 1.00 \| [\d.]+ \| [\d.]+ \|", report)  # its cost against aligned
    assert "| tiny | attention | 2 | 200 |" in report and "python posthoc.py" in report
    tuned, _ = files.load_tensors(runs / "tiny/attention/finetuned/glyphs.safetensors", "")
    assert tuned and all(re.search(common.ATTENTION, name) and not torch.equal(tensor, pre[name]) for name, tensor in tuned.items())
    merged, _ = files.load_tensors(runs / "tiny/attention/merged.safetensors", "")
    assert all(torch.equal(merged[name], pre[name]) for name in pre if name not in tuned)
    assert not (runs / "tiny/linearized/merged.safetensors").exists()
    rows = {recipe: json.loads((runs / f"tiny/{recipe}/finetune.json").read_text())["tasks"]["glyphs"] for recipe in ("aligned", "attention", "linearized")}
    assert rows["attention"]["trainable_params"] < rows["aligned"]["trainable_params"] == rows["linearized"]["trainable_params"]
    grid = json.loads((runs / "tiny/linearized/disentangle.json").read_text())["pairs"]["glyphs-signs"]
    assert grid["xi_at_origin"] == 0
    # a vector of one recipe in another one's place is refused by name
    shutil.copy(runs / "tiny/attention/vectors/glyphs.safetensors", runs / "tiny/aligned/vectors/glyphs.safetensors")
    (runs / "tiny/aligned/merge.json").unlink()
    with pytest.raises(files.Refused, match="aligned/vectors/glyphs.safetensors was made with recipe 'attention'"):
        perform("merge_eval", "tiny", "--runs", runs, "--tasks", ",".join(TASKS))


def test_an_encoder_without_such_parameters_is_refused_and_says_what_was_looked_for():
    import finetune
    module = timm.create_model("convnext_atto")
    args = argparse.Namespace(recipe="attention", encoder="timm:convnext_atto")
    with pytest.raises(files.Refused, match="attn.*timm:convnext_atto has none"):
        finetune.choose_parameters(module, args)
    args.recipe = "aligned"
    assert finetune.choose_parameters(module, args) == sum(parameter.numel() for parameter in module.parameters())
