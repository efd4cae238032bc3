"""Several processes share the work with the results of one; killed processes lose nothing."""
import errno
import fcntl
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import common
import pytest
import torch
from conftest import ROOT, STAGES, TASKS, as_a_process, perform, stage
from soak import numbers

from lib import results
from lib.files import Refused

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ALL_TASKS = ["--tasks", ",".join(TASKS)]


def test_killed_anywhere_or_on_two_processes_the_files_are_those_of_one_undisturbed_run(tmp_path):
    """SIGKILL at random instants of every heavy stage; then all of them under torchrun, and one that fails.

    The training state is saved at every step. tests/soak.sh N runs the first half longer.
    """
    folder, compared = tmp_path, 0
    finished = stage(sys.executable, "tests/soak.py", "2", "--folder", folder)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    figures = json.loads(finished.stdout)
    assert figures["kills"] == 2 and figures["files"] > 30 and figures["differ"] == []

    # two processes, from the same encoder and data
    (folder / "two/tiny").mkdir(parents=True)
    shutil.copy(folder / "clean/tiny/pretrained.safetensors", folder / "two/tiny")
    finished = stage(*TORCHRUN, "tests/two_processes.py", folder / "two", "cut")
    said = finished.stdout + finished.stderr
    cut = folder / "two/tiny/heads/paper/boards.safetensors"
    assert finished.returncode != 0 and f"{cut} cannot be read" in finished.stderr, said
    (folder / "two/whole").rename(cut)
    for one in sorted((folder / "clean/tiny").rglob("*")):
        two = folder / "two" / one.relative_to(folder / "clean")
        if one.suffix == ".json":
            assert numbers(one) == numbers(two), one.name
        elif one.suffix in (".safetensors", ".npz"):
            assert one.read_bytes() == two.read_bytes(), one.name
        compared += one.suffix in (".json", ".safetensors", ".npz")
    assert compared > 20
    search = json.loads((folder / "two/tiny/full/finetune.json").read_text())["search"]["val"]
    assert len(set(search.values())) > 1                   # else nothing was learnt and nothing compared
    assert json.loads((folder / "two/tiny/full/merge.json").read_text())["machine"]["processes"] == 2


# --------------------------------------------------------------------------------------- rows of several jobs


def rows_job(path, rows, seed=0, overwrite=False, protected=True):
    """The Result of one job that makes some rows of finetune.json."""
    config = {"encoder": "tiny", "seed": seed}
    return results.Result(path, config, {row: {} for row in rows}, ROOT / "finetune.py", torch.device("cpu"),
                          overwrite, key="tasks", protected=protected)


def make_row(result, row, test=0.5):
    with result.saving(row):
        result.rows[row] = {"test": test}


def rows_in(path):
    return set(json.loads(path.read_text())["tasks"])


@pytest.mark.parametrize("protected", [True, False])
def test_rows_another_job_wrote_meanwhile_are_kept(tmp_path, protected):
    path = tmp_path / "finetune.json"
    with as_a_process():
        mine, theirs = (rows_job(path, rows, protected=protected) for rows in (["cars", "mnist"], ["dtd"]))
        make_row(mine, "cars")
        make_row(theirs, "dtd")
        make_row(mine, "mnist")
    assert rows_in(path) == {"cars", "dtd", "mnist"} and not (tmp_path / "earlier").exists()
    with as_a_process():
        make_row(rows_job(path, ["svhn"], seed=1, overwrite=True, protected=protected), "svhn")
    assert rows_in(path) == {"svhn"}


def test_rows_of_other_settings_that_another_job_wrote_meanwhile_are_set_aside_by_an_analysis(tmp_path):
    path = tmp_path / "finetune.json"
    with as_a_process():
        mine = rows_job(path, ["cars"], protected=False)
        theirs = rows_job(path, ["dtd"], seed=1, protected=False)
        make_row(theirs, "dtd")
        before = path.read_bytes()
        make_row(mine, "cars")
    assert rows_in(path) == {"cars"}
    [kept] = (tmp_path / "earlier").rglob("finetune.json")
    assert kept.read_bytes() == before


def test_overwriting_some_rows_keeps_the_others_of_the_same_settings_and_code_also_in_two_jobs(tmp_path):
    path, states = tmp_path / "finetune.json", tmp_path / "state"
    with as_a_process():
        old = rows_job(path, ["cars", "dtd", "mnist"])
        old.values |= {"lr": 0.1, "search": {"task": "cars"}}
        for row in ("cars", "dtd", "mnist"):
            make_row(old, row, 0.1)
    with as_a_process():
        live = rows_job(path, ["svhn"])
        alive = live.training_state("svhn", "0" * 10)
        alive.write_bytes(b"a state")
        mine, theirs = (rows_job(path, [row], overwrite=True) for row in ("cars", "dtd"))
        make_row(mine, "cars", 0.2)
        make_row(theirs, "dtd", 0.3)
        assert alive.exists() and states.exists()
        make_row(live, "svhn", 0.4)
    result = json.loads(path.read_text())
    assert {row: values["test"] for row, values in result["tasks"].items()} == \
        {"cars": 0.2, "dtd": 0.3, "mnist": 0.1, "svhn": 0.4}
    assert (result["lr"], result["search"]) == (0.1, {"task": "cars"})
    with as_a_process():
        make_row(rows_job(path, ["cars", "dtd", "mnist", "svhn"], overwrite=True), "cars", 0.5)
    assert rows_in(path) == {"cars"} and "lr" not in json.loads(path.read_text())


def test_two_jobs_of_other_settings_that_begin_at_once_do_not_drop_each_others_rows(tmp_path):
    path = tmp_path / "finetune.json"
    with as_a_process():
        mine, theirs = rows_job(path, ["cars"]), rows_job(path, ["dtd"], seed=1)
        make_row(theirs, "dtd")
        before = path.read_bytes()
        with pytest.raises(Refused, match="finetune.json holds a result of other settings.*seed 1 there"):
            make_row(mine, "cars")
    assert path.read_bytes() == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_search_is_done_once_and_waited_for(tmp_path, overwrite):
    path = tmp_path / "finetune.json"
    if overwrite:
        with as_a_process():
            old = rows_job(path, ["cars", "dtd"])
            assert old.search_begins()
            old.values |= {"lr": 9.0, "search": {"task": "cars", "seconds": 9}}
            old.search_ends()
            make_row(old, "cars")
    with as_a_process(), ThreadPoolExecutor() as pool:
        mine, theirs = (rows_job(path, rows, overwrite=overwrite) for rows in (["cars"], ["dtd"]))
        assert mine.search_begins()                        # has not taken what --overwrite replaces
        waiting = pool.submit(theirs.search_begins)
        time.sleep(0.2)
        assert not waiting.done()
        mine.values |= {"lr": 0.1, "search": {"task": "cars", "seconds": 1}}
        mine.search_ends()
        assert waiting.result() is False and theirs.values["lr"] == 0.1
        make_row(mine, "cars", 0.2)
        make_row(theirs, "dtd", 0.3)
    result = json.loads(path.read_text())
    assert result["lr"] == 0.1 and {row: values["test"] for row, values in result["tasks"].items()} == \
        {"cars": 0.2, "dtd": 0.3}


def test_a_search_whose_process_was_killed_is_begun_anew_on_another_task(copy, monkeypatch):
    """Not gone on with: its accuracies are another task's."""
    import finetune
    monkeypatch.setattr(finetune, "LEARNING_RATES", [1e-3, 1e-2])
    words = ["finetune", "tiny", "--runs", copy, "--recipe", "full", "--steps", "2", "--batch-size", "8"]
    with monkeypatch.context() as stopping:
        stopping.setattr(finetune, "evaluate", evaluate_until(finetune.evaluate, 2))
        with pytest.raises(KeyboardInterrupt):
            perform(*words, "--tasks", "signs")
    path = copy / "tiny/full/finetune.json"
    assert json.loads(path.read_text())["search"]["val"].keys() == {"0.001"}
    perform(*words, "--tasks", "glyphs")
    result = json.loads(path.read_text())
    assert result["search"]["task"] == "glyphs" and set(result["search"]["val"]) == {"0.001", "0.01"}
    assert result["tasks"]["glyphs"]["lr"] == result["lr"]
    perform(*words, "--tasks", "signs")                    # takes what was found meanwhile
    after = json.loads(path.read_text())
    assert after["search"] == result["search"] and after["tasks"]["signs"]["lr"] == result["lr"]


def evaluate_until(evaluate, stop):
    """A function that is interrupted at its n-th call."""
    calls = itertools.count(1)

    def call(*given):
        if next(calls) == stop:
            raise KeyboardInterrupt
        return evaluate(*given)
    return call


def test_jobs_claim_rows_in_one_order_so_that_no_two_wait_for_each_other(tmp_path, monkeypatch):
    claimed, claim = [], results.claim
    monkeypatch.setattr(results, "claim", lambda path, name: claimed.append(name) or claim(path, name))
    for rows in (["signs", "glyphs", "textures"], ["textures", "signs", "glyphs"]):
        with as_a_process():
            rows_job(tmp_path / "finetune.json", rows)
    assert len(claimed) == 6 and claimed[:3] == claimed[3:]


# --------------------------------------------------------------------------------------- not by torchrun


def test_stages_in_one_process_run_the_code_that_is_there_when_each_begins(tmp_path):
    (tmp_path / "lib").mkdir()
    shutil.copy(ROOT / "lib/together.py", tmp_path / "lib")
    (tmp_path / "lib/rule.py").write_text("VALUE = 1\n")
    (tmp_path / "common.py").write_text("from lib import rule\n")
    (tmp_path / "show.py").write_text("import torch, common\nprint(common.rule.VALUE)\n")
    (tmp_path / "edit.py").write_text("open('lib/rule.py', 'w').write('VALUE = 22\\n')\n")
    stages = ["--", "show.py", "--", "edit.py", "--", "show.py"]
    done = stage(sys.executable, "lib/together.py", *stages, cwd=tmp_path)
    assert done.stdout.split() == ["1", "22"], done.stderr


def test_what_a_scheduler_leaves_in_the_environment_is_one_process_or_a_wait_that_can_be_ended(study):
    command = [sys.executable, "report.py", "--runs", study / "none"]
    left = os.environ | {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
    finished = stage(*command, env=left)
    assert finished.returncode == 2 and "one process on its own" in finished.stderr
    assert "report.py: " in finished.stderr                # its own refusal, as without
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    waiting = subprocess.Popen(command, cwd=ROOT, env=left | meeting, stderr=subprocess.PIPE, text=True)
    assert "process 1 of 2" in next(line for line in waiting.stderr if "process" in line)
    time.sleep(0.5)
    waiting.terminate()
    assert waiting.wait(timeout=20) == -15
    waiting.stderr.close()


# --------------------------------------------------------------------------------------- ended midway


@pytest.mark.parametrize("name, words, function, made, kept", [
    ("merge_eval", ["--lambdas", "12", "--tasks", "signs"], "hits", ["merge.json"], "merge"),
    ("disentangle", ["--points", "5", "--samples", "60", "--metric", "both", "--pairs", "glyphs-signs"],
     "features", ["disentangle.json", "representation.json", "representation/glyphs-signs.npz"],
     "disentangle-glyphs-signs"),
])
def test_an_interrupted_search_or_heat_map_goes_on_where_it_was(copy, monkeypatch, name, words, function,
                                                                made, kept):
    """Interrupted at the evaluator's third call: the first two are not made again, the result is the same."""
    asked, evaluate = [], getattr(common.Evaluator, function)

    def counting(self, *given):
        asked.append(given[-1])                            # the weight settings
        if len(asked) == stop:
            raise KeyboardInterrupt
        return evaluate(self, *given)

    def contents():
        found = {}
        for path in paths:
            found[path] = numbers(path) if path.suffix == ".json" else path.read_bytes()
        return found

    monkeypatch.setattr(common.Evaluator, function, counting)
    command, stop = [name, "tiny", "--runs", copy, "--tasks", "glyphs,signs", *words], 0
    paths = [copy / "tiny/aligned" / file for file in made]
    state = copy / f"tiny/aligned/state/{kept}.json"
    perform(*command, "--overwrite")
    undisturbed, clean = list(asked), contents()
    for path in paths:
        path.unlink()
    asked.clear()
    stop = 3
    with pytest.raises(KeyboardInterrupt):
        perform(*command)
    assert state.exists()
    asked.clear()
    stop = 0
    perform(*command)
    assert len(asked) < len(undisturbed)
    assert undisturbed[2] in asked and undisturbed[1] not in asked[1:]
    assert contents() == clean
    assert not state.exists()


def test_states_of_finished_rows_are_removed_also_after_a_kill_before_that(copy):
    """A kill between writing a row and removing its training states; those of other rows stay."""
    states = copy / "tiny/aligned/state"
    finished = [states / f"finetune-glyphs-{name}.state" for name in ("0123456789", "abcdefabcd")]
    others = states / "finetune-glyphs-more-0123456789.state", states / "finetune-ground-0123456789.state"
    gone = subprocess.Popen(["true"])
    gone.wait()
    dead, alive = (f".{platform.node()}.{process}.tmp" for process in (gone.pid, os.getpid()))
    # killed while it wrote the state, under settings that nobody asks for again
    finished.append(states / f".finetune-glyphs-0a1b2c3d4e.state{dead}")
    others += states / f".finetune-glyphs-0a1b2c3d4e.state{alive}", states / f".finetune-ground-0.state{dead}"
    for path in (*finished, *others):
        path.write_bytes(b"a state")
    perform("finetune", "tiny", "--runs", copy, *ALL_TASKS, *STAGES["finetune"])
    assert all(path.exists() for path in others) and not any(path.exists() for path in finished)


def test_a_second_process_waits_for_the_first_and_finds_its_result(copy):
    path = copy / "tiny/aligned/merge.json"
    whole = path.read_text()
    path.unlink()
    lock = results.claim(path, "merge")                    # this process is the first
    command = [sys.executable, "-u", "merge_eval.py", "tiny", "--runs", copy, *ALL_TASKS, "--lambdas", "11"]
    second = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
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
        lock.release()                                     # as when the first process ends
    rest = second.communicate()[0]
    assert second.returncode == 0 and "nothing to do" in rest and path.read_text() == whole, rest


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_about_and_used(copy, monkeypatch, capsys, code):
    def no_locks(descriptor, operation):
        raise OSError(code, "no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    words = ["tiny", "--runs", copy, *ALL_TASKS, "--images-per-task", "20"]
    perform("posthoc", *words)
    said = capsys.readouterr()
    assert f"warning: {copy / 'tiny/aligned'} is on a file system without locks" in said.err
    assert set(json.loads((copy / "tiny/aligned/posthoc.json").read_text())["tasks"]) == set(TASKS)
    perform("posthoc", *words)
    assert "nothing to do" in capsys.readouterr().out


def test_a_lock_that_fails_for_another_reason_ends_the_stage(copy, monkeypatch):
    def broken(descriptor, operation):
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="the disk is broken"):
        perform("posthoc", "tiny", "--runs", copy, *ALL_TASKS, "--images-per-task", "20")
    assert not (copy / "tiny/aligned/posthoc.json").exists()
