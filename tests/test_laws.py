"""Laws of the arithmetic; each test's name states one."""
import json

import common
import disentangle
import encoders
import files
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from encoders import weights_of


def random_split(n, n_classes, seed=0, side=16):
    rng = np.random.default_rng(seed)
    return common.Split(rng.integers(0, 256, (n, 3, side, side), dtype=np.uint8), np.arange(n), rng.integers(0, n_classes, n))


def random_vector(encoder, seed, scale=0.05):
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(tensor.shape, generator=generator) for name, tensor in weights_of(encoder.module).items()}


def plain_hits(encoder, split, head, vector=None, lam=0.0):
    """Correct predictions by the plainest loop there is: one image at a time through an ordinary module."""
    theta = {name: tensor + (lam * vector[name] if vector else 0) for name, tensor in weights_of(encoder.module).items()}
    hits = 0
    for row, label in zip(split.rows, split.labels, strict=True):
        pixels = (torch.from_numpy(split.images[row]).float() / 255 - 0.5) / 0.5
        with torch.no_grad():
            feature = torch.func.functional_call(encoder.module, theta, (pixels[None],))
        hits += int((F.linear(feature, head["weight"], head["bias"]).argmax() == label))
    return hits


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_padding_never_counts_and_batch_size_does_not_change_accuracy(small_encoder, args, batch_size):
    split, head = random_split(100, 4), common.random_head(32, 4, torch.Generator().manual_seed(1))
    vector = random_vector(small_encoder, 2)
    evaluator = common.Evaluator(small_encoder, args, 0)
    evaluator.batch_size = batch_size
    evaluator.use_vectors([vector])
    [hits] = evaluator.hits([split], [head], [(0.0,), (0.5,), (1.0,)])
    assert hits == [plain_hits(small_encoder, split, head, vector, lam) for lam in (0.0, 0.5, 1.0)]


def test_tasks_in_one_stream_keep_their_own_images_labels_and_heads(small_encoder, args, monkeypatch):
    monkeypatch.setattr(common, "CHUNK_BYTES", 3 * 16 * 16 * 64)  # chunks end in the middle of tasks
    splits = [random_split(n, 5, seed) for seed, n in enumerate((30, 77, 64, 3))]
    heads = [common.random_head(32, 5, torch.Generator().manual_seed(seed)) for seed in range(4)]
    evaluator = common.Evaluator(small_encoder, args, 0)
    assert [hits for [hits] in evaluator.hits(splits, heads, [()])] == [plain_hits(small_encoder, s, h) for s, h in zip(splits, heads, strict=True)]
    for features, split in zip(evaluator.features(splits), splits, strict=True):
        [alone] = evaluator.features([split])
        torch.testing.assert_close(features, alone, atol=1e-5, rtol=1e-5)


def test_compiled_equals_eager_in_one_graph_also_after_the_weights_change(small_encoder, args):
    split, head = random_split(150, 4), common.random_head(32, 4, torch.Generator().manual_seed(1))
    settings, predicted = [(0.0,), (0.3,), (1.0,)], {}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for args.compile in ("on", "off"):
        evaluator = common.Evaluator(small_encoder, args, 0)
        evaluator.use_vectors([random_vector(small_encoder, 2)])
        predicted[args.compile] = evaluator.predictions([split], [head], settings)[0]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(predicted["on"], predicted["off"])
    assert not torch.equal(predicted["on"][0], predicted["on"][2])


def test_theta_pre_plus_task_vector_is_theta_t_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    pre = {"w": torch.randn(200_000, generator=generator) * 10 ** torch.empty(200_000).uniform_(-8, 2, generator=generator)}
    tuned = {"w": torch.randn(200_000, generator=generator) * 10 ** torch.empty(200_000).uniform_(-8, 2, generator=generator)}
    assert not torch.equal(pre["w"] + (tuned["w"] - pre["w"]), tuned["w"])  # why task_vector exists
    theta_t, tau_t = common.task_vector(pre, tuned)
    assert torch.equal(pre["w"] + tau_t["w"], theta_t["w"])
    assert torch.equal(torch.add(pre["w"], tau_t["w"], alpha=1.0), theta_t["w"])
    assert torch.equal(theta_t["w"] - pre["w"], tau_t["w"])
    assert ((theta_t["w"] - tuned["w"]).abs() <= 2.0 ** -22 * torch.maximum(pre["w"].abs(), tuned["w"].abs())).all()  # a rounding, no more


def test_theta_pre_plus_task_vector_reproduces_the_fine_tuned_accuracy(study):
    """Also through the files: finetuned/ minus pretrained is vectors/, and one task merged at lambda = 1 is that task's own."""
    import merge_eval
    from conftest import TASKS
    finetuned = json.loads((study / "tiny/aligned/finetune.json").read_text())["tasks"]
    pre, _ = files.load_tensors(study / "tiny/pretrained.safetensors", "")
    for name in TASKS:
        theta_t, _ = files.load_tensors(study / f"tiny/aligned/finetuned/{name}.safetensors", "")
        tau_t, _ = files.load_tensors(study / f"tiny/aligned/vectors/{name}.safetensors", "")
        assert all(torch.equal(pre[key] + tau_t[key], theta_t[key]) for key in theta_t)
    parsed = merge_eval.parse_args(["tiny", "--runs", str(study), "--tasks", TASKS[0]])
    encoder = encoders.load_encoder(parsed)
    task = common.load_task(TASKS[0], "generated", encoder, parsed)
    evaluator = common.Evaluator(encoder, parsed, 0)
    evaluator.use_vectors([common.load_vector(study / "tiny", "aligned", TASKS[0], encoder)[0]])
    head = common.load_head(study / "tiny", "aligned", task, encoder, evaluator.device)
    [[val], [test]] = evaluator.hits([task.splits["val"], task.splits["test"]], [head, head], [(1.0,)])
    assert (val, test) == (finetuned[TASKS[0]]["hits_val"], finetuned[TASKS[0]]["hits_test"])
    assert common.normalized_accuracy({"a": test / 1000}, {"a": finetuned[TASKS[0]]["test"]}) == 1


def test_addition_at_lambda_zero_is_probing(study):
    probe = json.loads((study / "tiny/probe.json").read_text())["tasks"]
    merge = json.loads((study / "tiny/aligned/merge.json").read_text())
    assert merge["test_lambda0"]["hits"] == {name: probe[name]["hits_test"] for name in probe}
    assert {name: curve[0] for name, curve in merge["val"]["tasks"].items()} == {name: probe[name]["val"] for name in probe}


def test_the_evaluator_at_lambda_zero_agrees_with_the_cached_features(study):

    import merge_eval
    parsed = merge_eval.parse_args(["tiny", "--runs", str(study), "--tasks", "signs"])
    encoder = encoders.load_encoder(parsed)
    task = common.load_task("signs", "generated", encoder, parsed)
    evaluator = common.Evaluator(encoder, parsed, 0)
    head = common.load_head(study / "tiny", "aligned", task, encoder, evaluator.device)
    evaluator.use_vectors([common.load_vector(study / "tiny", "aligned", "signs", encoder)[0]])
    [[hits]] = evaluator.hits([task.splits["test"]], [head], [(0.0,)])
    assert hits == json.loads((study / "tiny/probe.json").read_text())["tasks"]["signs"]["hits_test"]


def test_the_merged_encoder_loads_into_timm_and_repeats_the_test_accuracy(study):
    import merge_eval
    import timm
    merge = json.loads((study / "tiny/aligned/merge.json").read_text())
    module = timm.create_model(encoders.TINY["name"], checkpoint_path=str(study / "tiny/aligned/merged.safetensors"), **encoders.TINY["kwargs"]).eval()
    args = merge_eval.parse_args(["tiny", "--runs", str(study)])
    encoder = encoders.load_encoder(args)
    task = common.load_task("textures", "generated", encoder, args)
    head = common.load_head(study / "tiny", "aligned", task, encoder, torch.device("cpu"))
    dtype = getattr(torch, merge["config"]["dtype"])
    module, pixels = module.to(dtype), ((torch.from_numpy(task.splits["test"].images.copy()).float() / 255 - 0.5) / 0.25).to(dtype)
    with torch.no_grad():
        hits = int((F.linear(module(pixels).float(), head["weight"], head["bias"]).argmax(1) == torch.from_numpy(task.splits["test"].labels)).sum())
    assert abs(hits - merge["test"]["hits"]["textures"]) <= 1  # another batch size may round a tie the other way


def test_lambda_is_chosen_on_validation_by_normalized_accuracy(study):
    merge = json.loads((study / "tiny/aligned/merge.json").read_text())
    finetuned = json.loads((study / "tiny/aligned/finetune.json").read_text())["tasks"]
    curve = [np.mean([merge["val"]["tasks"][name][k] / finetuned[name]["val"] for name in finetuned]) for k in range(21)]
    assert merge["lambdas"] == [round(0.05 * k, 10) for k in range(21)]
    assert merge["best_lambda"] == merge["lambdas"][int(np.argmax(curve))]
    np.testing.assert_allclose(merge["val"]["normalized"], curve, atol=1e-12)


def test_disentanglement_error_laws(small_encoder, args):
    images = [random_split(60, 4, seed) for seed in (0, 1)]
    heads = [common.random_head(32, 4, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    vectors = [random_vector(small_encoder, seed) for seed in (2, 3)]
    lambdas = np.linspace(-2, 2, 5)
    evaluator = common.Evaluator(small_encoder, args, 0)

    def grid(order):
        evaluator.use_vectors([vectors[t] for t in order])
        return np.array([row["prediction"] for row in disentangle.error_rows(evaluator, [images[t] for t in order], [heads[t] for t in order], lambdas, ["prediction"])])

    xi = grid([0, 1])
    assert xi[2, 2] == 0 and xi.min() >= 0 and 0.1 < xi.max() <= 2
    np.testing.assert_array_equal(grid([1, 0]), xi.T)

    def predictions(t, first, second):  # brute force, one image at a time, weights built by hand
        theta = {name: pre + first * vectors[0][name] + second * vectors[1][name] for name, pre in weights_of(small_encoder.module).items()}
        out = []
        for image in images[t].images:
            with torch.no_grad():
                feature = torch.func.functional_call(small_encoder.module, theta, ((torch.from_numpy(image).float()[None] / 255 - 0.5) / 0.5,))
            out.append(int(F.linear(feature, heads[t]["weight"], heads[t]["bias"]).argmax()))
        return np.array(out)

    for row, column in [(0, 0), (0, 2), (2, 4), (3, 1), (2, 2)]:
        first, second = lambdas[row], lambdas[column]
        terms = [np.mean(predictions(0, first, 0) != predictions(0, first, second)), np.mean(predictions(1, 0, second) != predictions(1, first, second))]
        assert xi[row, column] == pytest.approx(sum(terms), abs=1e-12)
        if second == 0:
            assert terms[0] == 0
    with pytest.raises(ValueError):
        disentangle.disentanglement_error(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError):
        disentangle.disentanglement_error(torch.zeros(3), torch.zeros(4))


@pytest.mark.parametrize("n, n_val", [(8144, 814), (3760, 376), (60000, 5000), (73257, 5000), (19850, 1985)])
def test_splits_are_disjoint_and_pinned(n, n_val):
    train, val = common.validation_split(n)
    reference_train, reference_val = torch.utils.data.random_split(range(n), [n - n_val, n_val], torch.Generator().manual_seed(0))
    assert list(train) == list(reference_train.indices) and list(val) == list(reference_val.indices)
    assert sorted([*train, *val]) == list(range(n))


def test_generated_tasks_differ_by_split_and_seed_and_not_by_call():
    import tiny
    images, labels = tiny.draw_task("shapes", "test", 0)
    again, _ = tiny.draw_task("shapes", "test", 0)
    other, _ = tiny.draw_task("shapes", "test", 1)
    train, _ = tiny.draw_task("shapes", "train", 0)
    assert images.dtype == np.uint8 and images.shape[1:] == (3, 32, 32) and set(labels) == set(range(len(tiny.TASKS["shapes"])))
    assert np.array_equal(images, again) and not np.array_equal(images, other)
    seen = {image.tobytes() for image in train}
    assert not any(image.tobytes() in seen for image in images)


def test_crops_stay_inside_and_follow_torchvision_on_the_same_box(monkeypatch):
    from torchvision.transforms.v2 import InterpolationMode, functional
    rng = np.random.default_rng(0)
    smooth = torch.from_numpy(rng.integers(0, 256, (16, 3, 8, 8), dtype=np.uint8))
    images = functional.resize(smooth, [64, 64], InterpolationMode.BICUBIC)
    crops = common.random_resized_crop(images, 32, torch.Generator().manual_seed(0))
    assert crops.shape == (16, 3, 32, 32) and crops.min() >= 0 and crops.max() <= 255
    whole = functional.resize(images.float(), [32, 32], InterpolationMode.BICUBIC, antialias=False)
    distance = (crops - whole).abs().mean((1, 2, 3))
    assert 0.1 < distance.mean() < 12 and len(set(distance.tolist())) > 8  # nearly the whole image, and not one box for all
    # a box known in advance: area 1, ratio 1 is the whole image
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, 0.5).index_fill_(0, torch.tensor([0]), 1.0))
    full = common.random_resized_crop(images, 32, torch.Generator())
    torch.testing.assert_close(full, whole.clamp(0, 255), atol=0.01, rtol=0)


def test_resizing_on_the_device_matches_pillow_within_two_grey_levels(small_encoder):
    from PIL import Image
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    encoder = small_encoder._replace(size=18, crop_pct=0.9)
    ours = common.fit(torch.from_numpy(image).permute(2, 0, 1)[None], encoder)[0].permute(1, 2, 0).numpy()
    theirs = np.asarray(Image.fromarray(image).resize((20, 20), Image.Resampling.BICUBIC))[1:19, 1:19]
    assert ours.shape == (18, 18, 3) and np.abs(ours.astype(int) - theirs).max() <= 2


def test_only_what_a_dead_process_of_this_machine_left_is_removed(tmp_path):
    import os
    import platform
    import subprocess
    gone = subprocess.Popen(["true"])
    gone.wait()
    names = [f".a.json.{host}.{pid}.tmp" for host, pid in ((platform.node(), gone.pid), (platform.node(), os.getppid()), ("elsewhere", gone.pid))]
    for name in names:
        (tmp_path / name).write_text("half")
    files.write_json(tmp_path / "a.json", {"config": {}})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a.json", *names[1:]])


def test_learning_rate_warms_up_for_a_tenth_and_falls_to_zero():
    rates = [common.learning_rate(step, 2000, 1.0) for step in range(2000)]
    assert rates[0] == 1 / 200 and rates[199] == 1 and rates[200] == 1 and rates[1100] == pytest.approx(0.5)
    assert rates[1999] < 1e-5 and all(a >= b for a, b in zip(rates[200:], rates[201:], strict=False))


def test_every_image_is_seen_once_per_epoch():
    rows = common.batches(100, 32, 10, torch.Generator().manual_seed(0)).flatten()
    assert len(rows) == 320
    for epoch in range(3):
        assert sorted(rows[100 * epoch:100 * (epoch + 1)].tolist()) == list(range(100))


def test_linear_probe_agrees_with_reference():
    """The probe's head against torch's own Linear, unfused AdamW and schedulers, on the same batches."""
    import argparse
    import probe
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 600)
    features = torch.from_numpy((np.eye(5, 20)[labels] + 0.7 * rng.standard_normal((600, 20))).astype(np.float32))
    task = common.Task("t", {"train": common.Split(np.zeros(0), np.arange(600), labels)}, list("abcde"), "")
    ours = probe.train_head(features, task, 3e-2, argparse.Namespace(seed=4, probe_steps=200))
    generator = torch.Generator().manual_seed(4)
    linear = torch.nn.Linear(20, 5)
    linear.load_state_dict(common.random_head(20, 5, generator))
    optimizer = torch.optim.AdamW(linear.parameters(), 3e-2, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [
        torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 20, 1.0, total_iters=19), torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 180)], [20])
    targets = torch.from_numpy(labels)
    for rows in common.batches(600, 128, 200, generator):
        optimizer.zero_grad()
        F.cross_entropy(linear(features[rows]), targets[rows]).backward()
        torch.nn.utils.clip_grad_norm_(linear.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(ours["weight"], linear.weight.detach(), atol=1e-4, rtol=1e-3)
    accuracy = (common.predict(features, ours) == targets).float().mean()
    nearest_mean = torch.stack([features[targets == c].mean(0) for c in range(5)])  # a different classifier altogether
    assert abs(accuracy - (torch.cdist(features, nearest_mean).argmin(1) == targets).float().mean()) < 0.03
