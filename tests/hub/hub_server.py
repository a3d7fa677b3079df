"""A Hugging Face Hub on 127.0.0.1, in memory: of its HTTP protocol what create, upload and download of models need.

    with HubServer({"hf_write": "alice"}) as hub:
        subprocess.run(..., env=hub.environment("hf_write", home=tmp_path))   # HF_ENDPOINT, HF_TOKEN, a fresh HF_HOME

Spoken by huggingface_hub 2.4: whoami, repository and branch creation, pre-upload, Git LFS batch and basic transfer (so
HF_HUB_DISABLE_XET must be set), NDJSON commits, model info, trees, and files by HEAD and GET.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_REV = r"(?P<revision>[^/]+)"


@dataclass
class Repository:
    """Files by path, one mapping a commit; branches name commits."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        listing = json.dumps([len(self.commits), sorted((p, hashlib.sha1(c).hexdigest()) for p, c in files.items())])
        oid = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid


class HubServer:
    """The Hub. `tokens` are write tokens and whose they are; `readers` are tokens that may only read."""

    def __init__(self, tokens: dict[str, str], readers: dict[str, str] | None = None):
        self.writers, self.users = tokens, {**tokens, **(readers or {})}
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}  # LFS objects by SHA-256
        self.requests: list[str] = []
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def environment(self, token: str | None, home: Path) -> dict[str, str]:
        """Environment of a process whose Hub is this one and whose cache is `home`."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_", "HUGGING"))}
        hub = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        return kept | hub | {"HF_HUB_DISABLE_TELEMETRY": "1"} | ({"HF_TOKEN": token} if token else {})

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """What a repository holds."""
        return self.repositories[repo].commits[self.repositories[repo].branches[branch]]


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str = ""):
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def _serve(self) -> None:
        path, hub = unquote(urlsplit(self.path).path), self.server_hub
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append(f"{self.command} {path}")
        try:
            for method, pattern, answer in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split():
                    return self._send(*answer(self, **match.groupdict(default="")))
            raise _Refused(404, f"this Hub does not serve {self.command} {path}")
        except _Refused as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            self._send(json.dumps({"error": refusal.message}).encode(), headers, refusal.status)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _send(self, content: Any, headers: dict[str, str] | None = None, status: int = 200) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # silent: `hub.requests` is the log
        pass

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _writer(self, repo: str) -> str:
        user = self.server_hub.users.get(self.token)
        if user is None:
            raise _Refused(401, "Invalid username or password.")
        if self.token not in self.server_hub.writers or repo.split("/")[0] != user:
            raise _Refused(403, f"You don't have the rights to write to {repo}")
        return user

    def _repository(self, repo: str) -> Repository:
        found = self.server_hub.repositories.get(repo)
        if found is None or (found.private and self.server_hub.users.get(self.token) != repo.split("/")[0]):
            raise _Refused(404 if self.token else 401, "Repository not found", "RepoNotFound")
        return found

    def _tree(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]]:
        found = self._repository(repo)
        oid = found.branches.get(revision, revision)
        if oid not in found.commits:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, found.commits[oid]

    # Each answer is (content,), (content, headers) or (content, headers, status).

    def whoami(self):
        if self.token not in self.server_hub.users:
            raise _Refused(401, "Invalid credentials in Authorization header")
        role = "write" if self.token in self.server_hub.writers else "read"
        auth = {"type": "access_token", "accessToken": {"displayName": "t", "role": role}}
        return ({"type": "user", "name": self.server_hub.users[self.token], "orgs": [], "auth": auth},)

    def validate_yaml(self):
        return ({"errors": [], "warnings": []},)

    def create(self):
        wanted = json.loads(self.body)
        repo = f"{wanted.get('organization') or self.server_hub.users.get(self.token)}/{wanted['name']}"
        self._writer(repo)
        answer = {"url": f"{self.server_hub.endpoint}/{repo}", "name": repo, "id": repo}
        if repo in self.server_hub.repositories:
            return answer, None, 409
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.server_hub.repositories[repo] = Repository(private)
        self.server_hub.repositories[repo].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return (answer,)

    def branch(self, repo, revision):
        self._writer(repo)
        branches = self._repository(repo).branches
        if revision in branches:
            raise _Refused(409, "Reference already exists")
        branches[revision] = branches["main"]
        return ({},)

    def preupload(self, repo, revision):
        self._writer(repo)
        self._tree(repo, revision)
        files = json.loads(self.body)["files"]
        for file in files:
            large = file["path"].endswith((".safetensors", ".bin", ".pt")) or file["size"] > 10_000_000
            file |= {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        return ({"files": files},)

    def lfs_batch(self, repo):
        self._writer(repo)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.server_hub.blobs:
                item["actions"] = {"upload": {"href": f"{self.server_hub.endpoint}/lfs-objects/{item['oid']}"}}
        return ({"transfer": "basic", "objects": objects},)

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, "checksum mismatch")
        self.server_hub.blobs[oid] = self.body
        return (b"",)

    def commit(self, repo, revision):
        self._writer(repo)
        if revision not in self._repository(repo).branches:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files = dict(self._tree(repo, revision)[1])
        for line in self.body.splitlines():
            key, value = json.loads(line).values()
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server_hub.blobs[value["oid"]]
            elif key == "deletedFile":
                files.pop(value["path"])
        oid = self._repository(repo).commit(revision, files)
        url = f"{self.server_hub.endpoint}/{repo}/commit/{oid}"
        return ({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""},)

    def info(self, repo, revision="main"):
        oid, files = self._tree(repo, revision)
        private = self._repository(repo).private
        siblings = [{"rfilename": path} for path in sorted(files)]
        return ({"_id": repo, "id": repo, "sha": oid, "private": private, "siblings": siblings, "tags": []},)

    def tree(self, repo, revision, folder=""):
        files = self._tree(repo, revision)[1]
        inside = f"{folder[1:]}/" if folder else ""
        return ([self._entry(path, files[path]) for path in sorted(files) if path.startswith(inside)],)

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        sha256 = hashlib.sha256(content).hexdigest()
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry = {"type": "file", "path": path, "size": len(content), "oid": git}
        if sha256 in self.server_hub.blobs:
            entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
        return entry

    def resolve(self, repo, revision, path):
        oid, files = self._tree(repo, revision)
        if path not in files:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        entry = self._entry(path, files[path])
        etag = entry.get("lfs", entry)["oid"]
        return files[path], {"X-Repo-Commit": oid, "ETag": f'"{etag}"', "Content-Type": "application/octet-stream"}


_ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", f"/api/models/{_REPO}/branch/{_REV}", _Handler.branch),
    ("POST", f"/api/models/{_REPO}/preupload/{_REV}", _Handler.preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs-objects/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    ("POST", f"/api/models/{_REPO}/commit/{_REV}", _Handler.commit),
    ("GET", f"/api/models/{_REPO}", _Handler.info),
    ("GET", f"/api/models/{_REPO}/revision/{_REV}", _Handler.info),
    ("GET", f"/api/models/{_REPO}/tree/{_REV}(?P<folder>/.*)?", _Handler.tree),
    ("GET HEAD", f"/{_REPO}/resolve/{_REV}/(?P<path>.+)", _Handler.resolve),
]
