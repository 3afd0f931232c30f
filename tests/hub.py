"""A stand-in of the Hub on loopback, which the real `huggingface_hub` client pushes to and loads from over HTTP.

It keeps repositories in memory and speaks what the client needs: creating repositories, preupload, large files (LFS,
whose contents it checks), commits, information, trees and downloads. Faults are injected here, never in the client.

    python tests/hub.py COMMAND     # runs a command against it, and lists the calls that it got
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS_FROM = 10 * 2**20  # files of this size and more, and of these kinds, go through LFS
_LFS_KINDS = (".safetensors", ".parquet", ".bin", ".onnx")
TOKEN, USER = "hf_loopbackSecretToken", "maintainer"


@dataclass
class Repository:
    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=lambda: [("0" * 40, {})])

    @property
    def head(self) -> tuple[str, dict[str, bytes]]:
        return self.commits[-1]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.head
        return next((commit for commit in self.commits if commit[0] == revision), None)


@dataclass
class Fault:
    """What goes wrong: the next `times` requests that match get `status`, are cut in the middle, or get no answer."""

    method: str
    path: str  # a regular expression
    status: int | None = None  # None cuts the connection
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    body: str | None = None  # instead of a JSON error
    is_silent: bool = False


class LoopbackHub(ThreadingHTTPServer):
    """`with LoopbackHub() as hub:` serves at `hub.endpoint` until the end of the block."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def files(self, repo_id: str, repo_type: str = "model") -> dict[str, bytes]:
        """The files of a repository, as its last commit has them."""
        return self.repositories[repo_type, repo_id].head[1]

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 2**16  # one packet for headers and body
    server: LoopbackHub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def answer(self) -> None:
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        self.server.calls.append(f"{self.command} {path}")
        fault = self.server.take_fault(self.command, path)
        if fault is not None and fault.is_silent:
            time.sleep(60)
            return
        if fault is not None and fault.status is None:
            self.rfile.read(min(int(self.headers.get("Content-Length", 0)), 2**20) // 2)
            self.close_connection = True
            self.connection.close()
            return
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault is not None:
            content = fault.body.encode() if fault.body else {"error": f"injected {fault.status}"}
            self.reply(fault.status, content, **fault.headers)
            return
        for method, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split("|"):
                answer(self, **match.groupdict())
                return
        self.reply(404, {"error": f"no such call: {self.command} {path}"})

    def reply(self, status: int, content: dict | list | bytes, **headers: str) -> None:
        raw = isinstance(content, bytes)
        content = content if raw else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if raw else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def is_authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def may_write(self) -> bool:
        if self.is_authorised():
            return True
        self.reply(401, {"error": "Invalid credentials"})
        return False

    def find(self, kind: str | None, repo: str) -> Repository | None:
        repo_type = (kind or "models").rstrip("/").removesuffix("s")
        repository = self.server.repositories.get((repo_type, repo))
        if repository is None or (repository.private and not self.is_authorised()):
            self.reply(
                404 if self.is_authorised() else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound"
            )
            return None
        return repository

    # ---- Calls ----

    def whoami(self) -> None:
        if self.may_write():
            access = {"accessToken": {"role": "write", "displayName": "tests"}}
            self.reply(200, {"type": "user", "name": USER, "orgs": [], "auth": access})

    def create(self) -> None:
        if not self.may_write():
            return
        wanted = json.loads(self.body)
        repo_type = wanted.get("type") or "model"
        repo = f"{wanted.get('organization') or USER}/{wanted['name']}"
        url = f"{self.server.endpoint}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo}"
        if (repo_type, repo) in self.server.repositories:
            self.reply(409, {"error": "You already created this repo", "url": url})
            return
        is_private = wanted.get("private") or wanted.get("visibility") == "private"
        self.server.repositories[repo_type, repo] = Repository(private=bool(is_private))
        self.reply(200, {"url": url, "name": repo, "id": repo})

    def delete(self) -> None:
        if self.may_write():
            wanted = json.loads(self.body)
            repo = f"{wanted.get('organization') or USER}/{wanted['name']}"
            self.server.repositories.pop((wanted.get("type") or "model", repo), None)
            self.reply(200, {})

    def inject(self) -> None:
        """Not of the Hub: a test says what is to go wrong next."""
        self.server.faults = [Fault(**fault) for fault in json.loads(self.body)]
        self.reply(200, {})

    def validate(self) -> None:
        self.reply(200, {"errors": [], "warnings": []})

    def preupload(self, kind: str, repo: str, revision: str) -> None:
        if not self.may_write() or self.find(kind, repo) is None:
            return
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] >= LFS_FROM or file["path"].endswith(_LFS_KINDS) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.reply(200, {"files": files})

    def lfs_batch(self, repo: str, kind: str | None = None) -> None:
        if not self.may_write():
            return
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.large_files:
                upload = {"href": f"{self.server.endpoint}/_lfs/{wanted['oid']}"}
                verify = {"href": f"{self.server.endpoint}/_lfs/{wanted['oid']}/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        self.reply(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.reply(400, {"error": "the contents do not have this hash"})
            return
        self.server.large_files[oid] = self.body
        self.reply(200, {})

    def lfs_verify(self, oid: str) -> None:
        known = self.server.large_files.get(oid)
        fits = known is not None and len(known) == json.loads(self.body)["size"]
        self.reply(200 if fits else 404, {})

    def commit(self, kind: str, repo: str, revision: str) -> None:
        if not self.may_write() or (repository := self.find(kind, repo)) is None:
            return
        files = dict(repository.head[1])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.large_files[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif entry["key"] == "deletedFolder":
                files = {path: content for path, content in files.items() if not path.startswith(value["path"])}
        oid = hashlib.sha1(f"{len(repository.commits)} {repo}".encode() + self.body[:1000]).hexdigest()
        repository.commits.append((oid, files))
        self.reply(
            200, {"success": True, "commitOid": oid, "commitUrl": f"{self.server.endpoint}/{repo}/commit/{oid}"}
        )

    def info(self, kind: str, repo: str, revision: str = "main") -> None:
        if (repository := self.find(kind, repo)) is None:
            return
        if (commit := repository.at(revision)) is None:
            self.reply(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
            return
        siblings = [{"rfilename": path} for path in sorted(commit[1])]
        about = {"id": repo, "modelId": repo, "sha": commit[0], "private": repository.private, "tags": []}
        self.reply(200, {**about, "siblings": siblings, "downloads": 0, "likes": 0})

    def tree(self, kind: str, repo: str, revision: str, folder: str = "") -> None:
        if (repository := self.find(kind, repo)) is None:
            return
        if (commit := repository.at(revision)) is None:
            self.reply(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
            return
        below = f"{folder.rstrip('/')}/" if folder else ""
        inside = {path: content for path, content in commit[1].items() if path.startswith(below)}
        if folder and not inside:
            self.reply(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            return
        entries = [describe(path, content) for path, content in sorted(inside.items())]
        folders = {path[:end] for path in inside for end in range(len(below), len(path)) if path[end] == "/"}
        entries += [describe_folder(path) for path in sorted(folders)]
        if self.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            entries = [entry for entry in entries if "/" not in entry["path"][len(below) :]]
        self.reply(200, entries)

    def paths_info(self, kind: str, repo: str, revision: str) -> None:
        if (repository := self.find(kind, repo)) is None or (commit := repository.at(revision)) is None:
            return
        form = parse_qs(self.body.decode()) if not self.body.startswith(b"{") else json.loads(self.body)
        entries = []
        for path in form.get("paths", []):
            if path in commit[1]:
                entries.append(describe(path, commit[1][path]))
            elif any(other.startswith(f"{path}/") for other in commit[1]):
                entries.append(describe_folder(path))
        self.reply(200, entries)

    def resolve(self, repo: str, revision: str, file: str, kind: str | None = None) -> None:
        if (repository := self.find(kind, repo)) is None:
            return
        if (commit := repository.at(revision)) is None:
            self.reply(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
            return
        oid, files = commit
        if file not in files:
            self.reply(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
            return
        etag = f'"{hashlib.sha256(files[file]).hexdigest()}"'
        self.reply(200, files[file], X_Repo_Commit=oid, ETag=etag)


def describe_folder(path: str) -> dict:
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}


def describe(path: str, content: bytes) -> dict:
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"type": "file", "path": path, "size": len(content), "oid": oid}
    if len(content) >= LFS_FROM or path.endswith(_LFS_KINDS):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 135}
    return entry


_API = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, object]] = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("DELETE", r"/api/repos/delete", _Handler.delete),
    ("POST", r"/_faults", _Handler.inject),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", rf"{_API}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", rf"{_API}/commit/(?P<revision>.+)", _Handler.commit),
    ("POST", rf"{_API}/paths-info/(?P<revision>.+)", _Handler.paths_info),
    (
        "GET",
        rf"{_API}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.*))?",
        lambda self, **g: self.tree(**{k: v or "" for k, v in g.items()}),
    ),
    (
        "GET",
        rf"{_API}(?:/revision/(?P<revision>.+))?",
        lambda self, **g: self.info(**{k: v for k, v in g.items() if v}),
    ),
    ("POST", r"/(?P<kind>datasets/|spaces/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/_lfs/(?P<oid>\w+)", _Handler.lfs_put),
    ("POST", r"/_lfs/(?P<oid>\w+)/verify", _Handler.lfs_verify),
    (
        "GET|HEAD",
        r"/(?P<kind>datasets/|spaces/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)",
        _Handler.resolve,
    ),
]


def environment(endpoint: str, home: str, token: str = TOKEN) -> dict[str, str]:
    """That of a process whose Hub this is."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_DATASETS_CACHE")
    }
    return inherited | {
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": token,
        "HF_HOME": home,
        "HF_HUB_DISABLE_XET": "1",
        "PALS_HF_TESTS_ON_LOOPBACK": "1",
    }


def serving(*_: object) -> Iterator[LoopbackHub]:
    """For a fixture: `hub = pytest.fixture(serving)`."""
    with LoopbackHub() as hub:
        yield hub


if __name__ == "__main__":
    with LoopbackHub() as server, tempfile.TemporaryDirectory() as home:
        code = subprocess.call(sys.argv[1:], env=environment(server.endpoint, home))
        print("\ncalls:", *server.calls, sep="\n  ")
        for (_, name), repository in server.repositories.items():
            print(f"\n{name}, {'private' if repository.private else 'public'}, {len(repository.commits) - 1} commits:")
            print(
                *(f"  {path}, {len(content)} bytes" for path, content in sorted(repository.head[1].items())), sep="\n"
            )
    sys.exit(code)
