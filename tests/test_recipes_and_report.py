"""Recipe full, subsets of tasks, geometry of the vectors, and the report, on a copy of the small study."""
import itertools
import json
import re
import shutil
from pathlib import Path

import common
import files
import merge_eval
import numpy as np
import pytest
import torch
from conftest import TASKS, perform


@pytest.fixture(scope="module")
def both(study, tmp_path_factory):
    """The small study with recipe full and the subsets of tasks added."""
    runs = Path(shutil.copytree(study, tmp_path_factory.mktemp("both") / "runs"))
    shared = ["tiny", "--runs", runs, "--tasks", ",".join(TASKS), "--recipe", "full"]
    perform("finetune", *shared, "--steps", "20", "--batch-size", "32", "--lr", "1e-3")
    perform("make_vectors", *shared)
    perform("merge_eval", *shared, "--lambdas", "5")
    perform("disentangle", *shared, "--points", "5", "--samples", "60")
    for recipe in ("aligned", "full"):
        perform("merge_eval", *shared[:-1], recipe, "--lambdas", "3", "--subsets", "1", "--images-per-task", "40")
    perform("report", "--runs", runs)
    return runs


def test_full_trains_its_own_head_and_leaves_the_probed_one(both, study):
    for name in TASKS:
        probed, _ = files.load_tensors(both / f"tiny/heads/{name}.safetensors", "")
        before, _ = files.load_tensors(study / f"tiny/heads/{name}.safetensors", "")
        own, _ = files.load_tensors(both / f"tiny/full/heads/{name}.safetensors", "")
        assert torch.equal(probed["weight"], before["weight"]) and not torch.equal(own["weight"], probed["weight"])
    trained = {recipe: json.loads((both / f"tiny/{recipe}/finetune.json").read_text())["tasks"]["glyphs"]["trainable_params"] for recipe in ("aligned", "full")}
    assert trained["full"] - trained["aligned"] == 128 * 10 + 10  # the head of ten classes


def test_subsets_cover_every_task_and_pair_and_agree_with_a_search_by_hand(both):
    rows = json.loads((both / "tiny/full/scaling.json").read_text())["subsets"]
    assert [tuple(row["tasks"]) for row in rows] == [subset for size in (1, 2, 3) for subset in itertools.combinations(TASKS, size)]
    # the pair (glyphs, textures), by hand: both vectors written as one sum, on the same images
    args = merge_eval.parse_args(["tiny", "--runs", str(both), "--tasks", ",".join(TASKS), "--recipe", "full"])
    import encoders
    encoder, pair = encoders.load_encoder(args), ("glyphs", "textures")
    tasks = {name: common.load_task(name, "generated", encoder, args) for name in pair}
    evaluator = common.Evaluator(encoder, args, 0)
    curves = {"val": {}, "test": {}}
    for split, curve in curves.items():
        for name in pair:
            own = common.load_vector(both / "tiny", "full", name, encoder)[0]
            other = common.load_vector(both / "tiny", "full", pair[1 - pair.index(name)], encoder)[0]
            images = common.sample(tasks[name].splits[split], 40, 0)
            head = common.load_head(both / "tiny", "full", tasks[name], encoder, evaluator.device)
            evaluator.use_vectors([own])
            [[alone]] = evaluator.hits([images], [head], [(1.0,)])
            evaluator.use_vectors([{key: own[key] + other[key] for key in own}])
            [merged] = evaluator.hits([images], [head], [(0.0,), (0.5,), (1.0,)])
            curve[name] = [count / alone for count in merged]
    best = int(np.argmax(np.mean([curves["val"][name] for name in pair], axis=0)))
    [row] = [row for row in rows if tuple(row["tasks"]) == pair]
    assert row["best_lambda"] == [0.0, 0.5, 1.0][best]
    assert row["normalized"] == pytest.approx(np.mean([curves["test"][name][best] for name in pair]))


def test_subset_choice_is_seeded_and_without_repeats():
    names = list("abcdefgh")
    chosen = merge_eval.choose_subsets(names, 5, 0)
    assert [sum(len(subset) == size for subset in chosen) for size in range(1, 9)] == [8, 28, 5, 5, 5, 5, 5, 1]
    assert len(set(chosen)) == len(chosen) and chosen == merge_eval.choose_subsets(names, 5, 0) != merge_eval.choose_subsets(names, 5, 1)
    assert len(merge_eval.choose_subsets(names, 100, 0)) == 255


def test_overlap_of_subspaces_is_one_with_itself_and_by_chance_between_random_ones():
    import make_vectors
    generator = torch.Generator().manual_seed(0)
    bases = [make_vectors.leading_directions(torch.randn(96, 200, generator=generator), 8) for _ in range(12)]
    overlap = [float((a.T @ b).square().sum() / 8) for a, b in itertools.combinations(bases, 2)]
    assert float((bases[0].T @ bases[0]).square().sum() / 8) == pytest.approx(1)
    assert np.mean(overlap) == pytest.approx(8 / 96, rel=0.15)
    planted = torch.outer(torch.arange(50.0), torch.ones(20)) + 1e-3 * torch.randn(50, 20, generator=generator)
    assert abs(float(make_vectors.leading_directions(planted, 1).T @ torch.full((20, 1), 20 ** -0.5, dtype=torch.float64))) == pytest.approx(1, abs=1e-5)


def test_the_report_shows_what_is_there_and_the_command_for_what_is_not(both, study, tmp_path):
    text = (both / "report/report.md").read_text()
    merge = json.loads((both / "tiny/full/merge.json").read_text())
    assert f"| tiny | ours | 3 | 3000 | {100 * np.mean(list(merge['single_task'].values())):.1f} | {100 * merge['test']['absolute']:.1f} |" in text
    for link in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (both / "report" / link).exists()
    page = (both / "report/report.html").read_text()
    assert page.count("data:image/png;base64,") == text.count("![") and "src='http" not in page
    half = Path(shutil.copytree(both, tmp_path / "runs"))
    shutil.rmtree(half / "report")
    (half / "tiny/full/merge.json").unlink()
    cut = files.read_json(half / "tiny/full/scaling.json", "")             # as a killed run leaves it
    files.write_json(half / "tiny/full/scaling.json", cut | {"subsets": cut["subsets"][:4]})
    shutil.rmtree(half / "tiny/aligned")
    perform("report", "--runs", half)
    text = (half / "report/report.md").read_text()
    shared = f"tiny --runs {study} --tasks {','.join(TASKS)}"  # as probe.py was called
    assert f"| tiny | full | python merge_eval.py {shared} --recipe full |" in text and f"| tiny | aligned | python finetune.py {shared} --recipe aligned |" in text
    assert "| tiny | full | python finetune.py" not in text and "zeroshot" not in text  # the one is there, the other impossible
    assert f"| {half}/tiny/full/scaling.json | python merge_eval.py tiny --runs {both} --tasks {','.join(TASKS)} --recipe full --lambdas 3 --subsets 1 --images-per-task 40 |" in text
    assert f"| tiny | full | {cut['command']} |" in text
    assert "Table 1" not in text and "Table 3" not in text
    with pytest.raises(files.Refused, match="no results"):
        perform("report", "--runs", tmp_path / "empty")


def test_encoders_that_differ_in_data_or_scale_are_compared(both, tmp_path):
    for name in ("vit_b16_sup_in1k", "vit_b16_sup_in21k"):  # the small study under two of the paper's names
        shutil.copytree(both / "tiny", tmp_path / "runs" / name)
        files.write_json(tmp_path / "runs" / name / "probe.json", files.read_json(both / "tiny/probe.json", "") | {"encoder": name})
    perform("report", "--runs", tmp_path / "runs")
    pictures = {path.name for path in (tmp_path / "runs/report").glob("*.png")}
    assert {"scaling-vit_b16_sup_in1k-vit_b16_sup_in21k.png", "disentangle-glyphs-signs-vit_b16_sup_in1k-vit_b16_sup_in21k.png"} <= pictures


def test_the_report_over_seeds_gives_mean_and_deviation(both, tmp_path):
    other = tmp_path / "seed1/tiny/aligned"
    other.mkdir(parents=True)
    merge = files.read_json(both / "tiny/aligned/merge.json", "")
    first = merge["test"]["absolute"]
    merge["test"]["absolute"] += 0.02
    files.write_json(other / "merge.json", merge)
    half = Path(shutil.copytree(both, tmp_path / "runs"))
    perform("report", "--runs", half, "--seeds", tmp_path / "seed1", tmp_path / "nothing")
    assert "| tiny | aligned | 2 |" in (text := (half / "report/report.md").read_text())
    assert f"{100 * (first + 0.01):.1f} +- {100 * 0.02 / 2 ** 0.5:.1f}" in text


def test_precision_compares_the_four_ways_on_the_same_images(copy):
    perform("precision", "tiny", "--runs", copy, "--tasks", ",".join(TASKS), "--images-per-task", "60", "--compile", "off")
    result = files.read_json(copy / "tiny/aligned/precision.json", "")
    assert set(result["tasks"]) == set(TASKS) and all(row["n"] == 60 and row["flips_to_fp32"]["fp32"] == 0 for row in result["tasks"].values())
    weights = result["weights"]
    assert 0 < weights["bf16"]["error"] < weights["added"]["error"] and 0 < weights["added"]["unchanged"] < 1  # two roundings lose more than one
    assert result["xi_floor"] == pytest.approx(2 * np.mean([row["flips_between_paths"] for row in result["tasks"].values()]))


def test_subsets_of_one_task_are_refused(both):
    with pytest.raises(files.Refused, match="two tasks or more"):
        perform("merge_eval", "tiny", "--runs", both, "--tasks", "glyphs", "--subsets", "3")
