"""Random numbers that depend on (seed, epoch, image) and on nothing else.

Each image has a 64-bit key. Its random numbers are hashes of that key and a counter (SplitMix64; Steele et al., "Fast
splittable pseudorandom number generators", 2014), so that they are the same on any device, for any batch size, for any
number of processes and after any interruption. A global generator gives none of that.
"""

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

SEEDS = (-(1 << 63), (1 << 63) - 1)  # the seeds that there are, inclusive

# Streams: one image draws independent numbers for each use.
CROP, FLIP, START, RESTART, CHOSEN, VIEW, AREA, COLOUR, BLUR, TURN, TILES = range(11)


def _signed(x: int) -> int:
    """A 64-bit number as torch's int64 holds it; products of int64 tensors wrap in the same way."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def image_keys(seed: int, epoch: int, indices: Tensor) -> Tensor:
    """Key of each image.

    Args:
        seed: Seed of the run.
        epoch: Number of the pass over the data; the same image gets new random numbers in each.
        indices: Position of each image in its data set, int64.

    Shape:
        [B] -> [B], int64.
    """
    key = torch.tensor(_signed(seed), dtype=torch.int64, device=indices.device)
    key = _mix(_mix(key + _GOLDEN) + epoch)
    return _mix(key + (indices + 1) * _GOLDEN)


def fold_in(keys: Tensor, data: int) -> Tensor:
    """New keys from old ones and a number, e.g. that of a restart."""
    return _mix(keys + _signed((data + 1) * _MIX_1))


def random_keys(num: int, device: torch.device) -> Tensor:
    """Keys from torch's global generator, for callers that have none of their own."""
    return torch.randint(-(1 << 63), (1 << 63) - 1, (num,), dtype=torch.int64).to(device)


def uniform(keys: Tensor, shape: tuple[int, ...] = (), *, stream: int) -> Tensor:
    """Uniform numbers of [0, 1), float32, in steps of 2**-24.

    Shape:
        [B] -> [B, *shape].
    """
    count = math.prod(shape)
    counters = torch.arange(1, count // 2 + 2, dtype=torch.int64, device=keys.device)
    bits = _mix(fold_in(keys, stream)[:, None] + counters * _GOLDEN).view(torch.int32)[:, :count]
    return (((bits >> 8) & 0xFFFFFF).float() * 2.0**-24).reshape(len(keys), *shape)


def normal(keys: Tensor, shape: tuple[int, ...], *, stream: int) -> Tensor:
    """Standard normal numbers (Box-Muller).

    Shape:
        [B] -> [B, *shape].
    """
    first, second = uniform(keys, (2, *shape), stream=stream).unbind(1)
    return (-2 * torch.log1p(-first)).sqrt() * torch.cos(2 * math.pi * second)


def step_seed(seed: int, step: int, process: int) -> int:
    """Seed of torch's global generator in one step, for random draws without keys: dropout."""
    return _signed((seed * 1_000_003 + step) * 4096 + process)


def kept_generators(device: torch.device) -> AbstractContextManager[Any]:
    """Give torch's generators of the CPU and of this device, and no others, the state that they had."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed torch's global generators of the CPU and of one device; ``torch.manual_seed`` also asks for all other accelerators,
    which takes longer than a small training step."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def permutation(seed: int, epoch: int, num: int) -> Tensor:
    """Order of ``num`` images in one epoch, on the CPU."""
    key = image_keys(seed, epoch, torch.tensor([-2]))
    return torch.randperm(num, generator=torch.Generator().manual_seed(int(key) & ((1 << 63) - 1)))
