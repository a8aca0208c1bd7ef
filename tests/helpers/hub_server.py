"""A stand-in for the Hub on this machine: it answers the real client as huggingface.co does, and remembers every byte.

Two ports: the Hub itself, and the storage of large files (uploads, downloads), which must never see a token. Large
files come in one piece or in parts; a commit is taken whole or not at all. Settings:

    cut_after   bytes of uploads after which the connection breaks in the middle of a file, and stays broken
    refuse      [(method, pattern of the path, status, header or words)]: what to answer instead
    forget      names that a commit silently loses; spoil: names whose download has a changed byte
    full        the storage takes nothing more
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.helpers.hub_storage import Handler, Repo, StandIn, Storage, blob_of

LARGE = (".safetensors", ".gguf", ".bin")


@contextmanager
def standing(**settings: Any) -> Iterator[StandIn]:
    hub = StandIn(**settings)
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (kind,), {"hub": hub})) for kind in (Api, Storage)]
    hub.endpoint = f"http://127.0.0.1:{servers[0].server_address[1]}"
    hub.storage = f"http://localhost:{servers[1].server_address[1]}"
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        hub.quit.set()
        for server in servers:
            server.shutdown()
            server.server_close()


class Api(Handler):
    def route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        data = self.body()
        for method, pattern, answer in ROUTES:
            found = re.fullmatch(pattern, path)
            if method == self.command.replace("HEAD", "GET") and found:
                return answer(self, data, *found.groups())
        return self.answer({"error": f"no such address: {path}"}, 404)

    @property
    def user(self) -> str | None:
        return self.hub.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def barred(self, name: str = "", *, write: bool = False) -> bool:
        """Tell whether the request was answered with a refusal."""
        if self.user is None:
            self.answer({"error": "Invalid username or password."}, 401, X_Error_Message="Invalid credentials")
        elif write and self.user != name.partition("/")[0]:
            self.answer({"error": "you have no right to write here"}, 403, X_Error_Message="no right to write here")
        elif name and not write and name not in self.hub.repos:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        else:
            return False
        return True

    def whoami(self, _: bytes) -> None:
        if not self.barred():
            self.answer({"type": "user", "name": self.user, "auth": {"accessToken": {"role": "write"}}})

    def create(self, data: bytes) -> None:
        asked = json.loads(data)
        name = f"{asked['organization'] or self.user}/{asked['name']}"
        if self.barred(name, write=True):
            return
        url = f"{self.hub.endpoint}/{name}"
        if name in self.hub.repos:
            return self.answer({"error": "You already created this model repo", "url": url}, 409)
        self.hub.repos[name] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        return self.answer({"url": url, "name": name})

    def validate(self, data: bytes) -> None:
        import yaml

        content = json.loads(data)["content"]
        front = content.split("---\n")[1] if content.startswith("---\n") else "{}"
        try:
            errors = [] if isinstance(yaml.safe_load(front), dict) else [{"message": "not a mapping"}]
        except yaml.YAMLError as fault:
            errors = [{"message": str(fault)}]
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def info(self, _: bytes, name: str, _revision: str | None = None) -> None:
        if not self.barred(name):
            repo = self.hub.repos[name]
            names = [{"rfilename": each} for each in repo.files]
            self.answer({"id": name, "sha": repo.head, "private": repo.private, "siblings": names, "tags": []})

    def tree(self, _: bytes, name: str, _revision: str) -> None:
        if self.barred(name):
            return
        rows = []
        for file, (data, large) in self.hub.repos[name].files.items():
            sha = hashlib.sha256(data).hexdigest()
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {len(data)}\n".encode()
            row = {"type": "file", "oid": blob_of(pointer if large else data), "size": len(data), "path": file}
            lfs = {"oid": sha, "size": len(data), "pointerSize": len(pointer)}
            rows.append(row | ({"lfs": lfs} if large else {}))
        self.answer(rows)

    def preupload(self, data: bytes, name: str, _revision: str) -> None:
        if self.barred(name):
            return
        files, held = [], self.hub.repos[name].files
        for file in json.loads(data)["files"]:
            sample = base64.b64decode(file["sample"])
            large = file["path"].endswith(LARGE) or b"\0" in sample or file["size"] > 10_000_000
            row = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if file["path"] in held:
                then, was = held[file["path"]]
                row["oid"] = hashlib.sha256(then).hexdigest() if was else blob_of(then)
            files.append(row)
        self.answer({"files": files})

    def batch(self, data: bytes, name: str) -> None:
        if self.barred(name, write=True):
            return
        rows = []
        for each in json.loads(data)["objects"]:
            oid, size = each["oid"], each["size"]
            row: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.objects:
                row["actions"] = {
                    "upload": self.upload_of(oid, size),
                    "verify": {"href": f"{self.hub.endpoint}/verify/{oid}"},
                }
            rows.append(row)
        self.answer({"transfer": "basic", "objects": rows})

    def upload_of(self, oid: str, size: int) -> dict[str, Any]:
        step = self.hub.part_size
        if size <= step:
            return {"href": f"{self.hub.storage}/put/{oid}?key=signed"}
        parts = {str(i + 1): f"{self.hub.storage}/part/{oid}/{i + 1}?key=signed" for i in range(-(-size // step))}
        return {"href": f"{self.hub.endpoint}/complete/{oid}", "header": {"chunk_size": str(step), **parts}}

    def verify(self, data: bytes, oid: str) -> None:
        asked = json.loads(data)
        there = self.hub.objects.get(oid)
        self.answer({}, 200 if there is not None and len(there) == asked["size"] else 422)

    def complete(self, data: bytes, oid: str) -> None:
        numbers = [(each["partNumber"], each["etag"]) for each in json.loads(data)["parts"]]
        pieces = [self.hub.parts.get((oid, number), b"") for number, _ in numbers]
        whole = b"".join(pieces)
        right = [
            hashlib.md5(piece).hexdigest() == etag.strip('"') for piece, (_, etag) in zip(pieces, numbers, strict=True)
        ]
        if not all(right) or hashlib.sha256(whole).hexdigest() != oid:
            return self.answer({"error": "parts do not make the file"}, 400)
        self.hub.objects[oid] = whole
        return self.answer({})

    def commit(self, data: bytes, name: str, _revision: str) -> None:
        if self.barred(name, write=True):
            return
        repo = self.hub.repos[name]
        files = dict(repo.files)
        for line in data.splitlines():
            row = json.loads(line)
            value = row["value"]
            if row["key"] == "file":
                files[value["path"]] = (base64.b64decode(value["content"]), False)
            elif row["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.answer({"error": f"{value['path']} was never uploaded"}, 400)
                files[value["path"]] = (self.hub.objects[value["oid"]], True)
            elif row["key"] == "deletedFile":
                files.pop(value["path"])
        repo.files = {each: kept for each, kept in files.items() if each not in self.hub.forget}
        repo.commits.append(hashlib.sha1(repo.head.encode() + data).hexdigest())
        url = f"{self.hub.endpoint}/{name}/commit/{repo.head}"
        return self.answer({"commitUrl": url, "commitOid": repo.head, "success": True})

    def resolve(self, _: bytes, name: str, _revision: str, file: str) -> None:
        if self.barred(name):
            return
        repo = self.hub.repos[name]
        if file not in repo.files:
            return self.answer(None, 404, X_Error_Code="EntryNotFound")
        data, large = repo.files[file]
        if not large:
            return self.answer(data, ETag=f'"{blob_of(data)}"', X_Repo_Commit=repo.head)
        oid = hashlib.sha256(data).hexdigest()
        place = f"{self.hub.storage}/get/{oid}{'-spoilt' if file in self.hub.spoil else ''}?key=signed"
        linked = {"X_Linked_Etag": f'"{oid}"', "X_Linked_Size": str(len(data)), "X_Repo_Commit": repo.head}
        return self.answer(None, 302, Location=place, **linked)


NAME, REVISION = r"([\w.-]+/[\w.-]+)", r"([\w.-]+)"
ROUTES: tuple[tuple[str, str, Any], ...] = (
    ("GET", "/api/whoami-v2", Api.whoami),
    ("POST", "/api/repos/create", Api.create),
    ("POST", "/api/validate-yaml", Api.validate),
    ("GET", f"/api/models/{NAME}", Api.info),
    ("GET", f"/api/models/{NAME}/revision/{REVISION}", Api.info),
    ("GET", f"/api/models/{NAME}/tree/{REVISION}", Api.tree),
    ("POST", f"/api/models/{NAME}/preupload/{REVISION}", Api.preupload),
    ("POST", f"/api/models/{NAME}/commit/{REVISION}", Api.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Api.batch),
    ("POST", r"/verify/(\w+)", Api.verify),
    ("POST", r"/complete/(\w+)", Api.complete),
    ("GET", f"/{NAME}/resolve/{REVISION}/(.+)", Api.resolve),
)
