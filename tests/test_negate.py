"""Negation against probing, against weights subtracted by hand, and its random vectors and neighbours."""
import json

import common
import negate
import numpy as np
import pytest
import torch
from conftest import perform, refuse

from lib import encoders, files, vectors
from lib.study import open_study


def test_negation_begins_at_probing_and_picks_what_the_floor_allows(copy, capsys):
    """Two targets and a third task as control."""
    shared = ["tiny", "--runs", copy, "--tasks", "glyphs,signs", "--device", "cpu"]
    asked = [*shared, "--control", "textures", "--lambda-max", "0.6", "--lambdas", "3", "--a-class", "4"]
    perform("negate", *asked)
    found = json.loads((copy / "tiny/aligned/negation.json").read_text())
    probe = json.loads((copy / "tiny/probe.json").read_text())["tasks"]
    assert list(found["targets"]) == ["glyphs", "signs"] and found["lambdas"] == [0, 0.3, 0.6]
    for target, row in found["targets"].items():
        assert row["test_lambda0"]["frozen"] == probe[target]["paper"]["test"]
        assert row["test_lambda0"]["all"] == probe[target]["converged"]["test"]
        assert list(row["subtracted"]) == ["own", "random", "other"]
        for label, cell in row["subtracted"].items():
            target_at, control_at = cell["val"]["target"], cell["val"]["control"]
            assert target_at[0] == probe[target]["paper"]["val"]
            assert control_at[0] == probe["textures"]["paper"]["val"]
            assert cell["control"]["lambda0"] == probe["textures"]["paper"]["test"]
            allowed = [k for k in range(3) if control_at[k] >= 0.95 * control_at[0]]
            assert cell["best"] in allowed
            assert target_at[cell["best"]] == min(target_at[k] for k in allowed)
            assert cell["lambda"] == found["lambdas"][cell["best"]] * negate.REACH[label]
            change = cell["test"]["frozen"] - row["test_lambda0"]["frozen"]
            assert cell["change"]["frozen"]["mean"] == pytest.approx(change)
    own = [row["subtracted"]["own"]["test"]["few"] for row in found["targets"].values()]
    assert found["means"]["own"]["test"]["few"] == pytest.approx(np.mean(own))
    errors = [row["own_minus_random"]["all"]["standard_error"] for row in found["targets"].values()]
    combined = found["means"]["own"]["minus_random"]["all"]["standard_error"]
    assert combined == pytest.approx(np.hypot(*errors) / 2)

    # glyphs at .6, by hand: weights subtracted one by one in a module of its own
    row = found["targets"]["glyphs"]
    for label, source, lam in (("own", "glyphs", 0.6), ("other", "signs", 0.6), ("random", "glyphs", 6)):
        args = negate.parse_args([str(word) for word in shared])
        study = open_study(args, negate.__file__, "finetune.json")
        tau = vectors.load_vector(study.source, source, study.encoder)
        if label == "random":
            tau = negate.random_like(tau, "0 glyphs")
        for name, tensor in encoders.weights_of(study.encoder.module).items():
            tensor -= lam * tau[name]
        evaluator = common.Evaluator(study.encoder, study.device, study.dtype)
        split = study.tasks["glyphs"].splits["val"]
        [[hits]] = evaluator.hits([split], [study.heads["glyphs"]], [()])
        assert hits == pytest.approx(row["subtracted"][label]["val"]["target"][2] * len(split), abs=1)
    own, random = (row["subtracted"][label]["test"]["all"] for label in ("own", "random"))
    assert row["own_minus_random"]["all"]["mean"] == pytest.approx(own - random)

    perform("report", "--runs", copy)
    assert "## Negation" in (copy / "report/report.md").read_text()
    assert "negate own: mean target" in capsys.readouterr().out
    said = refuse("negate", *shared, "--control", "signs")
    assert "--control signs is one of the targets" in said
    assert "two tasks or more" in refuse("negate", *shared[:3], "--tasks", "glyphs")

    # another head of a control task makes everything anew
    head = copy / "tiny/heads/paper/textures.safetensors"
    tensors, about = files.load_tensors(head, "")
    files.save_tensors(head, {name: -tensor for name, tensor in tensors.items()},
                       **{key: value for key, value in about.items() if key != "sha256"})
    (copy / "tiny/probe.json").unlink()
    perform("negate", *asked)
    again = json.loads((copy / "tiny/aligned/negation.json").read_text())["targets"]["glyphs"]
    assert again["subtracted"]["own"]["val"]["control"] != row["subtracted"]["own"]["val"]["control"]


@pytest.mark.parametrize("floor", ["1.5", "-0.1", "none"])
def test_a_floor_outside_0_to_1_is_refused(floor, capsys):
    with pytest.raises(SystemExit):
        negate.parse_args(["tiny", "--floor", floor])
    assert "is not a number from 0 to 1" in capsys.readouterr().err


def test_a_random_vector_has_the_norm_of_each_tensor_and_a_seed():
    generator = torch.Generator().manual_seed(0)
    vector = {"a": torch.randn(5, 7, generator=generator), "b": 1e-3 * torch.randn(11, generator=generator),
              "zero": torch.zeros(3)}
    drawn = negate.random_like(vector, "0 glyphs")
    for name, tensor in vector.items():
        torch.testing.assert_close(drawn[name].norm(), tensor.norm())
        assert drawn[name].shape == tensor.shape
    again, other = negate.random_like(vector, "0 glyphs"), negate.random_like(vector, "1 glyphs")
    assert torch.equal(drawn["a"], again["a"]) and not torch.equal(drawn["a"], other["a"])
    cosine = torch.nn.functional.cosine_similarity(drawn["a"].flatten(), vector["a"].flatten(), dim=0)
    assert abs(cosine) < 0.6


def test_neighbours_vote_as_counted_one_by_one():
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(60, 6)).astype("f"), rng.normal(size=(25, 6)).astype("f")
    labels = rng.integers(0, 4, 60)
    split = common.Split(None, np.arange(60), labels)
    task = common.Task("t", {"train": split}, ["a", "b", "c", "d"], "", "")
    features = {"train": torch.from_numpy(train), "test": torch.from_numpy(test)}
    expected = []
    for row in test:
        cosine = train @ row / np.linalg.norm(train, axis=1) / np.linalg.norm(row)
        votes = np.zeros(4)
        for index in np.argsort(-cosine)[:20]:
            votes[labels[index]] += np.exp(cosine[index] / 0.07)
        expected.append(votes.argmax())
    assert negate.neighbours(features, task).tolist() == expected
