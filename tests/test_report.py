"""The report: the three questions, what is there beside the published numbers, commands for what is not."""
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import perform, refuse

from lib import files, schemes


def test_the_report_opens_with_the_three_questions_answered_from_the_stages_files(both):
    text = (both / "report/report.md").read_text()
    opening = text[:text.index("| encoder |")]
    merge, full = (json.loads((both / f"tiny/{name}/merge.json").read_text()) for name in ("aligned", "full"))
    xi = json.loads((both / "tiny/aligned/disentangle.json").read_text())["pairs"]["glyphs-signs"]
    test, minus = merge["test"], merge["probing"]["converged"]["addition_minus"]
    points, error = 100 * minus["mean"], 100 * minus["standard_error"]
    verdict = "above" if points > 2 * error else "below" if points < -2 * error else "within the noise of"
    for said in (f"at lambda = {merge['best_lambda']:g} it gets {100 * test['absolute']:.1f} % of the 1,200",
                 f"xi = {xi['mean_xi_in_box']:.2f} in [-1, 1]^2", "not measured (precision.py)",
                 "On the same 1,200 test images addition is",
                 f"{verdict} the converged one ({100 * merge['probing']['converged']['absolute']:.1f} %): "
                 f"{points:+.1f} +- {error:.1f} points, above it on {minus['tasks_won']} of 3 tasks",
                 f"The control full, whose heads train along, gets {100 * full['test']['absolute']:.1f} %"):
        assert said in opening, said
    assert merge["gain"]["mean"] == pytest.approx(test["absolute"] - merge["test_lambda0"]["absolute"])


def test_the_paper_in_small_stands_beside_the_paper(study):
    merge, variants = json.loads((study / "tiny/aligned/merge.json").read_text()), {}
    for name, more in (("tiny", 0), ("tiny-mae", -.1), ("tiny-dino", -.05), ("timm:x", .2)):
        test = merge["test"] | {"absolute": .6 + more, "normalized": .8 + more}
        zero = merge["test_lambda0"] | {"absolute": .5 + 2 * more}
        variants[name, "aligned"] = {"merge.json": merge | {"test": test, "test_lambda0": zero}}
    assert schemes.paper_in_small({key: variants[key] for key in list(variants)[-1:]}) == []
    heading, (_, table), (_, orders), about = schemes.paper_in_small(variants)
    assert heading[1] == "The paper in small: aligned (arXiv:2511.14569 Table 1)" and len(table) == 3
    assert table[0]["encoder"] == "tiny" and table[0]["stands for"] == "vit_b16_sup_in21k"
    assert (table[0]["lambda = 0"], table[0]["addition"]) == ("50.0 / 80.7", "60.0 / 81.7")
    assert table[0]["lambda"] == f"{merge['best_lambda']:g} / 0.05"
    assert orders == [  # DINO is published as 82.2, 90.9 and a gain of 0, MAE as 63.1, 73.0 and .3
        {"": "DINO above MAE", "addition": "+5.0 / +19.1", "normalized": "+5.0 / +17.9",
         "gain": "-5.0 / -0.3"},
        {"": "supervised above DINO", "addition": "+5.0 / -0.5", "normalized": "+5.0 / -1.6",
         "gain": "-5.0 / +1.0"}]


def test_every_picture_is_there_and_in_the_page(both):
    text, page = (both / "report/report.md").read_text(), (both / "report/report.html").read_text()
    for link in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (both / "report" / link).exists()
    assert page.count("data:image/png;base64,") == text.count("![") and "src='http" not in page
    merge = json.loads((both / "tiny/full/merge.json").read_text())
    single = np.mean(list(merge["single_task"].values()))
    numbers = [merge["test_lambda0"]["absolute"], single, merge["test"]["absolute"]]
    assert f"| tiny | full | 3 | 1200 | {' | '.join(f'{100 * number:.1f}' for number in numbers)} |" in text


def test_the_report_names_the_command_for_what_is_not_there(both, tmp_path):
    half = Path(shutil.copytree(both, tmp_path / "runs"))
    shutil.rmtree(half / "report")
    (half / "tiny/full/merge.json").unlink()
    cut = files.read_json(half / "tiny/full/scaling.json", "")             # as a killed run leaves it
    rows = dict(list(cut["subsets"].items())[:4])
    files.write_json(half / "tiny/full/scaling.json", cut | {"subsets": rows})
    shutil.rmtree(half / "tiny/aligned")
    perform("report", "--runs", half)
    text = (half / "report/report.md").read_text()
    assert f"| tiny | full | python merge_eval.py tiny --runs {half} --name full |" in text
    assert f"| tiny | aligned | python finetune.py tiny --runs {half} --name aligned |" in text
    assert "| tiny | full | python finetune.py" not in text and "zeroshot" not in text    # there; impossible
    assert f"| {half}/tiny/full/scaling.json | {cut['command']} |" in text
    assert f"| tiny | full | {cut['command']} |" in text
    assert "Table 1" not in text and "Table 3" not in text
    with pytest.raises(files.Refused, match="no results"):
        perform("report", "--runs", tmp_path / "empty")


def test_encoders_that_differ_in_data_or_scale_are_compared(both, tmp_path):
    for name in ("vit_b16_sup_in1k", "vit_b16_sup_in21k"):  # the small study under two of the paper's names
        shutil.copytree(both / "tiny", tmp_path / "runs" / name)
        probe = files.read_json(both / "tiny/probe.json", "")
        files.write_json(tmp_path / "runs" / name / "probe.json", probe | {"encoder": name})
    perform("report", "--runs", tmp_path / "runs")
    pictures = {path.name for path in (tmp_path / "runs/report").glob("*.png")}
    compared = "vit_b16_sup_in1k-vit_b16_sup_in21k.png"
    assert {f"scaling-{compared}", f"disentangle-glyphs-signs-{compared}"} <= pictures


def test_the_report_over_seeds_gives_mean_and_deviation(both, tmp_path):
    other = tmp_path / "seed1/tiny/aligned"
    other.mkdir(parents=True)
    merge = files.read_json(both / "tiny/aligned/merge.json", "")
    first = merge["test"]["absolute"]
    merge["test"]["absolute"] += 0.02
    files.write_json(other / "merge.json", merge)
    half = Path(shutil.copytree(both, tmp_path / "runs"))
    perform("report", "--runs", half, "--seeds", tmp_path / "seed1")
    assert "| tiny | aligned | 2 |" in (text := (half / "report/report.md").read_text())
    assert f"{100 * (first + 0.01):.1f} +- {100 * 0.02 / 2 ** 0.5:.1f}" in text
    said = refuse("report", "--runs", half, "--seeds", tmp_path / "seed1", tmp_path / "nothing")
    assert f"{tmp_path / 'nothing'} is not a folder" in said
