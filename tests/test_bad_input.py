"""Wrong input ends in exit code 2 and one line that names it, and leaves what was computed as it was."""
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import RESULT, STAGES, TASKS, TIMM, image_folder, perform, refuse, snapshot, stage

from lib import results

ALL_TASKS = ["--tasks", ",".join(TASKS)]


def test_the_command_line_says_it_in_one_line_with_exit_code_2(tmp_path):
    finished = stage(sys.executable, "probe.py", "vit_b16_dyno", "--runs", tmp_path / "runs")
    assert finished.returncode == 2 and finished.stdout == ""
    assert finished.stderr.count("\n") == 1
    assert "vit_b16_dino" in finished.stderr and "vit_b16_dyno" in finished.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words, said", [
    (["vit_b16_dyno"], "did you mean vit_b16_dino"),
    (["timm:vit_tiny_patch16_225"], "vit_tiny_patch16_224"),
    (["open_clip:ViT-B-61/laion2b_s34b_b88k"], "ViT-B-16"),
    (["timm:../../x"], "unknown encoder"),
    ([TIMM, "--weights", "nowhere.safetensors"], "nowhere.safetensors cannot be read"),
    (["tiny"], 'run "python pretrain.py tiny" first'),
])
def test_encoders_that_cannot_be_had(tmp_path, words, said):
    assert said in refuse("probe", *words, "--runs", tmp_path / "runs", "--tasks", "glyphs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("tasks, said", [
    ("glyph", "did you mean glyphs"),
    ("glyphs,glyphs", "names a task twice"),
    ("../x", "no task name"),
    ("pets=/no/such/folder", "/no/such/folder is not a folder"),
    ("", "no task name"),
])
def test_unknown_tasks(study, tasks, said):
    before = snapshot(study)
    assert said in refuse("probe", "tiny", "--runs", study, "--tasks", tasks)
    assert snapshot(study) == before


def write_a_note(folder):
    folder.mkdir()
    (folder / "notes.txt").write_text("hello")


def break_nothing(folder):
    image_folder(folder)
    shutil.rmtree(folder / "test")


def break_image(folder):
    image_folder(folder)
    path = sorted((folder / "train").rglob("*.png"))[7]
    path.write_bytes(path.read_bytes()[:200])


def break_parquet(folder):
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 but then nothing")


@pytest.mark.parametrize("make, said", [
    (lambda folder: folder.mkdir(), "does not load as a data set"),
    (write_a_note, "needs one image column and one column `label`, found text (string)"),
    (lambda folder: image_folder(folder, n_train=0), "has splits test; train and test are needed"),
    (break_nothing, "a fifth of each of its 2 classes is 2 rows in all; at least 10 are needed"),
    (break_image, "image 7 of split train cannot be decoded"),
    (break_parquet, "does not load as a data set"),
    (lambda folder: image_folder(folder, n_test=3), "at least 10 are needed"),
])
def test_folders_that_are_no_good_data_set(copy, tmp_path, make, said):
    make(tmp_path / "pets")
    before = snapshot(copy)
    pets = f"pets={tmp_path / 'pets'}"
    message = refuse("probe", "tiny", "--runs", copy, "--tasks", pets, *STAGES["probe"])
    assert said in message and "pets" in message
    assert snapshot(copy) == before


def test_a_registered_task_with_other_counts_is_refused(copy, tmp_path):
    image_folder(tmp_path / "data" / "dtd")
    words = ["--data", tmp_path / "data", "--tasks", "dtd", *STAGES["probe"]]
    message = refuse("probe", "tiny", "--runs", copy, *words)
    assert "12 train and 10 test images in 2 classes" in message and "3760 and 1880 in 47" in message


def test_labels_out_of_range_and_missing_are_refused(copy, tmp_path):
    import datasets
    from PIL import Image
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "PNG")
    images = [{"bytes": buffer.getvalue(), "path": None}] * 12
    cases = [([0, 1, -1], "labels -1 to 1"), ([0, 1, None], "not all whole numbers"),
             ([0.5, 1.0, 2.0], "not all whole numbers")]
    for index, (labels, said) in enumerate(cases):
        folder = tmp_path / f"set{index}"
        for split in ("train", "test"):
            rows = datasets.Dataset.from_dict({"image": images, "label": labels * 4})
            rows.cast_column("image", datasets.Image()).to_parquet(folder / f"{split}.parquet")
        assert said in refuse("probe", "tiny", "--runs", copy, "--tasks", f"odd={folder}", *STAGES["probe"])


@pytest.mark.parametrize("content, said", [
    (b"<html><body>404 Not Found</body></html>", "is no checkpoint of"),
    (b"", "is no checkpoint of"),
])
def test_files_that_are_no_checkpoint(tmp_path, content, said):
    weights, runs = tmp_path / "weights.safetensors", tmp_path / "runs"
    weights.write_bytes(content)
    assert said in refuse("probe", TIMM, "--weights", weights, "--runs", runs, "--tasks", "glyphs")
    assert not runs.exists() or not snapshot(runs)


def test_a_checkpoint_of_another_architecture_missing_keys_or_with_nan_is_refused(tmp_path):
    import timm
    import torch
    from safetensors.torch import save_file
    good, runs = timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "runs"
    other = timm.create_model("vit_tiny_patch16_224", embed_dim=96, num_heads=3).state_dict()
    cases = {
        "other": (other, "size mismatch"),
        "missing": ({key: tensor for key, tensor in good.items() if key != "norm.weight"}, "norm.weight"),
        "extra": (good | {"surprise": torch.zeros(3)}, "surprise"),
        "nan": (good | {"norm.bias": good["norm.bias"] * float("nan")}, "not finite"),
    }
    for name, (state, said) in cases.items():
        weights = tmp_path / f"{name}.safetensors"
        save_file(state, weights)
        assert said in refuse("probe", TIMM, "--weights", weights, "--runs", runs, "--tasks", "glyphs")
    save_file(good, tmp_path / "good.safetensors")
    words = ["--weights", tmp_path / "good.safetensors", "--runs", runs, "--tasks", "glyphs"]
    said = refuse("probe", TIMM, *words, "--image-size", "8")
    assert f"{TIMM} does not take images of 8 pixels" in said and "good.safetensors" not in said
    assert not runs.exists() or not snapshot(runs)


SMALL_TIMM = "timm:test_vit.r160_in1k"


def test_a_head_that_is_thrown_away_need_not_fit(tmp_path):
    """None, of other classes, and with nothing said of theta_pre's: the same encoder."""
    import timm
    import torch
    from safetensors.torch import save_file

    from lib import encoders
    good, found = timm.create_model("test_vit").state_dict(), {}
    headless = {key: tensor for key, tensor in good.items() if not key.startswith("head.")}
    ten = headless | {"head.weight": torch.ones(10, 64), "head.bias": torch.ones(10)}
    for name, state in {"good": good, "headless": headless, "ten": ten}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
        torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}},
                   tmp_path / f"{name}.pt")
        for file in (f"{name}.safetensors", f"{name}.pt"):
            encoder = encoders.load_encoder(SMALL_TIMM, tmp_path / f"runs-{file}", tmp_path / file, 32)
            found[file] = encoder.fingerprint
    assert len(found) == 6 and len(set(found.values())) == 1
    torch.save({**good, "epoch": 3}, tmp_path / "more.pt")
    words = ["--weights", tmp_path / "more.pt", "--runs", tmp_path / "more", "--tasks", "glyphs"]
    said = refuse("probe", SMALL_TIMM, *words)
    assert "epoch" in said and "attribute" not in said
    [ours] = tmp_path.glob("runs-good.pt/*/pretrained.safetensors")
    again = encoders.load_encoder(SMALL_TIMM, tmp_path / "again", ours, 32)
    assert again.fingerprint == encoder.fingerprint         # a file of ours: pretrained, merged


def test_a_folder_of_runs_is_no_name_of_an_encoder_and_messages_have_the_name(tmp_path):
    import timm
    from safetensors.torch import save_file
    runs, weights = tmp_path / "runs", tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), weights)
    shared = ["--runs", runs, "--tasks", "pets"]
    image_folder(tmp_path / "data/pets")
    said = refuse("finetune", SMALL_TIMM, *shared, "--weights", weights, "--image-size", "32",
                  "--data", tmp_path / "data")
    assert f'run "python probe.py {SMALL_TIMM}" first' in said and not (runs / "inputs").exists()
    [folder] = runs.iterdir()
    for name in ("finetune", "merge_eval"):
        assert f"is the folder of encoder {SMALL_TIMM}: give that name" in \
            refuse(name, folder.name, "--runs", runs, "--tasks", f"pets={tmp_path / 'data/pets'}")
    said = refuse("merge_eval", SMALL_TIMM, "--runs", runs, "--tasks", f"pets={tmp_path / 'data/pets'}")
    assert f'run "python finetune.py {SMALL_TIMM} --name aligned" first' in said


@pytest.mark.parametrize("name, gone, said", [
    ("probe", "tiny/pretrained.safetensors", "pretrain.py tiny"),
    ("finetune", "tiny/heads/paper/signs.safetensors", "python probe.py tiny"),
    ("make_vectors", "tiny/aligned/finetuned/signs.safetensors", "python finetune.py tiny --name aligned"),
    ("merge_eval", "tiny/aligned/vectors/signs.safetensors", "python make_vectors.py tiny --name aligned"),
    ("merge_eval", "tiny/aligned/finetune.json", "python finetune.py tiny --name aligned"),
    ("disentangle", "tiny/aligned/vectors/signs.safetensors", "python make_vectors.py tiny --name aligned"),
])
def test_a_missing_earlier_stage_is_named(copy, name, gone, said):
    (copy / gone).unlink()
    (copy / RESULT[name]).unlink(missing_ok=True)  # so that the stage has work to do
    before = snapshot(copy)
    message = refuse(name, "tiny", "--runs", copy, *ALL_TASKS, *STAGES[name])
    assert said in message and Path(gone).name in message
    assert snapshot(copy) == before


@pytest.mark.parametrize("damage", ["cut", "flip"])
@pytest.mark.parametrize("name, file", [
    ("probe", "tiny/pretrained.safetensors"), ("finetune", "tiny/heads/paper/signs.safetensors"),
    ("make_vectors", "tiny/aligned/finetuned/signs.safetensors"),
    ("merge_eval", "tiny/aligned/vectors/signs.safetensors"),
    ("merge_eval", "tiny/features/signs.safetensors"),
])
def test_a_cut_or_altered_file_is_refused_by_name(copy, name, file, damage):
    content = bytearray((copy / file).read_bytes())
    if damage == "cut":
        content = content[:len(content) // 2]
    else:
        content[-10] ^= 1
    (copy / file).write_bytes(content)
    (copy / RESULT[name]).unlink()
    before = snapshot(copy)
    assert file in refuse(name, "tiny", "--runs", copy, *ALL_TASKS, *STAGES[name])
    assert snapshot(copy) == before


@pytest.mark.parametrize("gone, makes, uses", [
    ("tiny/heads/paper/signs.safetensors", "probe", "finetune"),
    ("tiny/aligned/finetuned/signs.safetensors", "finetune", "make_vectors"),
    ("tiny/aligned/vectors/signs.safetensors", "make_vectors", "merge_eval"),
])
def test_the_command_that_is_named_brings_a_lost_file_back(copy, gone, makes, uses):
    lost = (copy / gone).read_bytes()
    (copy / gone).unlink()
    (copy / RESULT[uses]).unlink()
    shared = ["tiny", "--runs", copy, *ALL_TASKS]
    settings = STAGES | {"merge_eval": ["--lambdas", "2"]}
    refuse(uses, *shared, *settings[uses])
    perform(makes, *shared, *settings[makes])
    assert (copy / gone).read_bytes() == lost  # bit for bit: same seed, same machine
    perform(uses, *shared, *settings[uses])


def test_another_data_set_under_the_same_name_is_not_taken_for_the_first(copy, tmp_path):
    first = ["--tasks", f"pets={image_folder(tmp_path / 'a', n_train=40)}"]
    second = ["--tasks", f"pets={image_folder(tmp_path / 'b', n_train=50)}"]
    probe, finetune = ["tiny", "--runs", copy, *STAGES["probe"]], ["tiny", "--runs", copy, "--steps", "2"]
    finetune += ["--batch-size", "8", "--lr", "1e-3", "--name", "pets"]
    perform("probe", *probe, *first)
    perform("finetune", *finetune, *first)
    before = snapshot(copy / "tiny")
    said = refuse("probe", *probe, *second)
    assert "pets was made of other inputs (data " in said and "--overwrite" in said
    said = refuse("finetune", *finetune, *second)
    assert "pets was made of other inputs (data " in said and "--name" in said and "--overwrite" in said
    assert snapshot(copy / "tiny") == before
    (copy / "tiny/probe.json").unlink()
    assert "features/pets" in refuse("probe", *probe, *second)
    (copy / "tiny/pets/finetune.json").unlink()
    assert "heads/paper/pets" in refuse("finetune", *finetune, *second)


def test_a_cut_image_cache_is_refused_by_name(copy):
    images = next((copy / "inputs").glob("signs-*")) / "test_inputs.npy"
    images.write_bytes(images.read_bytes()[:5000])
    assert images.parent.name in refuse("merge_eval", "tiny", "--runs", copy, *ALL_TASKS, "--overwrite")


def test_heads_features_and_vectors_of_another_encoder_are_refused_by_name(copy, tmp_path):
    """A second tiny, from another seed, meets the first one's files."""
    perform("pretrain", "tiny", "--runs", tmp_path / "other", "--pretrain-steps", "2", "--seed", "5")
    shutil.copy(tmp_path / "other/tiny/pretrained.safetensors", copy / "tiny/pretrained.safetensors")
    found = {"finetune": "heads/paper/glyphs", "make_vectors": "finetuned/glyphs",
             "merge_eval": "vectors/glyphs"}
    for name, file in found.items():
        (copy / "tiny/aligned/merge.json").unlink(missing_ok=True)
        overwrite = ["--overwrite"] if name == "finetune" else []
        message = refuse(name, "tiny", "--runs", copy, *ALL_TASKS, *STAGES[name], *overwrite)
        assert file in message and "theta_pre" in message
    (copy / "tiny/probe.json").unlink()
    message = refuse("probe", "tiny", "--runs", copy, *ALL_TASKS, "--probe-steps", "300")
    assert "features/glyphs" in message and "theta_pre" in message
    words = ["--tasks", "glyphs", "--probe-steps", "3", "--probe-lr", "0.01", "--overwrite"]
    perform("probe", "tiny", "--runs", copy, *words)


def test_other_settings_of_what_is_trained_are_refused_by_name_and_overwrite_allows_them(copy):
    before = snapshot(copy)
    shared = ["tiny", "--runs", copy, *ALL_TASKS]
    assert "steps 300 there, 10 asked" in refuse("probe", *shared, "--probe-steps", "10")
    assert "image" in refuse("probe", *shared, "--image-size", "64")
    said = refuse("finetune", *shared, *STAGES["finetune"], "--steps", "10")
    assert "steps 20 there, 10 asked" in said and "--name" in said and "--overwrite" in said
    assert "recipe of head" in refuse("finetune", *shared, *STAGES["finetune"], "--recipe", "full",
                                      "--name", "aligned")
    assert "steps 40 there, 5 asked" in refuse("pretrain", "tiny", "--runs", copy, "--pretrain-steps", "5")
    assert snapshot(copy) == before
    for name in ("probe", "finetune"):                     # before another seed draws other pictures
        words = ["--tasks", "textures", *STAGES[name], "--seed", "1"]
        assert "seed 0 there, 1 asked" in refuse(name, "tiny", "--runs", copy, *words)
    assert snapshot(copy) == before
    perform("probe", "tiny", "--runs", copy, "--tasks", "glyphs", "--probe-steps", "10", "--overwrite")
    assert json.loads((copy / "tiny/probe.json").read_text())["config"]["steps"] == 10


def test_a_vector_or_an_encoder_trained_against_another_head_is_refused(copy):
    shared = ["tiny", "--runs", copy, *ALL_TASKS]
    perform("probe", *shared, "--probe-steps", "7", "--overwrite")
    (copy / "tiny/aligned/merge.json").unlink()
    assert "another head" in refuse("merge_eval", *shared)
    before = snapshot(copy)
    said = refuse("finetune", *shared, *STAGES["finetune"])
    assert "glyphs was made of other inputs (head " in said and "--name" in said and "--overwrite" in said
    assert snapshot(copy) == before


def test_a_vector_of_an_earlier_fine_tuning_is_refused(copy):
    words = [*ALL_TASKS, "--steps", "2", "--lr", "1e-3", "--overwrite"]
    perform("finetune", "tiny", "--runs", copy, *words)
    said = refuse("disentangle", "tiny", "--runs", copy, *ALL_TASKS, "--overwrite", *STAGES["disentangle"])
    assert "make_vectors.py" in said


# --------------------------------------------------------------------------------------- made of other things


def stopped_before_the_json(monkeypatch, of, name, *words):
    """A stage, killed when its files are there and its JSON `of` is about to be written."""
    write = results.write_json

    def stopping(path, values):
        if path.name == of and path.parent.name != "state" and "made_of" in str(values):     # not a search
            raise KeyboardInterrupt
        write(path, values)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(results, "write_json", stopping)
        perform(name, *words)


@pytest.mark.parametrize("name, of, words, reader, more, said", [
    ("probe", "probe.json", ["--probe-steps", "3", "--probe-lr", "0.01"],
     "finetune", ["--name", "new"], "glyphs.safetensors is not what"),
    ("finetune", "finetune.json", ["--steps", "1", "--batch-size", "8", "--lr", "1e-3"],
     "make_vectors", [], "glyphs.safetensors is not what finetune.json describes"),
])
def test_a_row_is_not_believed_for_weights_that_a_stopped_overwrite_has_written(
        copy, monkeypatch, name, of, words, reader, more, said):
    shared = ["tiny", "--runs", copy, *ALL_TASKS]
    stopped_before_the_json(monkeypatch, of, name, *shared, *words, "--overwrite")
    before = snapshot(copy / "tiny/aligned")
    assert said in refuse(reader, *shared, *STAGES[reader], *more)
    assert snapshot(copy / "tiny/aligned") == before
    config = json.loads((copy / RESULT[name]).read_text())["config"]
    perform(name, *shared, *(words if config["steps"] < 20 else STAGES[name]))             # makes it again
    perform(reader, *shared, *STAGES[reader], *more)


@pytest.mark.parametrize("name, words, made", [
    ("merge_eval", ["--lambdas", "3"], ["merge.json", "merge.png", "merged.safetensors"]),
    ("disentangle", ["--points", "3", "--samples", "20"],
     ["disentangle.json", "disentangle/glyphs-signs.npz", "disentangle/glyphs-signs.png"]),
])
def test_an_analysis_is_not_believed_for_files_that_a_stopped_overwrite_has_written(copy, monkeypatch, name,
                                                                                    words, made):
    folder, shared = copy / "tiny/aligned", ["tiny", "--runs", copy, *ALL_TASKS]
    arrays = [folder / file for file in made if not file.endswith(".json")]
    before = [path.read_bytes() for path in arrays]
    stopped_before_the_json(monkeypatch, made[0], name, *shared, *words, "--overwrite")
    assert [path.read_bytes() for path in arrays] != before
    perform(name, *shared, *STAGES[name])
    assert [path.read_bytes() for path in arrays if path.suffix != ".png"] == \
        [content for path, content in zip(arrays, before, strict=True) if path.suffix != ".png"]


def test_other_test_images_are_noticed_by_every_stage_and_said_in_the_report(copy, tmp_path, capsys):
    """Only one image of test/ of one task changes; what does not meet it stays."""
    folders = [image_folder(tmp_path / name, n_train=30) for name in ("pets", "cars2")]
    tasks = ["--tasks", f"pets={folders[0]},cars2={folders[1]}"]
    shared, named = ["tiny", "--runs", copy], ["--name", "pictures"]
    analyses = {"merge_eval": ["--lambdas", "2"], "posthoc": ["--images-per-task", "9"],
                "subsets": ["--lambdas", "2", "--images-per-task", "9"],
                "disentangle": ["--points", "3", "--samples", "9"]}

    def redo(*overwrite):
        perform("probe", *shared, *tasks, *STAGES["probe"], *overwrite)
        perform("finetune", *shared, *tasks, *named, "--steps", "2", "--batch-size", "8", "--lr", "1e-3",
                *overwrite)

    redo()
    perform("make_vectors", *shared, *named)
    for name, words in analyses.items():
        perform(name, *shared, *named, *words)
    [picture, *_] = sorted((folders[0] / "test").rglob("*.png"))
    shutil.copy(sorted((folders[0] / "train").rglob("*.png"))[0], picture)
    assert "pets was made of other inputs (data " in refuse("probe", *shared, *tasks, *STAGES["probe"])
    perform("probe", *shared, *tasks, *STAGES["probe"], "--overwrite")
    for name, words in analyses.items():
        assert "pets was fine-tuned and tested on other data" in refuse(name, *shared, *named, *words), name
    capsys.readouterr()
    perform("report", "--runs", copy)
    said = capsys.readouterr().out
    stale = [line for line in said.splitlines() if line.startswith(f"| {copy}/tiny/pictures/")]
    for file in ("finetune", "merge", "posthoc", "scaling", "disentangle"):
        assert any(f"/{file}.json | pets | python" in line for line in stale), file
    redo("--overwrite")
    perform("make_vectors", *shared, *named)
    capsys.readouterr()
    for name, words in analyses.items():
        perform(name, *shared, *named, *words)
        assert "nothing to do" not in capsys.readouterr().out, name
    perform("report", "--runs", copy)
    assert f"| {copy}/tiny/pictures/" not in capsys.readouterr().out


def test_disentangle_refuses_odd_requests(study):
    runs = ["tiny", "--runs", study, "--tasks"]
    assert "two tasks" in refuse("disentangle", *runs, "glyphs")
    assert "odd" in refuse("disentangle", *runs, "glyphs,signs", "--points", "4")
    assert "odd" in refuse("disentangle", *runs, "glyphs,signs", "--points", "1")
    assert "'glyphs-letters'" in refuse("disentangle", *runs, "glyphs,signs", "--pairs", "glyphs-letters")


@pytest.mark.parametrize("name", ["merge_eval", "refit"])
def test_a_single_task_without_a_hit_is_said_before_any_search_and_the_others_go_on(copy, name, capsys):
    path = copy / "tiny/aligned/finetune.json"
    there = json.loads(path.read_text())
    there["tasks"]["signs"]["val"] = 0.0
    path.write_text(json.dumps(there))
    said = refuse(name, "tiny", "--runs", copy, "--lambdas", "2")
    assert "signs: theta_t has no image right" in said and "--tasks glyphs,textures" in said
    assert "evaluator" not in capsys.readouterr().out
    if name == "merge_eval":
        perform(name, "tiny", "--runs", copy, "--lambdas", "2", "--tasks", "glyphs,textures")


def test_a_finished_study_run_again_does_nothing(copy, capsys):
    """Each stage with the settings of SMALL."""
    before = snapshot(copy)
    for name, settings in STAGES.items():
        perform(name, "tiny", "--runs", copy, *ALL_TASKS, *settings)
    perform("pretrain", "tiny", "--runs", copy, "--pretrain-steps", "40")
    assert capsys.readouterr().out.count("nothing to do") == 6
    assert snapshot(copy) == before


def test_a_learning_rate_that_diverges_counts_as_failed_and_a_diverged_task_is_named(copy, monkeypatch):
    import finetune
    monkeypatch.setattr(finetune, "LEARNING_RATES", [1e-3, 1e30])
    words = ["tiny", "--runs", copy, "--steps", "3", "--batch-size", "8"]
    perform("finetune", *words, "--tasks", "glyphs", "--recipe", "full")
    result = json.loads((copy / "tiny/full/finetune.json").read_text())
    assert result["lr"] == 1e-3
    assert result["search"]["val"]["1e+30"] is None and result["search"]["val"]["0.001"] > 0
    said = refuse("finetune", *words, "--tasks", "glyphs,signs", "--recipe", "attention", "--lr", "1e30")
    assert "diverged at learning rate 1e+30 on glyphs (step 3 of 3), signs (step 3 of 3)" in said
    assert not (copy / "tiny/attention/finetune.json").exists()
    assert not list((copy / "tiny/attention").rglob("*.safetensors"))
