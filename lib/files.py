"""
Files that are whole: written beside their target and renamed; tensors and results that know their checksum.

    from lib.files import Refused, load_tensors, read_json, save_tensors, write_json
"""
import contextlib
import hashlib
import io
import json
import os
import platform
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lib import ranks


class Refused(Exception):
    """A user's mistake, or a file that cannot be trusted. Ends the stage in one line and exit code 2."""


# --------------------------------------------------------------------------------------- whole or not at all


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary name beside `path` for a file or folder; renamed to `path` when whole, else removed.

    Where another process has made the same folder meanwhile, its folder stays. What a killed process left
    behind is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        yield temporary
        for file in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        if not (temporary.is_dir() and path.is_dir()):
            os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def remove_leftovers(path):
    """Remove temporary files for `path`, its name perhaps a pattern, of processes that are no longer there.

    Of this machine only: another's process cannot be looked up here.
    """
    if not Path("/proc/self").exists():
        return
    machine = f".{platform.node()}."
    for left in path.parent.glob(f".{path.name}{machine}*.tmp"):
        process = left.name.rpartition(machine)[2].split(".")[0]
        if Path("/proc", process).exists():
            continue
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------- fingerprints


def fingerprint(tensors):
    """SHA-256 (hex) over names, dtypes, shapes and bytes of a dict of tensors, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def checksum(values):
    """SHA-256 (hex) of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def block_checksums(path, block=2 ** 26):
    """SHA-256 (hex) of every 64 MiB of a file, all processor cores at work."""
    def digest(start):
        with open(path, "rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(block)).hexdigest()

    with ThreadPoolExecutor() as pool:
        return list(pool.map(digest, range(0, path.stat().st_size, block)))


# --------------------------------------------------------------------------------------- tensors


def save_tensors(path, tensors, from_any_rank=False, **metadata):
    """Write a dict of tensors as safetensors, whole or not at all.

    metadata is JSON, with the contents' SHA-256 added. Of several processes rank 0 writes, or with
    from_any_rank the one that calls.
    """
    if ranks.rank() > 0 and not from_any_rank:
        return
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = metadata | {"sha256": fingerprint(tensors)}
    about = json.dumps(about | {"checksum": checksum(about)}, sort_keys=True)
    with replacing(path) as temporary:
        # not save_file: a full disk is no OSError there, and others may not read what it writes.
        # One entry: the order of several would vary
        temporary.write_bytes(save(tensors, {"about": about}))


def load_tensors(path, made_by, **expected):
    """Read back what save_tensors wrote.

    made_by   the command that writes the file, named when it is missing
    expected  metadata that has to match, e.g. theta_pre=FINGERPRINT
    Returns   (dict of CPU tensors, dict of metadata)
    Errors    Refused: missing, cut, altered (SHA-256), or with other metadata
    """
    metadata = file_metadata(path, made_by)
    with opened(path, made_by) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if metadata.get("sha256") != fingerprint(tensors):
        raise Refused(f'{path} does not match its own checksum: delete it and run "{made_by}" again')
    check_metadata(path, metadata, made_by, **expected)
    return tensors, metadata


def check_metadata(path, metadata, made_by, **expected):
    """Refused where a file's metadata are not as expected."""
    for key, value in expected.items():
        if metadata.get(key) != value:
            found = short(metadata.get(key))
            raise Refused(f"{path} was made with {key} {found}, but {short(value)} is in use: "
                          f'delete it and run "{made_by}" again, or use another --runs')


def file_metadata(path, made_by):
    """The metadata of a file of save_tensors, checked; its tensors unread and unchecked."""
    require(path, made_by)
    with opened(path, made_by) as file:
        about = json.loads((file.metadata() or {}).get("about", "{}"))
    if "checksum" not in about:
        raise Refused(f'{path} was not written by this version of the study: '
                      f'move it away and run "{made_by}" again')
    if about.pop("checksum") != checksum(about):
        raise Refused(f'{path} does not match its own checksum: delete it and run "{made_by}" again')
    return about


@contextlib.contextmanager
def opened(path, made_by):
    """An open safetensors file; Refused if it is cut or no such file, OSError if it may be whole."""
    with open(path, "rb"):
        pass                                 # safe_open says of whatever it cannot open that it is not there
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, json.JSONDecodeError, RecursionError) as error:
        raise Refused(f'{path} cannot be read ({error}): delete it and run "{made_by}" again') from error


def require(path, made_by):
    """Refused, naming the command that writes `path`, if it is not there."""
    if not path.exists():
        raise Refused(f'{path} is missing: run "{made_by}" first')


def short(value):
    """A value for a message; fingerprints cut to twelve digits."""
    return value[:12] if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) else repr(value)


def save_state(path, state):
    """Write a training state, anything that torch.load reads with weights_only, behind its own SHA-256."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(hashlib.sha256(buffer.getbuffer()).digest() + buffer.getbuffer())


def load_state(path):
    """Read back what save_state wrote; Refused if it is damaged."""
    content = path.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise Refused(f"{path} does not match its own checksum: delete it and run the same command again")
    return torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)


# --------------------------------------------------------------------------------------- results


class Values(dict):
    """The values of a JSON file. One that lacks a key, edited by hand or of another version, is Refused."""

    def __init__(self, path, made_by, values):
        super().__init__(values)
        self.path, self.made_by = path, made_by

    def __missing__(self, key):
        raise Refused(f"{self.path} lacks {key}, as one edited by hand or of an older version may: "
                      f'run "{self.made_by}" with --overwrite')


def write_json(path, result):
    """Write a result with a checksum of itself (rank 0)."""
    if ranks.rank() > 0:
        return
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(result | {"checksum": checksum(result)}, indent=1, allow_nan=False)
                             + "\n")


def read_json(path, made_by):
    """An earlier stage's result. Refused if missing, not JSON or no result; a warning if edited by hand."""
    require(path, made_by)
    try:
        result = json.loads(path.read_text(), object_hook=lambda values: Values(path, made_by, values))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(f'{path} is not valid JSON ({error}): delete it and run "{made_by}" again') from error
    keys = {"config": dict, "command": str, "machine": dict}
    if not isinstance(result, dict) or not all(isinstance(result.get(key), kind)
                                               for key, kind in keys.items()):
        raise Refused(f"{path} is no result of this version of the study: "
                      f'move it away and run "{made_by}" again')
    if result.pop("checksum", None) != checksum(result) and ranks.rank() == 0:
        print(f"warning: {path} is not as it was written (its checksum differs): taken as edited by hand",
              file=sys.stderr)
    return result


def new_array(path, shape, dtype):
    """An array mapped to a new .npy file whose blocks on disk are reserved; OSError where the disk is full.

    Found out later, in the middle of a mapped file, that ends the process without a word.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):                     # not on macOS
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def save_array(path, array):
    """Write a numpy array as .npy; np.save itself does not say why it fails."""
    mapped = new_array(path, array.shape, array.dtype)
    mapped[:] = array
    mapped.flush()


def save_arrays(path, **arrays):
    """Write numpy arrays as .npz (rank 0)."""
    if ranks.rank() == 0:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)
