"""
Task vectors: tau_t = theta_t - theta_pre, on disk.

    runs/ENCODER/NAME/finetuned/TASK.safetensors    theta_t, the parameters that were trained
    runs/ENCODER/NAME/vectors/TASK.safetensors      tau_t, with the recipe and the fingerprints it was made of
"""
import hashlib

import torch

from lib.files import (Refused, check_metadata, file_metadata, load_tensors, opened, read_json,
                       save_tensors)

KEPT = ("theta_pre", "recipe", "task", "data", "head")     # of theta_t's metadata in its vector's


def task_vector(theta_pre, theta_t):
    """(theta_t, tau_t) with theta_pre + tau_t == theta_t bit for bit in float32, for the names in theta_t.

    A plain difference loses up to half a unit in the last place where the two differ by more than a factor of
    two; rounding theta_t to theta_pre + (theta_t - theta_pre) twice reaches a value that loses nothing.
    """
    tau_t = {}
    for name in theta_t:
        pre = theta_pre[name]
        for _ in range(2):
            theta_t = theta_t | {name: pre + (theta_t[name] - pre)}
        tau_t[name] = theta_t[name] - pre
    return theta_t, tau_t


def norm(tensors):
    """Euclidean norm of a dict of tensors taken as one vector."""
    return sum(tensor.double().square().sum() for tensor in tensors.values()).sqrt().item()


def generator_of(words):
    """A generator on the CPU whose seed is made of some words: the same whatever is drawn before."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(words.encode()).digest()[:7]))


def save_vector(folder, tau_t, finetuned):
    """Write tau_t under the variant's folder with the metadata of its theta_t's file, unless it is there."""
    path = folder / "vectors" / f"{finetuned['task']}.safetensors"
    if path.exists() and file_metadata(path, "the same command").get("finetuned") == finetuned["sha256"]:
        return
    save_tensors(path, tau_t, **{key: finetuned[key] for key in KEPT}, finetuned=finetuned["sha256"])


def vector_metadata(folder, task, encoder):
    """What the file of a task's vector in a variant's folder runs/ENCODER/NAME says of it, the vector unread.

    Errors  Refused: missing, of another encoder, of an earlier fine-tuning, or trained against another head
            than the one that is there now
    """
    path, made_by = vector_file(folder, task, encoder)
    about = file_metadata(path, made_by)
    check_metadata(path, about, made_by, theta_pre=encoder.fingerprint)
    finetune = folder / "finetune.json"
    if finetune.exists():
        theta_t = theta_fingerprint(read_json(finetune, "python finetune.py"), task)
        if about["finetuned"] != theta_t:
            raise Refused(f'{path} is not of the theta_t in {finetune}: run "{made_by}" first')
    head, head_made_by = head_file(folder, about["recipe"], task, encoder.name)
    if file_metadata(head, head_made_by)["sha256"] != about["head"]:
        raise Refused(f"{path} was trained against another head than {head}: "
                      f"run finetune.py with --overwrite and make_vectors.py again")
    return about


def load_vector(folder, task, encoder):
    """tau_t {name: tensor}, float32 on the CPU, from a variant's folder; Refused as vector_metadata does."""
    vector_metadata(folder, task, encoder)
    vector, _ = load_tensors(*vector_file(folder, task, encoder))
    return vector


def by_name(files):
    """Yield (name, [tensor of each]) of files of the same names [(path, made_by)]; one name is in memory."""
    with opened(*files[0]) as file:
        names = list(file.keys())
    for name in names:
        tensors = []
        for path, made_by in files:
            with opened(path, made_by) as file:            # anew: what stays mapped stays in memory
                tensors.append(file.get_tensor(name))
        yield name, tensors


def theta_fingerprint(finetuned, task):
    """SHA-256 of a task's theta_t, as its row in finetune.json says."""
    return finetuned["tasks"][task]["weights_sha256"][0]


def vector_file(folder, task, encoder):
    """(path of a task's vector, the command that makes it)."""
    made_by = f"python make_vectors.py {encoder.name} --name {folder.name}"
    return folder / "vectors" / f"{task}.safetensors", made_by


def head_file(folder, recipe, task, encoder_name):
    """(path of a task's head, the command that makes it); probed heads are the encoder's own.

    folder   the variant's, runs/ENCODER/NAME
    """
    if recipe["head"] == "probed":
        return probe_file(folder.parent, recipe["probe"], task, encoder_name)
    made_by = f"python finetune.py {encoder_name} --recipe {recipe['name']} --name {folder.name}"
    return folder / "heads" / f"{task}.safetensors", made_by


def probe_file(folder, kind, task, encoder_name):
    """(path of a task's head from one of the two ways of probing, the command that makes it).

    folder   the encoder's, runs/ENCODER
    """
    return folder / "heads" / kind / f"{task}.safetensors", f"python probe.py {encoder_name}"
