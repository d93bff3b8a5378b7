"""Routes that change nothing."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, urlencode

import yaml

from .access import find_user, sees
from .errors import HubError
from .metadata import as_list, card_metadata, hub_tags
from .repository import Commit, Repository, timestamp
from .server import Reply, Request, json_reply
from .tree import File, files_hash, listing, sha1, under

if TYPE_CHECKING:
    from .hub import LocalHub

_FILTERS = ("filter", "author", "search", "pipeline_tag", "gated")
_LISTED = ["_id", "id", "private", "gated", "downloads", "likes", "createdAt", "tags", "library_name", "pipeline_tag"]
_LISTED_IN_FULL = ["author", "sha", "lastModified", "disabled", "siblings"]


# What a repository is


def info(repository: Repository, request: Request, revision: str) -> Reply:
    described = _describe(repository, repository.resolve(revision), blobs=request.flag("blobs"))
    expand = request.query.get("expand")
    return json_reply(_only(described, ["_id", "id", *expand]) if expand else described)


def list_repositories(hub: "LocalHub", request: Request, kinds: str) -> Reply:
    """The repositories of one type that pass the filters, in order of creation unless another order is requested."""
    query = request.query
    if unknown := query.keys() - {*_FILTERS, "sort", "direction", "limit", "cursor", "full", "config", "cardData", "expand"}:
        raise HubError(400, f"LocalHub can't list by {', '.join(sorted(unknown))}")
    user = find_user(hub.tokens, request)
    of_kind = [repository for (kind, _), repository in hub.repositories.items() if f"{kind}s" == kinds]
    found = [_describe(repository, repository.resolve("main")) for repository in of_kind if sees(user, repository)]
    found = [described for described in found if _passes(described, query)]
    if sort := query.get("sort"):
        found.reverse()  # of those that are equal, such as created in one millisecond, the newest comes first
        found.sort(key=lambda described: described[sort[0]], reverse=query.get("direction", ["-1"]) == ["-1"])
    fields = _LISTED + (_LISTED_IN_FULL if request.flag("full") else []) + (["cardData"] if request.flag("cardData") else [])
    if "expand" in query:
        fields = ["_id", "id", *query["expand"]]
    size = min(hub.page_size, int(query.get("limit", [hub.page_size])[0]))
    return _page(hub, request, [_only(described, fields) for described in found], size)


def _describe(repository: Repository, commit: Commit, *, blobs: bool = False) -> dict[str, Any]:
    """The Hub's full description of a repository at a commit."""
    card = commit.files.get("README.md")
    metadata = card_metadata(card.content.decode(errors="replace")) if card else {}
    return {
        "_id": sha1(repository.id.encode())[:24],
        "id": repository.id,
        "modelId": repository.id,
        "author": repository.namespace,
        "sha": commit.oid,
        "createdAt": timestamp(repository.created),
        "lastModified": timestamp(commit.date),
        "private": repository.private,
        "gated": repository.gated,
        "disabled": False,
        "downloads": repository.downloads,
        "downloadsAllTime": repository.downloads,
        "likes": repository.likes,
        "trendingScore": 0,
        "tags": hub_tags(metadata, commit.files),
        "library_name": metadata.get("library_name"),
        "pipeline_tag": metadata.get("pipeline_tag"),
        "cardData": metadata,
        "model-index": metadata.get("model-index"),
        "baseModels": as_list(metadata.get("base_model")),
        "evalResults": _eval_results(commit),
        "usedStorage": sum(file.size for file in commit.files.values()),
        "siblings": [_sibling(path, file, blobs) for path, file in sorted(commit.files.items())],
    }


def _sibling(path: str, file: File, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": path}
    lfs = {"lfs": {"sha256": file.sha256, "size": file.size, "pointerSize": file.pointer_size}} if file.lfs else {}
    return {"rfilename": path, "size": file.size, "blobId": file.oid, **lfs}


def _eval_results(commit: Commit) -> list[Any]:
    entries: list[Any] = []
    for path, file in sorted(under(commit.files, ".eval_results").items()):
        try:
            entries += as_list(yaml.safe_load(file.content))
        except yaml.YAMLError as error:
            entries.append({"filename": path, "error": str(error)})
    return entries


def _only(described: Mapping[str, Any], fields: list[str]) -> dict[str, Any]:
    return {field: described[field] for field in fields if field in described}


def _passes(described: Mapping[str, Any], query: Mapping[str, list[str]]) -> bool:
    tags = [tag for value in query.get("filter", []) for tag in value.split(",")]
    return (
        all(tag in described["tags"] for tag in tags)
        and all(author == described["author"] for author in query.get("author", []))
        and all(word.lower() in described["id"].lower() for word in query.get("search", []))
        and all(tag == described["pipeline_tag"] for tag in query.get("pipeline_tag", []))
        and all((value.lower() == "true") == bool(described["gated"]) for value in query.get("gated", []))
    )


def _page(hub: "LocalHub", request: Request, items: list[Any], size: int) -> Reply:
    """One page of a list, with a link to the next."""
    start = int(request.query.get("cursor", ["0"])[0])
    headers = {}
    if start + size < len(items):
        query = urlencode({**request.query, "cursor": [str(start + size)]}, doseq=True)
        headers["Link"] = f'<{hub.endpoint}{request.path}?{query}>; rel="next"'
    return json_reply(items[start : start + size], headers=headers)


# What lies in it


def tree(hub: "LocalHub", repository: Repository, request: Request, revision: str, folder: str) -> Reply:
    commit = repository.resolve(revision)
    found = listing(commit.files, folder, recursive=request.flag("recursive"))
    entries = [_entry(repository, commit, path, file, expand=request.flag("expand")) for path, file in found.items()]
    return _page(hub, request, entries, hub.page_size)


def paths_info(repository: Repository, request: Request, revision: str) -> Reply:
    """Information on the paths in a form; those that don't exist are left out."""
    commit = repository.resolve(revision)
    form = parse_qs(request.body.decode())
    expand = form.get("expand", [""])[0].lower() == "true"
    paths = [path.rstrip("/") for path in form.get("paths", [])]
    known = [path for path in paths if under(commit.files, path)]
    return json_reply([_entry(repository, commit, path, commit.files.get(path), expand=expand) for path in known])


def references(repository: Repository, request: Request) -> Reply:
    def named(prefix: str, shown: str = "") -> list[dict[str, str]]:
        refs = [(ref, oid) for ref, oid in repository.refs.items() if ref.startswith(prefix)]
        return [{"name": shown + ref.removeprefix(prefix), "ref": ref, "targetCommit": oid} for ref, oid in refs]

    refs = {"branches": named("refs/heads/"), "tags": named("refs/tags/"), "converts": []}
    return json_reply(refs | ({"pullRequests": named("refs/pr/", "refs/pr/")} if request.flag("include_prs") else {}))


def commits(hub: "LocalHub", repository: Repository, request: Request, revision: str) -> Reply:
    history = [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.description,
            "authors": [{"user": commit.author}],
            "date": timestamp(commit.date),
        }
        for commit in repository.history(repository.resolve(revision))
    ]
    return _page(hub, request, history, hub.page_size)


def _entry(repository: Repository, commit: Commit, path: str, file: File | None, *, expand: bool) -> dict[str, Any]:
    """A file, or a folder for None."""
    if file is None:
        entry: dict[str, Any] = {"type": "directory", "path": path, "oid": files_hash(under(commit.files, path)), "size": 0}
    else:
        entry = {"type": "file", "path": path, "oid": file.oid, "size": file.size}
        if file.lfs:
            entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
        if file.xet_hash:
            entry["xetHash"] = file.xet_hash
    if expand:
        last = repository.last_change(commit, path)
        entry["lastCommit"] = {"id": last.oid, "title": last.title, "date": timestamp(last.date)}
    return entry


# Files


def resolve(hub: "LocalHub", repository: Repository, request: Request, revision: str, path: str) -> Reply:
    """A file; or where it is, for an LFS file: at another origin, to which clients don't take their token."""
    commit = repository.resolve(revision)
    headers = {"X-Repo-Commit": commit.oid}
    file = commit.files.get(path)
    if file is None:
        raise HubError(404, "Entry not found", "EntryNotFound", headers=headers)
    if path == "config.json" and request.method == "HEAD":  # what every load asks for once
        repository.downloads += 1
    headers |= {"ETag": f'"{file.oid}"', "Content-Disposition": f"inline; filename*=UTF-8''{_quoted(path.split('/')[-1])}"}
    if not file.lfs:
        return _ranged(request, file, headers)
    place = f"{repository.type}s/{repository.id}"
    if file.xet_hash and hub.xet:
        refresh = f"{hub.endpoint}/api/{place}/xet-read-token/{commit.oid}"
        headers |= {"X-Xet-Hash": file.xet_hash, "X-Xet-Refresh-Route": refresh}
    location = f"{hub.content_endpoint}/cdn/{place}/{commit.oid}/{_quoted(path)}"
    headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size), "Location": location}
    return Reply(status=302, headers=headers)


def content(hub: "LocalHub", request: Request, kinds: str, repo_id: str, oid: str, path: str) -> Reply:
    """Bytes of an LFS file, for all who know the commit: on the real Hub, the URL is signed."""
    repository = hub.repositories.get((kinds.removesuffix("s"), repo_id))
    file = repository.commits[oid].files.get(path) if repository and oid in repository.commits else None
    if file is None:
        raise HubError(403, "Access denied")
    return _ranged(request, file, {"ETag": f'"{file.sha256}"'})


def _ranged(request: Request, file: File, headers: Mapping[str, str]) -> Reply:
    """A file, or the requested range of its bytes."""
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)|bytes=-(\d+)", request.headers.get("Range", ""))
    if not asked:
        return Reply(file.content, headers=headers)
    first, last, final = asked.groups()
    start = int(first) if first else max(0, file.size - int(final))
    stop = min(file.size, int(last) + 1) if last else file.size
    if start >= stop:
        raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{file.size}"})
    return Reply(file.content[start:stop], 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{file.size}"})


def _quoted(path: str) -> str:
    return quote(path, errors="surrogateescape")
