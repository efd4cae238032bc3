"""The report, on copies of the small study with other recipes and subsets of tasks added."""
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TASKS, perform

from lib import files


@pytest.fixture(scope="module")
def both(study, tmp_path_factory):
    """The small study with recipe full and the subsets of tasks added."""
    runs = Path(shutil.copytree(study, tmp_path_factory.mktemp("both") / "runs"))
    shared = ["tiny", "--runs", runs, "--tasks", ",".join(TASKS), "--name", "full"]
    perform("finetune", *shared, "--steps", "20", "--batch-size", "32", "--lr", "1e-3")
    perform("make_vectors", *shared)
    perform("merge_eval", *shared, "--lambdas", "5")
    perform("disentangle", *shared, "--points", "5", "--samples", "60")
    for name in ("aligned", "full"):
        perform("subsets", *shared[:-1], name, "--lambdas", "3", "--per-size", "1", "--images-per-task", "40")
    perform("report", "--runs", runs)
    return runs


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


def test_the_report_compares_attention_and_linearized_with_what_trains_everything(copy):
    """Moved here from test_attention_and_linearized.py's way through every stage."""
    for name in ("attention", "linearized"):
        shared = ["tiny", "--runs", copy, "--tasks", ",".join(TASKS[:2]), "--name", name]
        perform("finetune", *shared, "--steps", "6", "--batch-size", "32", "--lr", "1e-3")
        perform("make_vectors", *shared)
        perform("merge_eval", *shared, "--lambdas", "5")
        perform("disentangle", *shared, "--points", "3", "--samples", "40", "--metric", "both")
    perform("posthoc", *shared[:-1], "attention", "--images-per-task", "100")
    perform("report", "--runs", copy)
    report = (copy / "report/report.md").read_text()
    for name in ("metrics-tiny-glyphs-signs", "cosines-tiny", "advantage", "posthoc"):
        assert report.count(f"]({name}.png)") == 1
    # its cost against aligned
    assert re.search(r"\| tiny \| linearized \| [\d,]+ \| 1.00 \| [\d.]+ \| [\d.]+ \|", report)
    assert "| tiny | attention | 2 | 200 |" in report and "python posthoc.py" in report
