"""A small Hub server on 127.0.0.1 for the real huggingface_hub client (HF_ENDPOINT, HF_HUB_DISABLE_XET=1).

It keeps repositories in memory: branches, commits, regular and LFS files. Tokens control access to private
repositories. `drop` closes the connection without an answer on the next matching requests. Run as a program, it serves
until it is killed:

    python tests/training/machine/hub_server.py
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

USERS = {"hf_me": "me", "hf_you": "you"}  # token -> user


@dataclass
class Repository:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)  # name -> commit
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> files
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        name = hashlib.sha1(repr((len(self.commits), message, sorted(files))).encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        self.messages.append(message)
        return name

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class Hub(ThreadingHTTPServer):
    """The server and its repositories. Set HF_ENDPOINT to `url`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # SHA-256 -> LFS object
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self.dropped: list[tuple[re.Pattern, int]] = []

    def drop(self, pattern: str, times: int) -> None:
        """Close the connection on the next `times` requests whose method and path match, without handling them."""
        self.dropped.append((re.compile(pattern), times))

    def must_drop(self, line: str) -> bool:
        with self.lock:
            self.requests.append(line)
            for place, (pattern, left) in enumerate(self.dropped):
                if left and pattern.search(line):
                    self.dropped[place] = (pattern, left - 1)
                    return True
        return False

    def handle_error(self, request, client_address) -> None:
        """Ignore errors of clients that disconnect."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args) -> None:
        """Do not log requests."""

    # --- answers ------------------------------------------------------------------------------------------------

    def answer(self, value, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(value, bytes) else "application/json"
        for name, text in ({"Content-Type": kind, "Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, message: str, code: str = "") -> None:
        self.answer({"error": message}, status, {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}))

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    @property
    def user(self) -> str | None:
        return USERS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    # --- requests -----------------------------------------------------------------------------------------------

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        content = self.body()
        if self.server.must_drop(f"{self.command} {path}"):
            self.close_connection = True
            self.connection.close()
            return
        if self.headers.get("Authorization") and self.user is None:
            return self.refuse(401, "Invalid user token.")
        for method, pattern, act in ROUTES:
            if method == self.command.replace("HEAD", "GET") and (match := re.fullmatch(pattern, path)):
                return act(self, content, *match.groups())
        self.refuse(404, f"{self.command} {path} is not supported by this server.")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def find(self, name: str, write: bool = False) -> Repository | None:
        """Return a repository that the user may read, or write to; answer with an error if there is none."""
        found = self.server.repositories.get(name)
        if write and self.user is None:
            self.refuse(401, "Invalid username or password.")
        elif found is None or (found.private and self.user != name.split("/")[0]):
            self.refuse(401 if self.user is None else 404, "Repository not found", "RepoNotFound")
        elif write and self.user != name.split("/")[0]:
            self.refuse(403, f"You are not allowed to write to {name}.")
        else:
            return found
        return None

    def whoami(self, content: bytes) -> None:
        if self.user is None:
            return self.refuse(401, "Invalid user token.")
        self.answer({"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})

    def create(self, content: bytes) -> None:
        request = json.loads(content)
        if self.user is None:
            return self.refuse(401, "Invalid username or password.")
        name = f"{request.get('organization') or self.user}/{request['name']}"
        if name.split("/")[0] != self.user:
            return self.refuse(403, f"You are not allowed to create {name}.")
        if name in self.server.repositories:
            return self.answer(
                {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}, 409
            )
        private = request.get("private") or request.get("visibility") == "private"
        repository = self.server.repositories[name] = Repository(bool(private))
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self.answer({"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def validate_card(self, content: bytes) -> None:
        self.answer({"errors": [], "warnings": []})

    def branch(self, content: bytes, name: str, branch: str) -> None:
        if (found := self.find(name, write=True)) is None:
            return
        if branch in found.branches:
            return self.refuse(409, "Reference already exists")
        start = (json.loads(content) if content else {}).get("startingPoint", "main")
        found.branches[branch] = found.resolve(start)
        self.answer({})

    def preupload(self, content: bytes, name: str, revision: str) -> None:
        if (found := self.find(name, write=True)) is None:
            return
        if found.resolve(revision) is None:
            return self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files = [
            {"path": file["path"], "shouldIgnore": False,
             "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".bin", ".png")) else "regular"}
            for file in json.loads(content)["files"]
        ]  # fmt: skip
        self.answer({"files": files})

    def large_batch(self, content: bytes, name: str) -> None:
        if self.find(name, write=True) is None:
            return
        objects = []
        for item in json.loads(content)["objects"]:
            stored = item["oid"] in self.server.large
            link = {"href": f"{self.server.url}/large/{item['oid']}", "header": {}}
            objects.append(item | ({} if stored else {"actions": {"upload": link}}))
        self.answer({"transfer": "basic", "objects": objects})

    def large_upload(self, content: bytes, oid: str) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            return self.refuse(400, "The SHA-256 of the content does not match its name.")
        self.server.large[oid] = content
        self.answer({})

    def commit(self, content: bytes, name: str, revision: str) -> None:
        if (found := self.find(name, write=True)) is None:
            return
        if revision not in found.branches:
            return self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files, message = dict(found.commits[found.branches[revision]]), ""
        for line in content.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        oid = found.commit(revision, files, message)
        self.answer({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"})

    def info(self, content: bytes, name: str, revision: str | None = None) -> None:
        if (found := self.find(name)) is None:
            return
        oid = found.resolve(revision or "main")
        if oid is None:
            return self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        siblings = [{"rfilename": path} for path in found.commits[oid]]
        self.answer({"_id": "1", "id": name, "modelId": name, "sha": oid, "private": found.private, "tags": [],
                     "siblings": siblings, "downloads": 0, "likes": 0})  # fmt: skip

    def tree(self, content: bytes, name: str, revision: str, folder: str | None = None) -> None:
        if (found := self.find(name)) is None:
            return
        oid = found.resolve(revision)
        if oid is None:
            return self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        self.answer(
            [{"type": "file", "path": path, "size": len(value), "oid": hashlib.sha1(value).hexdigest()}
             for path, value in found.commits[oid].items() if not folder or path.startswith(folder)]
        )  # fmt: skip

    def resolve(self, content: bytes, name: str, revision: str, path: str) -> None:
        if (found := self.find(name)) is None:
            return
        oid = found.resolve(revision)
        if oid is None:
            return self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if path not in found.commits[oid]:
            message = "Entry not found"
            return self.answer({"error": message}, 404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": message,
                                                         "X-Repo-Commit": oid})  # fmt: skip
        value = found.commits[oid][path]
        etag = hashlib.sha256(value).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": oid, "X-Linked-Size": str(len(value)),
                   "X-Linked-ETag": f'"{etag}"', "Accept-Ranges": "bytes"}  # fmt: skip
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked:
            start = int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(value) - 1}/{len(value)}"
            return self.answer(value[start:], 206, headers)
        self.answer(value, headers=headers)


NAME = r"([^/]+/[^/]+)"
ROUTES = (
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate_card),
    ("POST", rf"/api/models/{NAME}/branch/(.+)", Handler.branch),
    ("POST", rf"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.large_batch),
    ("PUT", r"/large/([0-9a-f]{64})", Handler.large_upload),
    ("POST", rf"/api/models/{NAME}/commit/(.+)", Handler.commit),
    ("GET", rf"/api/models/{NAME}/revision/(.+)", Handler.info),
    ("GET", rf"/api/models/{NAME}/tree/([^/]+)(?:/(.+))?", Handler.tree),
    ("GET", rf"/api/models/{NAME}", Handler.info),
    ("GET", rf"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
)


@contextmanager
def serving():
    """Serve a Hub while the block runs."""
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


if __name__ == "__main__":
    server = Hub()
    print(f"HF_ENDPOINT={server.url} HF_HUB_DISABLE_XET=1 HF_TOKEN={next(iter(USERS))}", flush=True)
    server.serve_forever()
