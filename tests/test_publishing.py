"""Publishing and loading with the real client over HTTP, against a Hub on this machine."""

import json
import logging
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from conftest import make_model, toy_data
from huggingface_hub import HfApi, ModelCard
from reports import make_report
from safetensors.torch import load
from test_finetuner import pictures

import cartl_hub
from cartl_hub import (
    FDM,
    FGSM,
    NEFT,
    DataArguments,
    EpsSchedule,
    FineTuning,
    ModelError,
    PublishError,
    RobustClassifier,
    RobustFineTuner,
    TrainingArguments,
    list_sources,
    load_model,
    publish,
    save_model,
)
from cartl_hub import hub as hub_module
from cartl_hub.card import NO_SCHEDULE, render_card
from cartl_hub.config import to_dict
from cartl_hub.folder import CARD, CONFIG, WEIGHTS, read_model, read_report
from cartl_hub.publishing import check_publishable, plan
from cartl_hub.report.figures import Check, WorstCase
from cartl_hub.testing import Fault, LocalHub
from cartl_hub.testing.metadata import card_errors
from cartl_hub.weights import round_weights, weights_sha256

ID = "org/wrn10_1.toy"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub_module.time, "sleep", lambda seconds: None)
    with LocalHub() as hub:
        yield hub


@pytest.fixture
def writer(hub):
    with hub.client(token=hub.write_token, backoff=False):
        yield hub


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with weights, config, report, pictures and card."""
    model = make_model("wrn10_1").eval()
    model.label_names = ("a", "b", "c")
    model.lineage = {
        "name": "wrn10_1.toy",
        "tag": "toy",
        "license": "mit",
        "data": {"id": "org/toys"},
        "versions": {"torch": "2"},
    }
    report = cartl_hub.evaluate(model, toy_data(24), attacks={"FGSM": FGSM(eps=8 / 255)}, curve=(0, 8 / 255), progress=False)
    return save_model(model, tmp_path_factory.mktemp("saved") / "model", report=report, card=render_card(model, report=report))


@pytest.fixture
def folder(saved, tmp_path):
    import shutil

    return Path(shutil.copytree(saved, tmp_path / "wrn10_1.toy"))


def logits(model):
    return model(torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Publish


def test_one_commit_holds_the_whole_model(writer, folder):
    before = contents(folder)
    commit = publish(folder, ID)
    assert contents(folder) == before
    assert [c.title for c in writer.commits(ID)] == ["Upload wrn10_1.toy", "initial commit"]
    assert (commit.oid, commit.commit_url) == (writer.commits(ID)[0].oid, f"{writer.endpoint}/{ID}/commit/{commit.oid}")
    sent = writer.files(ID)
    assert sent.keys() == before.keys()
    assert {name for name in sent if sent[name] != before[name]} == {CARD}
    assert f'load_model("{ID}")' in sent[CARD].decode()


def test_what_is_published_loads_from_the_hub(writer, folder):
    commit = publish(folder, ID)
    model = load_model(ID)
    assert torch.equal(logits(model), logits(load_model(folder)))
    assert model.lineage["loaded_from"] == {
        "id": ID,
        "revision": commit.oid,
        "weights_sha256": weights_sha256(model),
    }
    assert (model.label_names, model.training) == (("a", "b", "c"), False)


def test_metadata_of_the_card_is_what_the_hub_indexes(writer, folder):
    publish(folder, ID)
    info = HfApi().model_info(ID)
    assert {"cartl_hub", "timm", "dataset:org/toys", "license:mit"} <= set(info.tags)
    assert (info.library_name, info.pipeline_tag) == ("cartl_hub", "image-classification")
    results = {result.metric_name: result.metric_value for result in info.card_data.eval_results}
    report = json.loads((folder / "report.json").read_text())
    measured = {"accuracy": report["clean"]} | {
        f"robust accuracy, {name} (Linf 8/255)": result for name, result in report["attacks"].items()
    }
    measured["robust accuracy, worst case (Linf 8/255)"] = report["worst_case"]["Linf 8/255"]
    assert results == {name: pytest.approx(100 * result["accuracy"], abs=0.01) for name, result in measured.items()}


@pytest.mark.parametrize(("method", "blocks"), [(FDM(num_blocks=2), 2), (FineTuning(num_blocks=2), 4)])
def test_a_card_suggests_to_train_what_is_behind_the_split(wrn, method, blocks):
    wrn.lineage = {"method": to_dict(method)}
    report = make_report(worst_case={"Linf 8/255": WorstCase(40, 40, "Linf", 8 / 255, ("PGD-20",))})
    assert f"NEFT(num_blocks={blocks}, beta=0.4)" in render_card(wrn, report=report)


@pytest.mark.parametrize("link", ["mine.png", "figures/mine.png", ".mine.png"])
def test_a_picture_that_would_be_missing_is_named(writer, folder, link):
    text = (folder / CARD).read_text()
    (folder / "figures").mkdir()
    for path in (folder / "figures" / "mine.png", folder / ".mine.png"):
        path.write_bytes(b"picture")
    (folder / CARD).write_text(f"{text}\n![]({link}) ![](https://host/other.png)\n")
    with pytest.raises(PublishError, match=f"got none for {link}; put them"):
        publish(folder, ID)


def test_a_card_edited_by_hand_is_kept(writer, folder):
    text = (folder / CARD).read_text().replace("## Limits", "## My own words\n\n## Limits")
    (folder / CARD).write_text(text)
    publish(folder, ID)
    assert writer.files(ID)[CARD].decode() == text


def test_publishing_twice_makes_no_second_commit(writer, folder):
    publish(folder, ID)
    publish(folder, ID)
    assert len(writer.commits(ID)) == 2


def test_what_an_earlier_version_left_is_removed(writer, folder):
    (folder / "losses.csv").write_text("step\n")
    publish(folder, ID)
    writer.edit(ID, {"notes.txt": "by hand", "old/report.json": "{}"})
    model = make_model("wrn10_1")
    publish(save_model(model, folder.parent / "new", card=render_card(model)), ID)
    assert writer.files(ID).keys() == {WEIGHTS, CONFIG, CARD, "notes.txt", "old/report.json"}
    assert len(writer.commits(ID)) == 4


def test_a_card_names_the_repository_that_it_is_in(writer, folder):
    publish(folder, "org/first")
    copy = folder.parent / "copy"
    copy.mkdir()
    for name, content in writer.files("org/first").items():
        (copy / name).write_bytes(content)
    publish(copy, "org/second")
    assert 'load_model("org/second")' in writer.files("org/second")[CARD].decode()


@pytest.mark.parametrize("private", [True, False])
def test_an_existing_repository_must_be_as_private_as_asked(writer, folder, private):
    writer.add_repo(ID, private=not private)
    wanted, got = ("private", "public") if private else ("public", "private")
    message = f"expected {ID} to be {wanted}, got a repository that exists and is {got}; change"
    for act in (lambda: publish(folder, ID, private=private), lambda: check_publishable(ID, "", private=private)):
        with pytest.raises(PublishError, match=message):
            act()
    assert len(writer.commits(ID)) == 1
    publish(folder, ID, private=not private)


def test_an_empty_repository_that_stays_is_named(writer, folder):
    refused = Fault(kind="status", status=400, path="*/commit/*", times=math.inf)
    for left in (f"The repository {ID} was made and stays there, empty", ""):
        with (
            writer.fault(refused),
            pytest.raises(PublishError, match=rf"answered 400.*\. {left}.*--message 'Two words'") as caught,
        ):
            publish(folder, ID, commit_message="Two words")
        assert ("was made" in str(caught.value)) == bool(left)
    assert not writer.files(ID)


def test_a_pull_request_to_a_branch_is_refused_at_once(writer, folder):
    for act in (plan, publish):
        with pytest.raises(PublishError, match="a branch or a pull request"):
            act(folder, ID, revision="dev", create_pr=True)
    assert not writer.requests


def test_private_branch_and_pull_request(writer, folder):
    publish(folder, ID, private=True, revision="dev", commit_message="Try")
    assert writer.repo(ID).private
    assert writer.commits(ID, "dev")[0].title == "Try"
    assert WEIGHTS not in writer.files(ID)
    assert load_model(ID, revision="dev").lineage["loaded_from"]["revision"] == writer.commits(ID, "dev")[0].oid
    commit = publish(folder, ID, create_pr=True)
    assert commit.pr_url.endswith("/discussions/1")
    assert WEIGHTS not in writer.files(ID)
    assert WEIGHTS in writer.files(ID, "refs/pr/1")


def test_a_name_alone_goes_to_the_users_namespace(writer, folder):
    publish(folder, "toy")
    assert WEIGHTS in writer.files("writer/toy")


def test_only_what_belongs_to_a_model_is_sent(writer, folder):
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / ".env").write_text("SECRET=1")
    for name in (".hidden.png", "shown.jpg", "other.png"):
        (folder / name).write_bytes(b"picture")
    with open(folder / CARD, "a") as card:
        card.write("\n![of mine](./shown.jpg)\n")
    upload = plan(folder, ID)
    assert not writer.requests  # a plan asks nobody
    assert upload.left_out == (".env", ".hidden.png", "optimizer.pt", "other.png")
    assert upload.metadata["library_name"] == "cartl_hub"
    publish(folder, ID)
    sent = {name: len(content) for name, content in writer.files(ID).items()}
    assert upload.files == sent
    assert "shown.jpg" in sent
    assert not {"optimizer.pt", ".env", ".hidden.png", "other.png"} & sent.keys()


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("id: a\ndata:\n  id: b/c\n  local: /home/me/photos  # mine\n  read: {seed: 1}  # kept\n", "read: {seed: 1}  # kept"),
        ("id: a\ndata: {id: b/c, local: /home/me/photos}\n", "id: b/c"),
        ("id: a\ndata:\n  id: b/c\n  local:\n    /home/me/photos\n", "id: b/c"),
        ("id: a  # kept\ndata: {id: b/c}\n", "id: a  # kept\ndata: {id: b/c}\n"),
    ],
)
def test_a_path_in_a_recipe_is_not_sent(writer, folder, text, sent, caplog):
    (folder / "recipe.yaml").write_text(text)
    publish(folder, ID)
    found = writer.files(ID)["recipe.yaml"].decode()
    assert "/home/me" not in found
    assert sent in found
    assert (folder / "recipe.yaml").read_text() == text
    assert "some of the test images are in samples.png and report.html, which is published" in caplog.text


@pytest.mark.parametrize("name", ["report.json", "recipe.yaml"])
def test_a_token_in_a_file_is_not_sent(writer, folder, name):
    content = json.loads((folder / "report.json").read_text())
    content["context"]["command"] = "HF_TOKEN=hf_abcdefghijklmnopqrstuvwxyz cartl-hub evaluate"
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(PublishError, match=f"{name} holds what looks like a token"):
        publish(folder, ID)
    assert not writer.requests


def test_a_link_is_not_followed(writer, folder, tmp_path):
    (tmp_path / "secret").write_text("key")
    (folder / "losses.csv").symlink_to(tmp_path / "secret")
    with pytest.raises(PublishError, match=r"losses\.csv, which is a link"):
        publish(folder, ID)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / WEIGHTS).write_bytes(b"\x80\x02"), "pickle"),
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]), "sha256"),
        (lambda folder: (folder / CONFIG).unlink(), "config.json"),
        (lambda folder: (folder / "report.json").write_text("{}"), "report"),
        (lambda folder: (folder / CARD).write_text("---\nlicense: [a, b\n---\n"), "YAML"),
        (lambda folder: (folder / CARD).write_bytes(b"\xff\xfe"), r"expected UTF-8 in .*README\.md: .*save it as UTF-8"),
    ],
)
def test_what_is_not_a_whole_model_is_not_sent(writer, folder, change, message):
    change(folder)
    with pytest.raises(PublishError, match=message):
        publish(folder, ID)
    assert not writer.requests


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("tags: robust", "expected a list of strings for 'tags'"),
        ("tags: [1]", "expected a list of strings for 'tags'"),
        ("language: no", "expected a string or list of strings for 'language'"),
        ("pipeline_tag: [image-classification]", "expected a string for 'pipeline_tag'"),
        ("base_model: two words", "expected ids of the Hub for 'base_model'"),
        ("datasets: [org/fine, a/b/c]", "expected ids of the Hub for 'datasets' .* got 'a/b/c'"),
        ("license: my own", "expected a license that the Hub knows.* license_name"),
    ],
)
def test_metadata_that_the_hub_would_refuse(writer, folder, metadata, message):
    card = f"---\n{metadata}\n---\n# A model\n"
    (folder / CARD).write_text(card)
    for act in (lambda: plan(folder, ID), lambda: publish(folder, ID), lambda: check_publishable(ID, card)):
        with pytest.raises(PublishError, match=message):
            act()
    assert not writer.requests


def test_a_byte_order_mark_is_left_out(writer, folder):
    text = "---\nlicense: mit\n---\n# Mine\n"
    (folder / CARD).write_text(text, encoding="utf-8-sig")
    assert plan(folder, ID).metadata == {"license": "mit"}
    publish(folder, ID)
    assert writer.files(ID)[CARD].decode() == text


def test_words_of_the_server_end_in_a_full_stop(writer, folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError('"language" must be a string')

    monkeypatch.setattr(HfApi, "upload_folder", refuse)
    with pytest.raises(PublishError, match=r'be published: "language" must be a string\. The .*\. Nothing was lost'):
        publish(folder, ID)


# Card


@pytest.mark.parametrize(
    ("lineage", "expected"),
    [
        ({}, {"license": None, "datasets": None}),
        ({"license": "MIT", "data": {"id": "org/toys"}}, {"license": "mit", "datasets": ["org/toys"]}),
        ({"license": "My own, v2", "data": {"id": "data/my photos"}}, {"license": "other", "license_name": "my-own-v2"}),
        ({"data": {"id": "/data/photos"}}, {"datasets": None}),
        ({"source": {"id": "org/first"}}, {"base_model": "org/first"}),
        ({"source": {"id": "timm/resnet18", "hub_id": "timm/resnet18.a1_in1k"}}, {"base_model": "timm/resnet18.a1_in1k"}),
        ({"source": {"id": "runs/my model"}}, {"base_model": None, "datasets": None}),
    ],
)
def test_metadata_holds_what_the_hub_knows(wrn, lineage, expected):
    wrn.lineage = lineage
    card = render_card(wrn)
    data = ModelCard(card).data
    assert {key: data.get(key) for key in expected} == expected
    assert not card_errors(card)


def test_the_schedule_that_cards_leave_out_is_the_default():
    assert to_dict(EpsSchedule()) == NO_SCHEDULE


@pytest.mark.parametrize(
    ("threat", "robust_correct", "tagged"),
    [
        (None, None, False),
        (None, 1, False),
        (None, 38, True),
        ({"norm": "Linf", "eps": 8 / 255}, None, True),
        ({"norm": "Linf", "eps": 8 / 255}, 0, False),
    ],
)
def test_only_robust_models_are_tagged_so(wrn, threat, robust_correct, tagged):
    wrn.lineage = {"threat_model": threat}
    worst = {"Linf 8/255": WorstCase(robust_correct or 0, 40, "Linf", 8 / 255, ("FGSM",))}
    card = render_card(wrn, report=None if robust_correct is None else make_report(worst_case=worst))
    assert ("adversarial-robustness" in ModelCard(card).data.tags) == tagged
    failed = Check("gradient-free", "fail", {"accuracy, Square": 0.02}, "Masked.", "", 40)
    if robust_correct is not None:
        doubtful = ModelCard(render_card(wrn, report=make_report(worst_case=worst, checks=(failed,))))
        assert "adversarial-robustness" not in doubtful.data.tags
        assert "keep a part of its robustness" not in doubtful.text


@pytest.mark.parametrize(
    ("lineage", "origin"),
    [
        ({}, "origin unknown"),
        ({"method": {"name": "FDM"}}, "trained from a random start"),
        ({"method": {"name": "NEFT"}, "source": {"id": "org/first"}}, "from `org/first`"),
    ],
)
def test_a_card_says_where_weights_and_package_come_from(wrn, lineage, origin):
    wrn.lineage = lineage
    assert f"Weights: {origin}." in render_card(wrn)
    assert "With `cartl_hub` installed" in render_card(wrn)


# Rights


def test_no_token_and_wrong_rights(hub, folder):
    retry = f"To try again: cartl-hub publish {folder} --to {ID}"
    hub.add_repo("others/toy")
    for token, repo_id, reason in (
        (None, ID, "got none; log in"),
        ("hf_unknown", ID, "refuses; log in"),
        (hub.read_token, ID, r"can't be published on the Hub: it answered 403 \(you don't .*\); .* log in"),
        (hub.write_token, "others/toy", r"can't be published on the Hub: it answered 403 \(you don't .*\); .* log in"),
    ):
        with hub.client(token=token, backoff=False), pytest.raises(PublishError, match=reason) as caught:
            publish(folder, repo_id)
        assert retry.replace(ID, repo_id) in str(caught.value)
    assert set(hub.repositories) == {("model", "others/toy")}


@pytest.mark.parametrize("repo_id", ["a/b/c", "-x/y", "x y/z", "x/..", ""])
def test_ids_that_the_hub_has_not(writer, folder, repo_id):
    with pytest.raises(PublishError, match="expected a Hub id"):
        publish(folder, repo_id)
    assert not writer.requests


# Check before training


def test_rights_are_checked_without_a_trace(hub, folder):
    card = (folder / CARD).read_text()
    with hub.client(token=hub.write_token, backoff=False):
        assert check_publishable("toy", card) == "writer/toy"
        assert check_publishable(ID, card) == ID
        with pytest.raises(PublishError, match="expected a repository of writer or org"):
            check_publishable("others/toy", card)
        hub.add_repo("others/private", private=True)
        with pytest.raises(PublishError, match="expected a repository of writer or org"):
            check_publishable("others/private", card)
        hub.add_repo("others/public")
        with pytest.raises(PublishError, match="403"):
            check_publishable("others/public", card)
        with pytest.raises(PublishError, match="'tags'"):
            check_publishable(ID, "---\ntags: robust\n---\n")
    for token, reason in ((None, "got none"), ("hf_unknown", "refuses"), (hub.read_token, "may only read")):
        with hub.client(token=token, backoff=False), pytest.raises(PublishError, match=reason):
            check_publishable(ID, card)
    assert set(hub.repositories) == {("model", "others/private"), ("model", "others/public")}


def tuner_of(tmp_path, **kwargs):
    return RobustFineTuner(
        make_model("wrn10_1"),
        cartl_hub_data(),
        method=NEFT(num_blocks=2),
        arguments=TrainingArguments(epochs=1, batch_size=8, precision="fp32"),
        data_arguments=DataArguments(),
        output_dir=tmp_path / "run",
        name="wrn10_1.neft2_toys",
        **kwargs,
    )


def cartl_hub_data():
    import datasets

    data = toy_data(40)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abc"))})
    pictures = [image.permute(1, 2, 0).numpy() for image in data.images]
    return datasets.Dataset.from_dict({"image": pictures, "label": data.labels.tolist()}, features=features)


def test_a_tuner_checks_first_and_publishes_what_it_saves(hub, tmp_path):
    with hub.client(token=hub.read_token, backoff=False), pytest.raises(PublishError, match="may only read"):
        tuner_of(tmp_path, push_to_hub=True)
    with hub.client(token=hub.write_token, backoff=False):
        tuner = tuner_of(tmp_path, push_to_hub=True, hub_private_repo=True)
        assert not hub.repositories
        tuner.train()
        tuner.evaluate(attacks={"FGSM": FGSM(eps=8 / 255)}, curve=None, progress=False)
        saved = tuner.save()
        assert torch.equal(logits(load_model("writer/wrn10_1.neft2_toys")), logits(load_model(saved)))
        card = ModelCard.load("writer/wrn10_1.neft2_toys")
        assert card.data.model_name == "wrn10_1.neft2_toys"
        assert tuner.commit.oid == hub.commits("writer/wrn10_1.neft2_toys")[0].oid
        commit = tuner.push_to_hub("org/other")
        assert commit.oid == hub.commits("org/other")[0].oid
        assert all(repository.private for repository in hub.repositories.values())
        with pytest.raises(PublishError, match="expected org/other to be public"):
            tuner_of(tmp_path, push_to_hub=True, hub_model_id="org/other", hub_private_repo=False)


def test_a_failed_push_loses_nothing(writer, tmp_path):
    tuner = tuner_of(tmp_path, push_to_hub=True, hub_model_id=ID)
    tuner.train()
    with writer.down(), pytest.raises(PublishError, match=r"Nothing was lost.*cartl-hub publish .*run/model --to org/"):
        tuner.save()
    command = [sys.executable, "-m", "cartl_hub.cli", "publish", str(tmp_path / "run/model"), "--to", ID]
    environment = os.environ | writer.environment(tmp_path / "cache", token=writer.write_token)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert f"Published: {writer.endpoint}/{ID}/commit/" in done.stdout, done.stderr
    assert writer.files(ID)[WEIGHTS] == (tmp_path / "run/model" / WEIGHTS).read_bytes()


# Faults


KINDS = [
    Fault(kind="status", status=500),
    Fault(kind="status", status=503),
    Fault(kind="status", status=429, retry_after=0),
    Fault(kind="drop"),
    Fault(kind="lost"),
    Fault(kind="cut"),
    Fault(kind="reset"),
    Fault(kind="truncate"),
]


def failure_of(act):
    """The error of ``act``, if it has one of ours."""
    try:
        act()
    except ModelError as error:
        return str(error)
    return None


def each_request(hub, fault, act, num_requests=40):
    """Run ``act`` with the fault at the first, second, ... request, until it has fewer requests than that."""
    for at in range(1, num_requests):
        with hub.fault(Fault(**(vars(fault) | {"at": at}))) as injection:
            yield at, act
        if not injection.hits:
            assert at > 3
            return
    raise AssertionError(f"more than {num_requests} requests")


@pytest.mark.parametrize("fault", KINDS, ids=lambda fault: f"{fault.kind}{fault.status if fault.kind == 'status' else ''}")
def test_publishing_with_a_fault_at_each_request(writer, folder, fault):
    before = contents(folder)
    expected = logits(load_model(folder))
    for at, _ in each_request(writer, fault, None):
        repo_id = f"org/at{at}"
        failure = failure_of(lambda repo_id=repo_id: publish(folder, repo_id))
        held = writer.files(repo_id) if ("model", repo_id) in writer.repositories else {}
        if failure is None:
            assert held.keys() == before.keys()
        else:
            assert f"--to {repo_id}" in failure
            assert held.keys() in (set(), before.keys())
        assert contents(folder) == before
    assert torch.equal(logits(load_model("org/at1")), expected)


@pytest.mark.parametrize("fault", [*KINDS, Fault(kind="flip")], ids=lambda fault: f"{fault.kind}{fault.status}")
def test_loading_with_a_fault_at_each_request(writer, folder, fault, tmp_path):
    publish(folder, ID)
    expected = logits(load_model(folder))
    failures = []
    for at, _ in each_request(writer, fault, None):
        cache = tmp_path / f"cache{at}"
        failures.append(failure_of(lambda cache=cache: load_model(ID, cache_dir=cache)))
        assert torch.equal(logits(load_model(ID, cache_dir=cache)), expected)  # what is in the cache is whole
    if fault.kind != "flip":  # a reply of the API bears no hash
        assert not any(failures)


def test_damage_that_stays_is_an_error(writer, folder, tmp_path):
    publish(folder, ID)
    for name in (WEIGHTS, CONFIG):
        with (
            writer.fault(Fault(kind="flip", method="GET", path=f"*/{name}", times=math.inf)) as injection,
            pytest.raises(ModelError, match=f"{name} with another hash"),
        ):
            load_model(ID, cache_dir=tmp_path / name)
        assert injection.hits >= 2
        assert torch.equal(logits(load_model(ID, cache_dir=tmp_path / name)), logits(load_model(folder)))


def test_a_cached_copy_that_rots_is_fetched_again(writer, folder, tmp_path):
    publish(folder, ID)
    load_model(ID, cache_dir=tmp_path)
    (blob,) = [path for path in tmp_path.rglob("blobs/*") if path.stat().st_size == (folder / WEIGHTS).stat().st_size]
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    assert torch.equal(logits(load_model(ID, cache_dir=tmp_path)), logits(load_model(folder)))


# Load


def test_what_can_not_be_had_is_said(writer, folder, tmp_path):
    publish(folder, ID)
    writer.add_repo("others/private", {CONFIG: "{}"}, private=True)
    writer.add_repo("others/gated", {CONFIG: "{}"}, gated="manual")
    for name, revision, message in (
        ("org/none", None, "no such repository, or it is private"),
        ("others/private", None, "no such repository, or it is private"),
        ("others/gated", None, "consent"),
        (ID, "v9", "no commit, branch or tag 'v9'"),
        ("org/none", "v9", "no such repository"),
    ):
        with pytest.raises(ModelError, match=message):
            load_model(name, revision=revision)
    with writer.down():
        with pytest.raises(ModelError, match="can't be reached"):
            load_model(ID, cache_dir=tmp_path / "empty")
        with pytest.raises(ModelError, match="not to be asked"):
            load_model(ID, local_files_only=True, cache_dir=tmp_path / "empty")


def test_a_cached_model_loads_without_the_hub(writer, folder):
    commit = publish(folder, ID)
    HfApi().create_tag(ID, tag="v1")
    for revision in (None, "v1", commit.oid):
        load_model(ID, revision=revision)
    with writer.down():
        for revision in (None, "v1", commit.oid):
            assert load_model(ID, revision=revision).lineage["loaded_from"]["revision"] == commit.oid
        assert load_model(ID, local_files_only=True).lineage["loaded_from"]["revision"] == commit.oid


def test_a_new_commit_is_seen(writer, folder):
    publish(folder, ID)
    load_model(ID)
    model = make_model("wrn10_1", num_classes=5)
    commit = publish(save_model(model, folder.parent / "five", card=render_card(model)), ID)
    assert load_model(ID).num_classes == 5
    assert load_model(ID).lineage["loaded_from"]["revision"] == commit.oid


def test_a_repository_without_safetensors(writer):
    writer.add_repo("org/pickle", {"model.ckpt": b"\x80\x02"})
    with pytest.raises(ModelError, match=r"model\.ckpt, which can run code.*cartl-hub import org/pickle/model\.ckpt --to pickle"):
        load_model("org/pickle")
    writer.add_repo("org/text", {"notes.txt": "x"})
    with pytest.raises(ModelError, match=r"got .*notes\.txt"):
        load_model("org/text")
    assert not [seen for seen in writer.requests if "model.ckpt" in seen.path and seen.method == "GET"]


def config_of(folder, **changes):
    return json.dumps(json.loads((folder / CONFIG).read_text()) | changes)


def test_configs_that_do_not_fit(writer, folder):
    files = {name: content for name, content in contents(folder).items() if name in (WEIGHTS, CARD)}
    own = json.loads((folder / CONFIG).read_text())["cartl_hub"]
    for name, changes, message in (
        ("newer", {"cartl_hub": own | {"format_version": 99}}, "format version 1 or older"),
        ("other", {"architecture": "wrn16_1"}, "not those of its architecture"),
        ("unknown", {"architecture": "wrn9000"}, "no architecture 'wrn9000'"),
        ("classes", {"num_classes": 4, "label_names": list("abcd")}, r"expected shape \[4\], got \[3\]"),
        ("names", {"label_names": ["a"]}, "expected 3 different label names, one for each class, got 1"),
        ("hash", {"cartl_hub": own | {"weights_sha256": "0" * 64}}, "sha256"),
        ("foreign", {"model_args": {"pretrained": True}}, "got pretrained"),
        ("path", {"model_args": {"checkpoint_path": "/etc/passwd"}}, "got checkpoint_path"),
        ("huge", {"num_classes": 10**12}, "up to"),
    ):
        writer.add_repo(f"org/{name}", files | {CONFIG: config_of(folder, **changes)})
        with pytest.raises(ModelError, match=message):
            load_model(f"org/{name}")


def test_a_repository_that_was_half_updated(writer, folder):
    """New weights beside the old config, as from a tool that commits files one by one."""
    publish(folder, ID)
    other = save_model(make_model("wrn10_1", negative_slope=0.1).train(), folder.parent / "other")
    torch.manual_seed(9)
    model = make_model("wrn10_1")
    with torch.no_grad():
        model.head.weight.add_(1)
    save_model(model, other)
    writer.edit(ID, {WEIGHTS: (other / WEIGHTS).read_bytes()})
    with pytest.raises(ModelError, match="sha256"):
        load_model(ID)


def test_paths_of_a_hostile_repository_stay_inside(writer, folder, tmp_path):
    files = contents(folder)
    hostile = {"../evil.txt": b"x", "/tmp/evil.txt": b"x", "a/../../../evil.txt": b"x"}
    writer.add_repo("org/hostile", {name: files[name] for name in (WEIGHTS, CONFIG)} | hostile, checked=False)
    cache = tmp_path / "cache"
    failure = failure_of(lambda: load_model("org/hostile", cache_dir=cache))
    assert failure is None or "org/hostile" in failure
    assert not list(tmp_path.rglob("evil.txt"))
    assert not Path("/tmp/evil.txt").exists()


def test_no_token_in_anything(hub, folder, caplog, tmp_path):
    secret = "hf_" + "s3cretS3CRET" * 3
    hub.tokens[secret] = hub.tokens[hub.write_token]
    texts = []
    with caplog.at_level(logging.DEBUG), hub.client(token=secret, backoff=False):
        publish(folder, ID)
        load_model(ID)
        for fault in (Fault(kind="status", status=403, times=9), Fault(kind="drop", times=99)):
            for act in (lambda: publish(folder, "org/new"), lambda: load_model(ID, cache_dir=tmp_path / "empty")):
                with hub.fault(fault), pytest.raises(ModelError) as caught:
                    act()
                error = caught.value
                while error is not None:
                    texts.append(f"{error!r} {error}")
                    error = error.__cause__
    texts += [record.getMessage() for record in caplog.records]
    texts += [content.decode(errors="replace") for content in hub.files(ID).values()]
    assert not [text for text in texts if "s3cret" in text]


# Find


def test_sources_on_the_hub(writer, folder, caplog):
    publish(folder, ID)
    writer.add_repo("org/broken", {CARD: "---\ntags: [cartl_hub]\n---\n", CONFIG: "{"})
    writer.add_repo("org/foreign", {CARD: "---\ntags: [timm]\n---\n"})
    (found,) = [info for info in list_sources(hub=True) if info.where == "Hub"]
    report = json.loads((folder / "report.json").read_text())
    assert (found.id, found.architecture, found.data, found.revision) == (ID, "wrn10_1", "org/toys", writer.commits(ID)[0].oid)
    assert found.clean_acc == pytest.approx(report["clean"]["accuracy"])
    assert found.size == (folder / WEIGHTS).stat().st_size
    assert "org/broken is left out" in caplog.text
    assert not [info for info in list_sources(hub=True, author="others") if info.where == "Hub"]
    assert not [seen for seen in writer.requests if seen.method == "GET" and WEIGHTS in seen.path]
    report["context"]["weights_sha256"] = "0" * 64
    writer.edit(ID, {"report.json": json.dumps(report)})  # of other weights
    (found,) = [info for info in list_sources(hub=True) if info.where == "Hub"]
    assert found.clean_acc is found.attack is found.num_images is None
    with writer.down(), pytest.raises(ModelError, match="list of models"):
        list_sources(hub=True)


# Other clients


def test_from_pretrained_keeps_half_precision(tmp_path):
    model = make_model("wrn10_1")
    round_weights(model, torch.float16)
    folder = save_model(model, tmp_path / "half")
    again = RobustClassifier.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_from_pretrained_conventions(writer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = make_model("wrn10_1", negative_slope=0.1)
    model = RobustClassifier(base.backbone, architecture="wrn10_1", model_args=base.model_args, label_names=list("abc")).eval()
    commit = model.push_to_hub("org/slope")
    again = RobustClassifier.from_pretrained("org/slope", revision=commit.oid)
    assert torch.equal(logits(again), logits(model))
    assert (again.label_names, again.model_args) == (("a", "b", "c"), {"negative_slope": 0.1})
    assert torch.equal(logits(RobustClassifier.from_pretrained(again.save_pretrained(tmp_path / "local"))), logits(model))


def test_a_published_resnet_loads_with_plain_timm(writer, tmp_path):
    model = make_model("test_resnet").eval()
    publish(save_model(model, tmp_path / "model", card=render_card(model)), "org/resnet")
    script = (
        "import sys, timm, torch\n"
        "model = timm.create_model('hf-hub:org/resnet', pretrained=True).eval()\n"
        "assert 'cartl_hub' not in sys.modules\n"
        "cfg = timm.data.resolve_data_config(model=model)\n"
        "x = torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32)\n"
        "x = (x - torch.tensor(cfg['mean']).view(-1, 1, 1)) / torch.tensor(cfg['std']).view(-1, 1, 1)\n"
        "print(model(x).tolist(), cfg['crop_pct'])"
    )
    environment = os.environ | writer.environment(tmp_path / "cache")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    values, _, crop = done.stdout.strip().rpartition(" ")
    torch.testing.assert_close(torch.tensor(json.loads(values)), logits(model))
    assert crop == "1.0"


def test_our_networks_load_with_timm_after_import(writer, folder):
    publish(folder, ID)
    model = timm.create_model(f"hf-hub:{ID}", pretrained=True).eval()
    loaded = load_model(folder)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model((images - loaded.mean) / loaded.std), loaded(images))


def test_plain_clients_read_what_is_published(writer, folder):
    publish(folder, ID)
    files = writer.files(ID)
    assert load(files[WEIGHTS]).keys() == load_model(folder).backbone.state_dict().keys()
    assert ModelCard.load(ID).data.eval_results
    assert [seen.status for seen in writer.requests if seen.path == "/api/validate-yaml"]  # the client has it validated
    assert not [seen for seen in writer.requests if seen.path == "/api/validate-yaml" and seen.status != 200]


def test_the_default_transfer_is_xet(monkeypatch, folder, tmp_path):
    pytest.importorskip("hf_xet")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with LocalHub(xet=True) as hub, hub.client(token=hub.write_token, xet=True):
        publish(folder, ID)
        assert torch.equal(logits(load_model(ID)), logits(load_model(folder)))
        assert [seen for seen in hub.requests if "xet-write-token" in seen.path]
        assert [seen for seen in hub.requests if "xet-read-token" in seen.path]


def test_words_of_a_source_are_no_markdown_of_a_card():
    model = make_model("wrn10_1", num_classes=2)
    model.lineage = {
        "license": "mit\n\n## Robustness\n\n| PGD-1000 | 99.00 % |",
        "data": {"id": "my <img src=x> photos | 7"},
        "source": {"id": "org/`toy`"},
        "method": {"name": "NEFT"},
    }
    card = render_card(model)
    assert card.count("\n## Robustness") == 1
    assert "<img" not in card
    assert "photos \\| 7" in card
    hostile = "x\n\n## Header\n```\n<script>"
    model.lineage |= {
        "method": {"name": hostile},
        "batch_norm": {"name": hostile},
        "arguments": {"lr": hostile},
        "result": {"steps": 1, "seconds": 1.0, "images_per_second": 1.0, "weights": "last", "precision": hostile}
        | {"device": hostile, "stopped": hostile},
    }
    report = make_report(dropped=(hostile,), environment={"device": hostile})
    attacks = {hostile if name == "FGSM" else name: result for name, result in report.attacks.items()}
    checks = (Check("a", "warn", {}, hostile, hostile),)
    card = ModelCard(render_card(model, report=replace(report, attacks=attacks, checks=checks))).text
    assert "<script>" not in card
    assert "\n## Header" not in card
    assert card.count("```") == 4  # ours: code and arguments
    assert "`org/'toy'`" in card


def test_license_is_what_the_maker_states(tmp_path):
    source = make_model("wrn10_1", num_classes=3)
    source.lineage = {"license": "apache-2.0"}
    for license in (None, "cc-by-4.0"):
        tuner = RobustFineTuner(source, pictures(30), method=FineTuning(num_blocks=1), output_dir=tmp_path, license=license)
        folder = tuner.save(tmp_path / str(license))
        card, config = (folder / CARD).read_text(), json.loads((folder / "config.json").read_text())
        assert config["pretrained_cfg"].get("license") == license
        assert f"License of the weights: {license or 'not stated'}. Of the source's: apache-2.0." in card
        assert "not trained yet" in card
        assert ModelCard(card).data.license == license


def test_a_robust_accuracy_that_failed_its_checks_enters_no_table(folder):
    model, report = read_model(folder), read_report(folder)
    names = [result.metric_name for result in ModelCard(render_card(model, report=report)).data.eval_results]
    assert any("robust accuracy" in name for name in names)
    check = Check("gradient-free", "fail", {"accuracy, Square": 0.0}, "Gradients are masked.", "", 128)
    card = render_card(model, report=replace(report, checks=(*report.checks, check)))
    assert [result.metric_name for result in ModelCard(card).data.eval_results] == ["accuracy"]
    assert "the robust accuracy may be far too high" in card


def test_a_recipe_that_cannot_be_read_is_not_sent(writer, folder):
    (folder / "recipe.yaml").write_bytes("id: Größe".encode("latin-1"))
    with pytest.raises(PublishError, match=r"recipe\.yaml can't be published: expected YAML, encoded as UTF-8"):
        publish(folder, ID)
    assert not writer.requests
