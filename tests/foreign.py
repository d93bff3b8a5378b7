"""Networks of other projects, written out from their papers: each forward pass makes its weights, under the project's names."""

import math

import torch
import torch.nn.functional as F


class Weights(dict):
    """A state dict; a layer that isn't in it yet gets random weights, and batch norm random statistics."""

    def conv(self, name, x, out_chans, kernel=3, stride=1, padding=None, groups=1):
        in_chans = x.shape[1] // groups
        if f"{name}.weight" not in self:
            self[f"{name}.weight"] = torch.randn(out_chans, in_chans, kernel, kernel) / math.sqrt(in_chans * kernel**2)
        padding = kernel // 2 if padding is None else padding
        return F.conv2d(x, self[f"{name}.weight"], stride=stride, padding=padding, groups=groups)

    def norm(self, name, x):
        if f"{name}.weight" not in self:
            for leaf, low, high in (
                ("weight", 0.5, 1.5),
                ("bias", -0.5, 0.5),
                ("running_mean", -0.5, 0.5),
                ("running_var", 0.5, 1.5),
            ):
                self[f"{name}.{leaf}"] = torch.empty(x.shape[1]).uniform_(low, high)
            self[f"{name}.num_batches_tracked"] = torch.tensor(7)
        mean, var = self[f"{name}.running_mean"], self[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, self[f"{name}.weight"], self[f"{name}.bias"])

    def classifier(self, name, x, num_classes):
        features = x.mean((2, 3))
        if f"{name}.weight" not in self:
            self[f"{name}.weight"] = torch.randn(num_classes, features.shape[1]) / math.sqrt(features.shape[1])
            self[f"{name}.bias"] = torch.randn(num_classes)
        return F.linear(features, self[f"{name}.weight"], self[f"{name}.bias"])


def wide_resnet(w, x, *, depth=10, width=1, num_classes=5, slope=0.0, convex_blocks=0):
    """TRADES, RobustBench and CARTL (slope 0.1; its NEFT networks with convex sums)."""
    per_stage = (depth - 4) // 6
    x = w.conv("conv1", x, 16)
    for index in range(3 * per_stage):
        stage, block = divmod(index, per_stage)
        name, stride, out_chans = f"block{stage + 1}.layer.{block}", 2 if stage and not block else 1, 16 * width * 2**stage
        active = F.leaky_relu(w.norm(f"{name}.bn1", x), slope)
        branch = F.leaky_relu(w.norm(f"{name}.bn2", w.conv(f"{name}.conv1", active, out_chans, stride=stride)), slope)
        branch = w.conv(f"{name}.conv2", branch, out_chans)
        if x.shape[1] != out_chans:
            x = w.conv(f"{name}.convShortcut", active, out_chans, 1, stride)
        convex = index + 1 + convex_blocks > 3 * per_stage + 2  # blocks are counted from 1, norm and classifier included
        x = 0.5 * x + 0.5 * branch if convex else x + branch
    return w.classifier("fc", F.leaky_relu(w.norm("bn1", x), slope), num_classes)


def resnet(w, x, *, layers=(2, 2, 2, 2), bottleneck=False, num_classes=5, base=64, groups=1, names="kuangliu", convex_blocks=0):
    """Post-activation ResNets: of kuangliu ("linear"), torchvision ("fc", large stem) and CARTL ("conv2_x")."""
    large, cartl = names == "torchvision", names == "cartl"
    stem, stem_norm = ("conv1.0", "conv1.1") if cartl else ("conv1", "bn1")
    down = "downsample" if large else "shortcut"
    x = w.norm(stem_norm, w.conv(stem, x, 64, 7, 2) if large else w.conv(stem, x, 64)).relu()
    x = F.max_pool2d(x, 3, 2, 1) if large else x
    number = 0
    for stage, num_blocks in enumerate(layers):
        chans = 64 * 2**stage
        inner, out_chans = (chans * base * groups // 64, 4 * chans) if bottleneck else (chans, chans)
        for block in range(num_blocks):
            number += 1
            name = f"conv{stage + 2}_x.{block}" if cartl else f"layer{stage + 1}.{block}"
            stride = 2 if stage and not block else 1
            plan = [(inner, 3, stride, 1), (out_chans, 3, 1, 1)]
            if bottleneck:
                plan = [(inner, 1, 1, 1), (inner, 3, stride, groups), (out_chans, 1, 1, 1)]
            branch = x
            for layer, (width, kernel, step, parts) in enumerate(plan):
                conv, norm = f"conv{layer + 1}", f"bn{layer + 1}"
                if cartl:
                    conv, norm = f"residual_function.{3 * layer}", f"residual_function.{3 * layer + 1}"
                branch = w.norm(f"{name}.{norm}", w.conv(f"{name}.{conv}", branch, width, kernel, step, groups=parts))
                branch = branch if layer + 1 == len(plan) else branch.relu()
            if stride != 1 or x.shape[1] != out_chans:
                x = w.norm(f"{name}.{down}.1", w.conv(f"{name}.{down}.0", x, out_chans, 1, stride))
            x = (0.5 * (x + branch) if number + convex_blocks > sum(layers) + 1 else x + branch).relu()
    return w.classifier("linear" if names == "kuangliu" else "fc", x, num_classes)


def preact_resnet18(w, x, *, num_classes=5, activated_shortcut=True, final_norm=True):
    """Wong et al. (raw shortcut), Rice et al. (activated shortcut); both with a last norm, RobustBench's also without."""
    x = w.conv("conv1", x, 64)
    for index in range(8):
        name, stride, chans = f"layer{index // 2 + 1}.{index % 2}", 2 if index in (2, 4, 6) else 1, 64 * 2 ** (index // 2)
        active = w.norm(f"{name}.bn1", x).relu()
        branch = w.norm(f"{name}.bn2", w.conv(f"{name}.conv1", active, chans, stride=stride)).relu()
        branch = w.conv(f"{name}.conv2", branch, chans)
        if stride == 2:
            x = w.conv(f"{name}.shortcut.0", active if activated_shortcut else x, chans, 1, 2)
        x = x + branch
    return w.classifier("linear", w.norm("bn", x).relu() if final_norm else x, num_classes)
