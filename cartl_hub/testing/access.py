"""Users of the Hub, and their rights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .errors import HubError
from .repository import Repository
from .server import Request

if TYPE_CHECKING:
    from .hub import LocalHub

Right = Literal["see", "read", "propose", "write"]


@dataclass(frozen=True)
class User:
    """Holder of a token.

    Args:
        name: Name of the user, and of a namespace that the user owns.
        role: Role of the token: ``read`` sees private repositories, ``write`` also changes them.
        organizations: Other namespaces that the user owns.
    """

    name: str
    role: Literal["read", "write"] = "write"
    organizations: tuple[str, ...] = ()

    def owns(self, namespace: str) -> bool:
        return namespace in (self.name, *self.organizations)


def find_user(tokens: Mapping[str, User], request: Request) -> User | None:
    """User who sends a request; None for a request without a token.

    Raises:
        HubError: With 401 for an unknown token.
    """
    header = request.headers.get("Authorization")
    if header is None:
        return None
    user = tokens.get(header.removeprefix("Bearer "))
    if user is None:
        raise HubError(401, "Invalid credentials in Authorization header")
    return user


def signed_in(tokens: Mapping[str, User], request: Request) -> User:
    user = find_user(tokens, request)
    if user is None:
        raise not_found(user)
    return user


def find_repository(hub: "LocalHub", request: Request, kinds: str, repo_id: str, right: Right) -> Repository:
    """The repository, for somebody who may ``see`` it, ``read`` its files, ``propose`` changes or ``write`` to it.

    Args:
        kinds: Kind of repository: ``models``, ``datasets`` or ``spaces``.

    Raises:
        HubError: With 401, 403 or 404.
    """
    user = find_user(hub.tokens, request)
    repository = hub.repositories.get((kinds.removesuffix("s"), repo_id))
    if repository is None or not sees(user, repository):
        raise not_found(user)
    owner = user is not None and user.owns(repository.namespace)
    if right == "read" and repository.gated and not owner and not (user and user.name in repository.granted):
        message = f"Access to {repository.type} {repo_id} is restricted: you must be in its list of users and signed in."
        raise HubError(403 if user else 401, message, "GatedRepo")
    if right in ("propose", "write"):
        if user is None:
            raise not_found(user)
        if user.role != "write":
            raise HubError(403, "you must use a write token to upload to a repository")
        if right == "write" and not owner:
            raise HubError(403, f"you don't have the right to write to {repo_id}")
    return repository


def find_namespace(hub: "LocalHub", request: Request, namespace: str | None) -> str:
    """Namespace in which somebody may create and delete repositories; by default their own.

    Raises:
        HubError: With 401 or 403.
    """
    user = signed_in(hub.tokens, request)
    if user.role != "write" or not user.owns(namespace or user.name):
        raise HubError(403, f"you don't have the right to create or delete repositories of {namespace!r}")
    return namespace or user.name


def sees(user: User | None, repository: Repository) -> bool:
    return not repository.private or (user is not None and user.owns(repository.namespace))


def not_found(user: User | None) -> HubError:
    """The Hub's error for a repository that is not found: to strangers, a private repository and none are the same."""
    if user is None:
        return HubError(401, "Invalid username or password.", "RepoNotFound")
    return HubError(404, "Repository not found", "RepoNotFound")
