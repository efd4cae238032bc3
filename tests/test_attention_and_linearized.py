"""Recipes of arXiv:2407.07089, attention alone and the linear expansion, against independent computations."""
import copy as copying
import itertools
import json
import re
import shutil

import common
import disentangle
import finetune
import merge_eval
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import TASKS, perform, refuse
from torch.nn.attention import SDPBackend, sdpa_kernel

from lib import encoders, files, linearized, vectors
from lib.parameters import PARTS, choose_parameters
from lib.study import open_study

CPU = torch.device("cpu")


def random_split(n, n_classes, seed, side=16):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (n, 3, side, side), dtype=np.uint8)
    return common.Split(pixels, np.arange(n), rng.integers(0, n_classes, n))


def random_vector(encoder, seed, scale=0.05):
    generator, vector = torch.Generator().manual_seed(seed), {}
    for name, tensor in encoders.weights_of(encoder.module).items():
        vector[name] = scale * torch.randn(tensor.shape, generator=generator)
    return vector


def random_head(n_classes, seed):
    return common.random_head(32, n_classes, torch.Generator().manual_seed(seed))


def linear_evaluator(encoder):
    return linearized.LinearizedEvaluator(encoder, CPU, torch.float32)


# --------------------------------------------------------------------------------------- the expansion


def test_the_expansion_is_the_derivative_and_linear_in_the_vector(small_encoder):
    module = small_encoder.module.double()
    theta = {name: tensor.clone() for name, tensor in encoders.weights_of(module).items()}
    tau = {name: tensor.double() for name, tensor in random_vector(small_encoder, 0).items()}
    other = {name: tensor.double() for name, tensor in random_vector(small_encoder, 1).items()}
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(5, 3, 16, 16, dtype=torch.float64, generator=generator)

    def at(step):
        moved = {name: theta[name] + step * tau[name] for name in theta}
        with torch.no_grad():
            return torch.func.functional_call(module, moved, (images,))

    value, tangent = linearized.expand(module, theta, tau, images)
    torch.testing.assert_close(value, at(0.0))
    torch.testing.assert_close(tangent, (at(1e-5) - at(-1e-5)) / 2e-5, rtol=1e-6, atol=1e-8)
    assert tangent.abs().max() > 0.1
    assert (at(1.0) - value - tangent).abs().max() > 1e-3    # it is no linear function
    _, second = linearized.expand(module, theta, other, images)
    combined = {name: 2 * tau[name] - 3 * other[name] for name in tau}
    _, both = linearized.expand(module, theta, combined, images)
    torch.testing.assert_close(both, 2 * tangent - 3 * second)

    # an explicit Jacobian with respect to one parameter; names that a vector lacks do not move
    only = "blocks.0.attn.proj.bias"

    def of_bias(bias):
        return torch.func.functional_call(module, theta | {only: bias}, (images,))

    jacobian = torch.func.jacrev(of_bias)(theta[only])     # (B, D, P)
    _, sparse = linearized.expand(module, theta, {only: tau[only]}, images)
    torch.testing.assert_close(sparse, torch.einsum("bdp,p->bd", jacobian, tau[only]))


def test_open_clip_towers_have_the_expansion_also_in_eval_mode():
    """In eval mode and without gradients their attention would take a fused path that has no derivative."""
    import open_clip
    torch.manual_seed(0)
    module = open_clip.transformer.VisionTransformer(16, 8, 32, 1, 2, 4, output_dim=24).eval().double()
    module.requires_grad_(False)
    theta = dict(module.named_parameters())
    tau = {name: 0.1 * torch.randn_like(tensor) for name, tensor in theta.items()}
    images, fast = torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.backends.mha.get_fastpath_enabled()

    def at(step):
        moved = {name: theta[name] + step * tau[name] for name in theta}
        return torch.func.functional_call(module, moved, (images,))

    value, tangent = linearized.expand(module, theta, tau, images)
    torch.testing.assert_close(value, at(0.0))
    torch.testing.assert_close(tangent, (at(1e-5) - at(-1e-5)) / 2e-5, rtol=1e-5, atol=1e-8)
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_batch_norms_are_refused_by_name_not_by_a_traceback():
    architecture = {"library": "timm", "name": "resnet10t", "kwargs": {"num_classes": 0}}
    module = encoders.build_architecture(architecture).eval()
    description = encoders.describe(module, architecture, 32, (0.5,) * 3, (0.5,) * 3, 1.0, encoder="resnet")
    encoder = encoders.as_encoder(lambda: module, description, "random")
    for begin in (linear_evaluator, lambda encoder: linearized.forward(module, encoder, CPU)):
        with pytest.raises(files.Refused, match=r"resnet has batch norms \(conv1\..*cannot be linearized"):
            begin(encoder)


class NormThenConvolution(torch.nn.Module):
    """Autocast leaves it bf16 between the two, and the norm's derivative by its fp32 weights is in fp32."""

    def __init__(self, by_function):
        super().__init__()
        self.first, self.norm = torch.nn.Conv2d(3, 16, 4, 4), torch.nn.LayerNorm(4)
        self.last, self.by_function = torch.nn.Conv2d(16, 8, 4), by_function

    def forward(self, images):
        found, norm = self.first(images), self.norm
        found = F.layer_norm(found, (4,), norm.weight, norm.bias) if self.by_function else norm(found)
        return self.last(found).flatten(1)


def test_norms_are_in_fp32_where_a_linearized_encoder_trains_in_bf16():
    module = NormThenConvolution(by_function=False).eval()
    description = encoders.describe(module, {}, 16, (0.5,) * 3, (0.5,) * 3, 1.0, encoder="odd")
    encoder = encoders.as_encoder(lambda: module, description, "random")
    images, gradients = torch.randn(64, 3, 16, 16), []
    for amp in (False, True):
        twin = copying.deepcopy(module)
        forward = linearized.forward(twin, encoder, CPU, amp)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            features = forward(images)
        features.float().sum().backward()
        gradients.append(twin.norm.weight.grad)
    torch.testing.assert_close(*gradients, rtol=0.05, atol=0.05 * gradients[0].abs().max().item())
    module = NormThenConvolution(by_function=True).eval()
    encoder = encoders.as_encoder(lambda: module, description, "random")
    linearized.forward(module, encoder, CPU)
    with pytest.raises(files.Refused, match="odd cannot be linearized: .* in bf16, try --dtype fp32"):
        linearized.forward(module, encoder, CPU, amp=True)


class NoJvp(torch.autograd.Function):
    @staticmethod
    def forward(tensor):
        return tensor.clone()

    @staticmethod
    def setup_context(*_):
        pass


class Custom(torch.nn.Module):
    """An operation of somebody's own, behind a layer."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 16)

    def forward(self, images):
        return NoJvp.apply(self.first(images).flatten(1))


def test_an_operation_of_ones_own_is_refused_in_any_precision_also_where_a_batch_is_measured(monkeypatch):
    module = Custom().eval()
    description = encoders.describe(module, {}, 16, (0.5,) * 3, (0.5,) * 3, 1.0, encoder="odd")
    encoder = encoders.as_encoder(lambda: module, description, "random")
    for amp in (False, True):
        with pytest.raises(files.Refused, match="odd cannot be linearized: You must implement the jvp"):
            linearized.forward(module, encoder, CPU, amp)
    # as on a GPU
    monkeypatch.setattr(common, "evaluation_batch", lambda forward, *_: forward(encoder.example(1)))
    with pytest.raises(files.Refused, match="odd cannot be linearized: You must implement the jvp"):
        linear_evaluator(encoder)


class HardAndRecurrent(torch.nn.Module):
    """Operations that torch has no forward-mode derivative of, behind a layer that has one."""

    def __init__(self, recurrent):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 16)
        self.then = torch.nn.LSTM(8, 8, batch_first=True) if recurrent else torch.nn.Hardsigmoid()

    def forward(self, images):
        found = self.then(self.first(images).flatten(1)[:, None])
        return (found[0] if isinstance(found, tuple) else found)[:, 0]


@pytest.mark.parametrize("recurrent, named", [(True, "rnn"), (False, "hardsigmoid")])
def test_operations_without_a_derivative_are_refused_by_name_before_any_work(recurrent, named):
    module = HardAndRecurrent(recurrent).eval()
    description = encoders.describe(module, {}, 16, (0.5,) * 3, (0.5,) * 3, 1.0, encoder="odd")
    encoder = encoders.as_encoder(lambda: module, description, "random")
    with pytest.raises(files.Refused, match=f"odd cannot be linearized: .*{named}.* has no derivative"):
        linearized.forward(module, encoder, CPU)


def test_what_is_trained_is_the_expansion(small_encoder):
    """finetune.py's forward has the gradient of features at theta_pre, wherever the weights have moved."""
    module = copying.deepcopy(small_encoder.module)
    forward = linearized.forward(module, small_encoder, CPU)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    theta_pre, tau = encoders.weights_of(small_encoder.module), random_vector(small_encoder, 0)
    gradients = []
    for step in (0.0, 0.1):
        module.load_state_dict({name: tensor + step * tau[name] for name, tensor in theta_pre.items()})
        module.zero_grad()
        forward(images).sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in module.named_parameters()})
    plain = copying.deepcopy(small_encoder.module)
    plain(images).sum().backward()
    for (name, parameter), gradient in itertools.product(plain.named_parameters(), gradients):
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-3, atol=1e-4)


def test_one_pass_gives_the_counts_of_each_lambda_on_its_own(small_encoder):
    splits = [random_split(70, 4, 3), random_split(45, 4, 4)]
    heads = [random_head(4, seed) for seed in (0, 1)]
    tau = [random_vector(small_encoder, 5, 0.3), random_vector(small_encoder, 6, 0.3)]
    settings = [(0.0, 0.0), (0.5, 0.0), (0.5, -1.0), (2.0, 1.0)]
    evaluator = linear_evaluator(small_encoder)
    evaluator.use_vectors(tau)
    at_once = evaluator.hits(splits, heads, settings)
    theta, module = encoders.weights_of(small_encoder.module), small_encoder.module
    for split, head, counts in zip(splits, heads, at_once, strict=True):
        pixels = (torch.from_numpy(split.inputs).float() / 255 - 0.5) / 0.5

        def features(weights, pixels=pixels):
            return torch.func.functional_call(module, weights, (pixels,))

        for setting, count in zip(settings, counts, strict=True):
            evaluator.use_vectors(tau)                     # forgets what it has computed
            assert evaluator.hits([split], [head], [setting]) == [[count]]
            merged = {name: setting[0] * tau[0][name] + setting[1] * tau[1][name] for name in theta}
            with sdpa_kernel(SDPBackend.MATH):
                value, jvp = torch.func.linearize(features, theta)
            classes = common.predict(value + jvp(merged), head)
            assert abs(int((classes == torch.from_numpy(split.labels)).sum()) - count) <= 1
    assert len(set(at_once[0])) > 1


def test_a_linear_heat_map_takes_one_derivative_per_batch_and_vector(small_encoder, monkeypatch):
    splits, heads = [random_split(40, 4, seed) for seed in (0, 1)], [random_head(4, seed) for seed in (0, 1)]
    evaluator, calls, expand = linear_evaluator(small_encoder), [], linearized.expand
    monkeypatch.setattr(linearized, "expand", lambda *given: calls.append(1) or expand(*given))
    evaluator.use_vectors([random_vector(small_encoder, seed, 0.3) for seed in (5, 6)])
    metrics = ["prediction", "representation"]
    rows = list(disentangle.error_rows(evaluator, splits, heads, np.linspace(-1, 1, 5), metrics))
    assert len(calls) == 2 * 2 * 2                         # two sets of images of two batches, two vectors
    assert max(rows[0]["prediction"]) > 0
    assert evaluator.hits(splits[:1], heads[:1], [(0.5, 0.5)]) and len(calls) == 8
    evaluator.use_vectors([random_vector(small_encoder, 5, 0.3)])
    evaluator.hits(splits, heads, [(0.5,), (1.0,)])
    assert len(calls) == 8 + 3                             # another vector: anew, 80 images in three batches


# --------------------------------------------------------------------------------------- representations


def test_representation_error_is_the_mean_kl_divergence_of_the_single_from_the_merged():
    single, merged = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    error, divergences = disentangle.representation_error, []
    for p, q in zip(single.softmax(1), merged.softmax(1), strict=True):
        divergences.append(sum(p * (p.log() - q.log())))
    assert error(single, merged) == pytest.approx(np.mean(divergences), rel=1e-5) != error(merged, single)
    assert error(single, single) == 0
    with pytest.raises(ValueError):
        error(single, merged[:3])


def test_the_grid_of_representations_agrees_with_a_loop_over_its_cells(small_encoder):
    images, heads = [random_split(40, 4, seed) for seed in (0, 1)], [random_head(4, seed) for seed in (0, 1)]
    lambdas = np.linspace(-1, 1, 3)
    evaluator = common.Evaluator(small_encoder, CPU, torch.float32)
    evaluator.use_vectors([random_vector(small_encoder, seed, 0.2) for seed in (2, 3)])
    single = [evaluator.features(images[:1], [(lam, 0.0) for lam in lambdas])[0],
              evaluator.features(images[1:], [(0.0, lam) for lam in lambdas])[0]]

    def grid(metric, metrics, begin=0):
        found = disentangle.error_rows(evaluator, images, heads, lambdas, metrics, begin)
        return np.array([row[metric] for row in found])

    both = ["prediction", "representation"]
    xi = {metric: grid(metric, both) for metric in both}
    for row, column in itertools.product(range(3), range(3)):
        at = lambdas[row], lambdas[column]
        merged = [evaluator.features([split], [at])[0][0] for split in images]
        terms = [disentangle.representation_error(single[0][row], merged[0]),
                 disentangle.representation_error(single[1][column], merged[1])]
        assert xi["representation"][row, column] == pytest.approx(sum(terms), abs=1e-6)
    assert xi["representation"][1, 1] == 0 and xi["representation"].max() > 0.01
    for metric in both:    # one pass for both gives what each gives on its own
        np.testing.assert_array_equal(grid(metric, [metric]), xi[metric])
    np.testing.assert_array_equal(grid("prediction", ["prediction"], 1), xi["prediction"][1:])


# --------------------------------------------------------------------------------------- trained parameters


@pytest.mark.parametrize("recipe, wanted, count", [
    ("attention", r"blocks\.\d+\.attn\.(qkv|proj)\.weight", 2),
    ("attention-bias", r"blocks\.\d+\.attn\.(qkv|proj)\.(weight|bias)", 4),
    ("attention-mlp", r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])\.weight", 4),
    ("attention-mlp-bias", r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)", 8),
])
def test_the_named_parameters_and_no_others_train(recipe, wanted, count):
    module = timm.create_model("vit_tiny_patch16_224", depth=2)
    trained, names = finetune.RECIPES[recipe].trained, [name for name, _ in module.named_parameters()]
    chosen = [name for name in names if re.search(trained, name)]
    assert chosen == [name for name in names if re.fullmatch(wanted, name)] and len(chosen) == 2 * count


def test_open_clip_towers_have_the_named_parameters():
    import open_clip
    module = open_clip.transformer.VisionTransformer(16, 8, 32, 2, 2, 4)
    trained = finetune.RECIPES["attention"].trained
    chosen = [name for name, _ in module.named_parameters() if re.search(trained, name)]
    assert chosen == [
        "transformer.resblocks.0.attn.in_proj_weight", "transformer.resblocks.0.attn.out_proj.weight",
        "transformer.resblocks.1.attn.in_proj_weight", "transformer.resblocks.1.attn.out_proj.weight"]


def test_an_encoder_without_such_parameters_is_refused_and_says_what_was_looked_for():
    module, what = timm.create_model("convnext_atto"), "recipe attention on timm:convnext_atto"
    with pytest.raises(files.Refused, match="on timm:convnext_atto: .*no parameter .* are stem.0.weight to"):
        choose_parameters(module, finetune.RECIPES["attention"].trained, what)
    everything = sum(parameter.numel() for parameter in module.parameters())
    assert choose_parameters(module, finetune.RECIPES["aligned"].trained, what) == everything


@pytest.mark.parametrize("name, biases", [
    ("eva02_tiny_patch14_224", 36), ("beit_base_patch16_224", 36), ("swinv2_tiny_window8_256", 36),
    ("swin_tiny_patch4_window7_224", 24), ("eva02_base_patch14_224", 36), ("twins_pcpvt_small", 48),
    ("deit3_small_patch16_224", 24), ("vit_small_patch16_dinov3", 12),
])
def test_every_bias_of_a_projection_trains_in_every_family(name, biases):
    with torch.device("meta"):
        module = timm.create_model(name, num_classes=0)
    choose_parameters(module, finetune.RECIPES["attention-bias"].trained, name)
    chosen = [key for key, parameter in module.named_parameters() if parameter.requires_grad]
    assert len([key for key in chosen if key.endswith("bias")]) == biases
    assert not any(re.search("norm|table|cpb|mlp", key) for key in chosen)


@pytest.mark.parametrize("name, recipe, left_out", [
    ("cait_xxs24_224", "attention", r"attn\.proj_l\.weight, attn\.proj_w\.weight \(48 matrices\)"),
    ("volo_d1_224", "attention-bias-random", r"attn\.attn\.weight \(4 matrices\)"),
    ("vit_giant_patch14_dinov2", "attention-mlp", None),   # its MLP is of SwiGLU: mlp.fc1, mlp.fc2
    ("eva02_base_patch14_224", "attention-mlp-bias", None),
])
def test_a_recipe_that_would_leave_out_a_matrix_is_refused_by_its_name(name, recipe, left_out):
    with torch.device("meta"):
        module = timm.create_model(name, num_classes=0)
    if not left_out:
        assert choose_parameters(module, finetune.RECIPES[recipe].trained, name) > 1e6
        return
    with pytest.raises(files.Refused, match=f"{name} would leave out {left_out}"):
        choose_parameters(module, finetune.RECIPES[recipe].trained, name)


def with_dropped_paths(encoder):
    """A twin of small_encoder whose training drops paths at random."""
    architecture = encoder.description["architecture"]
    architecture = architecture | {"kwargs": architecture["kwargs"] | {"drop_path_rate": 0.5, "depth": 3}}
    torch.manual_seed(0)
    module = encoders.build_architecture(architecture).eval()
    return encoders.as_encoder(lambda: module, encoder.description, "twin")


@pytest.mark.parametrize("recipe", ["aligned", "linearized"])
def test_training_that_drops_paths_depends_on_its_seed_alone(small_encoder, tmp_path, monkeypatch, recipe):
    encoder, head = with_dropped_paths(small_encoder), random_head(4, 0)
    task = common.Task("t", {"train": random_split(60, 4, 0)}, list("abcd"), "", "generated")
    chosen, state = finetune.RECIPES[recipe], tmp_path / "a.state"

    def trained(seed, steps=6, state=None):
        plan = {"lr": 1e-3, "steps": steps, "batch_size": 8, "micro_batch": 8, "seed": seed}
        torch.rand(seed + 7)                               # whatever was drawn before
        module = copying.deepcopy(encoder.module).train()
        forward = linearized.forward(module, encoder, CPU) if chosen.linear else module
        return finetune.train(forward, module, encoder, task, head, chosen, plan, False, state, 1e-9)[0]

    def killed(*given):
        raise KeyboardInterrupt

    first = trained(0)
    assert all(torch.equal(tensor, first[name]) for name, tensor in trained(0).items())
    assert not torch.equal(trained(1)["blocks.0.attn.qkv.weight"], first["blocks.0.attn.qkv.weight"])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        save, calls = finetune.save_state, itertools.count(1)
        patched.setattr(finetune, "save_state",
                        lambda *given: save(*given) if next(calls) < 4 else killed())
        trained(0, state=state)
    assert state.exists()
    assert all(torch.equal(tensor, first[name]) for name, tensor in trained(0, state=state).items())


# --------------------------------------------------------------------------------------- through the stages


def check_vector_reproduces_finetuned_hits(runs, name, kind):
    """A variant's vector of glyphs, added once by its kind of evaluator, gives the hits of finetune.json."""
    words = ["tiny", "--runs", str(runs), "--tasks", "glyphs", "--name", name, "--compile", "off"]
    there = open_study(merge_eval.parse_args(words), merge_eval.__file__, "finetune.json")
    evaluator, splits = there.evaluator(0, there.recipe["linear"]), there.tasks["glyphs"].splits
    assert type(evaluator) is kind
    evaluator.use_vectors([vectors.load_vector(there.source, "glyphs", there.encoder)])
    heads, row = [there.heads["glyphs"]] * 2, there.finetuned["tasks"]["glyphs"]
    [[val], [test]] = evaluator.hits([splits["val"], splits["test"]], heads, [(1.0,)])
    assert (val, test) == (row["hits_val"], row["hits_test"])


def check_report_compares_with_what_trains_everything(copy):
    perform("report", "--runs", copy)
    report = (copy / "report/report.md").read_text()
    for name in ("metrics-tiny-glyphs-signs", "cosines-tiny", "advantage", "posthoc"):
        assert report.count(f"]({name}.png)") == 1
    # its cost against aligned
    assert re.search(r"\| tiny \| linearized \|.*\| 1.00 \| [\d.]+ \| [\d.]+ \|\n", report)
    assert "| tiny | attention | 2 | 200 |" in report and "python posthoc.py" in report
    for name in ("attention", "linearized"):               # non-linear advantage: what the recipe loses alone
        rows = {}
        for variant in ("aligned", name):
            rows[variant] = json.loads((copy / f"tiny/{variant}/finetune.json").read_text())
        gaps = []
        for task, row in rows[name]["tasks"].items():
            gaps.append(rows["aligned"]["tasks"][task]["test"] - row["test"])
        assert rows[name]["against"]["nonlinear_advantage"] == pytest.approx(np.mean(gaps))
        assert f"| tiny | {name} | {name} | 2 | 800 |" in report
        assert f"| {100 * np.mean(gaps):+.1f} |" in report


def test_attention_and_linearized_go_through_every_stage(copy):
    pre, _ = files.load_tensors(copy / "tiny/pretrained.safetensors", "")
    for recipe in ("attention", "linearized"):
        shared = ["tiny", "--runs", copy, "--tasks", ",".join(TASKS[:2]), "--name", recipe]
        perform("finetune", *shared, "--steps", "6", "--batch-size", "32", "--lr", "1e-3")
        perform("make_vectors", *shared)
        perform("merge_eval", *shared, "--lambdas", "5")
        for metric in ("prediction", "both"):              # the second adds what the first left out
            perform("disentangle", *shared, "--points", "3", "--samples", "40", "--metric", metric)
    perform("posthoc", *shared[:-1], "attention", "--images-per-task", "100")
    assert "linear already" in refuse("posthoc", *shared)

    # only what the recipe names has moved, on disk and in the merge
    tuned, _ = files.load_tensors(copy / "tiny/attention/finetuned/glyphs.safetensors", "")
    assert tuned and all(re.search(PARTS["attention"], name) for name in tuned)
    assert not any(torch.equal(tensor, pre[name]) for name, tensor in tuned.items())
    merged, _ = files.load_tensors(copy / "tiny/attention/merged.safetensors", "")
    assert all(torch.equal(merged[name], pre[name]) for name in pre if name not in tuned)
    assert not (copy / "tiny/linearized/merged.safetensors").exists()
    trained = {}
    for recipe in ("aligned", "attention", "linearized"):
        rows = json.loads((copy / f"tiny/{recipe}/finetune.json").read_text())["tasks"]
        trained[recipe] = rows["glyphs"]["trainable_params"]
    assert trained["attention"] < trained["aligned"] == trained["linearized"]
    grid = json.loads((copy / "tiny/linearized/disentangle.json").read_text())["pairs"]["glyphs-signs"]
    assert grid["xi_at_origin"] == 0

    # later stages read from finetune.json which function it is that the vectors belong to
    check_vector_reproduces_finetuned_hits(copy, "attention", common.Evaluator)
    check_vector_reproduces_finetuned_hits(copy, "linearized", linearized.LinearizedEvaluator)
    check_report_compares_with_what_trains_everything(copy)


@pytest.mark.parametrize("left", ["with its fine-tuned encoders", "without them"])
def test_a_vector_of_one_recipe_in_another_ones_place_is_refused_by_name(copy, left):
    shared = ["tiny", "--runs", copy, "--tasks", "glyphs,signs", "--name", "attention"]
    perform("finetune", *shared, "--steps", "2", "--batch-size", "32", "--lr", "1e-3")
    perform("make_vectors", *shared)
    vector = "vectors/glyphs.safetensors"
    shutil.copy(copy / "tiny/attention" / vector, copy / "tiny/aligned" / vector)
    (copy / "tiny/aligned/merge.json").unlink()
    if left == "without them":                             # deleted to save room
        shutil.rmtree(copy / "tiny/aligned/finetuned")
    message = refuse("merge_eval", "tiny", "--runs", copy, "--tasks", ",".join(TASKS))
    assert re.search(r"aligned/vectors/glyphs\.safetensors (is not of|was made with)", message)
    assert "make_vectors.py tiny --name aligned" in message
