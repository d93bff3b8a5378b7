"""Forward passes written out from the papers, on a state dict: logits, and what enters each block after the stem."""

import torch
import torch.nn.functional as F


def _norm(x, state, name, training):
    stored = (None, None) if training else (state[f"{name}.running_mean"], state[f"{name}.running_var"])
    return F.batch_norm(x, *stored, state[f"{name}.weight"], state[f"{name}.bias"], training=training)


def wide_resnet(state, x, depth, *, slope=0.0, convex_blocks=0, training=False):
    def active(x, name):
        return F.leaky_relu(_norm(x, state, name, training), slope)

    per_stage = (depth - 4) // 6
    x, inputs = F.conv2d(x, state["stem.weight"], padding=1), []
    for index in range(3 * per_stage):
        stage, block = divmod(index, per_stage)
        name, stride = f"stages.{stage}.{block}", 2 if stage and not block else 1
        inputs.append(x)
        before = active(x, f"{name}.norm1")
        branch = F.conv2d(before, state[f"{name}.conv1.weight"], stride=stride, padding=1)
        branch = F.conv2d(active(branch, f"{name}.norm2"), state[f"{name}.conv2.weight"], padding=1)
        kernel = state.get(f"{name}.shortcut.weight")
        shortcut = x if kernel is None else F.conv2d(before, kernel, stride=stride)
        convex = 3 * per_stage + 2 - index <= convex_blocks
        x = 0.5 * shortcut + 0.5 * branch if convex else shortcut + branch
    inputs.append(x)
    features = active(x, "norm").mean((2, 3))
    return F.linear(features, state["head.fc.weight"], state["head.fc.bias"]), [*inputs, features]


def resnet18(state, x, *, convex_blocks=0, training=False):
    def convolved(x, name, norm, stride=1):
        kernel = state[f"{name}.weight"]
        return _norm(F.conv2d(x, kernel, stride=stride, padding=kernel.shape[2] // 2), state, norm, training)

    x, inputs = convolved(x, "conv1", "bn1").relu(), []
    for index in range(8):
        name, stride = f"layer{index // 2 + 1}.{index % 2}", 2 if index in (2, 4, 6) else 1
        inputs.append(x)
        branch = convolved(x, f"{name}.conv1", f"{name}.bn1", stride).relu()
        branch = convolved(branch, f"{name}.conv2", f"{name}.bn2")
        down = f"{name}.downsample"
        shortcut = convolved(x, f"{down}.0", f"{down}.1", stride) if f"{down}.0.weight" in state else x
        convex = 9 - index <= convex_blocks
        x = (0.5 * shortcut + 0.5 * branch if convex else shortcut + branch).relu()
    features = x.mean((2, 3))
    return F.linear(features, state["fc.weight"], state["fc.bias"]), [*inputs, features]


def tiny_vit(state, x, *, training=False):
    """timm's "test_vit": patches of 16 pixels, width 64, 2 heads, 6 blocks."""

    def norm(x, name):
        return F.layer_norm(x, (64,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16).flatten(2).mT
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
    inputs = []
    for index in range(6):
        name = f"blocks.{index}"
        inputs.append(x)
        query, key, value = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").unflatten(2, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        mixed = ((query @ key.mT / 32**0.5).softmax(3) @ value).transpose(1, 2).flatten(2)
        x = x + linear(mixed, f"{name}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
    features = norm(x, "norm")[:, 0]
    return linear(features, "head"), [*inputs, features]
