"""Replies of the Hub, path by path, and the right that each path needs."""

import re
from typing import TYPE_CHECKING

from .access import Right, find_namespace, find_repository, find_user, not_found, signed_in
from .discussions import answer_discussion
from .errors import HubError
from .metadata import card_errors, card_metadata
from .reading import commits, content, info, list_repositories, paths_info, references, resolve, tree
from .repository import Repository
from .server import Reply, Request, json_reply
from .writing import commit, lfs_batch, preupload, put_object, verify_object, xet_token

if TYPE_CHECKING:
    from .hub import LocalHub

_NAME = re.compile(r"[A-Za-z0-9_](?!.*(\.\.|--))[\w.-]{0,95}")


def answer(hub: "LocalHub", request: Request) -> Reply:
    """The reply to any request.

    Raises:
        HubError: If it is refused.
    """

    def found(right: Right) -> Repository:
        return find_repository(hub, request, kinds, f"{namespace}/{name}", right)

    match (request.method, *request.segments):
        case ("GET" | "HEAD", "cdn", kinds, namespace, name, oid, *path):
            return content(hub, request, kinds, f"{namespace}/{name}", oid, "/".join(path))
        case ("PUT", "lfs", kinds, namespace, name, oid):
            return put_object(hub, request, kinds, f"{namespace}/{name}", oid)
        case ("GET", "api", "whoami-v2"):
            return _whoami(hub, request)
        case ("POST", "api", "validate-yaml"):
            return _validate_yaml(request)
        case ("POST", "api", "repos", "create"):
            return _create(hub, request)
        case ("DELETE", "api", "repos", "delete"):
            return _delete(hub, request)
        case ("GET", "api", "models" | "datasets" | "spaces" as kinds):
            return list_repositories(hub, request, kinds)
        case (_, "api", "models" | "datasets" | "spaces" as kinds, namespace, name, *rest):
            return _answer_repository(hub, request, kinds, f"{namespace}/{name}", tuple(rest))
        case ("GET" | "HEAD", "datasets" | "spaces" as kinds, namespace, name, "resolve", revision, *path):
            return resolve(hub, found("read"), request, revision, "/".join(path))
        case ("GET" | "HEAD", namespace, name, "resolve", revision, *path):
            kinds = "models"
            return resolve(hub, found("read"), request, revision, "/".join(path))
        case ("POST", "datasets" | "spaces" as kinds, namespace, git, "info", "lfs", "objects", "batch"):
            name = git.removesuffix(".git")
            return lfs_batch(hub, found("propose"), request)
        case ("POST", namespace, git, "info", "lfs", "objects", "batch"):
            kinds, name = "models", git.removesuffix(".git")
            return lfs_batch(hub, found("propose"), request)
        case (
            (_, "api", "models" | "datasets" | "spaces", _) | (_, _, "resolve", *_) | (_, "datasets" | "spaces", _, "resolve", *_)
        ):
            raise not_found(find_user(hub.tokens, request))  # an id without a namespace
    raise HubError(404, "Sorry, we can't find the page you are looking for.")


def _answer_repository(hub: "LocalHub", request: Request, kinds: str, repo_id: str, rest: tuple[str, ...]) -> Reply:
    """Answer requests below ``/api/models/<repo_id>`` and the like."""

    def found(right: Right) -> Repository:
        return find_repository(hub, request, kinds, repo_id, right)

    proposed = request.flag("create_pr") or (len(rest) > 1 and rest[1].startswith("refs/pr/"))
    upload: Right = "propose" if proposed else "write"
    match (request.method, *rest):
        case ("GET",):
            return info(found("see"), request, "main")
        case ("GET", "revision", revision):
            return info(found("see"), request, revision)
        case ("GET", "tree", revision, *path):
            return tree(hub, found("read"), request, revision, "/".join(path))
        case ("POST", "paths-info", revision):
            return paths_info(found("read"), request, revision)
        case ("GET", "refs"):
            return references(found("see"), request)
        case ("GET", "commits", revision):
            return commits(hub, found("see"), request, revision)
        case ("POST", "branch", branch):
            found("write").add_ref(f"refs/heads/{branch}", request.json().get("startingPoint") or "main")
        case ("DELETE", "branch", branch):
            found("write").remove_ref(f"refs/heads/{branch}")
        case ("POST", "tag", revision):
            found("write").add_ref(f"refs/tags/{request.json()['tag']}", revision)
        case ("DELETE", "tag", tag):
            found("write").remove_ref(f"refs/tags/{tag}")
        case ("PUT", "settings"):
            _set(found("write"), request)
        case ("GET", "auth-check"):
            found("read")
        case ("GET", "auth-check", "write"):
            found("write")
        case ("POST", "preupload", revision):
            return preupload(found(upload), request, revision)
        case ("POST", "commit", revision):
            return commit(hub, found(upload), request, revision)
        case ("POST", "lfs-verify"):
            return verify_object(found("propose"), request)
        case ("GET", "xet-write-token", _) if hub.xet:
            return xet_token(hub, found("propose"))
        case ("GET", "xet-read-token", _) if hub.xet:
            return xet_token(hub, found("read"))
        case ("GET", "discussions", *more):
            return answer_discussion(hub, found("see"), request, tuple(more))
        case ("POST", "discussions", _, "merge" | "status" as action):
            return answer_discussion(hub, found("write"), request, (rest[1], action))
        case ("POST", "discussions", *more):
            return answer_discussion(hub, found("propose"), request, tuple(more))
        case _:
            found("see")
            raise HubError(404, "Not Found")
    return json_reply({})


def _whoami(hub: "LocalHub", request: Request) -> Reply:
    user = signed_in(hub.tokens, request)
    organizations = [{"type": "org", "name": name, "fullname": name} for name in user.organizations]
    auth = {"type": "access_token", "accessToken": {"displayName": user.name, "role": user.role}}
    names = {"id": user.name, "name": user.name, "fullname": user.name}
    return json_reply({"type": "user", **names, "orgs": organizations, "auth": auth})


def _validate_yaml(request: Request) -> Reply:
    text = request.json()["content"]
    errors = [{"message": message} for message in card_errors(text)]
    warnings = [] if errors or card_metadata(text) else [{"message": "empty or missing yaml metadata in repo card"}]
    return json_reply({"errors": errors, "warnings": warnings}, 400 if errors else 200)


def _create(hub: "LocalHub", request: Request) -> Reply:
    asked = request.json()
    repo_id = f"{find_namespace(hub, request, asked.get('organization'))}/{asked['name']}"
    repo_type = asked.get("type", "model")
    if not _NAME.fullmatch(asked["name"]):
        raise HubError(400, f"Invalid repository name: {asked['name']!r}")
    url = hub.url(repo_id, repo_type)
    if (repo_type, repo_id) in hub.repositories:
        raise HubError(409, f"You already created this {repo_type} repo: {repo_id}", url=url)
    private = asked.get("visibility") == "private" or asked.get("private", False)
    author = signed_in(hub.tokens, request).name
    hub.repositories[repo_type, repo_id] = Repository(repo_id, repo_type, private=private, author=author)
    return json_reply({"url": url, "name": repo_id, "id": repo_id})


def _delete(hub: "LocalHub", request: Request) -> Reply:
    asked = request.json()
    repo_id = f"{find_namespace(hub, request, asked.get('organization'))}/{asked['name']}"
    if hub.repositories.pop((asked.get("type", "model"), repo_id), None) is None:
        raise not_found(signed_in(hub.tokens, request))
    return Reply()


def _set(repository: Repository, request: Request) -> None:
    asked = request.json()
    repository.gated = asked.get("gated", repository.gated)
    if "visibility" in asked or "private" in asked:
        repository.private = asked.get("visibility") == "private" or asked.get("private", False)
