"""Routes of uploads and commits."""

import base64
import binascii
import hashlib
from typing import TYPE_CHECKING, Any

from . import xet
from .access import signed_in
from .errors import HubError
from .metadata import card_errors
from .repository import Repository, apply
from .server import Reply, Request, json_reply, parse_json
from .tree import is_lfs

if TYPE_CHECKING:
    from .hub import LocalHub


def preupload(repository: Repository, request: Request, revision: str) -> Reply:
    """Upload mode of each file, and its hash if the path is taken."""
    files = repository.resolve(revision).files
    modes = []
    for asked in request.json()["files"]:
        path = asked["path"]
        lfs = is_lfs(path, asked["size"], base64.b64decode(asked.get("sample", "")), files)
        oid = files[path].etag if path in files else None
        modes.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
    return json_reply({"files": modes})


def lfs_batch(hub: "LocalHub", repository: Repository, request: Request) -> Reply:
    """Upload addresses of objects; one without actions is already there."""
    place = f"{repository.type}s/{repository.id}"
    objects = []
    for asked in request.json()["objects"]:
        wanted = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in repository.lfs_objects:
            hub.expected_uploads.add(f"{place}/{asked['oid']}")
            wanted["actions"] = {
                "upload": {"href": f"{hub.content_endpoint}/lfs/{place}/{asked['oid']}"},
                "verify": {"href": f"{hub.endpoint}/api/{place}/lfs-verify"},
            }
        objects.append(wanted)
    return json_reply({"transfer": "basic", "objects": objects})


def put_object(hub: "LocalHub", request: Request, kinds: str, repo_id: str, oid: str) -> Reply:
    """Upload of an object that a batch reply requested; without a token, as its URL is signed on the real Hub."""
    repository = hub.repositories.get((kinds.removesuffix("s"), repo_id))
    if repository is None or f"{kinds}/{repo_id}/{oid}" not in hub.expected_uploads:
        raise HubError(403, "Access denied")
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, f"Expected content of sha256 {oid}, got another one")
    repository.lfs_objects[oid] = request.body
    return Reply()


def verify_object(repository: Repository, request: Request) -> Reply:
    asked = request.json()
    if len(repository.lfs_objects.get(asked["oid"], b"")) != asked["size"]:
        raise HubError(404, f"Expected {asked['size']} bytes of {asked['oid']}, got others or none")
    return Reply()


def commit(hub: "LocalHub", repository: Repository, request: Request, revision: str) -> Reply:
    """Carry out all the operations of a commit, or none."""
    author = signed_in(hub.tokens, request).name
    header, operations = _parse(request.body)
    ref, parent = repository.writable_ref(revision), header.get("parentCommit") or ""
    tip = repository.resolve(parent if parent and request.flag("create_pr") else ref)
    if not tip.oid.startswith(parent):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    if hub.xet:
        _take_from_xet(hub, repository, operations)
    files = apply(repository, tip.files, operations)
    card = files.get("README.md")
    if card and card != tip.files.get("README.md") and (errors := card_errors(card.content.decode(errors="replace"))):
        raise HubError(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
    title, text, url = header["summary"], header.get("description", ""), hub.url(repository.id, repository.type)
    reply: dict[str, Any] = {"success": True}
    if request.flag("create_pr"):
        discussion = repository.open_discussion(title, author, text, base=tip.oid)
        ref = discussion.ref
        reply["pullRequestUrl"] = f"{url}/discussions/{discussion.num}"
    made = repository.commit(ref, files, title, author, text)
    for discussion in repository.discussions:
        if discussion.ref == ref:
            discussion.record("commit", author, subject=title, oid=made.oid)
    return json_reply({**reply, "commitOid": made.oid, "commitUrl": f"{url}/commit/{made.oid}"})


def xet_token(hub: "LocalHub", repository: Repository) -> Reply:
    """Xet token, in the body for ``hf_xet``, in the headers for ``huggingface_hub``."""
    token = xet.token(hub.xet_folder(repository))
    headers = {
        "X-Xet-Cas-Url": str(token["casUrl"]),
        "X-Xet-Access-Token": str(token["accessToken"]),
        "X-Xet-Token-Expiration": str(token["exp"]),
    }
    return json_reply(token, headers=headers)


def _parse(body: bytes) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    """The header and the operations of a commit, which come as one JSON object per line."""
    lines = [parse_json(line) for line in body.splitlines() if line.strip()]
    headers = [line["value"] for line in lines if line["key"] == "header"]
    if len(headers) != 1 or not headers[0].get("summary"):
        raise HubError(400, "Expected one header with a summary")
    operations = [(line["key"], line["value"]) for line in lines if line["key"] != "header"]
    return headers[0], [(kind, _decoded(value) if kind == "file" else value) for kind, value in operations]


def _decoded(value: dict[str, Any]) -> dict[str, Any]:
    if value.get("encoding") != "base64":
        return {**value, "content": value["content"].encode()}
    try:
        return {**value, "content": base64.b64decode(value["content"], validate=True)}
    except binascii.Error as error:
        raise HubError(400, f"Expected base64 for {value['path']}: {error}") from error


def _take_from_xet(hub: "LocalHub", repository: Repository, operations: list[tuple[str, dict[str, Any]]]) -> None:
    """Fetch files that a commit names by their sha256 and that the client left with xet."""
    wanted = {value["oid"] for kind, value in operations if kind == "lfsFile"} - repository.lfs_objects.keys()
    hashes = xet.uploaded(hub.xet_folder(repository)) if wanted else {}
    for oid in wanted & hashes.keys():
        repository.lfs_objects[oid] = xet.content(hub.xet_folder(repository), hashes[oid])
        repository.xet_hashes[oid] = hashes[oid]
