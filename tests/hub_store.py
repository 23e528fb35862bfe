"""What the stand-in of the hub (tests/hub_server.py) keeps: repos, their commits and files, in memory."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

LFS = (".safetensors", ".bin", ".png", ".npz")


@dataclass(frozen=True)
class File:
    """A file of a commit."""

    data: bytes
    lfs: bool

    @classmethod
    def of(cls, path: str, data: bytes) -> "File":
        """With the hub's choice of storage: LFS for known endings and for what is not text."""
        return cls(data, is_lfs(path, data))

    @property
    def oid(self) -> str:
        """What the hub compares and gives as ETag: SHA-256 of an LFS file, git's SHA-1 of another."""
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def blob(self) -> str:
        """Name of the git blob; of an LFS file that is its pointer, here simply hashed over its oid."""
        return hashlib.sha1(self.oid.encode()).hexdigest() if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """A revision with all its files."""

    sha: str
    parent: str | None
    title: str
    files: Mapping[str, File]


@dataclass
class Repo:
    """A model repository: commits, and the branches and tags that name them."""

    private: bool
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag or a sha names."""
        return self.commits.get(self.branches.get(revision) or self.tags.get(revision) or revision)

    def commit(self, branch: str, files: Mapping[str, File], title: str) -> Commit:
        """Make a new head of a branch that holds exactly these files."""
        parent = self.branches.get(branch)
        listing = "".join(f"{name} {file.oid}\n" for name, file in sorted(files.items()))
        sha = hashlib.sha1(f"{parent} {title} {len(self.commits)}\n{listing}".encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, title, dict(files))
        self.branches[branch] = sha
        return self.commits[sha]


def is_lfs(path: str, sample: bytes) -> bool:
    """Whether the hub wants a file through the LFS protocol."""
    return path.endswith(LFS) or b"\0" in sample
