"""An imitation of the Hugging Face Hub on 127.0.0.1, for the real `huggingface_hub` client: models, git refs, LFS.

It knows tokens, namespaces and roles, private repositories, branches, commits with a parent, LFS objects on a second
origin (another port, as the Hub's storage is another host), and goes wrong on demand. It knows no Xet, no multipart
uploads, no pull requests. Statuses and headers are those that the client of version 2.4 reads.
"""

import base64
import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import parse_qs, unquote

from faulty_http import FaultyHandler, FaultyServer, Refusal, as_json

GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.png filter=lfs diff=lfs merge=lfs -text\n"
PAGE = 10  # files on one page of a listing; the Hub has 1,000, but the client must be seen to turn pages


@dataclass(frozen=True)
class Account:
    """Whom a token belongs to, and whether it is a `read` or a `write` token."""

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Blob:
    """A file of a commit: small ones with their `content`, large ones by the sha256 of their LFS object."""

    size: int
    content: bytes = b""
    sha256: str | None = None

    @property
    def oid(self) -> str:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()
        body = pointer if self.sha256 else self.content
        return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@dataclass
class Commit:
    files: dict[str, Blob]
    message: str
    parent: str | None


@dataclass
class Repository:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob], message: str) -> str:
        oid = secrets.token_hex(20)
        self.commits[oid] = Commit(files, message, self.branches.get(branch))
        self.branches[branch] = oid
        return oid

    def find(self, revision: str) -> str | None:
        known = {**self.tags, **self.branches}
        return known.get(revision) or (revision if revision in self.commits else None)


class HubServer(FaultyServer):
    """The imitation. Use it as a context manager; `endpoint` is what HF_ENDPOINT has to say."""

    def __init__(self, accounts: Mapping[str, Account]) -> None:
        super().__init__(HubHandler, StorageHandler)
        self.endpoint, self.storage = self.addresses
        self.accounts = dict(accounts)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.refuses_parents = False  # as the Hub does, even for the very head, with some fine-grained tokens

    def create(self, repo_id: str, private: bool = False) -> Repository:
        repository = self.repositories[repo_id] = Repository(private)
        repository.commit("main", {".gitattributes": Blob(len(GITATTRIBUTES), GITATTRIBUTES)}, "initial commit")
        return repository

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The content of every file at a revision."""
        repository = self.repositories[repo_id]
        files = repository.commits[repository.find(revision)].files
        return {path: self.objects[blob.sha256] if blob.sha256 else blob.content for path, blob in files.items()}

    def messages(self, repo_id: str, branch: str = "main") -> list[str]:
        """Commit messages of a branch, the first one first."""
        repository, messages = self.repositories[repo_id], []
        oid = repository.branches[branch]
        while oid:
            messages.insert(0, repository.commits[oid].message)
            oid = repository.commits[oid].parent
        return messages


class StorageHandler(FaultyHandler):
    """Where LFS objects lie: signed addresses, and no tokens."""

    origin = "storage"

    def answer(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        oid = self.path.rpartition("/")[2]
        if "Authorization" in self.headers or self.query.get("signature") != [signature(oid)]:
            raise Refusal(400, "Only one auth mechanism allowed")
        if self.command == "PUT":
            if hashlib.sha256(body).hexdigest() != oid:
                raise Refusal(400, "The content does not match its sha256")
            self.hub.objects[oid] = body
            return 200, {"ETag": f'"{oid}"'}, b""
        content = self.hub.objects[oid]
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(wanted[1])
            return 206, {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}, content[start:]
        return 200, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}, content


def signature(oid: str) -> str:
    return hashlib.sha256(f"signed {oid}".encode()).hexdigest()[:16]


class HubHandler(FaultyHandler):
    """The API, and the files of repositories."""

    origin = "hub"
    REPOSITORY = r"(?P<repo>[\w.-]+/[\w.-]+)"
    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/lfs/verify", "lfs_verify"),
        ("GET", rf"/api/models/{REPOSITORY}/auth-check(?P<write>/write)?", "auth_check"),
        ("GET", rf"/api/models/{REPOSITORY}/refs", "refs"),
        ("POST", rf"/api/models/{REPOSITORY}/branch/(?P<revision>[^/]+)", "branch"),
        ("POST", rf"/api/models/{REPOSITORY}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"/api/models/{REPOSITORY}/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", rf"/api/models/{REPOSITORY}/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("GET", rf"/api/models/{REPOSITORY}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "tree"),
        ("GET", rf"/api/models/{REPOSITORY}(/revision/(?P<revision>[^/]+))?", "info"),
        ("POST", rf"/{REPOSITORY}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("(GET|HEAD)", rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def answer(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.account = self.hub.accounts.get(token)
        if token and self.account is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        for method, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, self.path) if re.fullmatch(method, self.command) else None
            if match:
                places = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                return getattr(self, name)(body, **places)
        raise Refusal(404, "Sorry, we can't find the page you are looking for.")

    def may_write(self, repo_id: str) -> bool:
        account = self.account
        return bool(account) and account.role == "write" and repo_id.split("/")[0] in (account.name, *account.orgs)

    def readable(self, repo_id: str) -> Repository:
        repository = self.hub.repositories.get(repo_id)
        member = self.account and repo_id.split("/")[0] in (self.account.name, *self.account.orgs)
        if repository is None or (repository.private and not member):
            raise Refusal(404 if self.account else 401, "Repository not found", "RepoNotFound")
        return repository

    def writable(self, repo_id: str) -> Repository:
        repository = self.readable(repo_id)
        if not self.may_write(repo_id):
            raise Refusal(403, f"Your token has no write access to {repo_id}")
        return repository

    def at(self, repo_id: str, revision: str) -> tuple[str, Commit]:
        repository = self.readable(repo_id)
        oid = repository.find(revision)
        if oid is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, repository.commits[oid]

    def whoami(self, body: bytes):
        if self.account is None:
            raise Refusal(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": name, "roleInOrg": "admin"} for name in self.account.orgs]
        auth = {"type": "access_token", "accessToken": {"displayName": "a token", "role": self.account.role}}
        return as_json({"type": "user", "name": self.account.name, "orgs": orgs, "auth": auth})

    def create(self, body: bytes):
        wanted = json.loads(body)
        namespace = wanted.get("organization") or self.account.name
        repo_id = f"{namespace}/{wanted['name']}"
        if not self.may_write(repo_id):
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        url = f"{self.hub.endpoint}/{repo_id}"
        if repo_id in self.hub.repositories:
            return as_json({"error": "You already created this model repo", "url": url}, status=409)
        self.hub.create(repo_id, private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        return as_json({"url": url, "name": repo_id})

    def auth_check(self, body: bytes, repo: str, write: str | None = None):
        self.writable(repo) if write else self.readable(repo)
        return 200, {}, b""

    def validate_yaml(self, body: bytes):
        content = json.loads(body)["content"]
        if not re.match(r"---\n.*?\n---\n", content, flags=re.DOTALL):
            return as_json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        if re.search(r"^license: not-a-licence$", content, flags=re.MULTILINE):
            return as_json({"errors": [{"message": '"license" must be one of [...]'}], "warnings": []}, status=400)
        return as_json({"errors": [], "warnings": []})

    def refs(self, body: bytes, repo: str):
        repository = self.readable(repo)
        kinds = {"branches": ("heads", repository.branches), "tags": ("tags", repository.tags), "converts": ("", {})}
        return as_json(
            {
                kind: [{"name": name, "ref": f"refs/{place}/{name}", "targetCommit": oid} for name, oid in refs.items()]
                for kind, (place, refs) in kinds.items()
            }
        )

    def branch(self, body: bytes, repo: str, revision: str):
        repository = self.writable(repo)
        if revision in repository.branches:
            raise Refusal(409, f"Reference already exists: {revision}")
        repository.branches[revision] = repository.branches["main"]
        return 200, {}, b""

    def info(self, body: bytes, repo: str, revision: str = "main"):
        oid, commit = self.at(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        private = self.hub.repositories[repo].private
        return as_json({"id": repo, "modelId": repo, "private": private, "sha": oid, "siblings": siblings, "tags": []})

    def entries(self, commit: Commit) -> list[dict[str, Any]]:
        entries = []
        for path, blob in sorted(commit.files.items()):
            entry = {"type": "file", "path": path, "oid": blob.oid, "size": blob.size}
            if blob.sha256:
                entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
            entries.append(entry)
        folders = {path.rpartition("/")[0] for path in commit.files} - {""}
        return [*({"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders), *entries]

    def tree(self, body: bytes, repo: str, revision: str, path: str = ""):
        everything = [
            e for e in self.entries(self.at(repo, revision)[1]) if not path or e["path"].startswith(f"{path}/")
        ]
        if self.query.get("recursive") != ["true"]:
            everything = [e for e in everything if "/" not in e["path"].removeprefix(f"{path}/")]
        start = int(self.query.get("cursor", ["0"])[0])
        recursive = self.query.get("recursive", ["false"])[0]
        following = f"{self.hub.endpoint}{self.path}?recursive={recursive}&cursor={start + PAGE}"
        link = {"Link": f'<{following}>; rel="next"'} if start + PAGE < len(everything) else {}
        return as_json(everything[start : start + PAGE], **link)

    def paths_info(self, body: bytes, repo: str, revision: str):
        wanted = parse_qs(body.decode())["paths"]
        return as_json([e for e in self.entries(self.at(repo, revision)[1]) if e["path"] in wanted])

    def preupload(self, body: bytes, repo: str, revision: str):
        self.writable(repo)
        files = self.at(repo, revision)[1].files
        ignored = files[".gitignore"].content.decode().split() if ".gitignore" in files else []
        answers = []
        for file in json.loads(body)["files"]:
            path, blob = file["path"], files.get(file["path"])
            patterns = [line.split()[0] for line in GITATTRIBUTES.decode().splitlines()]
            large = file["size"] > 10_000_000 or any(fnmatchcase(path, pattern) for pattern in patterns)
            answers.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": any(fnmatchcase(path, pattern) for pattern in ignored),
                    **({"oid": blob.sha256 or blob.oid} if blob else {}),
                }
            )
        return as_json({"files": answers})

    def lfs_batch(self, body: bytes, repo: str):
        self.writable(repo)
        objects = []
        for wanted in json.loads(body)["objects"]:
            oid = wanted["oid"]
            href = f"{self.hub.storage}/objects/{oid}?signature={signature(oid)}"
            actions = {"upload": {"href": href}, "verify": {"href": f"{self.hub.endpoint}/lfs/verify"}}
            objects.append({**wanted, **({} if oid in self.hub.objects else {"actions": actions})})
        return as_json({"transfer": "basic", "objects": objects})

    def lfs_verify(self, body: bytes):
        wanted = json.loads(body)
        if len(self.hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refusal(404, "The object was not uploaded")
        return as_json({})

    def commit(self, body: bytes, repo: str, revision: str):
        repository = self.writable(repo)
        if revision not in repository.branches:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        header, *operations = [json.loads(line) for line in body.splitlines()]
        parent = header["value"].get("parentCommit")
        if parent and (self.hub.refuses_parents or parent != repository.branches[revision]):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.commits[repository.branches[revision]].files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = Blob(len(content), content)
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = Blob(len(self.hub.objects[value["oid"]]), sha256=value["oid"])
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, f"Unknown operation {operation['key']}")
        oid = repository.commit(revision, files, header["value"]["summary"])
        return as_json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}"})

    def resolve(self, body: bytes, repo: str, revision: str, path: str):
        oid, commit = self.at(repo, revision)
        blob = commit.files.get(path)
        if blob is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": oid})
        if blob.sha256:
            linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
            where = f"{self.hub.storage}/objects/{blob.sha256}?signature={signature(blob.sha256)}"
            return 302, {"X-Repo-Commit": oid, "Location": where, **linked}, b""
        return 200, {"X-Repo-Commit": oid, "ETag": f'"{blob.oid}"'}, blob.content
