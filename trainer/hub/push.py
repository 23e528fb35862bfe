"""Pushing a finished run to the Hugging Face hub: what would be pushed, whether we may, and one commit that holds all.

A push compares the branch with the plan and makes one commit of what differs, stale weights deleted in it; after every
fault it looks again. So a commit whose answer was lost is found, nothing stored is sent twice, and a reader of the
branch sees the old model or the new one, never a mixture.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from trainer import artifacts
from trainer.config.recipe import Recipe
from trainer.config.runtime import HubConfig
from trainer.hub import code
from trainer.hub.address import code_address
from trainer.hub.card import taught, trained_with, write_card
from trainer.hub.detector_card import write_detector_card
from trainer.hub.retry import patiently, reason_of
from trainer.hub.usage import MODELS
from trainer.hub.wording import hub_id
from trainer.request import graph

log = logging.getLogger(__name__)
PUBLISHED = re.compile(  # of an artifact
    r"(preprocessor_)?config\.json|basis\.safetensors|model.*\.safetensors(\.index\.json)?"
)
# what an earlier push may have left: weights and indexes of the student, whole stages, and what hub.code added
OURS = re.compile(
    r"[^/]+\.(safetensors|bin)(\.index\.json)?|(teacher|probe|assemble|meta|upcycle|distill_\d+)/.*|"
    rf"({'|'.join(model.remote for model in MODELS.values())})\.py|preprocessor_config\.json"
)


@dataclass(frozen=True)
class PlannedFile:
    """A file of the commit: its place in the repo, its content on disk or in memory."""

    path: str
    content: Path | bytes
    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class Plan:
    """All files of a push. str() is what --dry-run shows: files with sizes, and the card."""

    repo: str
    revision: str
    files: tuple[PlannedFile, ...]

    @property
    def card(self) -> str:
        """README.md."""
        (card,) = (file for file in self.files if file.path == "README.md")
        return card.content.decode()

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every file by its place in the repo."""
        return {file.path: file.sha256 for file in self.files}

    def __str__(self) -> str:
        width = max(len(file.path) for file in self.files)
        lines = [f"  {file.path.ljust(width)}  {file.size:>15,} bytes" for file in self.files]
        total = sum(file.size for file in self.files)
        head = f"push to {self.repo}@{self.revision}: {len(self.files)} files, {total:,} bytes"
        return "\n".join([head, *lines, "", "README.md:", "", self.card])


def plan(run_dir: Path, recipe: Recipe, teacher_license: str | None = None) -> Plan:
    """What a push of this run holds. Contacts nothing and writes nothing.

    Args:
        run_dir: the run's folder, with a finished train (and, for hub.stages=all, the stages before it), or with a
            finished detect for hub.stages=detector.
        teacher_license: for the card, see find_teacher_license.

    Raises:
        ValueError: hub.repo is not set, or an artifact is missing, unfinished, of another recipe or damaged.
    """
    if not recipe.hub.repo:
        raise ValueError("hub.repo is empty: set hub.repo=OWNER/NAME to push")
    detector = recipe.hub.stages == "detector"
    name = graph.artifact_name("detect" if detector else "train", start=recipe.train.start)
    folder, result = artifacts.require(run_dir, name, recipe, "--phase push")
    files = _published(folder, result, "")
    stages = _stages(run_dir, recipe)
    for stage in stages:
        stage_folder, stage_result = artifacts.require(run_dir, stage, recipe, "--phase push with hub.stages=all")
        files += _published(stage_folder, stage_result, f"{stage}/")
        for name in ("config.yaml", "result.json"):  # what trainer/teaching/reuse.py asks of a teaching pair
            if (stage_folder / name).is_file():  # a start has no config.yaml
                files.append(_in_memory(f"{stage}/{name}", (stage_folder / name).read_bytes()))
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    recipe_text = yaml.safe_dump(saved["recipe"], sort_keys=False)
    files.append(_in_memory("recipe.yaml", recipe_text.encode()))
    ds_config_text = json.dumps(saved["ds_config"], indent=1) + "\n"
    files.append(_in_memory("ds_config.json", ds_config_text.encode()))
    address = code_address(recipe.hub.code_url)
    if address is None:
        log.warning(
            "the model card names no address of the code: set hub.code_url, so that others can install what loads it"
        )
    if detector:
        if recipe.hub.code:
            log.warning("hub.code has no effect on a detector: its heads are those of transformers already")
        card = write_detector_card(run_dir, recipe, folder, address)
    else:
        if recipe.hub.code:
            files = _with_code(files, result, address)
        card = write_card(run_dir, recipe, teacher_license, stages, address)
    for path, content in card.items():
        files.append(_in_memory(path, content))
    return Plan(recipe.hub.repo, recipe.hub.revision, tuple(sorted(files, key=lambda file: file.path)))


def check_hub(hub: HubConfig, *, make: bool = True) -> None:
    """Before training: may this token push to hub.repo?

    Args:
        make: make the repo and the branch where they do not exist; else only ask what can be asked without them.

    Raises:
        ValueError: an illegal name or licence, no token, one that is not valid or may not write there, HF_HUB_OFFLINE.
        OSError: the hub cannot be reached.
    """
    api = _client(hub)
    _check_rights(hub, patiently("asking the hub whose token this is", api.whoami))
    if hub.license:
        card = ModelCard(f"---\nlicense: {json.dumps(hub.license)}\n---\n")
        patiently(f"asking the hub about hub.license={hub.license}", card.validate)
    try:
        info = patiently(f"looking for {hub.repo}", lambda: api.repo_info(hub.repo), leave=RepositoryNotFoundError)
        if hub.private and not info.private:
            log.warning("%s exists and is public; hub.private is for a repo that has to be made", hub.repo)
    except RepositoryNotFoundError:
        if not make:
            return
        patiently(f"making {hub.repo}", lambda: api.create_repo(hub.repo, private=hub.private, exist_ok=True))
    patiently(f"asking for the right to write to {hub.repo}", lambda: api.auth_check(hub.repo, write=True))
    if hub.revision != "main" and make:
        patiently(
            f"making branch {hub.revision} of {hub.repo}",
            lambda: api.create_branch(hub.repo, branch=hub.revision, exist_ok=True),
        )


def push(plan: Plan, hub: HubConfig) -> str:
    """Bring the branch to exactly this plan, in one commit.

    Returns:
        The commit that holds it, the one already there when nothing differs.

    Raises:
        ValueError: refused by the hub, as in check_hub.
        OSError: the hub could not be reached for minutes, or did not take a file.
    """
    check_hub(hub)
    api = _client(hub)
    return patiently(f"pushing to {hub.repo}", lambda: _bring(api, plan))


def find_teacher_license(run_dir: Path, recipe: Recipe) -> str | None:
    """Licence of a teacher from the hub as its page names it; None when there is none or it cannot be asked."""
    if not recipe.teacher.source or recipe.hub.stages == "detector":
        return None
    teacher_on_hub = hub_id(trained_with(run_dir, recipe))
    if teacher_on_hub is None or constants.HF_HUB_OFFLINE:
        return None
    teacher_id, revision = teacher_on_hub
    try:
        card = HfApi().model_info(teacher_id, revision=revision).card_data
    # whatever went wrong, the card then says that the licence is on the teacher's page
    except (OSError, ValueError, HTTPError) as error:
        log.warning("licence of teacher %s not found: %s", teacher_id, reason_of(error))
        return None
    return card.get("license") if card else None


def _stages(run_dir: Path, recipe: Recipe) -> list[str]:
    """Artifacts pushed beside the student."""
    if recipe.hub.stages != "all":
        return []
    if not taught(recipe):
        log.warning("hub.stages=all has no effect: this student was not taught by modules")
        return []
    distilled = [graph.artifact_name("distill", module) for module in range(recipe.modules)]
    teacher = [*graph.own_teacher(recipe)]
    if (run_dir / "probe" / "result.json").is_file():  # with head auto there may be none
        teacher.append("probe")
    start = ["upcycle"] if (run_dir / "upcycle" / "result.json").is_file() else []
    return [*teacher, "meta", *start, *distilled]


def _published(folder: Path, result: dict[str, Any], place: str) -> list[PlannedFile]:
    """The model files of an artifact whose checksums have just been checked."""
    return [
        PlannedFile(place + name, folder / name, record["bytes"], record["sha256"])
        for name, record in result["files"].items()
        if PUBLISHED.fullmatch(name)
    ]


def _with_code(files: list[PlannedFile], result: dict[str, Any], address: str | None) -> list[PlannedFile]:
    """The files with what hub.code adds: the modelling file, how config.json names it, and an image processor."""
    (config_file,) = (file for file in files if file.path == "config.json")
    config = json.loads(Path(config_file.content).read_text())
    model_type = config["model_type"]
    config["auto_map"] = code.auto_map(model_type)
    commit = result.get("git_commit") or "not in git"
    origin = f"Sources: {address or 'not published'}, commit {commit}. MIT licence."
    added = {
        "config.json": json.dumps(config, indent=2) + "\n",
        code.file_name(model_type): code.modelling_file(model_type, origin),
    }
    if config.get("preprocessing"):
        # here, because they import torch and transformers
        from models.preprocessing import Preprocessing
        from models.teacher.images import to_processor

        added["preprocessor_config.json"] = to_processor(
            Preprocessing.from_dict(config["preprocessing"])
        ).to_json_string()
    kept = [file for file in files if file.path not in added]
    return kept + [_in_memory(path, text.encode()) for path, text in added.items()]


def _in_memory(path: str, content: bytes) -> PlannedFile:
    return PlannedFile(path, content, len(content), hashlib.sha256(content).hexdigest())


def _client(hub: HubConfig) -> HfApi:
    """The hub's client, after what can be known without a request."""
    try:
        validate_repo_id(hub.repo)
    except HFValidationError as error:
        raise ValueError(f"hub.repo is {hub.repo!r}, which is no legal name: {reason_of(error)}") from None
    if "/" not in hub.repo:
        raise ValueError(f"hub.repo is {hub.repo!r}, expected OWNER/NAME: the owner is your user or organisation")
    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*", hub.revision) or ".." in hub.revision:
        raise ValueError(f"hub.revision is {hub.revision!r}, expected the name of a branch such as main or v2")
    if re.fullmatch(r"[0-9a-f]{40}", hub.revision):
        raise ValueError(f"hub.revision is the commit {hub.revision}: a push needs a branch, such as main")
    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"hub.repo is {hub.repo} but HF_HUB_OFFLINE=1: unset it, or train with hub.repo='' and run --phase push "
            "later on a machine with internet"
        )
    token = get_token()
    if not token:
        raise ValueError(f"no token to push to {hub.repo}: log in with `hf auth login`, or set HF_TOKEN")
    if not (token.isascii() and token.isprintable()):
        raise ValueError("the token (HF_TOKEN or `hf auth login`) has characters that no token has: copy it anew")
    return HfApi(library_name="m2mkd")


def _check_rights(hub: HubConfig, who: dict[str, Any]) -> None:
    """Refuse a token that cannot write to hub.repo, from what whoami says."""
    owner, _ = hub.repo.split("/")
    me = who["name"]
    access = who.get("auth", {}).get("accessToken", {})
    advice = "make one that may write on https://huggingface.co/settings/tokens and log in with `hf auth login`"
    if access.get("role") == "read":
        raise ValueError(f"the token of {me} may only read, so it cannot push to {hub.repo}: {advice}")
    if access.get("role") == "fineGrained":
        scopes = access.get("fineGrained", {}).get("scoped", [])
        writable = {scope["entity"].get("name") for scope in scopes if "repo.write" in scope["permissions"]}
        if owner not in writable and hub.repo not in writable:
            raise ValueError(f"the fine-grained token of {me} has no write permission for {hub.repo}: {advice}")
    role_in = {org["name"]: org.get("roleInOrg") for org in who.get("orgs", [])}
    if owner != me and role_in.get(owner) in (None, "read"):
        owners = [me, *(name for name, role in role_in.items() if role != "read")]
        places = ", ".join(f"{name}/..." for name in owners)
        raise ValueError(f"{hub.repo} is not yours: {me} can push to {places}")


def _bring(api: HfApi, plan: Plan) -> str:
    """One attempt; safe to repeat after it has failed anywhere."""
    head = api.repo_info(plan.repo, revision=plan.revision).sha
    to_send, stale = _difference(api, plan, head)
    if not to_send and not stale:
        return head
    log.info("%s@%s: %d files to send, %d stale ones to delete", plan.repo, plan.revision, len(to_send), len(stale))
    commit = api.create_commit(
        plan.repo,
        [*map(_addition, to_send), *map(CommitOperationDelete, stale)],
        commit_message="Push of a finished run by m2mkd",
        revision=plan.revision,
        parent_commit=head,
    )
    missing, stale = _difference(api, plan, commit.oid)
    if missing or stale:
        wrong = ", ".join([*(file.path for file in missing), *stale])
        raise OSError(f"{plan.repo} took commit {commit.oid} without {wrong}: does a .gitignore of the repo name them?")
    return commit.oid


def _difference(api: HfApi, plan: Plan, commit: str) -> tuple[list[PlannedFile], list[str]]:
    """What a commit lacks of the plan, and what it holds of an earlier push."""
    entries = api.list_repo_tree(plan.repo, revision=commit, recursive=True)
    stored = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    lacking = [file for file in plan.files if file.path not in stored or not _same(file, stored[file.path])]
    planned = {file.path for file in plan.files}
    stale = [path for path in stored if path not in planned and OURS.fullmatch(path)]
    return lacking, sorted(stale)


def _same(file: PlannedFile, stored: RepoFile) -> bool:
    if file.size != stored.size:
        return False
    if stored.lfs is not None:
        return stored.lfs.sha256 == file.sha256
    content = file.content
    if isinstance(content, Path):
        content = content.read_bytes()  # small: kept in git
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == stored.blob_id


def _addition(file: PlannedFile) -> CommitOperationAdd:
    content = file.content if isinstance(file.content, bytes) else str(file.content)
    operation = CommitOperationAdd(file.path, content)
    operation.upload_info.sha256 = bytes.fromhex(file.sha256)  # known: the client need not read the file for it
    return operation
