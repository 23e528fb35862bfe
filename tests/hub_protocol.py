"""The HTTP side of tests/hub_server.py: routes, access rights, and the places where faults strike."""

import base64
import hashlib
import http.server
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.hub_store import Commit, File, Repo, is_lfs

if TYPE_CHECKING:
    from tests.hub_server import HubServer


LICENSES = ("mit", "apache-2.0")  # some of those the hub knows


@dataclass(frozen=True)
class Answer:
    """An HTTP answer."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class Refused(Exception):
    """A request ends with this answer."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str):
        super().__init__(message)
        named = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}
        self.answer = answer({"error": message}, status, **named)


def answer(value: Any, status: int = 200, **headers: str) -> Answer:
    """An answer in JSON."""
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection to the hub."""

    hub: "HubServer"
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body of an answer in one packet

    def log_message(self, *arguments: object) -> None:
        pass

    def dispatch(self) -> None:
        """Find the route, let a fault strike, answer."""
        address = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(address.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        matches = ((step, function, re.fullmatch(pattern, address.path))
                   for step, methods, pattern, function in ROUTES if self.command in methods.split())  # fmt: skip
        step, function, found = next((m for m in matches if m[2]), ("unknown", _unknown, re.match("", "")))
        fault = self.hub.begin(step, unquote(address.path))
        kind = fault.kind if fault else None
        if kind == "drop":
            self.close_connection = True
            return
        with self.hub.lock:
            try:
                if isinstance(kind, int):
                    raise Refused(kind, f"injected {kind}", **fault.headers)
                if kind == "page":
                    return self.send(Answer(502, b"<html>Bad Gateway</html>"))
                result = function(self, **{key: unquote(value or "") for key, value in found.groupdict().items()})
            except Refused as refused:
                result = refused.answer
        if kind == "lost":
            self.close_connection = True
        else:
            self.send(result, len(result.body) // 2 if kind == "truncate" else None)

    do_GET = do_HEAD = do_POST = do_PUT = dispatch

    def send(self, result: Answer, length: int | None = None) -> None:
        """Answer with the whole body, or with a part of it and a closed connection."""
        self.send_response(result.status)
        for key, value in {"Content-Length": str(len(result.body)), **result.headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(result.body[:length])
            self.close_connection |= length is not None

    def user(self) -> dict[str, Any] | None:
        """Who the token belongs to, None without one. Raises Refused for one that is not valid."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def may_write(self, name: str) -> bool:
        """Whether the token may write to a repo, or make it."""
        user, owner = self.user(), name.split("/")[0]
        if user is None:
            return False
        access = user["auth"]["accessToken"]
        if access["role"] == "fineGrained":
            scopes = [s for s in access["fineGrained"]["scoped"] if "repo.write" in s["permissions"]]
            return any(scope["entity"]["name"] in (owner, name) for scope in scopes)
        members = {org["name"] for org in user["orgs"] if org["roleInOrg"] != "read"}
        return access["role"] == "write" and owner in {user["name"], *members}

    def repo(self, name: str, write: bool = False) -> Repo:
        """A repo the token may read, or write to."""
        user, repo = self.user(), self.hub.repos.get(name)
        if repo is None or (repo.private and not user):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if repo.gated and not self.may_write(name):
            raise Refused(403, "Access to this model is restricted", "GatedRepo")
        if write and not self.may_write(name):
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")
        return repo

    def commit(self, name: str, revision: str) -> Commit:
        """A commit the token may read."""
        found = self.repo(name).find(revision)
        if found is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found


def _unknown(h: Handler) -> Answer:
    raise Refused(404, f"the stand-in has no route for {h.command} {h.path}")


def _whoami(h: Handler) -> Answer:
    user = h.user()
    if user is None:
        raise Refused(401, "Invalid username or password.")
    return answer(user)


def _create(h: Handler) -> Answer:
    asked = json.loads(h.body)
    user = h.user()
    name = f"{asked.get('organization') or (user or {}).get('name')}/{asked['name']}"
    url = f"{h.hub.url}/{name}"
    if name in h.hub.repos and h.may_write(name):
        return answer({"error": "You already created this model repo", "url": url}, 409)
    if not h.may_write(name):
        raise Refused(403, f"You don't have the rights to create a model under the namespace {name.split('/')[0]!r}")
    h.hub.repos[name] = Repo(private=asked.get("visibility") == "private" or asked.get("private", False))
    h.hub.repos[name].commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, "initial commit")
    return answer({"url": url, "id": name})


def _info(h: Handler, repo: str, revision: str = "") -> Answer:
    commit, kept = h.commit(repo, revision or "main"), h.repo(repo)
    card = commit.files.get("README.md")
    head = card.data.decode().split("---\n")[1] if card and card.data.startswith(b"---\n") else ""
    return answer({"id": repo, "modelId": repo, "sha": commit.sha, "private": kept.private, "tags": [],
                   "cardData": yaml.safe_load(head),
                   "siblings": [{"rfilename": path} for path in sorted(commit.files)]})  # fmt: skip


def _auth_check(h: Handler, repo: str, write: str) -> Answer:
    h.repo(repo, write=bool(write))
    return answer({})


def _validate(h: Handler) -> Answer:
    head = json.loads(h.body)["content"].split("---\n")
    data = yaml.safe_load(head[1]) if len(head) > 2 and not head[0] else None
    wrong = [] if isinstance(data, dict) and data.get("license", "mit") in LICENSES else [{"message": "bad metadata"}]
    return answer({"errors": wrong, "warnings": []}, 400 if wrong else 200)


def _preupload(h: Handler, repo: str, revision: str) -> Answer:
    h.repo(repo, write=True)
    there, found = h.commit(repo, revision).files, []
    for asked in json.loads(h.body)["files"]:
        path, sample = asked["path"], base64.b64decode(asked["sample"])
        found.append({"path": path, "uploadMode": "lfs" if is_lfs(path, sample) else "regular",
                      "shouldIgnore": False, "oid": there[path].oid if path in there else None})  # fmt: skip
    return answer({"files": found})


def _lfs_batch(h: Handler, repo: str) -> Answer:
    h.repo(repo, write=True)
    objects = []
    for asked in json.loads(h.body)["objects"]:
        actions = {"upload": {"href": f"{h.hub.url}/storage/{asked['oid']}"},
                   "verify": {"href": f"{h.hub.url}/{repo}.git/info/lfs/verify"}}  # fmt: skip
        objects.append(asked if asked["oid"] in h.hub.objects else {**asked, "actions": actions})
    return answer({"transfer": "basic", "objects": objects})


def _lfs_put(h: Handler, oid: str) -> Answer:
    if hashlib.sha256(h.body).hexdigest() != oid:
        raise Refused(400, "the content does not have this SHA-256")
    h.hub.objects[oid] = h.body
    return Answer()


def _lfs_verify(h: Handler, repo: str) -> Answer:
    asked = json.loads(h.body)
    if len(h.hub.objects.get(asked["oid"], b"")) != asked["size"]:
        raise Refused(422, "this object is not stored")
    return answer({})


def _commit(h: Handler, repo: str, revision: str) -> Answer:
    kept, head = h.repo(repo, write=True), h.commit(repo, revision)
    files, title = dict(head.files), ""
    for line in h.body.splitlines():
        item = json.loads(line)
        key, value = item["key"], item["value"]
        if key == "header":
            title = value["summary"]
            if value.get("parentCommit", head.sha) != head.sha:
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
        elif key == "file":
            files[value["path"]] = File(base64.b64decode(value["content"]), False)
        elif key == "lfsFile":
            if value["oid"] not in h.hub.objects:
                raise Refused(400, f"LFS object {value['oid']} is not stored")
            files[value["path"]] = File(h.hub.objects[value["oid"]], True)
        elif files.pop(value["path"], None) is None:
            raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
    made = kept.commit(revision, files, title)
    return answer({"success": True, "commitUrl": f"{h.hub.url}/{repo}/commit/{made.sha}", "commitOid": made.sha})


def _branch(h: Handler, repo: str, name: str) -> Answer:
    kept = h.repo(repo, write=True)
    if name in kept.branches:
        raise Refused(409, f"Reference already exists: {name}")
    kept.branches[name] = h.commit(repo, json.loads(h.body or b"{}").get("startingPoint") or "main").sha
    return answer({})


def _tag(h: Handler, repo: str, revision: str) -> Answer:
    h.repo(repo, write=True).tags[json.loads(h.body)["tag"]] = h.commit(repo, revision).sha
    return answer({})


def _refs(h: Handler, repo: str) -> Answer:
    kept = h.repo(repo)
    named = {"branches": ("heads", kept.branches), "tags": ("tags", kept.tags)}
    found = {key: [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in names.items()]
             for key, (kind, names) in named.items()}  # fmt: skip
    return answer({"converts": [], **found})


def _tree(h: Handler, repo: str, revision: str) -> Answer:
    return answer([_entry(path, file) for path, file in sorted(h.commit(repo, revision).files.items())])


def _entry(path: str, file: File) -> dict[str, Any]:
    size = len(file.data)
    lfs = {"lfs": {"oid": file.oid, "size": size, "pointerSize": 130}} if file.lfs else {}
    return {"type": "file", "path": path, "size": size, "oid": file.blob, **lfs}


def _resolve(h: Handler, repo: str, revision: str, path: str) -> Answer:
    commit = h.commit(repo, revision)
    if (file := commit.files.get(path)) is None:
        raise Refused(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.sha})
    headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", h.headers.get("Range", ""))
    if asked is None or h.command == "HEAD":
        return Answer(200, file.data, headers)
    start, stop = int(asked[1]), int(asked[2] or len(file.data) - 1) + 1
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(file.data)}"
    return Answer(206, file.data[start:stop], headers)


REPO = r"(?P<repo>[^/]+/[^/]+)"
MODEL, REVISION = f"/api/models/{REPO}", r"(?P<revision>[^/]+)"
ROUTES = (  # step, methods, path, function
    ("whoami", "GET", "/api/whoami-v2", _whoami),
    ("create", "POST", "/api/repos/create", _create),
    ("info", "GET", MODEL, _info),
    ("info", "GET", f"{MODEL}/revision/{REVISION}", _info),
    ("auth-check", "GET", f"{MODEL}/auth-check(?P<write>/write)?", _auth_check),
    ("validate", "POST", "/api/validate-yaml", _validate),
    ("preupload", "POST", f"{MODEL}/preupload/{REVISION}", _preupload),
    ("lfs-batch", "POST", rf"/{REPO}\.git/info/lfs/objects/batch", _lfs_batch),
    ("lfs-put", "PUT", r"/storage/(?P<oid>\w+)", _lfs_put),
    ("lfs-verify", "POST", rf"/{REPO}\.git/info/lfs/verify", _lfs_verify),
    ("commit", "POST", f"{MODEL}/commit/{REVISION}", _commit),
    ("branch", "POST", f"{MODEL}/branch/(?P<name>[^/]+)", _branch),
    ("tag", "POST", f"{MODEL}/tag/{REVISION}", _tag),
    ("refs", "GET", f"{MODEL}/refs", _refs),
    ("tree", "GET", f"{MODEL}/tree/{REVISION}", _tree),
    ("resolve", "GET HEAD", rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)", _resolve),
)
