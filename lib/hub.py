"""
The Hugging Face hub: nothing hangs where it cannot be reached, and what it sends is checked.
"""
import contextlib
import hashlib
import shutil
from pathlib import Path

from lib import ranks
from lib.files import Refused


def go_offline_if_unreachable():
    """Spare the hub's clients half a minute of retries where there is no hub; what is cached still loads."""
    from huggingface_hub import constants, utils
    try:
        utils.get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # another HTTP library, with other errors, in every major version of huggingface_hub
        constants.HF_HUB_OFFLINE = True


@contextlib.contextmanager
def checked_download(repo, kind="model"):
    """Around what loads a repository: Refused, and the file deleted, where it is not what the hub has.

    repo  OWNER/NAME, a file's path behind it or not; None or "" where nothing comes from the hub
    The hub names large files (weights, data) by their SHA-256, and its cache keeps them under that name; the
    client itself compares sizes only.
    """
    repo = "/".join((repo or "").split("/")[:2])
    try:
        yield
    finally:                                                # a damaged file may also be why loading failed
        if repo and ranks.local_rank() == 0:
            check_blobs(repo, kind)


def check_blobs(repo, kind):
    from huggingface_hub import constants
    cached = Path(constants.HF_HUB_CACHE, f"{kind}s--{repo.replace('/', '--')}", "blobs")
    for blob in sorted(cached.glob("[0-9a-f]" * 64)):
        with open(blob, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != blob.name:
            blob.unlink()
            raise Refused(f"a download from {repo} is damaged (SHA-256 {found[:12]}, the hub says "
                          f"{blob.name[:12]}): it was deleted, run the same command again")


def load_dataset(path, config):
    """datasets.load_dataset from the hub, its download checked; what came of a damaged one is deleted too."""
    import datasets
    found = {}
    try:
        with checked_download(path, "dataset"):
            # without the prefix a folder of that name in the working directory comes first
            found = datasets.load_dataset(f"hf://datasets/{path}", config)
    except Refused:
        for split in found.values():
            for file in split.cache_files:
                shutil.rmtree(Path(file["filename"]).parent, ignore_errors=True)
        raise
    return found
