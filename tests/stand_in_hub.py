"""
A stand-in for the Hugging Face hub on loopback, so that downloads are tested without internet.

    write_data_set(folder_a, {"default": DatasetDict(train=..., test=...)})
    write_timm_model(folder_b, timm.create_model("vit_base_patch16_224.dino"))
    repositories = {"datasets/tanganke/dtd": folder_a, "timm/vit_base_patch16_224.dino": folder_b}
    with serve(repositories) as (url, seen):
        subprocess.run([sys.executable, "probe.py"], env=client_environment(url, fresh_folder), check=True)
    assert ("GET", "/timm/vit_base_patch16_224.dino/resolve/main/model.safetensors", 200) in seen

It answers what datasets.load_dataset, timm.create_model(pretrained=True) and huggingface_hub's
hf_hub_download and snapshot_download ask: a file or a range of it (resolve), repository information,
listings (tree, paths-info); plain HTTP, never xet. For a missing repository the real hub tells an anonymous
client 401, and it redirects to another host for large files; the clients come to the same end. `receive` is a
hub that takes what upload_folder sends.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

# /REPOSITORY/resolve/REVISION/FILE, and without "api" and "models" /REPOSITORY[/VERB/REVISION[/PATH]]
REPOSITORY, VERBS = r"(?:datasets/)?[^/]+/[^/]+", "resolve|revision|tree|paths-info"
ADDRESS = re.compile(rf"/({REPOSITORY})(?:/({VERBS})/([^/]+)(?:/(.+))?)?")


def write_data_set(folder, configs):
    """Write a data-set repository as it lies on the hub: a parquet file per split, a README that lists them.

    configs  {config name: datasets.DatasetDict}; "default" is that of a data set loaded without naming one
    """
    listed = []
    for config, splits in configs.items():
        below = "data" if config == "default" else config
        (Path(folder) / below).mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            rows.to_parquet(str(Path(folder) / below / f"{split}-00000-of-00001.parquet"))
        data_files = [{"split": split, "path": f"{below}/{split}-*"} for split in splits]
        listed.append({"config_name": config, "data_files": data_files})
    (Path(folder) / "README.md").write_text(f"---\nconfigs: {json.dumps(listed)}\n---\n")  # JSON is YAML


def write_timm_model(folder, model):
    """Write a timm model's weights as its repository lies on the hub: model.safetensors and config.json."""
    from timm.models import save_for_hf

    save_for_hf(model, folder, safe_serialization=True)


def client_environment(url, home):
    """Environment for a subprocess whose hub is `url` and whose caches lie in the folder `home`.

    What would reach round the stand-in (the caller's caches, token, offline mode, proxies) is left out.
    """
    foreign = re.compile(r"(HF|HUGGINGFACE|HUGGING_FACE|TRANSFORMERS)_|(https?|all|no)_proxy$", re.IGNORECASE)
    kept = {name: value for name, value in os.environ.items() if not foreign.match(name)}
    ours = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1"}
    return kept | ours | {"HF_UPDATE_DOWNLOAD_COUNTS": "0"}  # datasets would count it at another host


@contextlib.contextmanager
def client_here(url, home):
    """The same for this process while the block runs, of what asks for models; `home` is the cache."""
    from huggingface_hub import constants
    ours = {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(home), "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True}
    with mock.patch.multiple(constants, **ours), mock.patch.dict(os.environ, {"HF_TOKEN": "hf_none"}):
        yield


def listing(folder):
    """{path: entry of a hub listing} of all below `folder`; oid is a file's sha256, a folder's empty."""
    entries = {}
    for path in sorted(Path(folder).rglob("*")):
        name = path.relative_to(folder).as_posix()
        entries[name] = {"type": "directory", "path": name, "size": 0, "oid": ""}
        if path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            entries[name] = {"type": "file", "path": name, "size": path.stat().st_size, "oid": digest}
    return entries


@contextlib.contextmanager
def serve(repositories):
    """Serve local folders as hub repositories while the block runs.

    repositories  {"datasets/OWNER/NAME" or, for a model, "OWNER/NAME": folder}; read on entry, not after
    Yields        (url, seen): the value for HF_ENDPOINT, and a list of (method, path, status) answered so far
    Errors        FileNotFoundError if a folder is missing or empty
    """
    entries = {repo: listing(folder) for repo, folder in repositories.items()}
    for repo in entries:
        if not entries[repo]:
            raise FileNotFoundError(f"{repositories[repo]} holds no file to serve as {repo}")
    commits = {repo: hashlib.sha1(json.dumps(entries[repo]).encode()).hexdigest() for repo in entries}
    seen = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self):
            url = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            match = ADDRESS.fullmatch(re.sub("^/api/(models/)?", "/", url.path))
            repo, verb, revision, path = match.groups() if match else (None, None, None, None)
            if repo not in entries:
                return self.answer(404, headers={"X-Error-Code": "RepoNotFound"})
            here, path, headers = entries[repo], unquote(path or ""), {"X-Repo-Commit": commits[repo]}
            if revision not in (None, "main", commits[repo]):
                return self.answer(404, headers=headers | {"X-Error-Code": "RevisionNotFound"})
            is_file = here.get(path, {}).get("type") == "file"
            if (path and path not in here) or (verb == "resolve" and not is_file):
                return self.answer(404, headers=headers | {"X-Error-Code": "EntryNotFound"})
            if verb == "resolve":
                return self.answer_file(Path(repositories[repo]) / path, here[path], headers)
            if verb == "paths-info":
                return self.answer(200, [here[name] for name in parse_qs(body)["paths"] if name in here])
            if verb == "tree":
                below, deep = path and path + "/", "recursive=true" in url.query.lower()
                inside = [name for name in here if name.startswith(below)]
                listed = [name for name in inside if deep or "/" not in name[len(below):]]
                return self.answer(200, [here[name] for name in listed])
            siblings = [{"rfilename": name} for name in here if here[name]["type"] == "file"]
            about = {"id": repo.removeprefix("datasets/"), "sha": commits[repo], "siblings": siblings}
            self.answer(200, about)

        do_HEAD = do_POST = do_GET

        def answer_file(self, path, entry, headers):
            start, stop = 0, entry["size"]
            headers = headers | {"ETag": f'"{entry["oid"]}"', "Accept-Ranges": "bytes"}
            if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                start, stop = int(asked[1]), min(stop, int(asked[2] or stop) + 1)
                if start >= stop:
                    return self.answer(416, headers=headers | {"Content-Range": f"bytes */{entry['size']}"})
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{entry['size']}"
            with open(path, "rb") as file:
                file.seek(start)
                self.answer(206 if asked else 200, file.read(stop - start), headers)

        def answer(self, status, body=b"", headers={}):
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            seen.append((self.command, unquote(urlsplit(self.path).path), status))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def handle(self):
            with contextlib.suppress(ConnectionError):  # the client was killed
                super().handle()

        def log_message(self, *message):
            pass

    with serving(Handler) as url:
        yield url, seen


@contextlib.contextmanager
def serving(handler):
    """Yields the address of a server on loopback that runs while the block does."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def receive():
    """A hub that takes one repository's files while the block runs, each in the commit itself.

    Yields   (url, got): the value for HF_ENDPOINT, and {path: bytes} of what was uploaded so far
    """
    got = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            said = {"errors": [], "warnings": []}          # of the card
            if self.path == "/api/repos/create":
                said = {"url": "{url}/{organization}/{name}".format(url=url, **json.loads(body))}
            elif "/preupload/" in self.path:
                said = {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                  for file in json.loads(body)["files"]]}
            elif "/commit/" in self.path:
                for entry in map(json.loads, body.splitlines()):
                    if entry["key"] == "file":
                        got[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                said = {"commitUrl": f"{url}/user/name/commit/1", "commitOid": "1" * 40}
            said = json.dumps(said).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *message):
            pass

    with serving(Handler) as url:
        yield url, got
