"""
Refusals, and files that are whole: safetensors with their own checksum, JSON results that remember their settings.

    from files import Refused, load_tensors, open_result, save_tensors, write_json
"""
import argparse
import contextlib
import datetime
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import ranks


class Refused(Exception):
    """A user's mistake, or a file that cannot be trusted. Ends the stage in one line and exit code 2."""


def run(main, parse_args):
    """Run a stage from the command line: a refusal is one line on stderr and exit code 2, a bug keeps its traceback."""
    stage = Path(sys.argv[0]).name
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))                # so that temporary files are removed
    if ranks.rank() > 0:
        sys.stdout = open(os.devnull, "w")                                 # rank 0 speaks for all; errors still show
    try:
        args = parse_args()
        ranks.join()
        main(args)
        ranks.leave()
    except Refused as refusal:
        sys.exit(complain(stage, refusal))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        sys.exit(complain(stage, f"{error.strerror}: {error.filename or 'writing a result'}; what was finished is kept, the same command goes on from there"))
    except torch.OutOfMemoryError as error:
        sys.exit(complain(stage, f"out of memory ({str(error).splitlines()[0]}): try a smaller --batch-size or --image-size"))
    except KeyboardInterrupt:
        print(f"{stage}: interrupted; what was finished is kept, the same command goes on from there", file=sys.stderr)
        sys.exit(130)


def flag_parser(docstring):
    """An argparse parser whose --help is the docstring and whose errors are one line."""
    parser = argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(complain(parser.prog, f"{message} (--help lists the flags)"))
    return parser


def complain(stage, message):
    """One line on stderr; returns exit code 2."""
    print(f"{stage}: {' '.join(str(message).split())}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary name beside `path` for a file or folder; rename it to `path` when whole, remove it on failure.

    Where another process has made the same folder meanwhile, its folder stays. What a killed process left behind is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.{platform.node()}."                            # another machine's process cannot be looked up here
    for left in path.parent.glob(f"{prefix}*.tmp"):
        if Path("/proc/self").exists() and not Path("/proc", left.name[len(prefix):].split(".")[0]).exists():
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    temporary = path.with_name(f"{prefix}{os.getpid()}.tmp")
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


def make_room(folder, need, what):
    """Say what a stage is about to write under `folder` (bytes) and what is free there; Refused where it does not fit."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    print(f"disk: up to {need / 1e9:.2f} GB of {what} under {folder}, {free / 1e9:.0f} GB free", flush=True)
    if need > free:
        raise Refused(f"{what} need {need / 1e9:.2f} GB under {folder}, which has {free / 1e9:.2f} GB free")


def check_memory(device, need, what):
    """Refused where `what` needs more bytes than the device, or this machine, has left; said where it fits."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif Path("/proc/meminfo").exists():
        free = 1024 * int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1])
    else:
        return
    print(f"memory: {what} need {need / 1e9:.2f} GB and their activations, {free / 1e9:.0f} GB free", flush=True)
    if need > free:
        raise Refused(f"{what} need {need / 1e9:.2f} GB, {device} has {free / 1e9:.2f} GB free: leave out the largest tasks, or give another --device")


def save_tensors(path, tensors, from_any_rank=False, **metadata):
    """Write a dict of tensors as safetensors, whole or not at all; metadata is JSON, with the contents' SHA-256 added.

    Of several processes rank 0 writes, or with from_any_rank the one that calls.
    """
    if ranks.rank() > 0 and not from_any_rank:
        return
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = metadata | {"sha256": fingerprint(tensors)}
    about = json.dumps(about | {"checksum": checksum(about)}, sort_keys=True)
    with replacing(path) as temporary:
        folder = temporary.with_suffix(".writing.tmp")                     # safetensors leaves a file of its own beside it when it is killed
        try:
            folder.mkdir()
            save_file(tensors, folder / path.name, {"about": about})       # one entry: their order would differ from file to file
            os.replace(folder / path.name, temporary)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def opened(path, made_by):
    """An open safetensors file; Refused if it is cut or no such file."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise Refused(f'{path} cannot be read ({error}): delete it and run "{made_by}" again') from error


def file_metadata(path, made_by):
    """The metadata of a file of save_tensors, checked; its tensors unread and unchecked."""
    with opened(path, made_by) as file:
        about = json.loads((file.metadata() or {}).get("about", "{}"))
    if about.pop("checksum", None) != checksum(about):
        raise Refused(f'{path} does not match its own checksum: delete it and run "{made_by}" again')
    return about


def require(path, made_by):
    """Refused, naming the command that writes `path`, if it is not there."""
    if not path.exists():
        raise Refused(f'{path} is missing: run "{made_by}" first')


def require_rows(path, names, made_by):
    """The result at `path`; Refused if it lacks the row of one of the tasks `names`."""
    result = read_json(path, made_by)
    if missing := [name for name in names if name not in result.get("tasks", {})]:
        raise Refused(f'{path} lacks {", ".join(missing)}: run "{made_by} --tasks {",".join(names)}" first')
    return result


def load_tensors(path, made_by, **expected):
    """Read back what save_tensors wrote.

    made_by   the command that writes the file, named when it is missing
    expected  metadata that has to match, e.g. theta_pre=FINGERPRINT
    Returns   (dict of CPU tensors, dict of metadata)
    Errors    Refused: missing, cut, altered (SHA-256), or with other metadata
    """
    require(path, made_by)
    metadata = file_metadata(path, made_by)
    with opened(path, made_by) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if metadata.get("sha256") != fingerprint(tensors):
        raise Refused(f'{path} does not match its own checksum: delete it and run "{made_by}" again')
    for key, value in expected.items():
        if metadata.get(key) != value:
            raise Refused(f'{path} was made with {key} {short(metadata.get(key))}, but {short(value)} is in use: '
                          f'delete it and run "{made_by}" again, or use another --runs')
    return tensors, metadata


def short(value):
    """A value for an error message; fingerprints cut to twelve digits."""
    return value[:12] if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) else repr(value)


def save_arrays(path, **arrays):
    """Write numpy arrays as .npz (rank 0)."""
    if ranks.rank() == 0:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)


def write_json(path, result):
    """Write a result with a checksum of itself (rank 0)."""
    if ranks.rank() > 0:
        return
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(result | {"checksum": checksum(result)}, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def adding_rows(path, result, key, overwrite):
    """Write a result at the end of the body; rows of the dict result[key] that other processes wrote meanwhile are taken over before it.

    So jobs of a scheduler can fill one file, a task each. `overwrite` replaces what is there. Of torchrun's processes rank 0 writes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        there = read_json(path, "the same command") if path.exists() and not overwrite else {}
        if there.get("config") == result["config"]:
            result[key] |= {name: row for name, row in there.get(key, {}).items() if name not in result[key]}
        yield
        write_json(path, result)


def read_json(path, made_by):
    """A result of an earlier stage. Refused if it is missing or not JSON."""
    require(path, made_by)
    try:
        result = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Refused(f'{path} is not valid JSON ({error}): delete it and run "{made_by}" again') from error
    if not isinstance(result, dict) or not isinstance(result.get("config"), dict) or not isinstance(result.get("command"), str):
        raise Refused(f'{path} is no result of this study: delete it and run "{made_by}" again')
    if result.pop("checksum", None) != checksum(result):
        raise Refused(f'{path} is not as it was written (its checksum differs; edited by hand, or damaged): delete it and run "{made_by}" again')
    return result


CLAIMS = {}  # open files that hold this process's claims


def claim(path, rows):
    """Wait until no other process works on these rows (names) of the result at `path`, then keep others waiting until this one ends.

    A claim is a lock on one byte of a file .claims, which the system takes back from a process however it ends.
    """
    claims = path.parents[1] / ".claims"
    if claims not in CLAIMS:
        claims.parent.mkdir(parents=True, exist_ok=True)
        CLAIMS[claims] = open(claims, "ab")
    for place in sorted(int(checksum([path.parent.name, path.name, row])[:12], 16) for row in rows):  # in one order, so that no two wait for each other
        try:
            fcntl.lockf(CLAIMS[claims], fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except (BlockingIOError, PermissionError):
            print(f"{path}: another process is at work on it, waiting until that ends", flush=True)
            fcntl.lockf(CLAIMS[claims], fcntl.LOCK_EX, 1, place)


def open_result(path, config, overwrite, device, rows=("",)):
    """The result of an earlier run with the same settings, to be continued, or a new one; it, or the `rows` given, is this process's own until it ends.

    config   dict of every setting that changes the numbers (JSON values)
    rows     names of the rows that are about to be made, where several processes may fill one result
    Returns  dict with "config", "command" and "machine", ready for the stage's own keys
    Errors   Refused if `path` holds a result of other settings; they are named
    """
    config = json.loads(json.dumps(config))
    if ranks.rank() == 0:
        claim(path, rows)
    ranks.wait()
    result = {} if overwrite or not path.exists() else read_json(path, "the same command")
    there, differ = result.get("config", {}), []
    for key, asked in config.items() if result else ():
        found = there.get(key)
        if isinstance(asked, dict) and isinstance(found, dict):
            differ += [f"{key} of {name}" for name in asked | found if asked.get(name) != found.get(name)]
        elif asked != found:
            differ.append(f"{key} {short(found)} there, {short(asked)} asked")
    if differ:
        raise Refused(f"{path} holds a result of other settings ({'; '.join(differ)}): "
                      f"give --overwrite to replace it or another --runs to keep both")
    return result | {"config": config} | provenance(device)


def half_done(path, config, overwrite, device):
    """What a run with the same settings left at `path` when it was killed, or with `overwrite` or without such a run a new state.

    To be written with write_json as the work goes on, and given to forget at its end.
    """
    state = {"config": json.loads(json.dumps(config))} | provenance(device)
    there = read_json(path, "the same command") if path.exists() and not overwrite else {}
    [there, *_] = ranks.gather(there)                                      # all go on from what rank 0 has found
    return there if there.get("config") == state["config"] else state


def forget(path):
    """Delete a half-done state (rank 0)."""
    if ranks.rank() == 0:
        path.unlink(missing_ok=True)


def provenance(device):
    """How and where a number was made: {"command", "machine": device, threads, library versions, date (UTC)}."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {cpu_name()}"
    where = {"device": name, "threads": torch.get_num_threads(), "processes": ranks.world(), "python": platform.python_version(), "torch": torch.__version__,
            "timm": importlib.metadata.version("timm"), "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat()}
    return {"command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]), "machine": where}


def go_offline_if_unreachable():
    """Spare the hub's clients half a minute of retries where there is no hub; what they have cached still loads."""
    from huggingface_hub import constants, utils
    try:
        utils.get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # another HTTP library, with other error types, in every major version of huggingface_hub
        constants.HF_HUB_OFFLINE = True


@contextlib.contextmanager
def checked_download(repo, kind="model"):
    """Around what loads a repository of the hub: Refused, and the file deleted, where the hub's client keeps something else than the hub has.

    repo  OWNER/NAME, a file's path behind it or not; None or "" where nothing comes from the hub
    The hub names large files (weights, data) by their SHA-256, and its cache keeps them under that name; the client itself compares sizes only.
    """
    repo = "/".join((repo or "").split("/")[:2])
    try:
        yield
    finally:                                                               # a damaged file may also be why loading failed
        from huggingface_hub import constants
        blobs = Path(constants.HF_HUB_CACHE, f"{kind}s--{repo.replace('/', '--')}", "blobs").glob("[0-9a-f]" * 64)
        for blob in sorted(blobs) if repo and ranks.local_rank() == 0 else ():
            with open(blob, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != blob.name:
                blob.unlink()
                raise Refused(f"a download from {repo} is damaged (SHA-256 {found[:12]}, the hub says {blob.name[:12]}): it was deleted, run the same command again")


def cpu_name():
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0].strip() if names else platform.processor()
