"""Several processes share the work with the results of one; killed processes lose nothing."""
import json
import shutil
import subprocess
import sys
import time

import common
import pytest
import torch
import two_processes
from conftest import ROOT, TASKS, perform, stage
from soak import numbers


def test_two_processes_give_the_files_of_one(study, tmp_path):
    for runs in ("one", "two"):
        shutil.copytree(study, tmp_path / runs)
        shutil.rmtree(tmp_path / runs / "tiny/features")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)                                           # as torchrun gives each process
        two_processes.main(str(tmp_path / "one"))
    finally:
        torch.set_num_threads(threads)
    finished = stage(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "tests/two_processes.py", tmp_path / "two")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    compared = 0
    for one in sorted((tmp_path / "one/tiny").rglob("*")):
        two = tmp_path / "two" / one.relative_to(tmp_path / "one")
        if one.suffix == ".json":
            assert numbers(one) == numbers(two), one.name
        elif one.suffix in (".safetensors", ".npz"):
            assert one.read_bytes() == two.read_bytes(), one.name
        compared += one.suffix in (".json", ".safetensors", ".npz")
    assert compared > 20
    search = json.loads((tmp_path / "two/tiny/full/finetune.json").read_text())["search"]["val"]
    assert len(set(search.values())) > 1                                   # else nothing was learnt and nothing compared
    assert json.loads((tmp_path / "two/tiny/full/merge.json").read_text())["machine"]["processes"] == 2


def test_one_process_failing_ends_the_run_with_its_message(study, tmp_path):
    runs = shutil.copytree(study, tmp_path / "runs")
    (runs / "tiny/heads/signs.safetensors").write_bytes(b"cut")
    finished = stage(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "merge_eval.py", "tiny", "--runs", runs,
                     "--tasks", "glyphs,signs,textures", "--overwrite")
    assert finished.returncode != 0 and "heads/signs.safetensors cannot be read" in finished.stderr
    assert json.loads((runs / "tiny/aligned/merge.json").read_text()) == json.loads((study / "tiny/aligned/merge.json").read_text())


def test_rows_another_job_wrote_meanwhile_are_kept(tmp_path):
    import files
    path = tmp_path / "finetune.json"
    mine, theirs = ({"config": {"seed": 0}, "command": "", "tasks": {}} for _ in range(2))
    for result, name in ((mine, "cars"), (theirs, "dtd"), (mine, "mnist")):
        with files.adding_rows(path, result, "tasks", overwrite=False):
            result["tasks"][name] = {"test": 0.5}
    assert set(json.loads(path.read_text())["tasks"]) == {"cars", "dtd", "mnist"}
    other = {"config": {"seed": 1}, "command": "", "tasks": {}}
    with files.adding_rows(path, other, "tasks", overwrite=True):
        other["tasks"]["svhn"] = {"test": 0.5}
    assert set(json.loads(path.read_text())["tasks"]) == {"svhn"}


@pytest.mark.parametrize("name, words, function, kept", [("merge_eval", ["--lambdas", "14"], "hits", "merge"),
                                                         ("disentangle", ["--points", "5", "--samples", "60", "--metric", "both", "--pairs", "glyphs-signs"], "features", "disentangle-both-glyphs-signs")])
def test_an_interrupted_search_or_heat_map_goes_on_where_it_was(copy, monkeypatch, name, words, function, kept):
    """Interrupted at the third call of the evaluator: the first two are not made again, and the result is that of an undisturbed run."""
    asked, evaluate = [], getattr(common.Evaluator, function)

    def counting(self, *given):
        asked.append(given[-1])                                            # the weight settings
        if len(asked) == stop:
            raise KeyboardInterrupt
        return evaluate(self, *given)

    monkeypatch.setattr(common.Evaluator, function, counting)
    command, stop = [name, "tiny", "--runs", copy, "--tasks", ",".join(TASKS), *words], 0
    results = {file: copy / f"tiny/aligned/{file}" for file in (["merge.json"] if name == "merge_eval" else ["disentangle.json", "representation.json", "representation/glyphs-signs.npz"])}
    perform(*command, "--overwrite")
    undisturbed, clean = list(asked), {file: numbers(path) if path.suffix == ".json" else path.read_bytes() for file, path in results.items()}
    for path in results.values():
        path.unlink()
    asked.clear()
    stop = 3
    with pytest.raises(KeyboardInterrupt):
        perform(*command)
    assert (copy / f"tiny/aligned/state/{kept}.json").exists()
    asked.clear()
    stop = 0
    perform(*command)
    assert len(asked) < len(undisturbed) and undisturbed[2] in asked and undisturbed[1] not in asked[1:]
    assert {file: numbers(path) if path.suffix == ".json" else path.read_bytes() for file, path in results.items()} == clean
    assert not (copy / f"tiny/aligned/state/{kept}.json").exists()


def test_a_second_process_waits_for_the_first_and_finds_its_result(copy):
    import files
    path = copy / "tiny/aligned/merge.json"
    whole = path.read_text()
    path.unlink()
    files.claim(path, [""])                                                # this process is the first
    second = subprocess.Popen([sys.executable, "-u", "merge_eval.py", "tiny", "--runs", copy, "--tasks", ",".join(TASKS)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    said = []
    try:
        for line in second.stdout:
            said.append(line)
            if "merge.json: another process is at work on it" in line:
                break
        time.sleep(1)
        assert second.poll() is None and not path.exists(), "".join(said)
        path.write_text(whole)
    finally:
        files.CLAIMS.pop(copy / "tiny/.claims").close()                    # as when the first process ends
    rest = second.communicate()[0]
    assert second.returncode == 0 and "nothing to do" in rest and path.read_text() == whole, rest


def test_killed_anywhere_then_rerun_equals_uninterrupted():
    """SIGKILL at random instants of every heavy stage, the training state saved at every step; tests/soak.sh N runs it longer."""
    finished = stage(sys.executable, "tests/soak.py", "4")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    figures = json.loads(finished.stdout)
    assert figures["kills"] == 4 and figures["files"] > 30 and figures["differ"] == []
