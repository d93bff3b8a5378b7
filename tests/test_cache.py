import hashlib
from dataclasses import replace

import psutil
import pytest
import timm
import torch
from conftest import make_model
from torch import nn

from cartl_hub import (
    FDM,
    NEFT,
    PGD,
    AdversarialTraining,
    Augmentation,
    BatchNormPolicy,
    FeatureCache,
    FineTuning,
    LwF,
    StreamingData,
)
from cartl_hub.blocks import list_blocks
from cartl_hub.data import ImageData
from cartl_hub.models import Classifier
from cartl_hub.training import TrainingArguments, TrainingError, cache, loop, train
from cartl_hub.training.cache import FrozenPrefix, check_cache

ATTACK = PGD(eps=8 / 255, step_size=4 / 255, steps=2)


def arguments(**changes):
    defaults = {"epochs": 3, "batch_size": 8, "lr": 0.05, "precision": "fp32", "augmentation": None, "validation_attack": ATTACK}
    return TrainingArguments(**defaults | changes)


def trained(method, data, chosen, name="wrn10_1", **options):
    model = make_model(name)
    train(model, method, data, arguments=chosen, **options)
    return model.state_dict()


def equal(state, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in state.items())


def dense_net():
    torch.manual_seed(0)
    args = {"growth_rate": 4, "block_config": (3, 3), "num_classes": 3}
    return Classifier(timm.create_model("densenet121", **args))


@pytest.fixture(params=["wrn10_1", "test_resnet", "test_vit", "test_convnext", "densenet"])
def net(request):
    model = dense_net() if request.param == "densenet" else make_model(request.param)
    for parameter in model.head.parameters():
        nn.init.normal_(parameter)
    return model.to(memory_format=torch.channels_last)


def test_the_rest_gives_the_logits_of_the_model_wherever_it_is_cut(net):
    images = torch.rand(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    before = [(set(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks)) for module in net.modules()]
    whole = net.eval()(images)
    for num_blocks in {1, 2, 3, len(list_blocks(net)) // 2, len(list_blocks(net)) - 1}:
        with FineTuning(num_blocks=num_blocks).setup(net):
            prefix = FrozenPrefix(net, num_blocks, images)
            rows = prefix(images)
            with prefix.skipped():
                assert torch.equal(net(rows), whole)
                assert not torch.equal(net(rows * 2), whole)
    after = [(set(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks)) for module in net.modules()]
    assert after == before
    assert torch.equal(net(images), whole)


def test_frozen_modules_do_not_run_again(wrn, monkeypatch):
    images = torch.rand(2, 3, 32, 32)
    with FineTuning(num_blocks=2).setup(wrn):
        prefix = FrozenPrefix(wrn, 2, images)
        rows = prefix(images)
        monkeypatch.setattr(nn.Conv2d, "forward", None)
        with prefix.skipped():
            assert wrn(rows).shape == (2, 3)
        with pytest.raises(TypeError, match="not callable"):
            wrn(images)
    assert prefix.size == 64 * 8 * 8  # what enters the last norm, and nothing else


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("method", "name"),
    [(NEFT(num_blocks=1), "wrn10_1"), (NEFT(num_blocks=3), "wrn10_1"), (FineTuning(num_blocks=3), "test_vit")],
)
def test_without_augmentation_the_weights_are_those_of_an_uncached_run(method, name, precision, data):
    data = data.subset(range(21))  # the last part of the cache is smaller than a batch
    plain = trained(method, data, arguments(precision=precision), name)
    assert equal(plain, trained(method, data, arguments(precision=precision, cache=FeatureCache()), name))
    assert not equal(plain, make_model(name).state_dict())


def test_with_views_the_weights_are_those_of_a_run_whose_augmentation_repeats(data, monkeypatch):
    keys, method = loop.image_keys, NEFT(num_blocks=3)
    cached = trained(method, data, arguments(augmentation=Augmentation(), cache=FeatureCache(views=2)))
    plain = trained(method, data, arguments(augmentation=Augmentation()))
    monkeypatch.setattr(loop, "image_keys", lambda seed, epoch, indices: keys(seed, epoch % 2, indices))
    repeating = trained(method, data, arguments(augmentation=Augmentation()))
    assert equal(cached, repeating)
    assert not equal(cached, plain)


def test_dropout_behind_the_prefix_is_drawn_as_before(data):
    def run(**changes):
        model = make_model("test_vit", drop_rate=0.3)
        train(model, FineTuning(num_blocks=1), data, arguments=arguments(**changes))
        return model.state_dict()

    assert equal(run(), run(cache=FeatureCache()))


def test_rounded_features_train_and_validation_sees_the_whole_model(wrn, data):
    chosen = arguments(epochs=6, validate_every=6, cache=FeatureCache(dtype="bf16"))
    result = train(wrn, FineTuning(num_blocks=2), data, validation=data, arguments=chosen)
    right = (wrn(data.images.float() / 255).argmax(1) == data.labels).double().mean()
    assert result.validations[-1].clean_acc == pytest.approx(float(right))
    assert right > 0.6


class Attacking(FineTuning):
    """Says that it is natural, and is not."""

    natural = True

    def losses(self, model, batch):
        images = batch.images.requires_grad_()
        return {"loss": model(images).square().mean()}


class Broken(FineTuning):
    """Fails in the middle of a forward pass."""

    natural = True

    def losses(self, model, batch):
        model(batch.images)
        raise RuntimeError("broken")


def test_refused_before_the_first_step(wrn, data, monkeypatch):
    chosen = arguments(cache=FeatureCache())

    def run(method, model=wrn, bn=None, data=data):
        train(model, method, data, bn=bn, arguments=chosen)

    for method in (AdversarialTraining(attack=ATTACK, num_blocks=2), FDM(num_blocks=2, attack=ATTACK), LwF(), FineTuning()):
        with pytest.raises(ValueError, match=r"natural images through frozen blocks.*got \w+\(.*Train with cache=None"):
            run(method)
    with pytest.raises(ValueError, match=r"extractor_statistics='source' with the cache, got 'target'"):
        run(NEFT(num_blocks=2), bn=BatchNormPolicy(extractor_statistics="target"))
    with pytest.raises(ValueError, match=r"got blocks\.1\.drop_path1 \(DropPath.* which is random in training"):
        run(FineTuning(num_blocks=2), make_model("test_vit", drop_path_rate=0.5))
    with pytest.raises(ValueError, match="a method that does more with its images can't be natural"):
        run(Attacking(num_blocks=2))
    with pytest.raises(ValueError, match="expected one process with the cache, which is held by one, got 2"):
        check_cache(wrn, FineTuning(num_blocks=1), BatchNormPolicy(), data, 2)
    stream = StreamingData(None, data.label_names, data.policy, "image", "label")
    with pytest.raises(ValueError, match="data set of known size for the cache, got a stream"):
        check_cache(wrn, FineTuning(num_blocks=1), BatchNormPolicy(), stream, 1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    with pytest.raises(ValueError, match=r"expected 0\.000393 GB of memory .*24 images in 1 views, 4096 numbers.*got 1e-06"):
        run(FineTuning(num_blocks=2))


def test_a_module_that_draws_without_saying_so_is_found(wrn, data):
    stem = wrn.backbone.stem
    stem.register_forward_hook(lambda module, args, output: output + torch.rand_like(output))
    with pytest.raises(ValueError, match=r"the same for an image each time and in each batch, .* got a difference of up to"):
        train(wrn, FineTuning(num_blocks=2), data, arguments=arguments(cache=FeatureCache()))


def test_choices_that_do_not_fit():
    with pytest.raises(
        ValueError, match=r"cache needs the number of augmented views of each image, such as FeatureCache\(views=8"
    ):
        arguments(augmentation=Augmentation(), cache=FeatureCache())
    with pytest.raises(ValueError, match=r"cache has 2 augmented views, got augmentation=None"):
        arguments(cache=FeatureCache(views=2))
    with pytest.raises(ValueError, match="expected at most one view in the cache for each epoch, got 3 views and 2 epochs"):
        arguments(epochs=2, augmentation=Augmentation(), cache=FeatureCache(views=3))
    with pytest.raises(ValueError, match="views must be >= 1, got 0"):
        FeatureCache(views=0)
    with pytest.raises(ValueError, match="dtype must be 'fp32' or 'bf16', got 'fp16'"):
        FeatureCache(dtype="fp16")


def test_nothing_is_left_on_the_model_after_an_error(wrn, data, monkeypatch):
    copies, task = [], loop.Task
    before = [set(vars(module)) for module in wrn.modules()]
    monkeypatch.setattr(loop, "Task", lambda model, *args: copies.append(model) or task(model, *args))
    with pytest.raises(RuntimeError, match="broken"):
        train(wrn, Broken(num_blocks=2), data, arguments=arguments(cache=FeatureCache()))
    assert [set(vars(module)) for module in copies[0].modules()] == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in copies[0].modules())


# Files


@pytest.mark.parametrize("place", ["in the last image", "in the hash", "cut"])
def test_damaged_features_are_computed_again(data, tmp_path, place, caplog):
    chosen = arguments(epochs=1, cache=FeatureCache(folder=tmp_path))
    plain = trained(NEFT(num_blocks=3), data, chosen)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if place == "cut":
        del content[-1:]
    else:
        content[-1 if place == "in the hash" else -40] ^= 1
    path.write_bytes(content)
    assert equal(plain, trained(NEFT(num_blocks=3), data, chosen))
    assert "are damaged; they are computed again" in caplog.text
    caplog.clear()
    assert equal(plain, trained(NEFT(num_blocks=3), data, chosen))
    assert "damaged" not in caplog.text


def test_files_are_shared_by_runs_with_the_same_prefix(data, tmp_path, monkeypatch):
    chosen = arguments(epochs=1, cache=FeatureCache(folder=tmp_path))
    plain = trained(NEFT(num_blocks=3, beta=1.0), data, arguments(epochs=1))
    assert equal(plain, trained(NEFT(num_blocks=3, beta=1.0), data, chosen))
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size == 24 * 32 * 16 * 16 * 4 + 32  # and a hash
    built = path.stat().st_mtime_ns
    assert equal(plain, trained(NEFT(num_blocks=3, beta=1.0), data, chosen))
    trained(NEFT(num_blocks=3, beta=0.4), data, chosen)  # another method on the same features
    assert path.stat().st_mtime_ns == built
    trained(NEFT(num_blocks=2), data, chosen)
    darker = ImageData(data.labels, data.label_names, data.images // 2, data.policy)
    trained(NEFT(num_blocks=3), darker, chosen)
    other = make_model("wrn10_1")
    other.backbone.stem.weight.data.mul_(2)
    train(other, NEFT(num_blocks=3), data, arguments=chosen)
    chosen = arguments(epochs=1, augmentation=Augmentation(), cache=FeatureCache(views=1, folder=tmp_path))
    trained(NEFT(num_blocks=3), data, chosen)
    assert len(list(tmp_path.iterdir())) == 5
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match=r"GB of space in .* got 1e-06 GB\. Use fewer views, another folder"):
        trained(NEFT(num_blocks=1), data, chosen)


def test_a_part_of_a_file_is_not_taken_for_the_whole(data, tmp_path, monkeypatch):
    method, chosen = NEFT(num_blocks=3), arguments(epochs=1, cache=FeatureCache(folder=tmp_path))
    call, calls = FrozenPrefix.__call__, []

    def interrupted(self, images):
        if calls.append(1) or len(calls) == 5:  # two passes check, two fill parts of the file
            raise KeyboardInterrupt
        return call(self, images)

    monkeypatch.setattr(FrozenPrefix, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(method, data, chosen)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    plain = trained(method, data, arguments(epochs=1))
    assert equal(plain, trained(method, data, chosen))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert equal(plain, trained(method, data, chosen))
    assert path.read_bytes() == whole
    other = bytes(len(whole) - 32)
    path.write_bytes(other + hashlib.sha256(other).digest())
    with pytest.raises(TrainingError, match=r"features to be those of the images, got a difference of .* Remove the file"):
        trained(method, data, chosen)


# Resume


def test_an_interrupted_run_goes_on_with_or_without_the_cache(data, tmp_path, monkeypatch):
    method, step_of = NEFT(num_blocks=3), loop._Run._step

    def interrupted(self, wrapped, task, optimizer, trained, drawn, step):
        if step == 5:
            raise KeyboardInterrupt
        step_of(self, wrapped, task, optimizer, trained, drawn, step)

    plain = trained(method, data, arguments())
    for first, second in ((None, FeatureCache()), (FeatureCache(), None)):
        folder = tmp_path / str(first)
        monkeypatch.setattr(loop._Run, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained(method, data, arguments(cache=first), output_dir=folder)
        monkeypatch.setattr(loop._Run, "_step", step_of)
        assert equal(plain, trained(method, data, arguments(cache=second), output_dir=folder, resume=True))


def test_resuming_with_other_views_is_refused(data, tmp_path):
    def run(**changes):
        chosen = arguments(augmentation=Augmentation(), **changes)
        return trained(NEFT(num_blocks=1), data, chosen, output_dir=tmp_path, resume=True)

    run(cache=FeatureCache(views=2))
    with pytest.raises(ValueError, match=r"arguments\.cache\.views: then 2, now 3"):
        run(cache=FeatureCache(views=3))
    with pytest.raises(ValueError, match=r"arguments\.cache: then \{.*'views': 2.*\}, now None"):
        run()


def test_images_that_are_decoded_are_decoded_once_per_run(data):
    drawn = []

    def get(indices):
        drawn.extend(indices)
        return data.images[list(indices)]

    decoded = ImageData(data.labels, data.label_names, get, data.policy)
    assert equal(
        trained(FineTuning(num_blocks=2), data, arguments()),
        trained(FineTuning(num_blocks=2), decoded, arguments(cache=FeatureCache())),
    )
    assert len(drawn) == 24 + 8  # all of them, and the first batch, on which the cut is checked


def test_a_subclass_with_losses_of_its_own_is_not_natural():
    class Mixed(FineTuning):
        def losses(self, model, batch):
            return super().losses(model, replace(batch, images=batch.images.flip(0)))

    assert FineTuning(num_blocks=1).natural
    assert not Mixed(num_blocks=1).natural
    assert not type("Mixed", (NEFT,), {"losses": Mixed.losses})(num_blocks=1).natural
