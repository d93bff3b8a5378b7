"""Routes of discussions and pull requests."""

from typing import TYPE_CHECKING, Any

from .access import signed_in
from .errors import HubError
from .repository import MAIN, Discussion, Repository, timestamp
from .server import Reply, Request, json_reply

if TYPE_CHECKING:
    from .hub import LocalHub


def answer_discussion(hub: "LocalHub", repository: Repository, request: Request, rest: tuple[str, ...]) -> Reply:
    """Answer requests below ``discussions``."""
    match (request.method, *rest):
        case ("GET",):
            return _list(hub, repository, request)
        case ("GET", num):
            return json_reply(_describe(repository, _find(repository, num)))
    author, asked = signed_in(hub.tokens, request).name, request.json()
    match (request.method, *rest):
        case ("POST",):
            base = repository.refs[MAIN] if asked.get("pullRequest") else None
            opened = repository.open_discussion(asked["title"], author, asked["description"], base=base, draft=base is not None)
            return json_reply(_describe(repository, opened))
        case ("POST", num, "comment"):
            return json_reply({"newMessage": _find(repository, num).comment(author, asked["comment"])})
        case ("POST", num, "status"):
            discussion = _find(repository, num)
            discussion.status = asked["status"]
            return json_reply({"newStatus": discussion.record("status-change", author, status=asked["status"])})
        case ("POST", num, "merge"):
            repository.merge(_find(repository, num), author)
            return json_reply({})
    raise HubError(404, "Not Found")


def _list(hub: "LocalHub", repository: Repository, request: Request) -> Reply:
    """One page of discussions, the newest first."""
    kind, status = request.query.get("type", ["all"])[0], request.query.get("status", ["all"])[0]
    authors = request.query.get("author", [])
    found = [
        discussion
        for discussion in reversed(repository.discussions)
        if kind in ("all", "pull_request" if discussion.base else "discussion")
        and status in ("all", "open" if discussion.status in ("open", "draft") else "closed")
        and all(author == discussion.author for author in authors)
    ]
    start = hub.page_size * int(request.query.get("p", ["0"])[0])
    shown = [_describe(repository, discussion) for discussion in found[start : start + hub.page_size]]
    return json_reply({"count": len(found), "start": start, "discussions": shown})


def _describe(repository: Repository, discussion: Discussion) -> dict[str, Any]:
    described = {
        "num": discussion.num,
        "title": discussion.title,
        "author": {"name": discussion.author},
        "createdAt": timestamp(discussion.date),
        "status": discussion.status,
        "isPullRequest": discussion.base is not None,
        "repo": {"name": repository.id, "type": repository.type},
        "events": discussion.events,
    }
    if discussion.base is not None:
        described["changes"] = {"base": MAIN, "mergeCommitId": discussion.merge_commit}
        described["filesWithConflicts"] = [] if discussion.merge_commit else repository.conflicts(discussion)
    return described


def _find(repository: Repository, num: str) -> Discussion:
    if not num.isdecimal():
        raise HubError(404, f"Discussion not found: {num}")
    return repository.discussion(int(num))
