"""The Hub on loopback, driven by the real client."""

import hashlib
import io
import json
import math
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from conftest import make_model
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    errors,
)
from huggingface_hub.utils import _cache_manager
from safetensors.torch import save_file

from cartl_hub.testing import Fault, LocalHub, User

OLD_CLIENT = int(huggingface_hub.__version__.partition(".")[0]) < 2
CARD = """---
library_name: timm
pipeline_tag: image-classification
license: mit
tags: [robust]
datasets: [uoft-cs/cifar10]
base_model: org/source
---
# A model
"""


@pytest.fixture
def hub():
    with LocalHub(tokens={"hf_other": User("other")}) as hub:
        yield hub


@pytest.fixture
def client(hub):
    with hub.client(token=hub.write_token, backoff=False) as cache:
        yield cache


@pytest.fixture
def folder(tmp_path):
    """A model of 12 MB."""
    folder = tmp_path / "model"
    (folder / "logs").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text("{}")
    (folder / "logs/loss.csv").write_text("1\n2\n")
    (folder / "empty.safetensors").touch()
    (folder / "model.safetensors").write_bytes(noise(12_000_000))
    return folder


def noise(size: int, seed: int = 0) -> bytes:
    return torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)).numpy().tobytes()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fetch(url: str, method: str = "GET", body: bytes | None = None, **headers: str):
    """Status, headers and body, without the client's help."""
    request = urllib.request.Request(url, body, headers, method=method)
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status, reply.headers, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def download(**kwargs) -> bytes:
    return Path(huggingface_hub.hf_hub_download("org/model", "model.safetensors", **kwargs)).read_bytes()


# Publish and load


def test_publish_and_load(hub, client, folder):
    assert huggingface_hub.create_repo("org/model") == f"{hub.endpoint}/org/model"
    assert huggingface_hub.create_repo("org/model", exist_ok=True).repo_id == "org/model"
    with pytest.raises(errors.HfHubHTTPError, match="409"):
        huggingface_hub.create_repo("org/model")
    commit = huggingface_hub.upload_folder(repo_id="org/model", folder_path=folder, commit_message="Add model")
    assert [made.title for made in hub.commits("org/model")] == ["Add model", "initial commit"]
    assert hub.commits("org/model")[0].oid == commit.oid
    assert hub.files("org/model") == contents(folder)

    weights = (folder / "model.safetensors").read_bytes()
    info = huggingface_hub.model_info("org/model", files_metadata=True)
    siblings = {sibling.rfilename: sibling for sibling in info.siblings}
    assert info.sha == commit.oid
    assert siblings["model.safetensors"].lfs.sha256 == hashlib.sha256(weights).hexdigest()
    assert siblings["model.safetensors"].size == 12_000_000
    assert siblings["config.json"].lfs is None is siblings["empty.safetensors"].lfs
    git = subprocess.run(["git", "hash-object", folder / "config.json"], capture_output=True, text=True, check=True)
    assert siblings["config.json"].blob_id == git.stdout.strip()

    path = huggingface_hub.hf_hub_download("org/model", "model.safetensors")
    assert Path(path).is_relative_to(client)
    assert Path(path).read_bytes() == weights
    assert Path(path).resolve().name == hashlib.sha256(weights).hexdigest()
    snapshot = Path(huggingface_hub.snapshot_download("org/model"))
    assert {name: content for name, content in contents(snapshot).items() if name != ".gitattributes"} == contents(folder)
    assert HfApi().verify_repo_checksums("org/model").mismatches == []

    elsewhere = [seen for seen in hub.requests if seen.path.startswith(("/lfs/", "/cdn/"))]
    assert [seen.method for seen in elsewhere] == ["PUT", "GET"]
    assert not any(seen.authorized for seen in elsewhere)
    assert all(seen.authorized for seen in hub.requests if seen not in elsewhere)
    assert "hf_writer" not in repr(hub.requests)


def test_what_is_there_is_not_uploaded_again(hub, client, folder):
    huggingface_hub.create_repo("org/model")
    first = huggingface_hub.upload_folder(repo_id="org/model", folder_path=folder)
    again = huggingface_hub.upload_folder(repo_id="org/model", folder_path=folder)
    assert first.oid == again.oid
    (folder / "other.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    huggingface_hub.upload_folder(repo_id="org/model", folder_path=folder)
    assert hub.files("org/model")["other.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert [seen.method for seen in hub.requests].count("PUT") == 1


def test_every_kind_of_revision(hub, client):
    hub.add_repo("org/model", {"model.safetensors": b"first"})
    first = huggingface_hub.model_info("org/model").sha
    huggingface_hub.create_tag("org/model", tag="v1.0", tag_message="First")
    huggingface_hub.create_branch("org/model", branch="dev/robust")
    hub.edit("org/model", {"model.safetensors": b"branch"}, revision="dev/robust")
    hub.edit("org/model", {"model.safetensors": b"second"})
    pull = huggingface_hub.upload_file(
        repo_id="org/model", path_in_repo="model.safetensors", path_or_fileobj=b"proposed", create_pr=True
    )
    assert (pull.pr_revision, pull.pr_url) == ("refs/pr/1", f"{hub.endpoint}/org/model/discussions/1")
    expected = {"main": b"second", first: b"first", first[:8]: b"first", "v1.0": b"first", "dev/robust": b"branch"}
    for revision, content in (expected | {"refs/pr/1": b"proposed"}).items():
        assert download(revision=revision) == content
    refs = huggingface_hub.list_repo_refs("org/model", include_pull_requests=True)
    assert [ref.name for ref in refs.branches] == ["main", "dev/robust"]
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1.0", first)]
    assert [(ref.ref, ref.target_commit) for ref in refs.pull_requests] == [("refs/pr/1", pull.oid)]
    for create in (
        lambda **kwargs: huggingface_hub.create_branch("org/model", branch="dev/robust", **kwargs),
        lambda **kwargs: huggingface_hub.create_tag("org/model", tag="v1.0", **kwargs),
    ):
        create(exist_ok=True)
        with pytest.raises(errors.HfHubHTTPError, match="409"):
            create()
    huggingface_hub.create_branch("org/model", branch="old", revision=first)
    assert download(revision="old") == b"first"
    huggingface_hub.delete_branch("org/model", branch="dev/robust")
    huggingface_hub.delete_tag("org/model", tag="v1.0")
    for gone in ("dev/robust", "v1.0"):
        with pytest.raises(errors.RevisionNotFoundError):
            huggingface_hub.model_info("org/model", revision=gone)
    with pytest.raises(errors.HfHubHTTPError, match="default branch"):
        huggingface_hub.delete_branch("org/model", branch="main")
    with pytest.raises(errors.RevisionNotFoundError):
        huggingface_hub.upload_file(repo_id="org/model", path_in_repo="a", path_or_fileobj=b"a", revision="nowhere")


def test_a_commit_that_is_late_is_refused(hub, client):
    hub.add_repo("org/model", {"a.txt": "a"})
    before = huggingface_hub.model_info("org/model").sha
    hub.edit("org/model", {"a.txt": "b"})
    with pytest.raises(errors.HfHubHTTPError, match="412"):
        huggingface_hub.upload_file(repo_id="org/model", path_in_repo="a.txt", path_or_fileobj=b"c", parent_commit=before)
    assert hub.files("org/model") == {"a.txt": b"b"}
    pull = huggingface_hub.upload_file(
        repo_id="org/model", path_in_repo="c.txt", path_or_fileobj=b"c", parent_commit=before, create_pr=True
    )
    assert hub.files("org/model", pull.pr_revision) == {"a.txt": b"a", "c.txt": b"c"}


def test_operations_of_a_commit(hub, client):
    hub.add_repo("org/model", {"a.safetensors": b"weights", "a.txt": "text", "logs/1.txt": "1", "logs/2/2.txt": "2"})
    operations = [
        CommitOperationCopy("a.safetensors", "b/b.safetensors"),
        CommitOperationCopy("a.txt", "b.txt"),
        CommitOperationDelete("logs/", is_folder=True),
        CommitOperationDelete("a.txt"),
        CommitOperationAdd("c.txt", b"c"),
    ]
    HfApi().create_commit("org/model", operations, commit_message="Many", commit_description="Of all kinds")
    expected = {"a.safetensors": b"weights", "b.txt": b"text", "b/b.safetensors": b"weights", "c.txt": b"c"}
    assert hub.files("org/model") == expected
    commit = hub.commits("org/model")[0]
    assert (commit.title, commit.description, commit.author) == ("Many", "Of all kinds", "writer")
    assert [made.title for made in huggingface_hub.list_repo_commits("org/model")] == ["Many", "Edit", "initial commit"]
    for missing in (CommitOperationDelete("a.txt"), CommitOperationDelete("c.txt/", is_folder=True)):
        with pytest.raises(errors.RemoteEntryNotFoundError, match="doesn't exist"):
            HfApi().create_commit("org/model", [CommitOperationAdd("d.txt", b"d"), missing], commit_message="Half")
    assert hub.files("org/model") == expected


def test_tree_and_paths(hub, client):
    hub.page_size = 2
    hub.add_repo("org/model", {f"a/{name}/{name}.txt": name for name in "xyz"} | {"b.safetensors": b"b"})
    hub.edit("org/model", {"a/y/y.txt": "new"}, title="New y")
    top = {entry.path: entry for entry in huggingface_hub.list_repo_tree("org/model")}
    assert list(top) == [".gitattributes", "a", "b.safetensors"]
    assert top["b.safetensors"].lfs.sha256 == hashlib.sha256(b"b").hexdigest()
    below = {entry.path: entry for entry in huggingface_hub.list_repo_tree("org/model", "a", recursive=True, expand=True)}
    assert list(below) == ["a/x", "a/x/x.txt", "a/y", "a/y/y.txt", "a/z", "a/z/z.txt"]
    assert {path: entry.last_commit.title for path, entry in below.items() if "y" in path} == {
        "a/y": "New y",
        "a/y/y.txt": "New y",
    }
    assert below["a/x/x.txt"].last_commit.title == "Edit"
    found = HfApi().get_paths_info("org/model", ["a/x", "b.safetensors", "missing"])
    assert [entry.path for entry in found] == ["a/x", "b.safetensors"]
    with pytest.raises(errors.RemoteEntryNotFoundError):
        list(huggingface_hub.list_repo_tree("org/model", "missing"))
    file_system = huggingface_hub.HfFileSystem(token=hub.write_token)
    assert file_system.cat("org/model/a/y/y.txt") == b"new"
    assert file_system.read_block("org/model/b.safetensors", 0, 1) == b"b"


@pytest.mark.parametrize("kind", ["model", "dataset", "space"])
def test_repositories_of_each_type(hub, client, kind):
    options = {"space_sdk": "static"} if kind == "space" else {}
    url = huggingface_hub.create_repo("mine", repo_type=kind, private=True, **options)
    assert (url.repo_id, url.repo_type) == ("writer/mine", kind)
    commit = huggingface_hub.upload_file(
        repo_id="writer/mine", repo_type=kind, path_in_repo="data.bin", path_or_fileobj=io.BytesIO(b"data")
    )
    assert commit.repo_url == url
    assert hub.files("writer/mine", repo_type=kind) == {"data.bin": b"data"}
    path = huggingface_hub.hf_hub_download("writer/mine", "data.bin", repo_type=kind)
    assert Path(path).read_bytes() == b"data"
    huggingface_hub.delete_repo("writer/mine", repo_type=kind)
    assert not huggingface_hub.repo_exists("writer/mine", repo_type=kind)
    with pytest.raises(errors.RepositoryNotFoundError):
        huggingface_hub.delete_repo("writer/mine", repo_type=kind)


@pytest.mark.parametrize("name", ["a--b", "a..b", "é"])
def test_names_that_are_refused(hub, name):
    body = json.dumps({"name": name, "organization": "org"}).encode()
    status, _, _ = fetch(f"{hub.endpoint}/api/repos/create", "POST", body, Authorization=f"Bearer {hub.write_token}")
    assert status == 400


# Cards, tags, lists


def test_tags_of_a_card(hub, client):
    hub.add_repo("org/model", {"README.md": CARD, "model.safetensors": b"w"})
    info = huggingface_hub.model_info("org/model")
    assert (info.library_name, info.pipeline_tag, info.card_data.license) == ("timm", "image-classification", "mit")
    assert info.tags == [
        *("timm", "robust", "image-classification", "safetensors", "dataset:uoft-cs/cifar10", "license:mit"),
        *("base_model:org/source", "base_model:finetune:org/source", "region:us"),
    ]
    card = ModelCard.load("org/model")
    assert card.data.base_model == "org/source"
    result = EvalResult("image-classification", "cifar10", "CIFAR-10", "accuracy", 0.5, metric_name="Robust accuracy")
    card.data = ModelCardData(license="mit", model_name="a", eval_results=[result])
    if OLD_CLIENT:  # its push_to_hub() asks huggingface.co to validate the card, whatever HF_ENDPOINT says
        huggingface_hub.upload_file(repo_id="org/model", path_in_repo="README.md", path_or_fileobj=str(card).encode())
    else:
        card.push_to_hub("org/model")
    (read,) = huggingface_hub.model_info("org/model").card_data.eval_results
    assert (read.metric_name, read.metric_value) == ("Robust accuracy", 0.5)
    hub.edit("org/model", {".eval_results/a.yaml": "- dataset: {id: org/bench, task_id: default}\n  value: 0.25\n"})
    (entry,) = huggingface_hub.model_info("org/model", expand=["evalResults"]).eval_results
    assert (entry.dataset_id, entry.value) == ("org/bench", 0.25)
    assert huggingface_hub.model_info("org/model", expand=["evalResults"]).sha is None


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("license: [mit", "YAML metadata error"),
        ("- mit", "must be a mapping, got list"),
        ("license: 3", '"license" must be a string or an array'),
        ("license: my own", '"license" must be one of'),
        ("tags: {a: b}", '"tags" must be a string or an array'),
        ("library_name: [timm]", '"library_name" must be a string'),
        ("base_model: two words", '"base_model" with value "two words" is not valid'),
        ("datasets: [a/b/c]", '"datasets" with value "a/b/c" is not valid'),
        ("model-index: {}", '"model-index" must be an array'),
        ("model-index: [{name: a}]", r'"model-index\[0\]" must have a name and an array of results'),
        ("model-index: [{name: a, results: [{metrics: []}]}]", r'"model-index\[0\].results\[0\].task.type" is required'),
        (
            "model-index: [{name: a, results: [{task: {type: t}, dataset: {type: d, name: D}, metrics: [{type: a}]}]}]",
            r'"model-index\[0\].results\[0\].metrics" must be an array of a type and a value',
        ),
    ],
)
def test_bad_metadata_is_refused(hub, client, metadata, message):
    card = f"---\n{metadata}\n---\n# A model\n"
    with pytest.raises(ValueError, match=message):
        HfApi()._validate_yaml(card)
    hub.add_repo("org/model")
    lines = [{"key": "header", "value": {"summary": "Card"}}, {"key": "file", "value": {"path": "README.md", "content": card}}]
    status, _, body = commit_raw(hub, lines)
    assert status == 400
    assert b"Invalid metadata in README.md" in body
    assert hub.files("org/model") == {}


def test_good_and_missing_metadata(hub, client):
    HfApi()._validate_yaml(CARD)
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        HfApi()._validate_yaml("# A model\n")


def test_lists(hub, client):
    hub.add_repo("org/a", {"README.md": CARD, "config.json": "{}"})
    hub.add_repo("org/b", {"README.md": CARD.replace("mit", "apache-2.0")})
    hub.add_repo("other/ab", gated="auto")
    hub.add_repo("other/hidden", private=True)
    hub.add_repo("org/hidden", private=True)
    hub.add_repo("org/data", repo_type="dataset")

    def listed(**kwargs):
        return [info.id for info in huggingface_hub.list_models(**kwargs)]

    assert listed() == ["org/a", "org/b", "other/ab", "org/hidden"]
    assert listed(token=False) == ["org/a", "org/b", "other/ab"]
    assert listed(token="hf_other") == ["org/a", "org/b", "other/ab", "other/hidden"]
    assert listed(author="org") == ["org/a", "org/b", "org/hidden"]
    assert listed(search="AB") == ["other/ab"]
    assert listed(filter=["timm", "license:mit"]) == ["org/a"]
    assert listed(filter="base_model:org/source", pipeline_tag="image-classification") == ["org/a", "org/b"]
    assert listed(trained_dataset="uoft-cs/cifar10", limit=1) == ["org/a"]
    assert listed(gated=True) == ["other/ab"]
    assert listed(sort="created_at")[0] == "org/hidden"
    assert [info.id for info in huggingface_hub.list_datasets()] == ["org/data"]
    hub.edit("org/b", {"a.txt": "a"})
    assert listed(sort="last_modified")[0] == "org/b"
    huggingface_hub.hf_hub_download("org/a", "config.json")
    assert listed(sort="downloads")[0] == "org/a"
    hub.page_size = 2
    hub.requests.clear()
    assert len(listed(search="a")) == 2
    assert len(hub.requests) == 1
    assert len(listed()) == 4
    assert len(hub.requests) == 3
    full, short = (next(iter(huggingface_hub.list_models(author="org", full=full, cardData=full))) for full in (True, False))
    assert full.card_data.license == "mit"
    assert full.sha == hub.commits("org/a")[0].oid
    assert short.card_data is None is short.sha
    assert next(iter(huggingface_hub.list_models(expand=["likes"]))).tags is None
    with pytest.raises(errors.BadRequestError, match="can't list by num_parameters"):
        listed(num_parameters="min:6B")


# Discussions


def test_pull_requests(hub, client):
    hub.add_repo("org/model", {"a.txt": "a", "b.txt": "b", "c.txt": "c"})
    opened = huggingface_hub.create_pull_request("org/model", "Change", description="Why")
    assert (opened.num, opened.status, opened.git_reference, opened.events[0].content) == (1, "draft", "refs/pr/1", "Why")
    operations = [CommitOperationAdd("a.txt", b"A"), CommitOperationDelete("b.txt"), CommitOperationAdd("d.txt", b"d")]
    commit = HfApi().create_commit("org/model", operations, commit_message="Work", revision="refs/pr/1")
    hub.edit("org/model", {"c.txt": "C", "e.txt": "e"})
    with pytest.raises(errors.BadRequestError, match="is draft"):
        huggingface_hub.merge_pull_request("org/model", 1)
    assert huggingface_hub.change_discussion_status("org/model", 1, "open").new_status == "open"
    huggingface_hub.merge_pull_request("org/model", 1)
    assert hub.files("org/model") == {"a.txt": b"A", "c.txt": b"C", "d.txt": b"d", "e.txt": b"e"}
    details = huggingface_hub.get_discussion_details("org/model", 1)
    assert (details.status, details.merge_commit_oid) == ("merged", hub.commits("org/model")[0].oid)
    assert [event.type for event in details.events] == ["comment", "commit", "status-change", "status-change"]
    assert details.events[1].oid == commit.oid


def test_conflicts_of_a_pull_request(hub, client):
    hub.add_repo("org/model", {"a.txt": "a"})
    huggingface_hub.upload_file(repo_id="org/model", path_in_repo="a.txt", path_or_fileobj=b"theirs", create_pr=True)
    hub.edit("org/model", {"a.txt": "ours"})
    assert huggingface_hub.get_discussion_details("org/model", 1).conflicting_files == ["a.txt"]
    with pytest.raises(errors.HfHubHTTPError, match=r"Merge conflicts in a\.txt"):
        huggingface_hub.merge_pull_request("org/model", 1)
    assert hub.files("org/model") == {"a.txt": b"ours"}


def test_discussions(hub, client):
    hub.add_repo("org/model")
    hub.page_size = 2
    for number in range(3):
        huggingface_hub.create_discussion("org/model", f"Question {number}", token="hf_other")
    huggingface_hub.create_pull_request("org/model", "Answer")
    huggingface_hub.comment_discussion("org/model", 1, "An answer")
    huggingface_hub.change_discussion_status("org/model", 1, "closed")

    def listed(**kwargs):
        return [discussion.num for discussion in huggingface_hub.get_repo_discussions("org/model", **kwargs)]

    assert listed() == [4, 3, 2, 1]
    assert listed(discussion_type="pull_request") == listed(author="writer") == [4]
    assert listed(discussion_status="open", discussion_type="discussion") == [3, 2]
    assert huggingface_hub.get_discussion_details("org/model", 1).events[1].content == "An answer"
    with pytest.raises(errors.HfHubHTTPError, match="404"):
        huggingface_hub.get_discussion_details("org/model", 5)


# Rights


@pytest.mark.parametrize("token", [None, "hf_reader", "hf_other"])
@pytest.mark.parametrize("repo_id", ["org/none", "org/private", "none"])
def test_who_may_not_see_is_told_nothing(hub, client, token, repo_id):
    hub.add_repo("org/private", {"config.json": "{}"}, private=True)
    for ask in (
        lambda: huggingface_hub.model_info(repo_id, token=token or False),
        lambda: huggingface_hub.hf_hub_download(repo_id, "config.json", token=token or False),
        lambda: list(huggingface_hub.list_repo_tree(repo_id, token=token or False)),
        lambda: huggingface_hub.create_branch(repo_id, branch="a", token=token or False),
    ):
        with pytest.raises(errors.RepositoryNotFoundError) as caught:
            ask()
        assert caught.value.response.status_code == (404 if token else 401)
        assert not isinstance(caught.value, errors.GatedRepoError)


def test_owners_see_private_repositories(hub, client):
    hub.add_repo("org/model", {"model.safetensors": b"w"}, private=True)
    assert huggingface_hub.model_info("org/model").private
    assert download() == b"w"
    huggingface_hub.update_repo_settings("org/model", private=False)
    assert not huggingface_hub.model_info("org/model", token=False).private


@pytest.mark.parametrize(("token", "status"), [(False, 401), ("hf_reader", 403)])
def test_gated(hub, client, token, status):
    repository = hub.add_repo("org/model", {"model.safetensors": b"w"}, gated="manual")
    assert huggingface_hub.model_info("org/model", token=token).gated == "manual"
    for ask in (
        lambda: huggingface_hub.auth_check("org/model", token=token),
        lambda: list(huggingface_hub.list_repo_tree("org/model", token=token)),
        lambda: download(token=token),
    ):
        with pytest.raises(errors.GatedRepoError) as caught:
            ask()
        assert caught.value.response.status_code == status
    assert download(token=hub.write_token) == b"w"
    repository.granted.add("reader")
    huggingface_hub.auth_check("org/model", token=hub.read_token)
    huggingface_hub.update_repo_settings("org/model", gated=False)
    huggingface_hub.auth_check("org/model", token=False)


@pytest.mark.parametrize(
    ("token", "error", "message"),
    [
        (False, errors.RepositoryNotFoundError, "401"),
        ("hf_reader", errors.HfHubHTTPError, "403 Forbidden: you must use a write token"),
        ("hf_other", errors.HfHubHTTPError, "403 Forbidden: you don't have the right to write to org/model"),
        ("hf_wrong", errors.HfHubHTTPError, "Invalid credentials in Authorization header"),
    ],
)
def test_who_may_not_write(hub, client, token, error, message):
    hub.add_repo("org/model", {"a.txt": "a"})
    hub.add_repo("other/model", {"a.txt": "a"})
    for write in (
        lambda: huggingface_hub.upload_file(repo_id="org/model", path_in_repo="a", path_or_fileobj=b"a", token=token),
        lambda: huggingface_hub.create_tag("org/model", tag="v1", token=token),
        lambda: huggingface_hub.update_repo_settings("org/model", private=True, token=token),
        lambda: huggingface_hub.auth_check("org/model", write=True, token=token),
    ):
        with pytest.raises(error, match=message):
            write()
    with pytest.raises(errors.HfHubHTTPError, match=r"40[13]"):
        huggingface_hub.create_repo("org/new", token=token)
    with pytest.raises(errors.HfHubHTTPError, match=r"40[13]"):
        huggingface_hub.delete_repo("org/model", token=token)
    assert hub.files("org/model") == {"a.txt": b"a"}
    assert list(hub.repo("org/model").refs) == ["refs/heads/main"]


def test_strangers_may_propose_but_not_merge(hub, client):
    hub.add_repo("org/model", {"a.txt": "a"})
    options = {"repo_id": "org/model", "token": "hf_other"}
    pull = huggingface_hub.upload_file(path_in_repo="model.safetensors", path_or_fileobj=noise(1000), create_pr=True, **options)
    huggingface_hub.upload_file(path_in_repo="b.txt", path_or_fileobj=b"b", revision=pull.pr_revision, **options)
    with pytest.raises(errors.HfHubHTTPError, match="403"):
        huggingface_hub.merge_pull_request(discussion_num=1, **options)
    huggingface_hub.merge_pull_request("org/model", 1)
    assert hub.files("org/model") == {"a.txt": b"a", "model.safetensors": noise(1000), "b.txt": b"b"}


def test_whoami(hub, client):
    account = huggingface_hub.whoami()
    assert (account["name"], [organization["name"] for organization in account["orgs"]]) == ("writer", ["org"])
    assert huggingface_hub.whoami(token=hub.read_token)["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(errors.HfHubHTTPError, match="Invalid user token"):
        huggingface_hub.whoami(token="hf_wrong")


def test_what_is_not_there(hub, client):
    hub.add_repo("org/model", {"a.txt": "a"})
    with pytest.raises(errors.RemoteEntryNotFoundError):
        huggingface_hub.hf_hub_download("org/model", "b.txt")
    with pytest.raises(errors.RevisionNotFoundError):
        huggingface_hub.hf_hub_download("org/model", "a.txt", revision="v2")
    assert huggingface_hub.file_exists("org/model", "a.txt")
    assert not huggingface_hub.file_exists("org/model", "b.txt")
    assert huggingface_hub.revision_exists("org/model", "main")
    assert not huggingface_hub.revision_exists("org/model", "v2")
    status, headers, body = fetch(f"{hub.endpoint}/api/agent-harnesses")
    assert (status, headers["Content-Type"].split(";")[0]) == (404, "application/json")
    assert "error" in json.loads(body)


# Paths and raw requests


def commit_raw(hub, lines):
    body = "\n".join(json.dumps(line) for line in lines).encode()
    url = f"{hub.endpoint}/api/models/org/model/commit/main"
    return fetch(url, "POST", body, Authorization=f"Bearer {hub.write_token}")


@pytest.mark.parametrize(
    "path", ["../a", "/a", "a/../../b", "a/./b", "", "a//b", ".git/config", "a/.GIT/b", "a\\..\\b", "a\x00b", "a/", "taken/a"]
)
@pytest.mark.parametrize("operation", ["file", "lfsFile", "deletedFile", "deletedFolder"])
def test_paths_that_are_refused(hub, path, operation):
    hub.add_repo("org/model", {"taken": "a", "model.safetensors": b"w"})
    value = {"path": path, "content": "", "oid": hashlib.sha256(b"w").hexdigest()}
    status, _, _ = commit_raw(hub, [{"key": "header", "value": {"summary": "a"}}, {"key": operation, "value": value}])
    missing = {"deletedFile": ["taken/a"], "deletedFolder": ["taken/a", "a/"]}.get(operation, [])
    assert status == (404 if path in missing else 400)
    assert hub.files("org/model") == {"taken": b"a", "model.safetensors": b"w"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "one header with a summary"),
        ([{"key": "header", "value": {"summary": ""}}], "one header with a summary"),
        ([{"key": "header", "value": {"summary": "a"}}, {"key": "moved", "value": {"path": "a"}}], "Unknown operation: moved"),
        (
            [{"key": "header", "value": {"summary": "a"}}, {"key": "lfsFile", "value": {"path": "a", "oid": "0" * 64}}],
            "pointed to a file that does not exist",
        ),
        (
            [
                {"key": "header", "value": {"summary": "a"}},
                {"key": "file", "value": {"path": "a", "content": "?", "encoding": "base64"}},
            ],
            "Expected base64 for a",
        ),
    ],
)
def test_commits_that_are_refused(hub, lines, message):
    hub.add_repo("org/model")
    status, headers, _ = commit_raw(hub, lines)
    assert status == 400
    assert message in headers["X-Error-Message"]
    assert len(hub.commits("org/model")) == 1


def test_uploads_that_are_refused(hub):
    hub.add_repo("org/model")
    sha256 = hashlib.sha256(b"content").hexdigest()
    url = f"{hub.content_endpoint}/lfs/models/org/model/{sha256}"
    assert fetch(url, "PUT", b"content")[0] == 403  # nobody announced it
    body = json.dumps({"objects": [{"oid": sha256, "size": 7}]}).encode()
    batch = f"{hub.endpoint}/org/model.git/info/lfs/objects/batch"
    assert fetch(batch, "POST", body)[0] == 401
    status, _, reply = fetch(batch, "POST", body, Authorization=f"Bearer {hub.write_token}")
    assert status == 200
    assert json.loads(reply)["objects"][0]["actions"]["upload"]["href"] == url
    assert fetch(url, "PUT", b"contemt")[0] == 400
    assert fetch(url, "PUT", b"content")[0] == 200
    _, _, reply = fetch(batch, "POST", body, Authorization=f"Bearer {hub.write_token}")
    assert "actions" not in json.loads(reply)["objects"][0]


@pytest.mark.parametrize("path", ["../../../evil.txt", "/evil.txt", "a/../../../../evil.txt"])
def test_hostile_trees_can_be_planted(hub, tmp_path, path):
    """The client refuses them; the hub must send them."""
    with pytest.raises(Exception, match="Invalid path"):
        hub.add_repo("org/checked", {path: "evil"})
    hub.add_repo("org/model", {path: "evil", "good.txt": "good"}, checked=False)
    with hub.client(cache=tmp_path / "cache"):
        assert path in huggingface_hub.list_repo_files("org/model")
        with pytest.raises(ValueError, match="Invalid filename"):
            huggingface_hub.snapshot_download("org/model")
    assert not [found for found in tmp_path.parent.rglob("evil.txt") if found.is_relative_to(tmp_path)]


@pytest.mark.parametrize(
    ("asked", "expected", "shown"),
    [
        ("bytes=2-4", b"234", "bytes 2-4/10"),
        ("bytes=7-", b"789", "bytes 7-9/10"),
        ("bytes=-3", b"789", "bytes 7-9/10"),
        ("bytes=8-100", b"89", "bytes 8-9/10"),
        ("bytes=0-0", b"0", "bytes 0-0/10"),
        ("bytes=-100", b"0123456789", "bytes 0-9/10"),
    ],
)
@pytest.mark.parametrize("name", ["digits.txt", "digits.bin"])
def test_ranges(hub, asked, expected, shown, name):
    hub.add_repo("org/model", {name: "0123456789"})
    status, headers, body = fetch(f"{hub.endpoint}/org/model/resolve/main/{name}", Range=asked)
    assert (status, headers["Content-Range"], body) == (206, shown, expected)
    status, headers, _ = fetch(f"{hub.endpoint}/org/model/resolve/main/{name}", Range="bytes=10-")
    assert (status, headers["Content-Range"]) == (416, "bytes */10")


# Faults


@pytest.fixture
def model(hub, client, monkeypatch):
    """A model of 300 KB, which the client takes in chunks of 100 KB."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    hub.add_repo("org/model", {"model.safetensors": noise(300_000)})
    return noise(300_000)


def content_requests(hub):
    return [(seen.status, seen.fault) for seen in hub.requests if seen.path.startswith("/cdn/")]


BYTES = {"method": "GET", "path": "/cdn/*/model.safetensors"}


def test_a_cut_download_resumes(hub, model):
    with hub.fault(Fault(kind="cut", offset=250_000, **BYTES)) as injection:
        assert download() == model
    assert injection.hits == 1
    assert content_requests(hub) == [(200, "cut"), (206, None)]


@pytest.mark.parametrize("kind", ["drop", "lost"])
def test_a_download_without_a_reply_is_tried_again(hub, model, kind):
    with hub.fault(Fault(kind=kind, times=3, **BYTES)):
        assert download() == model
    assert content_requests(hub) == [(None if kind == "drop" else 200, kind)] * 3 + [(200, None)]


def test_a_reset_download_fails(hub, model):
    with hub.fault(Fault(kind="reset", **BYTES)), pytest.raises(errors.HTTPError) as caught:
        download()
    assert "ReadError" in type(caught.value).__name__
    assert content_requests(hub) == [(200, "reset")]
    assert download() == model


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_a_download_that_meets_5xx_fails(hub, model, status):
    with hub.fault(Fault(kind="status", status=status, **BYTES)), pytest.raises(errors.HfHubHTTPError, match=str(status)):
        download()
    assert content_requests(hub) == [(status, "status")]


def test_a_download_that_meets_429_waits(hub, model, monkeypatch):
    waited = []
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", waited.append)
    with hub.fault(Fault(kind="status", status=429, retry_after=7, times=2, **BYTES)):
        assert download() == model
    assert waited == [8, 8]


def test_a_slow_download_resumes(hub, model, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.8)
    with hub.fault(Fault(kind="slow", delay=2, offset=200_000, **BYTES)):
        assert download() == model
    with hub.fault(Fault(kind="slow", delay=2, **BYTES)):
        assert download(force_download=True) == model
    assert content_requests(hub) == [(200, "slow"), (206, None), (200, "slow"), (200, None)]


def test_a_slow_reply_comes_at_last(hub, model):
    start = time.monotonic()
    with hub.fault(Fault(kind="slow", delay=0.05, offset=0, **BYTES)):
        assert download() == model
    assert time.monotonic() - start > 0.25  # 5 chunks of 64 KiB


def test_a_truncated_file_is_noticed_and_a_flipped_byte_is_not(hub, model):
    with hub.fault(Fault(kind="truncate", offset=299_999, **BYTES)), pytest.raises(OSError, match="Consistency check failed"):
        download()
    with hub.fault(Fault(kind="flip", offset=123, **BYTES)):
        got = download()
    assert [place for place in range(300_000) if got[place] != model[place]] == [123]
    assert huggingface_hub.HfApi().verify_repo_checksums("org/model").mismatches != []


def test_metadata_that_meets_503(hub, model):
    fault = Fault(kind="status", status=503, method="HEAD", times=math.inf)
    with hub.fault(fault) as injection, pytest.raises(errors.LocalEntryNotFoundError):
        download()
    assert injection.hits == 7
    assert download() == model
    with hub.fault(fault) as injection:
        assert download() == model  # the cached one
    assert injection.hits == 1


@pytest.mark.parametrize("fault", [{"kind": "drop"}, {"kind": "status", "status": 503}])
@pytest.mark.parametrize(
    ("method", "path"), [("POST", "*/preupload/*"), ("POST", "*/objects/batch"), ("PUT", "/lfs/*"), ("GET", "/api/models")]
)
def test_requests_that_are_tried_again(hub, client, fault, method, path):
    hub.add_repo("org/model")
    with hub.fault(Fault(method=method, path=path, times=2, **fault)) as injection:
        huggingface_hub.upload_file(repo_id="org/model", path_in_repo="model.safetensors", path_or_fileobj=noise(1000))
        assert OLD_CLIENT or len(list(huggingface_hub.list_models())) == 1  # the old one does not try lists again
    assert injection.hits == (0 if OLD_CLIENT and method == "GET" else 2)
    assert len(hub.commits("org/model")) == 2


@pytest.mark.parametrize("kind", ["drop", "lost"])
def test_a_commit_whose_reply_is_lost(hub, client, kind):
    hub.add_repo("org/model")
    fault = Fault(kind=kind, path="*/commit/*")
    with hub.fault(fault), pytest.raises(errors.HTTPError):
        huggingface_hub.upload_file(repo_id="org/model", path_in_repo="a.txt", path_or_fileobj=b"a")
    assert hub.files("org/model") == ({"a.txt": b"a"} if kind == "lost" else {})


@pytest.mark.parametrize("kind", ["drop", "lost", "status"])
def test_a_fault_at_each_request_in_turn(hub, client, tmp_path, kind):
    """A model is published whole or not at all."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(noise(1000))
    for at in range(1, 20):
        name = f"org/model{at}"
        with hub.fault(Fault(kind=kind, at=at)) as injection:
            try:
                huggingface_hub.create_repo(name)
                huggingface_hub.upload_folder(repo_id=name, folder_path=tmp_path)
            except errors.HTTPError:
                pass
        assert ("model", name) not in hub.repositories or hub.files(name) in ({}, contents(tmp_path))
        if not injection.hits:
            break
    assert at == injection.matched + 1 == 7


def test_faults_count_what_they_match():
    hub = LocalHub()
    with hub.fault(Fault(kind="drop", method="GET", path="/a/*", at=2, times=2)) as injection:
        paths = [("GET", "/a/1"), ("POST", "/a/1"), ("GET", "/b/1"), ("GET", "/a/b/2"), ("GET", "/a/3"), ("GET", "/a/4")]
        assert [hub._faults.strike(*path) is not None for path in paths] == [False, False, False, True, True, False]
    assert (injection.matched, injection.hits) == (4, 2)
    assert hub._faults.strike("GET", "/a/1") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "explode"}, "kind must be one of status, drop"),
        ({"kind": "drop", "at": 0}, "count from 1"),
        ({"kind": "drop", "times": 0}, "count from 1"),
        ({"kind": "status", "status": 200}, "400 to 599"),
    ],
)
def test_faults_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Fault(**options)


# The server


def test_what_goes_wrong_in_the_server_is_raised(monkeypatch):
    def fail(*args):
        raise ZeroDivisionError("in a route")

    monkeypatch.setattr("cartl_hub.testing.hub.answer", fail)
    with pytest.raises(ExceptionGroup) as caught, LocalHub() as hub:
        assert fetch(f"{hub.endpoint}/api/models")[0] == 500
    assert caught.group_contains(ZeroDivisionError, match="in a route")
    assert "GET /api/models" in str(caught.value.exceptions[0].__notes__)
    with pytest.raises(KeyError) as caught, LocalHub() as hub:
        raise KeyError(fetch(f"{hub.endpoint}/api/models"))
    assert "in a route" in str(caught.value.__notes__)


def test_a_hub_that_is_down_comes_back(hub, client):
    hub.add_repo("org/model", {"a.txt": "a"})
    endpoint = hub.endpoint
    assert huggingface_hub.model_info("org/model").id == "org/model"  # leaves a connection open
    with hub.down(), pytest.raises(errors.HTTPError):
        huggingface_hub.model_info("org/model")
    assert hub.endpoint == endpoint
    assert huggingface_hub.model_info("org/model").id == "org/model"


def test_leaving_does_not_wait_for_stalled_requests():
    before = set(threading.enumerate())
    start = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        with LocalHub() as hub, hub.fault(Fault(kind="slow", delay=60)) as injection:
            asking = pool.submit(fetch, f"{hub.endpoint}/api/models")
            while not injection.hits:
                time.sleep(0.01)
        with pytest.raises(OSError, match=r"closed|reset"):
            asking.result()
    assert time.monotonic() - start < 30
    assert set(threading.enumerate()) == before


def test_many_clients_at_once(hub, client):
    """One commit each, and none lost."""
    hub.add_repo("org/model")

    def publish(number):
        huggingface_hub.upload_file(repo_id="org/model", path_in_repo=f"{number}.bin", path_or_fileobj=noise(1000, number))

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hub.files("org/model") == {f"{number}.bin": noise(1000, number) for number in range(8)}
    assert len(hub.commits("org/model")) == 9


def test_edit_and_corrupt(hub, client):
    hub.add_repo("org/model", {"model.safetensors": noise(1000), "a.txt": "a"})
    with pytest.raises(ValueError, match="org/model exists"):
        hub.add_repo("org/model")
    before = huggingface_hub.model_info("org/model", files_metadata=True)
    hub.corrupt("org/model", "model.safetensors", offset=10)
    after = huggingface_hub.model_info("org/model", files_metadata=True)
    assert before == after
    assert download() == noise(1000)[:10] + bytes([noise(1000)[10] ^ 1]) + noise(1000)[11:]
    hub.edit("org/model", {"a.txt": None, "b.txt": "b"}, title="Swap")
    assert hub.files("org/model").keys() == {"model.safetensors", "b.txt"}
    assert hub.commits("org/model")[0].title == "Swap"


def test_large_and_binary_files_are_lfs_files(hub, client):
    hub.add_repo("org/model", {"large.txt": "a" * 10_000_001, "small.txt": "a", "image.png": b"\x89PNG\0", "data.npz": b"a"})
    siblings = huggingface_hub.model_info("org/model", files_metadata=True).siblings
    assert [sibling.rfilename for sibling in siblings if sibling.lfs] == ["data.npz", "image.png", "large.txt"]


# The client


def test_the_client_is_as_it_was_afterwards(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    modules = (constants, datasets.config, _cache_manager, os.environ)
    before = [dict(vars(module) if module is not os.environ else os.environ) for module in modules]
    api = huggingface_hub.hf_api.api
    with hub.client(cache=tmp_path / "a"), LocalHub() as other:
        assert constants.HF_HUB_CACHE == _cache_manager.HF_HUB_CACHE == str(tmp_path / "a/hub")
        assert api.endpoint == HfApi().endpoint == datasets.config.HF_ENDPOINT == hub.endpoint
        assert tmp_path / "a/datasets" == datasets.config.HF_DATASETS_CACHE
        assert not constants.is_offline_mode()
        assert not datasets.config.HF_HUB_OFFLINE
        assert huggingface_hub.get_token() is None
        assert huggingface_hub.hf_hub_url("a/b", "c") == f"{hub.endpoint}/a/b/resolve/main/c"
        with other.client(token="hf_reader", xet=True) as cache:
            assert api.endpoint == constants.ENDPOINT == other.endpoint
            assert Path(constants.HF_HUB_CACHE) == cache / "hub"
            assert huggingface_hub.get_token() == "hf_reader"
            assert not constants.HF_HUB_DISABLE_XET
        assert not cache.exists()
        assert api.endpoint == constants.ENDPOINT == hub.endpoint
        assert constants.HF_HUB_DISABLE_XET
    assert [dict(vars(module) if module is not os.environ else os.environ) for module in modules] == before
    assert api.endpoint == constants.ENDPOINT


def test_what_is_imported_inside_is_as_if_imported_outside():
    script = """
import os, sys
from cartl_hub.testing import LocalHub
assert not {"torch", "datasets", "huggingface_hub", "timm"} & sys.modules.keys()
with LocalHub() as hub, hub.client():
    import datasets
    from huggingface_hub.utils import _cache_manager
    assert datasets.config.HF_ENDPOINT == hub.endpoint
    assert _cache_manager.HF_HUB_CACHE == os.environ["HF_HUB_CACHE"]
print(datasets.config.HF_ENDPOINT, datasets.config.HF_HUB_OFFLINE, _cache_manager.HF_HUB_CACHE)
"""
    environment = {key: value for key, value in os.environ.items() if key != "HF_ENDPOINT"} | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": "outside",
    }
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "https://huggingface.co True outside\n", done.stderr


def test_another_process(hub, tmp_path):
    hub.add_repo("org/model", {"a.txt": "a"}, private=True)
    script = "import huggingface_hub; print(open(huggingface_hub.hf_hub_download('org/model', 'a.txt')).read())"
    for token, output in ((hub.write_token, "a\n"), (None, "")):
        environment = {**os.environ, **hub.environment(tmp_path / str(token), token=token)}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
        assert done.stdout == output, done.stderr
    assert "RepositoryNotFoundError" in done.stderr
    assert (tmp_path / f"{hub.write_token}/hub/models--org--model").is_dir()


# Xet


def test_xet(tmp_path, folder):
    pytest.importorskip("hf_xet", reason="large files go through xet only where hf_xet is installed")
    with LocalHub(xet=True) as hub, hub.client(token=hub.write_token, xet=True):
        huggingface_hub.create_repo("org/model")
        commit = huggingface_hub.upload_folder(repo_id="org/model", folder_path=folder)
        assert hub.files("org/model") == contents(folder)
        assert not [seen for seen in hub.requests if seen.method == "PUT"]
        (entry,) = HfApi().get_paths_info("org/model", ["model.safetensors"])
        assert entry.xet_hash
        assert entry.lfs.sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        assert download() == (folder / "model.safetensors").read_bytes()
        assert Path(huggingface_hub.snapshot_download("org/model", revision=commit.oid), "config.json").read_text() == "{}"
        assert not [seen for seen in hub.requests if seen.path.startswith("/cdn/")]
        again = huggingface_hub.upload_folder(repo_id="org/model", folder_path=folder)
        assert again.oid == commit.oid
        with hub.client(cache=tmp_path / "cache"):  # a client without xet gets the same bytes
            assert download() == (folder / "model.safetensors").read_bytes()
            assert [seen.status for seen in hub.requests if seen.path.startswith("/cdn/")] == [200]


# Other libraries


def test_timm(hub, client):
    model = timm.create_model("test_resnet", num_classes=3)
    timm.models.push_to_hf_hub(model, "org/model", model_config={"label_names": ["a", "b", "c"]}, safe_serialization=True)
    assert hub.files("org/model").keys() == {"README.md", "config.json", "model.safetensors"}
    loaded = timm.create_model("hf-hub:org/model", pretrained=True)
    assert loaded.pretrained_cfg["label_names"] == ["a", "b", "c"]
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    huggingface_hub.create_tag("org/model", tag="v1")
    assert timm.create_model("hf-hub:org/model@v1", pretrained=True, num_classes=5).num_classes == 5
    assert [info.id for info in huggingface_hub.list_models(filter="timm")] == ["org/model"]


def test_weights_of_an_own_model(hub, client, tmp_path):
    model = make_model("wrn10_1")
    save_file(model.backbone.state_dict(), tmp_path / "model.safetensors")
    huggingface_hub.create_repo("org/model")
    huggingface_hub.upload_folder(repo_id="org/model", folder_path=tmp_path)
    metadata = huggingface_hub.get_safetensors_metadata("org/model")
    (file,) = metadata.files_metadata.values()
    assert file.tensors.keys() == model.backbone.state_dict().keys()


def test_datasets(hub, client):
    table = pa.table({"text": ["a", "b", "c"], "label": [0, 1, 0]})
    file = io.BytesIO()
    pq.write_table(table, file)
    hub.add_repo("org/data", {"data/train-00000.parquet": file.getvalue()}, repo_type="dataset")
    data = datasets.load_dataset("org/data", split="train")
    assert data["label"][:] == [0, 1, 0]
    assert [row["text"] for row in datasets.load_dataset("org/data", split="train", streaming=True)] == ["a", "b", "c"]
    data.push_to_hub("org/pushed", split="test")
    assert datasets.load_dataset("org/pushed")["test"]["text"][:] == ["a", "b", "c"]
    with pytest.raises(datasets.exceptions.DatasetNotFoundError):
        datasets.load_dataset("org/none")
