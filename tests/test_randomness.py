import math

import pytest
import scipy.stats
import torch

from cartl_hub import randomness
from cartl_hub.randomness import (
    CROP,
    FLIP,
    RESTART,
    START,
    fold_in,
    image_keys,
    normal,
    permutation,
    random_keys,
    seed_generators,
    uniform,
)

UNLIKELY = 1e-4  # the numbers are fixed: a sound generator passes once and for all
WORD = 1 << 64


def keys_of(num: int, *, seed: int = 0, epoch: int = 0) -> torch.Tensor:
    return image_keys(seed, epoch, torch.arange(num))


# A second, slow implementation


def slow_mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % WORD
    return x ^ (x >> 31)


def slow_key(seed: int, epoch: int, index: int) -> int:
    key = slow_mix((slow_mix((seed + 0x9E3779B97F4A7C15) % WORD) + epoch) % WORD)
    return slow_mix((key + (index + 1) * 0x9E3779B97F4A7C15) % WORD)


def slow_fold_in(key: int, data: int) -> int:
    return slow_mix((key + (data + 1) * 0xBF58476D1CE4E5B9) % WORD)


def slow_uniform(key: int, num: int, stream: int) -> list[float]:
    """Two numbers of 24 bits from each word of SplitMix64, the lower half first."""
    state, numbers = slow_fold_in(key, stream), []
    while len(numbers) < num:
        state = (state + 0x9E3779B97F4A7C15) % WORD
        word = slow_mix(state)
        numbers += [(word >> 8) % (1 << 24) / (1 << 24), (word >> 40) / (1 << 24)]
    return numbers[:num]


def test_mix_is_splitmix64():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    states = 1234567 + torch.arange(1, 6) * randomness._GOLDEN
    assert [x % WORD for x in randomness._mix(states).tolist()] == published
    assert [slow_mix((1234567 + i * 0x9E3779B97F4A7C15) % WORD) for i in range(1, 6)] == published


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (7, 3), (-1, 0), (2**63 + 5, 10**6)])
@pytest.mark.parametrize("index", [0, 1, 49_999, 2**40])
def test_against_the_slow_implementation(seed, epoch, index):
    key = image_keys(seed, epoch, torch.tensor([index]))
    slow = slow_key(seed % WORD, epoch, index)
    assert int(key) % WORD == slow
    assert int(fold_in(key, 5)) % WORD == slow_fold_in(slow, 5)
    for stream in (CROP, FLIP, START):
        assert uniform(key, (5,), stream=stream).tolist() == [slow_uniform(slow, 5, stream)]


def test_known_values():
    """A published run can't be repeated once these change."""
    keys = image_keys(1, 2, torch.tensor([0, 1, 1000]))
    assert (CROP, FLIP, START, RESTART) == (0, 1, 2, 3)
    assert keys.tolist() == [-3245177477913270351, -1879621943980676689, 8634518384736587397]
    assert (uniform(keys, (3,), stream=START) * 2**24).tolist() == [
        [964537, 4026949, 2044552],
        [1730604, 15148749, 1307982],
        [9125822, 10950029, 1587082],
    ]
    expected = torch.tensor([[0.248076, -0.301949], [0.411751, -1.976294], [1.038195, 1.362560]])
    torch.testing.assert_close(normal(keys, (2,), stream=START), expected, rtol=0, atol=1e-5)
    assert permutation(1, 2, 10).tolist() == [4, 1, 0, 8, 5, 3, 9, 2, 6, 7]


# Distribution


@pytest.mark.parametrize("stream", [CROP, FLIP, START])
def test_uniform(stream):
    numbers = uniform(keys_of(500), (2000,), stream=stream)
    assert numbers.dtype == torch.float32
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert scipy.stats.kstest(numbers.flatten().numpy(), "uniform").pvalue > UNLIKELY
    counts = torch.bincount((numbers.flatten() * 1000).long(), minlength=1000)
    assert scipy.stats.chisquare(counts.numpy()).pvalue > UNLIKELY
    lowest = (numbers * 2**24).long() % 256  # the bits that a coarse histogram doesn't see
    assert scipy.stats.chisquare(torch.bincount(lowest.flatten(), minlength=256).numpy()).pvalue > UNLIKELY


def test_one_number_per_image_is_uniform_too():
    flips = uniform(keys_of(100_000), stream=FLIP)
    assert flips.shape == (100_000,)
    assert scipy.stats.kstest(flips.numpy(), "uniform").pvalue > UNLIKELY


def test_normal():
    numbers = normal(keys_of(500), (2000,), stream=START).flatten().double()
    assert numbers.isfinite().all()
    assert scipy.stats.kstest(numbers.numpy(), "norm").pvalue > UNLIKELY
    deviation = 1 / math.sqrt(len(numbers))
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((numbers**power).mean() - moment) < 4 * math.sqrt(variance) * deviation, power


# Independence

IMAGES, NUMBERS = 400, 1000
PAIRS = {
    "neighbouring images": lambda: (draw(keys_of(IMAGES + 1)[1:]), draw(keys_of(IMAGES + 1)[:-1])),
    "streams": lambda: (draw(keys_of(IMAGES), CROP), draw(keys_of(IMAGES), FLIP)),
    "epochs": lambda: (draw(keys_of(IMAGES)), draw(keys_of(IMAGES, epoch=1))),
    "seeds": lambda: (draw(keys_of(IMAGES)), draw(keys_of(IMAGES, seed=1))),
    "next image of another epoch": lambda: (draw(keys_of(IMAGES + 1)[1:]), draw(keys_of(IMAGES, epoch=1))),
    "epoch of another seed": lambda: (draw(keys_of(IMAGES, seed=1)), draw(keys_of(IMAGES, epoch=1))),
    "restarts": lambda: (draw(keys_of(IMAGES)), draw(fold_in(fold_in(keys_of(IMAGES), RESTART), 1))),
    "halves of one word": lambda: (draw(keys_of(IMAGES))[:, ::2], draw(keys_of(IMAGES))[:, 1::2]),
    "neighbouring words": lambda: (draw(keys_of(IMAGES))[:, 2:], draw(keys_of(IMAGES))[:, :-2]),
}


def draw(keys, stream=START):
    return uniform(keys, (NUMBERS,), stream=stream)


@pytest.mark.parametrize("pair", PAIRS)
def test_independent(pair):
    first, second = (numbers.flatten() for numbers in PAIRS[pair]())
    assert not (first == second).all()
    correlation = float(torch.corrcoef(torch.stack([first, second]).double())[0, 1])
    assert abs(correlation) < 4 / math.sqrt(len(first))
    cells = (first * 20).long() * 20 + (second * 20).long()  # correlation sees linear dependence only
    assert scipy.stats.chisquare(torch.bincount(cells, minlength=400).numpy()).pvalue > UNLIKELY


def test_normal_numbers_of_an_image_are_independent():
    numbers = normal(keys_of(4000), (20,), stream=START).double()
    covariance = numbers.T @ numbers / len(numbers) - torch.eye(20)
    assert covariance.abs().max() < 5 * math.sqrt(2 / len(numbers))


def test_keys_differ():
    keys = torch.cat([image_keys(seed, epoch, torch.arange(2000)) for seed in (0, 1, 2, -1) for epoch in range(20)])
    restarts = torch.cat([fold_in(keys[:2000], data) for data in range(20)])
    assert len(torch.cat([keys, restarts]).unique()) == len(keys) + len(restarts)


# What they don't depend on


@pytest.mark.parametrize("numbers", [uniform, normal])
def test_an_image_has_its_numbers_in_any_batch(numbers):
    together = numbers(keys_of(16), (3, 5, 5), stream=START)
    order = torch.tensor([7, 3, 15])
    torch.testing.assert_close(numbers(image_keys(0, 0, order), (3, 5, 5), stream=START), together[order], rtol=0, atol=0)
    for i in range(16):
        alone = numbers(image_keys(0, 0, torch.tensor([i])), (3, 5, 5), stream=START)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=0)


def test_a_longer_draw_begins_with_the_shorter_one():
    assert torch.equal(uniform(keys_of(4), (7,), stream=CROP), uniform(keys_of(4), (12,), stream=CROP)[:, :7])


def test_no_global_generator():
    before = torch.get_rng_state()
    keys = keys_of(8)
    uniform(keys, (4,), stream=CROP), normal(keys, (4,), stream=START), permutation(0, 0, 100)
    assert torch.equal(torch.get_rng_state(), before)


def test_step_seed():
    """Whatever the seed, torch takes it; those of small ones are as in runs before."""
    assert randomness.step_seed(3, 7, 1) == (3 * 1_000_003 + 7) * 4096 + 1
    for seed in (*randomness.SEEDS, -(2**40), -1, 0):
        torch.Generator().manual_seed(randomness.step_seed(seed, 10**6, 3))
    seeds = [randomness.step_seed(seed, step, 0) for seed in (-(2**40), -1, 0, 1) for step in (0, 1, 10**6)]
    assert len(set(seeds)) == len(seeds)


def test_random_keys_follow_the_global_generator():
    torch.manual_seed(5)
    first, second = random_keys(4, torch.device("cpu")), random_keys(4, torch.device("cpu"))
    torch.manual_seed(5)
    assert torch.equal(random_keys(4, torch.device("cpu")), first)
    assert len(torch.cat([first, second]).unique()) == 8


# Order of the images


@pytest.mark.parametrize("num", [1, 2, 1000])
def test_permutation(num):
    assert permutation(0, 0, num).sort().values.tolist() == list(range(num))


def test_permutations_of_epochs_and_seeds_are_unrelated():
    orders = [permutation(seed, epoch, 1000) for seed in (0, 1) for epoch in range(3)]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert (first == second).sum() < 10  # 1 is expected of unrelated ones
            assert abs(scipy.stats.spearmanr(first.numpy(), second.numpy()).statistic) < 4 / math.sqrt(1000)
    assert torch.equal(permutation(1, 2, 1000), orders[-1])


def test_each_image_gets_each_place():
    places = torch.stack([permutation(0, epoch, 10).argsort() for epoch in range(5000)])
    for image in range(10):
        assert scipy.stats.chisquare(torch.bincount(places[:, image], minlength=10).numpy()).pvalue > UNLIKELY


def test_generators_are_seeded_as_by_torch():
    torch.manual_seed(-5)
    expected = torch.rand(3)
    seed_generators(-5, torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected)
