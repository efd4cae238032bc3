"""Laws of the arithmetic; each test's name states one."""
import copy as copying
import dataclasses
import itertools
import json
import os
import platform
import subprocess

import common
import disentangle
import merge_eval
import numpy as np
import pretrain
import probe
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import TASKS, perform, refuse

from lib import devices, encoders, files, generated, images, linearized, merging, training, vectors
from lib.encoders import weights_of
from lib.study import open_study

CPU = torch.device("cpu")


def random_split(n, n_classes, seed=0, side=16):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (n, 3, side, side), dtype=np.uint8)
    return common.Split(pixels, np.arange(n), rng.integers(0, n_classes, n))


def random_vector(encoder, seed, scale=0.05):
    generator, vector = torch.Generator().manual_seed(seed), {}
    for name, tensor in weights_of(encoder.module).items():
        vector[name] = scale * torch.randn(tensor.shape, generator=generator)
    return vector


def random_head(n_classes, seed):
    return common.random_head(32, n_classes, torch.Generator().manual_seed(seed))


def read(path):
    return json.loads(path.read_text())


def opened(runs, *words):
    """What a stage after finetune.py works on, for tests that go on by themselves."""
    import merge_eval
    args = merge_eval.parse_args(["tiny", "--runs", str(runs), "--compile", "off", *words])
    return open_study(args, merge_eval.__file__, "finetune.json")


def plain_class(encoder, theta, head, pixels):
    """The class of one stored image (3, s, s) by an ordinary module with the weights theta."""
    pixels = (torch.from_numpy(pixels).float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        feature = torch.func.functional_call(encoder.module, theta, (pixels[None],))
    return int(F.linear(feature, head.weight, head.bias).argmax())


def plain_hits(encoder, split, head, vector=None, lam=0.0):
    """Correct predictions by the plainest loop there is, one image at a time."""
    theta = dict(weights_of(encoder.module))
    for name in vector or ():
        theta[name] = theta[name] + lam * vector[name]
    hits = 0
    for index, label in zip(split.indices, split.labels, strict=True):
        hits += int(plain_class(encoder, theta, head, split.inputs[index]) == label)
    return hits


# --------------------------------------------------------------------------------------- the evaluator


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_padding_never_counts_and_batch_size_does_not_change_accuracy(small_encoder, batch_size):
    split, head, vector = random_split(100, 4), random_head(4, 1), random_vector(small_encoder, 2)
    evaluator = common.Evaluator(small_encoder, CPU, torch.float32)
    evaluator.batch_size = batch_size
    evaluator.use_vectors([vector])
    [hits] = evaluator.hits([split], [head], [(0.0,), (0.5,), (1.0,)])
    assert hits == [plain_hits(small_encoder, split, head, vector, lam) for lam in (0.0, 0.5, 1.0)]


def test_tasks_in_one_stream_keep_their_own_images_labels_and_heads(small_encoder, monkeypatch):
    monkeypatch.setattr(common, "CHUNK_BYTES", 3 * 16 * 16 * 64)    # chunks end in the middle of tasks
    splits = [random_split(n, 5, seed) for seed, n in enumerate((30, 77, 64, 3))]
    heads = [random_head(5, seed) for seed in range(4)]
    evaluator = common.Evaluator(small_encoder, CPU, torch.float32)
    by_hand = [plain_hits(small_encoder, split, head) for split, head in zip(splits, heads, strict=True)]
    assert [hits for [hits] in evaluator.hits(splits, heads, [()])] == by_hand
    for features, split in zip(evaluator.features(splits), splits, strict=True):
        [alone] = evaluator.features([split])
        torch.testing.assert_close(features, alone, atol=1e-5, rtol=1e-5)


def test_compiled_equals_eager_in_one_graph_also_after_the_weights_change():
    """The graph of one block serves all three."""
    architecture = {"library": "timm", "name": "vit_tiny_patch16_224",
                    "kwargs": {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2,
                               "num_classes": 0}}
    module = encoders.build_architecture(architecture).eval()
    description = encoders.describe(module, architecture, 16, (0.5,) * 3, (0.5,) * 3, 1.0, encoder="three")
    encoder = encoders.as_encoder(lambda: module, description)
    split, head = random_split(150, 4), random_head(4, 1)
    settings, predicted = [(0.0,), (0.3,), (1.0,)], {}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._inductor.config.patch(freezing=True):      # as TORCHINDUCTOR_FREEZING=1 sets it
        for compiled in (True, False):
            evaluator = common.Evaluator(encoder, CPU, torch.float32, compiled)
            evaluator.use_vectors([random_vector(encoder, 2)])
            predicted[compiled] = evaluator.predictions([split], [head], settings)[0]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(predicted[True], predicted[False])
    assert not torch.equal(predicted[True][0], predicted[True][2])


@pytest.mark.parametrize("name, blocks, kinds", [
    ("vit_tiny_patch16_224", 12, 1), ("convnext_atto", 12, 4), ("resnet18", 0, 0), ("efficientnet_b0", 0, 0)])
def test_what_is_compiled_are_blocks_that_share_their_code_and_weights(name, blocks, kinds):
    with torch.device("meta"):
        module = timm.create_model(name, num_classes=0).eval()
    found, shapes = devices.repeated_blocks(module), set()
    for block in found:
        shapes.add(tuple((key, tensor.shape) for key, tensor in block.state_dict().items()))
    assert (len(found), len(shapes)) == (blocks, kinds)
    compiled = devices.compile_module(module)
    assert {id(tensor) for tensor in compiled.parameters()} == {id(tensor) for tensor in module.parameters()}
    assert isinstance(compiled, torch._dynamo.eval_frame.OptimizedModule) == (blocks == 0)
    assert sum(part._compiled_call_impl is not None for part in compiled.modules()) == blocks
    assert all(part._compiled_call_impl is None for part in module.modules())


def scaled(encoder, factor):
    """An encoder with all its weights times a factor."""
    module = copying.deepcopy(encoder.module)
    module.load_state_dict({name: factor * tensor for name, tensor in weights_of(module).items()})
    return dataclasses.replace(encoder, build=lambda: module)


@pytest.mark.parametrize("kind", [common.Evaluator, linearized.LinearizedEvaluator])
def test_logits_that_are_not_finite_are_refused_and_never_counted(small_encoder, kind, tmp_path):
    split, head, vector = random_split(40, 4), random_head(4, 1), random_vector(small_encoder, 2)
    for broken in (head._replace(weight=head.weight * float("nan")), head._replace(bias=head.bias / 0),
                   head._replace(weight=head.weight * 1e39)):
        evaluator = kind(small_encoder, CPU, torch.float32)
        with pytest.raises(files.Refused, match="40 of 40 inputs are not finite"):
            evaluator.hits([split], [broken], [()])
        with pytest.raises(files.Refused, match="40 of 40 inputs are not finite"):
            common.count_hits(evaluator.features([split])[0][0] * 1e3, broken, split)
    evaluator.use_vectors([vector])
    assert evaluator.hits([split], [head], [(0.5,)])[0][0] > 0
    with pytest.raises(files.Refused, match=r"inputs are not finite under theta_pre \+ \[1e\+38\] x"):
        evaluator.hits([split], [head], [(0.5,), (1e38,)])


def test_features_that_are_not_finite_are_refused_and_not_cached(small_encoder, tmp_path):
    task = common.Task("t", {"val": random_split(40, 4)}, list("abcd"), "", "generated")
    evaluator = common.Evaluator(scaled(small_encoder, 1e38), CPU, torch.float32)
    with pytest.raises(files.Refused, match="task t: features of split val under theta_pre of small are not"):
        common.cached_features(tmp_path, task, evaluator)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_learning_rate_or_a_lambda_beyond_all_bounds_leaves_no_result(copy):
    heads = {path: path.read_bytes() for path in (copy / "tiny/heads").rglob("*.safetensors")}
    words = ["--tasks", "signs", "--probe-lr", "1e39", "--probe-steps", "20", "--overwrite"]
    assert "not finite" in refuse("probe", "tiny", "--runs", copy, *words)
    assert all(path.read_bytes() == before for path, before in heads.items())
    (copy / "tiny/aligned/merge.json").unlink()
    words = ["--tasks", "signs", "--lambda-max", "1e38", "--lambdas", "2"]
    message = refuse("merge_eval", "tiny", "--runs", copy, *words)
    assert "theta_pre + [1e+38] x task vectors" in message and not (copy / "tiny/aligned/merge.json").exists()


# --------------------------------------------------------------------------------------- task vectors


def test_theta_pre_plus_task_vector_is_theta_t_bit_for_bit():
    generator = torch.Generator().manual_seed(0)

    def drawn():
        """200,000 numbers over ten orders of magnitude."""
        normal = torch.randn(200_000, generator=generator)
        return normal * 10 ** torch.empty(200_000).uniform_(-8, 2, generator=generator)

    pre, tuned = {"w": drawn()}, {"w": drawn()}
    assert not torch.equal(pre["w"] + (tuned["w"] - pre["w"]), tuned["w"])    # why task_vector exists
    theta_t, tau_t = vectors.task_vector(pre, tuned)
    assert torch.equal(pre["w"] + tau_t["w"], theta_t["w"])
    assert torch.equal(torch.add(pre["w"], tau_t["w"], alpha=1.0), theta_t["w"])
    assert torch.equal(theta_t["w"] - pre["w"], tau_t["w"])
    rounding = 2.0 ** -22 * torch.maximum(pre["w"].abs(), tuned["w"].abs())    # and no more
    assert ((theta_t["w"] - tuned["w"]).abs() <= rounding).all()


def test_theta_pre_plus_task_vector_reproduces_the_fine_tuned_accuracy(study):
    """Also through the files: finetuned/ minus pretrained is vectors/, and a vector added once is theta_t."""
    finetuned = read(study / "tiny/aligned/finetune.json")["tasks"]
    pre, _ = files.load_tensors(study / "tiny/pretrained.safetensors", "")
    for name in TASKS:
        theta_t, _ = files.load_tensors(study / f"tiny/aligned/finetuned/{name}.safetensors", "")
        tau_t, _ = files.load_tensors(study / f"tiny/aligned/vectors/{name}.safetensors", "")
        assert set(theta_t) == set(tau_t) == set(pre)
        assert all(torch.equal(pre[key] + tau_t[key], theta_t[key]) for key in theta_t)
    name = TASKS[0]
    there = opened(study, "--tasks", name)
    evaluator, head, splits = there.evaluator(0), there.heads[name], there.tasks[name].splits
    evaluator.use_vectors([vectors.load_vector(study / "tiny/aligned", name, there.encoder)])
    [[val], [test]] = evaluator.hits([splits["val"], splits["test"]], [head, head], [(1.0,)])
    assert (val, test) == (finetuned[name]["hits_val"], finetuned[name]["hits_test"])
    assert common.normalized_accuracy({"a": test / len(splits["test"])}, {"a": finetuned[name]["test"]}) == 1


def test_addition_at_lambda_zero_is_probing(study):
    probed, merge = read(study / "tiny/probe.json")["tasks"], read(study / "tiny/aligned/merge.json")
    probed = {name: row[merge["recipe"]["probe"]] for name, row in probed.items()}
    assert merge["test_lambda0"]["hits"] == {name: row["hits_test"] for name, row in probed.items()}
    at_zero = {name: curve[0] for name, curve in merge["val"]["tasks"].items()}
    assert at_zero == {name: row["val"] for name, row in probed.items()}


def test_the_evaluator_at_lambda_zero_agrees_with_the_cached_features(study):
    there = opened(study, "--tasks", "signs")
    evaluator = there.evaluator(0)
    evaluator.use_vectors([vectors.load_vector(study / "tiny/aligned", "signs", there.encoder)])
    [[hits]] = evaluator.hits([there.tasks["signs"].splits["test"]], [there.heads["signs"]], [(0.0,)])
    assert hits == read(study / "tiny/probe.json")["tasks"]["signs"]["paper"]["hits_test"]


def test_the_merged_encoder_loads_into_timm_and_repeats_the_test_accuracy(study):
    merge, architecture = read(study / "tiny/aligned/merge.json"), pretrain.ARCHITECTURE
    checkpoint = str(study / "tiny/aligned/merged.safetensors")
    name, kwargs = architecture["name"], architecture["kwargs"]
    module = timm.create_model(name, checkpoint_path=checkpoint, **kwargs).eval()
    there = opened(study, "--tasks", "textures", "--device", "cpu")
    head, split = there.heads["textures"], there.tasks["textures"].splits["test"]
    dtype = getattr(torch, merge["config"]["dtype"])
    module, pixels = module.to(dtype), (torch.from_numpy(split.inputs.copy()).float() / 255 - 0.5) / 0.25
    with torch.no_grad():
        classes = F.linear(module(pixels.to(dtype)).float(), head.weight, head.bias).argmax(1)
    hits = int((classes == torch.from_numpy(split.labels)).sum())
    # another batch size may round a tie the other way
    assert abs(hits - merge["test"]["hits"]["textures"]) <= 1


def test_the_merged_encoder_is_bit_for_bit_the_one_that_was_evaluated(copy, monkeypatch):
    """Its own file gives every count of merge.json, and holds what the evaluator writes at that lambda."""
    accuracies = itertools.count(1)                        # the last lambda is the best
    monkeypatch.setattr(merge_eval, "normalized_accuracy", lambda *given: next(accuracies))
    words = ["--tasks", "signs,textures"]
    perform("merge_eval", "tiny", "--runs", copy, "--lambdas", "2", "--lambda-max", "0.3", *words)
    merge, there = read(copy / "tiny/aligned/merge.json"), opened(copy, *words)
    assert merge["best_lambda"] == 0.3
    shipped, _ = files.load_tensors(copy / "tiny/aligned/merged.safetensors", "")
    evaluator, heads = there.evaluator(0), list(there.heads.values())
    splits = [task.splits["test"] for task in there.tasks.values()]
    evaluator.use_vectors([merging.merge("sum", there.source, list(there.tasks), there.encoder)])
    evaluator.write((0.3,))
    for name, slot in evaluator.slots.items():
        assert torch.equal(slot, shipped[name].to(slot.dtype)), name
    there.encoder.module.load_state_dict(shipped)
    hits = there.evaluator(0).hits(splits, heads, [()])
    assert {name: count for name, [count] in zip(there.tasks, hits, strict=True)} == merge["test"]["hits"]


def test_a_batch_norm_merge_is_saved_as_it_is_evaluated():
    """A merged variance below zero counts as zero, in the evaluator and in the file."""
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 8, 16), torch.nn.BatchNorm2d(8), torch.nn.Flatten()
    module = torch.nn.Sequential(*layers).eval()
    description = encoders.describe(module, {}, 16, (0.5,) * 3, (0.5,) * 3, 1.0, encoder="batch norm")
    encoder, split = encoders.as_encoder(lambda: module, description), random_split(40, 4)
    evaluator = common.Evaluator(encoder, CPU, torch.float32)
    evaluator.use_vectors([random_vector(encoder, 0) | {"1.running_var": torch.linspace(-9, 9, 8)}])
    [evaluated] = evaluator.features([split], [(0.3,)])
    module.load_state_dict(module.state_dict() | dict(evaluator.merged((0.3,))))
    [saved] = common.Evaluator(encoder, CPU, torch.float32).features([split])
    assert evaluated.isfinite().all() and torch.equal(evaluated[0], saved[0])


def test_lambda_is_chosen_on_validation_by_normalized_accuracy(study):
    merge = read(study / "tiny/aligned/merge.json")
    finetuned = read(study / "tiny/aligned/finetune.json")["tasks"]
    curve = []
    for k in range(11):
        curve.append(np.mean([merge["val"]["tasks"][name][k] / finetuned[name]["val"] for name in finetuned]))
    assert merge["lambdas"] == [round(k / 10, 10) for k in range(11)]
    asked = merge_eval.parse_args(["tiny"])
    assert (asked.lambdas, asked.lambda_max, asked.rule) == (21, None, "sum")
    assert merging.RULES["sum"].largest == 1.0             # the paper's: 0, .05, ..., 1
    assert merge["best_lambda"] == merge["lambdas"][int(np.argmax(curve))]
    np.testing.assert_allclose(merge["val"]["normalized"], curve, atol=1e-12)


# --------------------------------------------------------------------------------------- disentanglement


def test_disentanglement_error_laws(small_encoder):
    splits, heads = [random_split(60, 4, seed) for seed in (0, 1)], [random_head(4, seed) for seed in (0, 1)]
    tau, lambdas = [random_vector(small_encoder, seed) for seed in (2, 3)], np.linspace(-2, 2, 5)
    evaluator = common.Evaluator(small_encoder, CPU, torch.float32)

    def grid(order):
        evaluator.use_vectors([tau[t] for t in order])
        found = disentangle.error_rows(evaluator, [splits[t] for t in order], [heads[t] for t in order],
                                       lambdas, ["prediction"])
        return np.array([row["prediction"] for row in found])

    xi = grid([0, 1])
    assert xi.shape == (5, 5) and xi[2, 2] == 0 and xi.min() >= 0 and 0.1 < xi.max() <= 2
    np.testing.assert_array_equal(grid([1, 0]), xi.T)

    def predictions(t, first, second):
        """Brute force, one image at a time, weights built by hand."""
        theta = {}
        for name, pre in weights_of(small_encoder.module).items():
            theta[name] = pre + first * tau[0][name] + second * tau[1][name]
        return np.array([plain_class(small_encoder, theta, heads[t], image) for image in splits[t].inputs])

    for row, column in [(0, 0), (0, 2), (2, 4), (3, 1), (2, 2)]:
        first, second = lambdas[row], lambdas[column]
        terms = [np.mean(predictions(0, first, 0) != predictions(0, first, second)),
                 np.mean(predictions(1, 0, second) != predictions(1, first, second))]
        assert xi[row, column] == pytest.approx(sum(terms), abs=1e-12)
        if second == 0:
            assert terms[0] == 0
    with pytest.raises(ValueError):
        disentangle.disentanglement_error(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError):
        disentangle.disentanglement_error(torch.zeros(3), torch.zeros(4))


def test_every_pair_has_a_name_of_its_own():
    names = ["a", "b-c", "a-b", "c", "-c", "a-"]
    pairs = disentangle.choose_pairs("all", names)
    assert sorted(pairs.values()) == sorted(itertools.combinations(names, 2))
    assert disentangle.choose_pairs("glyphs-signs", TASKS) == {"glyphs-signs": ("glyphs", "signs")}
    assert disentangle.choose_pairs("a-b-c", ["a", "b-c"]) == {"a+b-c": ("a", "b-c")}
    with pytest.raises(files.Refused, match="in one way only: write A.B"):
        disentangle.choose_pairs("a-b-c", names)
    assert disentangle.choose_pairs("a+b-c,a-b+c", names) == {"a+b-c": ("a", "b-c"), "a-b+c": ("a-b", "c")}
    with pytest.raises(files.Refused, match="is not A-B"):
        disentangle.choose_pairs("a+a", names)


def test_mean_xi_is_an_integral_over_the_box_alike_on_every_grid():
    def of(function, points, limit):
        lambdas = np.linspace(-limit, limit, points).round(10)
        return disentangle.describe(function(lambdas[:, None], lambdas[None]), lambdas)

    grids = [(3, 1.0), (5, 3.0), (7, 3.0), (13, 3.0), (25, 3.0), (15, 2.0), (3, 1.7)]
    for points, limit in grids:                            # exact for what is linear between the lines
        row = of(lambda x, y: 0.9 + 0.2 * x - 0.1 * y + 0.05 * x * y, points, limit)
        assert row["mean_xi_in_box"] == pytest.approx(0.9, abs=1e-12) and row["box"] == 1

    def bowl(x, y):
        return 2 - np.exp(-x ** 2) - np.exp(-y ** 2)

    means = [of(bowl, points, 3.0)["mean_xi_in_box"] for points in (7, 13, 25, 241)]
    whole = 2 - 2 * 0.7468241328                           # the integral of exp(-x^2) from 0 to 1
    assert means[-1] == pytest.approx(whole, abs=1e-3) and means[1] == pytest.approx(whole, abs=0.04)
    assert all(abs(mean - whole) < 0.13 for mean in means)
    half = of(lambda x, y: 1 + 0 * x * y, 5, 0.5)
    assert (half["mean_xi_in_box"], half["box"]) == (1.0, 0.5)


def test_the_sampling_error_of_mean_xi_is_not_below_what_drawing_other_images_gives():
    rng, lambdas, n = np.random.default_rng(0), np.linspace(-3, 3, 7), 60
    share = np.add.outer(lambdas ** 2, lambdas ** 2) / 30  # of each task's images that flip in each cell
    means, errors = [], []
    for _ in range(400):
        xi = np.zeros((7, 7))
        for _ in range(2):                                 # tasks; an image that flips early flips in all
            xi += (rng.uniform(size=(n, 1, 1)) < share).mean(0)
        means.append(disentangle.describe(xi, lambdas)["mean_xi_in_box"])
        errors.append(disentangle.sampling_error(xi, lambdas, n))
    assert 0.8 * np.mean(errors) < np.std(means) < 1.1 * np.mean(errors)


# --------------------------------------------------------------------------------------- splits and images


@pytest.mark.parametrize("n, n_val", [(8144, 814), (3760, 376), (60000, 5000), (73257, 5000), (19850, 1985)])
def test_splits_are_disjoint_and_pinned(n, n_val):
    train, val = common.validation_split(n)
    generator = torch.Generator().manual_seed(0)
    reference = torch.utils.data.random_split(range(n), [n - n_val, n_val], generator)
    assert list(train) == list(reference[0].indices) and list(val) == list(reference[1].indices)
    assert sorted([*train, *val]) == list(range(n))


def test_generated_tasks_differ_by_split_and_seed_and_not_by_call():
    pictures, labels = generated.draw_task("shapes", "test", 0)
    again, _ = generated.draw_task("shapes", "test", 0)
    other, _ = generated.draw_task("shapes", "test", 1)
    train, _ = generated.draw_task("shapes", "train", 0)
    assert pictures.dtype == np.uint8 and pictures.shape[1:] == (3, 32, 32)
    assert set(labels) == set(range(len(generated.TASKS["shapes"])))
    assert np.array_equal(pictures, again) and not np.array_equal(pictures, other)
    seen = {picture.tobytes() for picture in train}
    assert not any(picture.tobytes() in seen for picture in pictures)


def test_crops_stay_inside_and_follow_torchvision_on_the_same_box(monkeypatch):
    from torchvision.transforms.v2 import InterpolationMode, functional
    rng = np.random.default_rng(0)
    smooth = torch.from_numpy(rng.integers(0, 256, (16, 3, 8, 8), dtype=np.uint8))
    pictures = functional.resize(smooth, [64, 64], InterpolationMode.BICUBIC)
    crops = images.random_resized_crop(pictures, 32, torch.Generator().manual_seed(0))
    assert crops.shape == (16, 3, 32, 32) and crops.min() >= 0 and crops.max() <= 255
    whole = functional.resize(pictures.float(), [32, 32], InterpolationMode.BICUBIC, antialias=False)
    distance = (crops - whole).abs().mean((1, 2, 3))
    assert 0.1 < distance.mean() < 12                      # nearly the whole image,
    assert len(set(distance.tolist())) > 8                 # and not one box for all

    def known_box(*shape, **_):
        """Area 1, ratio 1: the whole image."""
        return torch.full(shape, 0.5).index_fill_(0, torch.tensor([0]), 1.0)

    monkeypatch.setattr(torch, "rand", known_box)
    full = images.random_resized_crop(pictures, 32, torch.Generator())
    torch.testing.assert_close(full, whole.clamp(0, 255), atol=0.01, rtol=0)


def test_resizing_on_the_device_matches_pillow_within_two_grey_levels():
    from PIL import Image
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 18), torch.nn.Flatten())
    description = encoders.describe(module, {}, 18, (0.5,) * 3, (0.5,) * 3, 0.9, encoder="one convolution")
    encoder = encoders.as_encoder(lambda: module, description)
    stored = torch.from_numpy(picture).permute(2, 0, 1)[None]
    ours = images.fit(stored, encoder.size, encoder.frame)[0].permute(1, 2, 0).numpy()
    theirs = np.asarray(Image.fromarray(picture).resize((20, 20), Image.Resampling.BICUBIC))[1:19, 1:19]
    assert ours.shape == (18, 18, 3) and np.abs(ours.astype(int) - theirs).max() <= 2
    pixels = (torch.from_numpy(ours).float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(encoder.prepare(stored)[0], pixels.permute(2, 0, 1))


def test_resizing_in_two_passes_matches_pillow_also_where_one_pass_in_float_does_not():
    """What a GPU does, on a CPU: pictures of two values overshoot between the passes."""
    from PIL import Image
    from torchvision.transforms.v2 import InterpolationMode, functional
    rng, worst = np.random.default_rng(0), {"two passes": 0, "one": 0}
    for low, high in ((12, 20), (28, 224), (40, 32), (31, 31 * 3)):
        pictures = 255 * rng.integers(0, 2, (4, low, low, 3), dtype=np.uint8)
        stored = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        theirs = [Image.fromarray(picture).resize((high, high), Image.Resampling.BICUBIC)
                  for picture in pictures]
        theirs = torch.from_numpy(np.stack(theirs)).permute(0, 3, 1, 2).int()
        one = functional.resize(stored.float(), [high, high], InterpolationMode.BICUBIC, antialias=True)
        ours = images.resize_in_two_passes(stored, images.Frame(high))
        assert ours.dtype == torch.uint8
        worst["two passes"] = max(worst["two passes"], int((ours.int() - theirs).abs().max()))
        worst["one"] = max(worst["one"], int((one.clamp(0, 255).round().int() - theirs).abs().max()))
    assert worst["two passes"] <= 2 and worst["one"] > 20


def test_pictures_are_resized_in_two_passes_on_every_device_but_a_cpu(monkeypatch):
    resized, in_two_passes = [], images.resize_in_two_passes
    monkeypatch.setattr(images, "resize_in_two_passes",
                        lambda *given: resized.append(given[0].device.type) or in_two_passes(*given))
    for device in ("cpu", "meta"):
        stored = torch.zeros(2, 3, 12, 12, dtype=torch.uint8, device=device)
        assert images.fit(stored, 18, images.Frame(20)).shape == (2, 3, 18, 18)
    assert resized == ["meta"]


# --------------------------------------------------------------------------------------- files


def test_only_what_a_dead_process_of_this_machine_left_is_removed(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    here = platform.node()
    names = [f".a.json.{host}.{process}.tmp" for host, process in
             ((here, gone.pid), (here, os.getppid()), ("elsewhere", gone.pid))]
    for name in names:
        (tmp_path / name).write_text("half")
    files.write_json(tmp_path / "a.json", {"config": {}})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a.json", *names[1:]])


# --------------------------------------------------------------------------------------- training


def test_learning_rate_warms_up_for_a_tenth_and_falls_to_zero():
    rates = [training.learning_rate(step, 2000, 1.0) for step in range(2000)]
    assert rates[0] == 1 / 200 and rates[199] == 1 and rates[200] == 1 and rates[1100] == pytest.approx(0.5)
    assert rates[1999] < 1e-5 and all(a >= b for a, b in zip(rates[200:], rates[201:], strict=False))


def test_every_image_is_seen_once_per_epoch():
    order = training.batches(100, 32, 10, torch.Generator().manual_seed(0)).flatten()
    assert len(order) == 320
    for epoch in range(3):
        assert sorted(order[100 * epoch:100 * (epoch + 1)].tolist()) == list(range(100))


def test_linear_probe_agrees_with_reference():
    """The probe's head against torch's own Linear, unfused AdamW and schedulers, on the same batches."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 600)
    features = np.eye(5, 20)[labels] + 0.7 * rng.standard_normal((600, 20))
    features, targets = torch.from_numpy(features.astype(np.float32)), torch.from_numpy(labels)
    train = common.Split(np.zeros(0), np.arange(600), labels)
    task = common.Task("t", {"train": train}, list("abcde"), "", "generated")
    ours = probe.train_head(features, task, 3e-2, 200, 4)

    generator = torch.Generator().manual_seed(4)
    linear = torch.nn.Linear(20, 5)
    linear.load_state_dict(common.head_tensors(common.random_head(20, 5, generator)))
    optimizer = torch.optim.AdamW(linear.parameters(), 3e-2, weight_decay=0.1)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 20, 1.0, total_iters=19)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 180)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, decay], [20])
    for rows in training.batches(600, 128, 200, generator):
        optimizer.zero_grad()
        F.cross_entropy(linear(features[rows]), targets[rows]).backward()
        torch.nn.utils.clip_grad_norm_(linear.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(ours.weight, linear.weight.detach(), atol=1e-4, rtol=1e-3)
    accuracy = (common.predict(features, ours) == targets).float().mean()
    # another kind of classifier altogether
    nearest_mean = torch.stack([features[targets == c].mean(0) for c in range(5)])
    by_distance = torch.cdist(features, nearest_mean).argmin(1)
    assert abs(accuracy - (by_distance == targets).float().mean()) < 0.03
