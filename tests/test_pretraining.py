"""The pre-training schemes: what each may see, what it minimises, and what all of them leave behind."""
import functools
import json
import re
import shutil
from unittest import mock

import numpy as np
import pretrain
import pretrain_contrastive
import pretrain_dino
import pretrain_mae
import pytest
import torch
import torch.nn.functional as F
from conftest import image_folder, perform, refuse

from lib import captions, encoders, files, generated, pretraining, text_heads

SCHEMES = ["pretrain", "pretrain_mae", "pretrain_dino", "pretrain_contrastive"]
NAMES = ["sup", "mae", "dino", "clip"]                     # of an encoder by each
NARROW = {"library": "timm", "name": "vit_tiny_patch16_224",
          "kwargs": {**pretrain.ARCHITECTURE["kwargs"], "embed_dim": 32, "depth": 1, "num_heads": 2}}
STEPS = ["--pretrain-steps", "5", "--batch-size", "8", "--device", "cpu"]
WHOLE_DRAW = generated.draw_pretraining
LABELS = [0, 39, 1, 78, 56, 14, 81, 69, 72, 28, 48, 59]    # of seed 3, 960 pictures: the first twelve
PIXELS = [[125, 173, 183], [90, 113, 96], [163, 189, 158], [207, 231, 255],        # and a pixel of eight
          [140, 161, 123], [51, 59, 103], [185, 213, 227], [115, 74, 77]]


@functools.cache
def few_pictures(seed=0):
    """What draw_pretraining returns, of 960 pictures instead of 24,000."""
    with mock.patch.object(generated, "PRETRAINING_IMAGES", 960):
        return WHOLE_DRAW(seed)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A narrow encoder and few pictures for every scheme."""
    monkeypatch.setattr(generated, "draw_pretraining", few_pictures)
    for name in SCHEMES:
        monkeypatch.setattr(f"{name}.ARCHITECTURE", NARROW)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def result(runs, name):
    return json.loads((runs / name / "pretrain.json").read_text())


def description(runs, name):
    return files.load_tensors(runs / name / "pretrained.safetensors", "")[1]


# --------------------------------------------------------------------------------------- captions


def test_the_pictures_are_those_of_earlier_versions():
    """Some pixels, as no arithmetic of another processor changes them by more than a grey level."""
    images, labels, _ = few_pictures(3)
    assert labels[:12].tolist() == LABELS
    assert np.abs(images[:960:120, :, 9, 17].astype(int) - PIXELS).max() <= 1


def test_a_caption_names_the_kind_and_the_specimen():
    images, labels, recorded = few_pictures()
    phrases = captions.captions(labels, recorded, mentioned=1)
    assert len(phrases) == len(images) == 960
    for label, phrase in zip(labels, phrases, strict=True):
        assert f" {captions.KINDS[label]} {captions.specimen_name(label)} on " in phrase, phrase
        assert ("upper" in phrase or "central" in phrase or "lower" in phrase) == ("cloud" not in phrase)
        assert ("lines" in phrase) == ("doodle" in phrase)
    assert [captions.KINDS.count(kind) for kind in ("doodle", "blob", "fractal", "cloud")] == [48, 16, 16, 16]
    assert len({captions.specimen_name(label) for label in range(96)}) == 96


def test_a_captions_ground_is_the_colour_of_the_corners():
    """Over the pictures of each word; a single one may have another by its noise, contrast and brightness."""
    images, labels, recorded = few_pictures()
    phrases = captions.captions(labels, recorded, mentioned=1)
    corners = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].mean(2) / 255           # (N, 3)
    outlined = np.array(["cloud" not in phrase for phrase in phrases])
    grounds = np.array([re.search(r" on ([a-z ]+)", phrase)[1] for phrase in phrases])
    dark, light = (np.array([word in ground for ground in grounds]) for word in ("dark ", "light "))
    assert corners[dark & outlined].mean() < .4 < .5 < corners[light & outlined].mean()
    strongest = {"red": [0], "yellow": [0, 1], "green": [1], "cyan": [1, 2], "blue": [2], "purple": [0, 2]}
    for hue, channels in strongest.items():
        found = np.array([ground.split()[-1] == hue for ground in grounds]) & outlined
        mean = corners[found].mean(0)
        assert sorted(np.argsort(mean)[-len(channels):]) == channels, hue


@pytest.mark.parametrize("colour, words", [
    ((.9, .1, .1), "red"), ((.3, .05, .05), "dark red"), ((.5, .5, .5), "grey"), ((.2, .2, .25), "dark grey"),
    ((.9, .9, .5), "light yellow"), ((.1, .9, .1), "green"), ((.1, .8, .8), "cyan"),
    ((.6, .6, 1), "light blue"), ((.7, .1, .7), "purple")])
def test_colours_have_the_words_that_a_person_would_use(colour, words):
    assert captions.colour_words(np.array([colour]))[0] == words


def test_size_place_tilt_and_lines_are_said_as_drawn():
    recorded = {"pen": np.full((2, 3), .5), "ground": np.full((2, 3), .9),
                "size": np.array([[.6, .6], [.8, .8]]), "centre": np.array([[-.1, -.1], [.1, 0]]),
                "angle": np.array([-.2, 0]), "width": np.array([.6, 1.7]), "cells": np.zeros(2, int)}
    assert captions.captions(np.array([0, 11]), recorded, mentioned=1) == [
        "small grey doodle baba on light grey, upper left, tilted left, thin lines",
        "big grey doodle dede on light grey, central right, upright, thick lines"]


def test_all_but_kind_and_name_is_said_of_some_pictures_only():
    _, labels, recorded = few_pictures()
    phrases, whole = (captions.captions(labels, recorded, mentioned=share) for share in (.3, 1))
    for label, phrase, all_words in zip(labels, phrases, whole, strict=True):
        words = text_heads.split_words(phrase)
        assert {captions.KINDS[label], captions.specimen_name(label)} <= set(words)
        assert set(words) <= set(text_heads.split_words(all_words))
    assert .25 < np.mean([" on " in phrase for phrase in phrases]) < .35
    assert captions.captions(labels, recorded, 1) != phrases == captions.captions(labels, recorded, 0)


def test_no_word_of_a_caption_is_a_class_of_a_task():
    _, labels, recorded = few_pictures()
    phrases = captions.captions(labels, recorded, mentioned=1)
    words = set(text_heads.words_of(phrases, captions.TEMPLATES)) - {"a"}          # A is a letter's class
    classes = set(text_heads.words_of(sum(map(list, generated.TASKS.values()), []), []))
    assert words & classes == set()


def test_views_are_drawn_by_the_generator_and_stay_in_range(small_encoder):
    stored = torch.from_numpy(few_pictures()[0][:6])

    def views(seed, scale=(.2, .5), strength=.4):
        generator = torch.Generator().manual_seed(seed)
        return pretraining.random_views(stored, small_encoder, scale, strength, generator)

    first, again, other = views(0), views(0), views(1)
    assert first.shape == (6, 3, 16, 16) and torch.equal(first, again) and not torch.equal(first, other)
    assert first.abs().max() <= 1                          # mean and deviation of .5
    plain = views(0, (.99, 1), 0)                          # all of each picture, a fifth of them grey
    whole = small_encoder.prepare(stored)
    grey = plain.std(1).amax((1, 2)) < 1e-5
    assert grey.sum() < 6 and (plain - whole)[~grey].abs().mean() < 0.1 < (other - whole).abs().mean()


# --------------------------------------------------------------------------------------- noisy labels


@pytest.mark.parametrize("share", [.5, 1])
def test_noisy_labels_are_the_same_labels_of_other_pictures(share):
    labels = torch.arange(96).repeat(10)
    noisy = pretrain.permuted(labels, share, torch.Generator().manual_seed(0))
    assert torch.equal(noisy.sort().values, labels.sort().values)
    assert (noisy != labels).float().mean().item() == pytest.approx(share, abs=.02)


def test_label_noise_is_a_setting_and_stands_in_the_description(tmp_path):
    perform("pretrain", "noisy", "--runs", tmp_path, *STEPS, "--label-noise", "0.5")
    perform("pretrain", "clean", "--runs", tmp_path, *STEPS)
    assert description(tmp_path, "noisy")["label_noise"] == 0.5
    assert result(tmp_path, "noisy")["config"]["label_noise"] == 0.5
    assert "label_noise" not in result(tmp_path, "clean")["config"] | description(tmp_path, "clean")
    assert description(tmp_path, "noisy")["sha256"] != description(tmp_path, "clean")["sha256"]
    assert "label_noise" in refuse("pretrain", "noisy", "--runs", tmp_path, *STEPS)


# --------------------------------------------------------------------------------------- masked autoencoder


def test_every_patch_is_visible_in_one_of_a_pictures_four_masks():
    visible, hidden = pretrain_mae.choose_patches(5, 16, torch.Generator().manual_seed(0))
    assert visible.shape == (20, 4) and hidden.shape == (20, 12)
    for picture in range(5):
        assert sorted(visible[picture::5].flatten().tolist()) == list(range(16))
    for shown, covered in zip(visible, hidden, strict=True):
        assert sorted([*shown.tolist(), *covered.tolist()]) == list(range(16))


def test_the_encoder_never_sees_a_hidden_patch():
    torch.manual_seed(0)
    module, images = encoders.build_architecture(NARROW), drawn(4, 3, 32, 32)
    visible, hidden = pretrain_mae.choose_patches(4, 16, torch.Generator().manual_seed(0))
    visible, hidden = visible[:4], hidden[:4]
    images.requires_grad_()
    tokens = pretrain_mae.encode(module, images, visible)
    assert tokens.shape == (4, 4, 32)
    tokens.square().sum().backward()
    moved = pretrain_mae.patches_of(images.grad, 8).abs().sum(2)                   # (4, 16)
    assert (moved.gather(1, hidden) == 0).all() and (moved.gather(1, visible) > 0).all()


def test_all_patches_visible_make_the_encoders_own_feature():
    torch.manual_seed(0)
    module, images = encoders.build_architecture(NARROW), drawn(2, 3, 32, 32)
    tokens = pretrain_mae.encode(module, images, torch.arange(16).expand(2, -1))
    torch.testing.assert_close(tokens.mean(1), module(images))


def test_the_masked_loss_looks_at_hidden_patches_only():
    guessed, patches = drawn(3, 16, 12).requires_grad_(), drawn(3, 16, 12, seed=1) * 5 + 2
    hidden = torch.stack([torch.randperm(16)[:12] for _ in range(3)])
    loss = pretrain_mae.masked_loss(guessed, patches, hidden)
    loss.backward()
    touched = guessed.grad.abs().sum(2) > 0
    assert torch.equal(touched, torch.zeros(3, 16, dtype=torch.bool).scatter(1, hidden, True))
    errors = []
    for picture, patch in ((i, int(p)) for i in range(3) for p in hidden[i]):
        pixels = patches[picture, patch].numpy()
        target = (pixels - pixels.mean()) / np.sqrt(pixels.var(ddof=1) + 1e-6)
        errors.append(((guessed[picture, patch].detach().numpy() - target) ** 2).mean())
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-5)


# --------------------------------------------------------------------------------------- self-distillation


def test_the_teacher_gets_no_gradient_and_moves_as_stated():
    torch.manual_seed(0)
    student, teacher = (pretrain_dino.ProjectionHead(32, 16, 8, 20) for _ in range(2))
    inputs = drawn(6, 32)
    said, taught = student(inputs).split(2), teacher(inputs).split(2)[:2]
    pretrain_dino.distillation_loss(said, taught, torch.zeros(20)).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())
    before = [parameter.detach().clone() for parameter in teacher.parameters()]
    pretrain_dino.follow(teacher, student, 0.9)
    for old, new, own in zip(before, teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * own)
    assert pretrain_dino.momentum(0, 100) == pretrain_dino.FIRST_MOMENTUM
    assert pretrain_dino.momentum(100, 100) == 1


def test_the_distillation_loss_is_the_mean_over_pairs_of_other_views():
    student, teacher = [drawn(4, 6, seed=i) for i in range(3)], [drawn(4, 6, seed=9), drawn(4, 6, seed=8)]
    centre, losses = drawn(6, seed=7), []
    for i, j, row in ((i, j, row) for i in range(2) for j in range(3) for row in range(4) if i != j):
        target = np.exp((teacher[i][row] - centre).double().numpy() / pretrain_dino.TEACHER_TEMPERATURE)
        own = student[j][row].double().numpy() / pretrain_dino.STUDENT_TEMPERATURE
        losses.append(-(target / target.sum() * (own - np.log(np.exp(own).sum()))).sum())
    loss = pretrain_dino.distillation_loss(student, teacher, centre)
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-4)
    moved = pretrain_dino.distillation_loss(student, [said + 3 * centre for said in teacher], 4 * centre)
    torch.testing.assert_close(moved, loss, atol=1e-4, rtol=1e-4)                  # the centre is taken off


@pytest.mark.parametrize("said, expected", [
    (torch.zeros(4, 4), (1, 1)),                           # the same of every prototype
    (torch.eye(4)[[1, 1, 1, 1]], (0, 0)),                  # one prototype for every picture
    (torch.eye(4), (0, 1))])                               # a prototype for each picture
def test_entropies_tell_both_collapses(said, expected):
    each, mean = pretrain_dino.entropies([said], torch.zeros(4))
    assert (each.item(), mean.item()) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("centre_momentum, collapsed", [(pretrain_dino.CENTRE_MOMENTUM, False), (1, True)])
def test_without_centring_one_prototype_wins(centre_momentum, collapsed, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_dino, "CENTRE_MOMENTUM", centre_momentum)         # 1: the centre stays 0
    words = ["--pretrain-steps", "40", "--batch-size", "8", "--lr", "3e-3", "--device", "cpu"]
    perform("pretrain_dino", "x", "--runs", tmp_path, *words)
    assert (result(tmp_path, "x")["entropy_of_mean"] < 0.3) == collapsed


def test_a_small_view_is_read_as_a_view_of_the_encoders_own_size_would_be():
    torch.manual_seed(0)
    module, views = encoders.build_architecture(NARROW), drawn(2, 3, 32, 32)
    torch.testing.assert_close(pretrain_dino.features_of(module, views), module(views))
    assert pretrain_dino.features_of(module, views[:, :, :16, :16]).shape == (2, 32)


# --------------------------------------------------------------------------------------- contrastive


def test_the_contrastive_loss_is_symmetric_and_a_permuted_batch_has_the_same():
    images, texts, same = drawn(8, 5), drawn(8, 5, seed=1), torch.eye(8, dtype=torch.bool)
    loss = pretrain_contrastive.contrastive_loss(images, texts, 7.0, same)
    torch.testing.assert_close(pretrain_contrastive.contrastive_loss(texts, images, 7.0, same), loss)
    order = torch.randperm(8)
    permuted = pretrain_contrastive.contrastive_loss(images[order], texts[order], 7.0, same)
    torch.testing.assert_close(permuted, loss)
    broken = pretrain_contrastive.contrastive_loss(images[order], texts, 7.0, same)
    assert abs(broken - loss) > 1e-3
    logits = 7 * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    one, other = -logits.log_softmax(1).diagonal().mean(), -logits.log_softmax(0).diagonal().mean()
    torch.testing.assert_close(loss, (one + other) / 2)


def test_pictures_of_equal_captions_are_no_negatives_of_each_other():
    """At infinite scale the loss of two pictures with one caption is log 2, whichever is whose."""
    features = torch.eye(4)[[0, 0, 1, 2]]
    caption = torch.tensor([0, 0, 1, 2])
    same = caption == caption[:, None]
    loss = pretrain_contrastive.contrastive_loss(features, features, 1e4, same)
    assert loss.item() == pytest.approx(np.log(2) / 2, rel=1e-5)


def test_words_that_no_caption_has_are_spelled():
    tower = text_heads.SmallTextTower(["a", "blob", "red"], 6, 8, 1, 2)
    blob, red, odd = tower.tokenize(["a Blob.", "a red", "a ox"])
    number = tower.number
    assert blob[:3].tolist() == [number["a"], number["blob"], 0] and len(set(number.values())) == len(number)
    assert red[:3].tolist() == [number["a"], number["red"], 0]
    assert odd[:4].tolist() == [number["a"], number["o"], number["x"], 0]
    assert max(number.values()) < tower.embed.num_embeddings
    longer = tower.encode_text(tower.tokenize(["a red", "a red blob ox ox ox"]))
    torch.testing.assert_close(tower.encode_text(red[None])[0], longer[0])         # padding does not count


# --------------------------------------------------------------------------------------- what all leave


class Killed(Exception):
    pass


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_killed_pretraining_ends_in_the_same_files(scheme, tmp_path):
    words = [*STEPS, "--save-minutes", "1e-9", "--checkpoints", "0,2,5"]
    perform(scheme, "x", "--runs", tmp_path / "whole", *words)
    after = pretraining.Training.after
    for stop in (0, 2, 3):                                 # in the middle of a step, before anything is kept

        def dies(training, step, *values, stop=stop, **more):
            if step == stop:
                raise Killed
            after(training, step, *values, **more)

        with mock.patch.object(pretraining.Training, "after", dies), pytest.raises(Killed):
            perform(scheme, "x", "--runs", tmp_path / "killed", *words)
        assert len(list((tmp_path / "killed/x/state").glob("*.state"))) == (stop > 0)
    perform(scheme, "x", "--runs", tmp_path / "killed", *words)
    for file in sorted((tmp_path / "whole").rglob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "killed" / file.relative_to(tmp_path / "whole")).read_bytes()
    assert result(tmp_path / "whole", "x")["curve"] == result(tmp_path / "killed", "x")["curve"]
    assert not list((tmp_path / "killed").rglob("*.state"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """A runs folder with the four schemes' encoders, sup, mae, dino and clip, and their checkpoints."""
    runs = tmp_path_factory.mktemp("four") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generated, "draw_pretraining", few_pictures)
        for scheme, name in zip(SCHEMES, NAMES, strict=True):
            patch.setattr(f"{scheme}.ARCHITECTURE", NARROW)
            perform(scheme, name, "--runs", runs, *STEPS, "--checkpoints", "0,3,5")
    return runs


def test_checkpoints_are_encoders_and_say_what_they_are(four):
    for name, scheme in zip(NAMES, ("supervised", "mae", "dino", "contrastive"), strict=True):
        for step in (0, 3, 5):
            encoder = encoders.load_encoder(f"{name}-step{step}", four)
            about = encoder.description
            assert encoder.module(encoder.example(2)).shape == (2, 32)
            assert (about["scheme"], about["step"], about["images_seen"]) == (scheme, step, 8 * step)
            assert about["architecture"] == NARROW and about["seed"] == 0
        assert encoder.fingerprint == encoders.load_encoder(name, four).fingerprint
        assert description(four, name)["step"] == 5
    begins = {encoders.load_encoder(f"{name}-step0", four).fingerprint for name in NAMES}
    assert len(begins) == 1                                # random initialisation is the same for all


def test_a_checkpoint_asked_for_later_is_made_and_the_encoder_stays(four, tmp_path, capsys):
    runs = shutil.copytree(four, tmp_path / "runs")
    made = ["pretrained.safetensors", "pretrain.json"]
    before = {file: (runs / "mae" / file).read_bytes() for file in made}
    perform("pretrain_mae", "mae", "--runs", runs, *STEPS, "--checkpoints", "0,4")
    assert "trained again for checkpoints [4]" in capsys.readouterr().out
    assert description(runs, "mae-step4")["step"] == 4
    assert before == {file: (runs / "mae" / file).read_bytes() for file in before}
    perform("pretrain_mae", "mae", "--runs", runs, *STEPS, "--checkpoints", "0,4")
    assert "nothing to do" in capsys.readouterr().out


def test_results_say_what_a_scheme_is_judged_by(four):
    results = {name: result(four, name) for name in NAMES}
    for values in results.values():
        assert values["images_seen"] == 40 and values["curve"][-1]["step"] == 5 and values["pictures"] == 960
    assert len({values["pictures_sha256"] for values in results.values()}) == 1
    assert 0 < results["dino"]["entropy"] < results["dino"]["entropy_of_mean"] < 1
    assert {"entropy", "entropy_of_mean"} <= set(results["dino"]["curve"][-1])
    assert results["clip"]["among"] == 100 and 0 <= results["clip"]["retrieval"] <= 1
    assert (four / "mae/reconstruction.png").exists() and (four / "dino/neighbours.png").exists()


# --------------------------------------------------------------------------------------- heads from text


def test_zero_shot_heads_come_from_the_small_tower(four, tmp_path):
    runs = shutil.copytree(four, tmp_path / "runs")
    pets = image_folder(tmp_path / "pets", n_train=40, n_test=20)
    words = ["clip", "--runs", runs, "--tasks", f"pets={pets}", "--recipe", "zeroshot", "--device", "cpu",
             "--compile", "off"]
    perform("finetune", *words, "--steps", "2", "--batch-size", "8", "--lr", "1e-4")
    encoder = encoders.load_encoder("clip", runs)
    tower, tokenize, templates = text_heads.text_tower(encoder, folder=runs / "clip")
    weight, _ = files.load_tensors(runs / "clip/zeroshot/heads/pets.safetensors", "")
    with torch.no_grad():
        for name, row in zip(("cat", "dog"), weight["weight"], strict=True):
            texts = [template.format(name) for template in templates]
            mean = F.normalize(tower.encode_text(tokenize(texts)), dim=1).mean(0)
            torch.testing.assert_close(row, tower.logit_scale.exp() * F.normalize(mean, dim=0))
    row = json.loads((runs / "clip/zeroshot/finetune.json").read_text())["tasks"]["pets"]
    assert 0 <= row["zero_shot"] <= 1
    (runs / "clip/text_tower.safetensors").unlink()
    said = refuse("finetune", *words, "--steps", "3", "--name", "other")
    assert "text_tower.safetensors is missing" in said and "pretrain_contrastive.py clip" in said


def test_a_tower_is_refused_beside_another_encoder(four, tmp_path):
    runs = shutil.copytree(four, tmp_path / "runs")
    shutil.copy(runs / "clip-step3/text_tower.safetensors", runs / "clip")
    with pytest.raises(files.Refused, match="was made with theta_pre"):
        text_heads.text_tower(encoders.load_encoder("clip", runs), folder=runs / "clip")


# --------------------------------------------------------------------------------------- amount and size


def test_fewer_pictures_are_some_of_them_with_their_labels_and_captions(tmp_path, small_encoder):
    pixels, labels, drawn = few_pictures()
    phrases = captions.captions(labels, drawn)
    cut = pretraining.gathered([pixels], labels, phrases, small_encoder, torch.device("cpu"), 50, seed=3)
    whole = pretraining.gathered([pixels], labels, phrases, small_encoder, torch.device("cpu"))
    assert len(cut.images) == len(cut.labels) == len(cut.captions) == 50
    for image, label, phrase in zip(cut.images[:5], cut.labels, cut.captions, strict=False):
        [at] = (whole.images == image).all(3).all(2).all(1).nonzero().flatten().tolist()
        assert labels[at] == label and phrases[at] == phrase
    perform("pretrain_mae", "few", "--runs", tmp_path, *STEPS, "--pictures", "100")
    assert result(tmp_path, "few")["pictures"] == 100
    assert "--pictures 961: there are 960" in refuse("pretrain", "x", "--runs", tmp_path, "--pictures", "961")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_larger_encoder_is_one_by_its_description(scheme, tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "LARGE", {"embed_dim": 48, "depth": 2, "num_heads": 3})
    perform(scheme, "big", "--runs", tmp_path, *STEPS, "--large")
    kwargs = description(tmp_path, "big")["architecture"]["kwargs"]
    assert kwargs == NARROW["kwargs"] | {"embed_dim": 48, "depth": 2, "num_heads": 3}
    assert encoders.load_encoder("big", tmp_path).module(torch.zeros(1, 3, 32, 32)).shape == (1, 48)


# --------------------------------------------------------------------------------------- own pictures


def test_every_scheme_takes_a_folder_of_classes(tmp_path):
    pets = image_folder(tmp_path / "pets", n_train=40, n_test=10, size=(40, 36))
    for scheme in SCHEMES:
        perform(scheme, scheme, "--runs", tmp_path / "runs", *STEPS, "--tasks", f"pets={pets}")
        values = result(tmp_path / "runs", scheme)
        assert values["pictures"] == 40 and values["config"]["pictures"] == {"pets": str(pets)}
    assert values["words"] == len({*"a picture of the photo".split(), "cat", "dog"})


def test_classes_of_several_folders_stay_apart(tmp_path):
    pets, beds = image_folder(tmp_path / "pets"), image_folder(tmp_path / "beds", classes=("rose", "tulip"))
    perform("pretrain", "x", "--runs", tmp_path, *STEPS, "--tasks", f"pets={pets},beds={beds}")
    assert result(tmp_path, "x")["classes"] == 4


def test_pictures_without_labels_serve_where_none_are_needed(tmp_path):
    folder = tmp_path / "heap"
    folder.mkdir()
    for path in image_folder(tmp_path / "pets", n_train=30).rglob("train/*/*.png"):
        shutil.copy(path, folder)
    for scheme in ("pretrain_mae", "pretrain_dino"):
        perform(scheme, scheme, "--runs", tmp_path, *STEPS, "--tasks", f"heap={folder}")
        assert result(tmp_path, scheme)["pictures"] == 30
    for scheme in ("pretrain", "pretrain_contrastive"):
        said = refuse(scheme, scheme, "--runs", tmp_path, *STEPS, "--tasks", f"heap={folder}")
        assert "have no labels" in said and "pretrain_mae.py" in said and "\n" not in said


@pytest.mark.parametrize("scheme", ["pretrain", "pretrain_contrastive"])
def test_one_class_is_refused(scheme, tmp_path):
    pets = image_folder(tmp_path / "pets", classes=("cat",))
    assert "one class only" in refuse(scheme, "x", "--runs", tmp_path, *STEPS, "--tasks", f"pets={pets}")
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_checkpoint_beyond_the_steps_is_refused(scheme, tmp_path):
    said = refuse(scheme, "x", "--runs", tmp_path, *STEPS, "--checkpoints", "0,6")
    assert "--checkpoints 6 is beyond the last step, 5" in said


@pytest.mark.parametrize("words", [["5,3"], ["1,1"], ["-1"], ["x"], [""]])
def test_checkpoints_that_are_no_ascending_steps_are_one_line(words, capsys):
    with pytest.raises(SystemExit) as left:
        pretrain_mae.parse_args(["x", "--checkpoints", *words])
    assert left.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_training_that_diverges_leaves_no_encoder(tmp_path):
    said = refuse("pretrain_mae", "x", "--runs", tmp_path, *STEPS, "--lr", "1e30")
    assert "diverged" in said and not list(tmp_path.rglob("*.safetensors"))
