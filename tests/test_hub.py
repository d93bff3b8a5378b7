import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile

import pytest
import timm
import torch
from conftest import make_model, toy_data
from datasets import DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from reports import make_report
from safetensors.torch import load_file, save_file
from test_finetuner import pictures

import cartl_hub
from cartl_hub import FGSM, ImagePolicy, ModelError, RobustFineTuner, evaluate, load_model, save_model
from cartl_hub.files import sha256
from cartl_hub.folder import CONFIG, WEIGHTS, read_config
from cartl_hub.hub import bundled_models, list_sources, models_table
from cartl_hub.report.figures import Check
from cartl_hub.spectral import rescaled, weighted
from cartl_hub.weights import round_weights, weights_sha256


@pytest.fixture
def folder(wrn, tmp_path):
    wrn.label_names = ("ant", "bee", "cat")
    return save_model(wrn, tmp_path / "wrn10_1.toy")


def change_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(config))


def test_round_trip_is_bit_equal(model, tmp_path):
    model.label_names = ("ant", "bee", "cat")
    model.lineage = {"method": {"name": "FineTuning"}}
    images = torch.rand(4, 3, 32, 32)
    loaded = load_model(save_model(model, tmp_path / "model"))
    assert torch.equal(loaded(images), model.eval()(images))
    assert (loaded.label_names, loaded.image_policy, loaded.model_args) == (
        model.label_names,
        model.image_policy,
        model.model_args,
    )
    assert loaded.lineage["method"] == {"name": "FineTuning"}
    assert not loaded.training


def test_half_precision_is_rounded_before_it_is_measured_and_stored(wrn, tmp_path):
    images, before = torch.rand(4, 3, 32, 32), weights_sha256(wrn)
    exact = wrn.eval()(images)
    round_weights(wrn, torch.float16)
    rounded = wrn(images)
    assert not torch.equal(rounded, exact)
    assert torch.allclose(rounded, exact, atol=1e-2)
    folder = save_model(wrn, tmp_path / "half")
    state = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float16, torch.int64}
    loaded = load_model(folder)
    assert loaded.backbone.head.fc.weight.dtype == torch.float32
    assert torch.equal(loaded(images), rounded)
    assert weights_sha256(loaded) == weights_sha256(wrn) == sha256(folder / "model.safetensors") != before
    again = save_model(loaded, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert RobustFineTuner(folder, DatasetDict(train=pictures(36), test=pictures(12))).model.stored_as == torch.float32
    plain = timm.create_model("wrn10_1", num_classes=3)
    plain.load_state_dict(state)
    assert torch.equal(plain.eval()((images - loaded.mean) / loaded.std), rounded)


def test_weights_that_half_precision_cannot_hold(wrn):
    wrn.backbone.head.fc.weight.data[0, 0] = 1e6
    before = weights_sha256(wrn)
    with pytest.raises(ValueError, match=r"expected weights that torch.float16 can hold, got larger ones in head\.fc\.weight"):
        round_weights(wrn, torch.float16)
    assert weights_sha256(wrn) == before


@pytest.mark.parametrize("arguments", [{"negative_slope": 0.1}, {"convex_blocks": 3}, {"in_chans": 1}])
def test_arguments_of_the_architecture_are_saved(arguments, tmp_path):
    model = make_model("wrn10_1", **arguments)
    images = torch.rand(2, arguments.get("in_chans", 3), 32, 32)
    assert torch.equal(load_model(save_model(model, tmp_path / "model"))(images), model.eval()(images))


def test_nothing_but_safetensors_and_json(folder):
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]


def test_plain_timm_gives_the_same_logits(tmp_path):
    """timm's own loader and transform on a photo of another size: one contract for normalisation."""
    model = make_model("test_resnet")
    save_model(model, tmp_path / "model")
    plain = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(plain)
    transform = timm.data.create_transform(**config, is_training=False)
    photo = Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 50).convert("RGB")
    ours = load_model(tmp_path / "model")
    images = ours.image_policy(photo)[None].float() / 255
    torch.testing.assert_close(ours(images), plain(transform(photo)[None]), atol=1e-5, rtol=1e-5)


def test_our_architectures_load_in_plain_timm_after_import(folder):
    script = (
        "import cartl_hub, timm\n"
        f"model = timm.create_model({f'local-dir:{folder}'!r}, pretrained=True)\n"
        "print(type(model).__name__, timm.data.resolve_model_data_config(model)['crop_pct'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["WideResNet", "1.0"], done.stderr


def test_reparametrised_and_broken_weights_are_not_saved(wrn, tmp_path):
    with (
        rescaled(weighted(wrn.modules()), 1.0),
        pytest.raises(ValueError, match="expected plain weights, got the reparametrised"),
    ):
        save_model(wrn, tmp_path / "model")
    wrn.head.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"expected finite weights, got NaN or infinite values in head\.fc\.weight"):
        save_model(wrn, tmp_path / "model")
    assert not (tmp_path / "model" / WEIGHTS).exists()


def test_weights_that_are_not_finite_are_not_loaded(folder):
    state = load_file(folder / WEIGHTS)
    state["head.fc.weight"][0, 0] = torch.inf
    save_file(state, folder / WEIGHTS)
    own = json.loads((folder / CONFIG).read_text())["cartl_hub"]
    change_config(folder, cartl_hub=own | {"weights_sha256": sha256(folder / WEIGHTS)})
    with pytest.raises(ModelError, match=r"head\.fc\.weight in .*: expected finite weights, got NaN or infinite values"):
        load_model(folder)


def test_no_name_is_not_the_current_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(ModelError, match=r"expected a folder, a Hub id .*, got ''"):
        load_model("")


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch exploded",))


def test_others_may_read_the_weights_as_they_may_read_the_config(folder):
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


@pytest.mark.parametrize("kind", ["torch.save", "pickle", "zip"])
def test_pickles_are_refused_unread(kind, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = folder / WEIGHTS
    if kind == "torch.save":
        torch.save({"weight": Bomb()}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    else:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("data.pkl", pickle.dumps(Bomb()))
    with pytest.raises(ModelError, match=r"expected a safetensors file .* got a pickle"):
        load_model(folder)
    assert not (tmp_path / "exploded").exists()


def test_damaged_weights_are_refused(folder):
    path, content = folder / WEIGHTS, (folder / WEIGHTS).read_bytes()
    for damaged, message in (
        (content[:100], "are cut off"),
        (b"", "are cut off"),
        (b"<html>502</html>", "are none"),
        (content[:-10], "expected weights with sha256"),
        (content[:-1] + bytes([content[-1] ^ 1]), "expected weights with sha256"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match=message):
            load_model(folder)


def test_weights_of_another_network_are_refused(folder):
    state = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}  # the file is mapped, and overwritten
    for changed, message in (
        ({name: tensor for name, tensor in state.items() if name != "norm.weight"}, r"1 missing \(norm\.weight\)"),
        (state | {"extra": torch.zeros(1)}, r"1 unknown \(extra\)"),
        (state | {"norm.weight": torch.zeros(3)}, r"norm\.weight in .* expected shape \[64\], got \[3\]"),
        (state | {"norm.weight": torch.zeros(64, dtype=torch.int64)}, "expected dtype"),
    ):
        save_file(changed, folder / WEIGHTS)
        change_config(folder, cartl_hub={"format_version": 1})
        with pytest.raises(ModelError, match=message):
            load_model(folder)


def test_half_precision_weights_load_as_fp32(folder, wrn):
    state = {name: t.half() if t.is_floating_point() else t for name, t in load_file(folder / WEIGHTS).items()}
    save_file(state, folder / WEIGHTS)
    change_config(folder, cartl_hub={"format_version": 1})
    loaded = load_model(folder)
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())
    torch.testing.assert_close(loaded.head.weight, wrn.head.weight, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "resnet999"}, "has no architecture 'resnet999'; upgrade timm"),
        ({"architecture": "hf-hub:evil/model"}, "has no architecture"),
        ({"architecture": "../../etc"}, "has no architecture"),
        ({"cartl_hub": {"format_version": 99}}, "format version 1 or older .* got 99; upgrade cartl_hub"),
        ({"cartl_hub": []}, "expected a mapping"),
        ({"num_classes": "many"}, "expected a whole number as num_classes, got 'many'"),
        ({"num_classes": 4.5}, "expected a whole number as num_classes, got 4.5"),
        ({"label_names": ["one"]}, "expected 3 different label names, one for each class, got 1"),
        ({"model_args": {"act": {"a": 1}}}, "model_args must be a mapping of plain values"),
        ({"model_args": {"nonsense": 1}}, "doesn't make a wrn10_1"),
    ],
)
def test_configs_that_make_no_model(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(ModelError, match=message):
        load_model(folder)


def test_names_that_lead_nowhere(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("no_such_model", "expected a folder, a Hub id 'org/name' or one of"),
        (tmp_path / "empty", r"expected config\.json and model\.safetensors in"),
        (folder / WEIGHTS, "got the file"),
    ):
        with pytest.raises(ModelError, match=message):
            load_model(name)
    (folder / CONFIG).write_text("{")
    with pytest.raises(ModelError, match="expected JSON"):
        load_model(folder)


def test_a_report_of_another_normalisation_is_not_kept(wrn, tmp_path):
    folder = save_model(wrn, tmp_path / "model")
    make_report(context={"weights_sha256": weights_sha256(wrn)}).save(folder)
    save_model(wrn, folder, card="the same model, with another card")
    assert (folder / "report.json").exists()
    wrn.mean += 0.1
    save_model(wrn, folder)
    assert not (folder / "report.json").exists()


def test_half_precision_is_kept_for_weights_that_it_holds(wrn, tmp_path):
    round_weights(wrn, torch.float16)
    assert load_model(save_model(wrn, tmp_path)).stored_as == torch.float16
    with torch.no_grad():
        wrn.head.weight += 1e-6  # trained on by the user's own loop
    again = load_model(save_model(wrn, tmp_path))
    assert again.stored_as == torch.float32
    assert torch.equal(again.head.weight, wrn.head.weight)


def test_failed_checks_leave_a_robust_accuracy_out_of_the_list(wrn, tmp_path, monkeypatch):
    wrn.lineage = {"name": "wrn10_1.at_toy"}
    folder = save_model(wrn, tmp_path / "model_cards" / "wrn10_1.at_toy")
    failed = Check("gradient-free", "fail", {"accuracy, Square": 0.02}, "Masked.", "", 40)
    make_report(context={"weights_sha256": weights_sha256(wrn)}, checks=(failed,)).save(folder)
    monkeypatch.setattr("cartl_hub.hub.__file__", str(tmp_path / "cartl_hub" / "hub.py"))
    (info,) = list_sources()
    assert info.doubtful
    assert info.clean_acc is not None
    assert info.robust_acc is info.worst_acc is None
    assert "| checks failed |" in models_table()


def test_bundled_models_are_listed_and_load():
    found = bundled_models()
    assert {"wrn16_2.fdm4_cifar100", "wrn16_2.natural_cifar100"} <= found.keys()
    listed = [info for info in list_sources() if info.where == "bundled"]
    assert {info.id for info in listed} == found.keys()
    for info in listed:
        folder = found[info.id]
        config = read_config(folder)
        assert info.num_parameters == sum(p.numel() for p in load_model(info.id).backbone.parameters())
        assert info.size == (folder / WEIGHTS).stat().st_size <= 12e6
        assert config["cartl_hub"]["lineage"]["data"]["id"] == info.data


def test_a_damaged_model_does_not_end_the_list(wrn, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("cartl_hub.hub.__file__", str(tmp_path / "cartl_hub" / "hub.py"))
    for name in ("a", "b", "c"):
        folder = save_model(wrn, tmp_path / "model_cards" / name)
    (folder.parent / "b" / "config.json").write_text("{")
    assert [info.id for info in list_sources()] == ["a", "c"]
    assert "b is left out: expected JSON in" in caplog.text


def test_a_recipe_without_a_model_is_listed_without_numbers(tmp_path, monkeypatch):
    folder = tmp_path / "model_cards" / "wrn10_1.at_toy"
    folder.mkdir(parents=True)
    shutil.copyfile(bundled_models()["wrn16_2.fdm4_cifar100"] / "recipe.yaml", folder / "recipe.yaml")
    monkeypatch.setattr("cartl_hub.hub.__file__", str(tmp_path / "cartl_hub" / "hub.py"))
    (info,) = list_sources()
    assert (info.where, info.architecture, info.data, info.method) == ("recipe only", "wrn16_2", "uoft-cs/cifar100", "FDM")
    assert info.clean_acc is info.robust_acc is info.num_parameters is info.size is None
    for name in ("wrn10_1.at_toy", folder):
        with pytest.raises(ModelError, match=r"recipe only: `cartl-hub pretrain .*wrn10_1\.at_toy/recipe\.yaml` makes it"):
            load_model(name)


@pytest.mark.parametrize("name", ["config.json", "README.md"])
def test_a_foreign_folder_is_left_alone(wrn, tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"expected a new folder or a model folder of cartl_hub, got .* a foreign {name}"):
        save_model(wrn, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_could_not_be_loaded_back_is_not_written(wrn, tmp_path):
    wrn.label_names = ("cat", "cat", "dog")
    with pytest.raises(ValueError, match="expected 3 different label names"):
        save_model(wrn, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_save_that_fails_leaves_weights_and_report(folder, wrn, monkeypatch):
    report = evaluate(load_model(folder), toy_data(4), attacks={"FGSM": FGSM(eps=0.1)}, curve=None, checks=False, progress=False)
    save_model(load_model(folder), folder, report=report)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with torch.no_grad():
        wrn.head.weight.add_(1)
    with pytest.raises(OSError, match="No space left"):
        save_model(wrn, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_what_a_killed_process_left_goes_after_a_while(folder, wrn):
    old, new = folder / "config.json.1.partial", folder / "config.json.2.partial"
    for path in (old, new):
        path.write_text("{")
    os.utime(old, (0, 0))
    save_model(wrn, folder)
    assert (old.exists(), new.exists()) == (False, True)


def test_a_report_of_a_classifier_names_its_weights(folder, wrn):
    report = evaluate(load_model(folder), toy_data(4), attacks={"FGSM": FGSM(eps=0.1)}, curve=None, checks=False, progress=False)
    with torch.no_grad():
        wrn.head.weight.add_(1)
    with pytest.raises(ValueError, match="expected a report of these weights"):
        save_model(wrn, folder, report=report)


@pytest.mark.parametrize("crop", [{"crop_mode": "squash"}, {"crop_pct": 0.875}])
def test_policy_of_images_is_saved(wrn, tmp_path, crop):
    wrn.image_policy = ImagePolicy(size=(24, 40), mode="RGB", interpolation="bicubic", **crop)
    folder = save_model(wrn, tmp_path / "model")
    assert load_model(folder).image_policy == wrn.image_policy
    assert read_config(folder)["pretrained_cfg"]["crop_pct"] == wrn.image_policy.crop_pct


@pytest.mark.parametrize("license", [None, "apache-2.0"])
def test_license_of_the_weights_survives(tmp_path, license):
    model = make_model("wrn10_1", pretrained_cfg_overlay={"license": license})
    again = load_model(save_model(load_model(save_model(model, tmp_path / "a")), tmp_path / "b"))
    assert again.backbone.pretrained_cfg.get("license") == license


@pytest.mark.parametrize(
    "change",
    [
        {"pretrained_cfg": {"mean": [], "std": []}},
        {"pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.0, 0.2]}},
        {"pretrained_cfg": {"mean": [float("nan")] * 3, "std": [1.0] * 3}},
        {"pretrained_cfg": None},
        {"model_args": {"depth": 6004}},
        {"model_args": {"width": 60000}},
        {"architecture": "test_vit", "model_args": {"num_heads": 0}},
        {"architecture": "test_vit", "model_args": {"embed_dim": 20000}},
        {"architecture": "resnet18", "model_args": {"layers": [1, 1, 1, 60000]}},
        {"architecture": "resnet18", "model_args": {"block": "x"}},
        {"label_names": ["ant", "ant", "ant"]},
        {"label_names": 3},
        {"cartl_hub": {"lineage": 5}},
        {"cartl_hub": {"lineage": {"source": "resnet18"}}},
        {"cartl_hub": {"lineage": {"source": {"revision": 3}}}},
        {"cartl_hub": {"lineage": {"data": None}}},
        {"cartl_hub": {"lineage": {"data": {"split_off": {"seed": 0}}}}},
        {"cartl_hub": {"lineage": {"result": {"steps": "1"}}}},
        {"cartl_hub": {"lineage": {"notes": "none"}}},
        {"cartl_hub": {"image_policy": {"size": [32.5, 32]}}},
        {"cartl_hub": {"image_policy": {"size": [32, 32], "mode": "L"}}},
        {"cartl_hub": []},
    ],
    ids=str,
)
def test_hostile_configs_are_refused(folder, change):
    config = json.loads((folder / CONFIG).read_text())
    for key, value in change.items():
        config[key] = config[key] | value if isinstance(value, dict) and isinstance(config[key], dict) else value
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ModelError):
        load_model(folder)


def test_an_entry_of_the_lineage_that_cannot_be_read_is_named(folder):
    change_config(folder, cartl_hub={"lineage": {"result": {"steps": 1, "seconds": "long"}}})
    with pytest.raises(ModelError, match=r"lineage\.result\.seconds: .*number, got 'long'"):
        load_model(folder)


def test_files_that_are_none_are_refused(folder):
    (folder / CONFIG).write_text("[" * 200_000)
    with pytest.raises(ModelError):
        load_model(folder)
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    with pytest.raises(ModelError):
        load_model(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_config_is_a_model_or_an_error(folder, data):
    """Entries replaced by anything that JSON has."""
    original = (folder / CONFIG).read_text()
    config = json.loads(original)
    place = config
    while True:
        key = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    place[key] = data.draw(values | st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=5), values, max_size=3))
    (folder / CONFIG).write_text(json.dumps(config))
    try:
        model = load_model(folder)
    except ModelError:
        pass
    else:
        assert model(torch.rand(1, 3, 32, 32)).shape == (1, 3)
    finally:
        (folder / CONFIG).write_text(original)


def test_a_report_of_other_weights_does_not_stay(wrn, tmp_path):
    report = cartl_hub.evaluate(
        wrn.eval(),
        toy_data(6),
        attacks={"FGSM": FGSM(eps=8 / 255)},
        curve=None,
        progress=False,
        context={"weights_sha256": weights_sha256(wrn)},
    )
    folder = save_model(wrn, tmp_path / "model", report=report)
    save_model(wrn, folder)
    assert (folder / "report.json").exists()
    with torch.no_grad():
        wrn.head.weight.add_(1)
    with pytest.raises(ValueError, match="got one of"):
        save_model(wrn, folder, report=report)
    (folder / "mine.png").touch()
    save_model(wrn, folder)
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, "mine.png", WEIGHTS]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_header_is_the_model_or_an_error(folder, data):
    """Bytes of the safetensors header changed, cut out or put in, where no hash guards them."""
    weights, config = folder / WEIGHTS, folder / CONFIG
    original, described = weights.read_bytes(), config.read_text()
    expected = load_model(folder).backbone.state_dict()
    change_config(folder, cartl_hub={"format_version": 1})
    end = 8 + int.from_bytes(original[:8], "little")
    start = data.draw(st.integers(0, end))
    stop = data.draw(st.integers(start, min(end, start + 20)))
    weights.write_bytes(original[:start] + data.draw(st.binary(max_size=20)) + original[stop:])
    try:
        found = load_model(folder).backbone.state_dict()
    except ModelError:
        pass
    else:  # a header may name the same tensors otherwise, or order those of equal shape anew
        assert {name: tensor.shape for name, tensor in found.items()} == {name: t.shape for name, t in expected.items()}
    finally:
        weights.write_bytes(original)
        config.write_text(described)


def test_a_revision_is_that_of_the_hub_whatever_lies_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_model("wrn10_1")
    save_model(model, tmp_path / "org" / "toy")
    assert load_model("org/toy").lineage["loaded_from"] == {"id": "toy", "weights_sha256": weights_sha256(model)}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="org/toy"):
        load_model("org/toy", revision="main")
    for name in (tmp_path / "org" / "toy", "wrn16_2.fdm4_cifar100"):
        with pytest.raises(ModelError, match="expected a Hub id 'org/name' with revision='main'"):
            load_model(name, revision="main")


def test_a_folder_that_timm_saved(tmp_path):
    """timm repeats the number of classes, the channels and the pooling in its model_args."""
    backbone = timm.create_model("wrn10_1", num_classes=3).eval()
    timm.models.save_for_hf(backbone, tmp_path / "saved", safe_serialization=True)
    images = torch.rand(2, 3, 32, 32)
    loaded = load_model(tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), backbone((images - loaded.mean) / loaded.std))
    change_config(tmp_path / "saved", model_args={"num_classes": 4})
    with pytest.raises(ModelError, match="expected 3 as num_classes of model_args too, got 4"):
        load_model(tmp_path / "saved")
