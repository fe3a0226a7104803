"""The replay's attention kernels against dense attention in float64."""

from dataclasses import dataclass

import pytest
import torch
from interpreted_triton import INTERPRETED, mend

from framework.retention import replay_kernels
from framework.retention.replay_kernels import Tile, attend, attend_backward

DEVICE = "cpu" if INTERPRETED else "cuda"
# Largest error over largest magnitude. What is rounded to 16 bits: weights, their gradients and the results.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@pytest.fixture(autouse=True, scope="module")
def mended_interpreter():
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            mend(patch)
        yield


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Many tiles, of both kinds, for few tokens."""
    set_tiles(monkeypatch, Tile(16, 32, 4, 1))


def set_tiles(monkeypatch, tile):
    monkeypatch.setattr(replay_kernels, "FLOAT32_TILE", tile)
    monkeypatch.setattr(replay_kernels, "TILES", dict.fromkeys(replay_kernels.TILES, tile))


@dataclass
class Problem:
    """Inputs of the kernels; `position`, `first`, `last` `[batch, slots]`."""

    tokens: int
    position: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor


def scattered(tokens, slots, fillers=0, seed=0):
    """Sorted positions without repetition, then fillers."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(tokens, generator=generator)[: slots - fillers].sort().values
    return torch.cat([chosen, torch.full((fillers,), -1)])


def problem(tokens, rows, interval):
    """A problem with positions `rows`, one row a sequence; `interval(sequence, position)` says what a token sees."""
    position = torch.stack(rows)
    seen = [[interval(b, p) if p >= 0 else (1, 0) for p in row] for b, row in enumerate(position.tolist())]
    bounds = torch.tensor(seen, dtype=torch.int32)
    return Problem(tokens, position.int(), bounds[..., 0].contiguous(), bounds[..., 1].contiguous())


def causal(_, position):
    return 0, position


def packed(*starts):
    return lambda _, position: (max(s for s in starts if s <= position), position)


def padded(*lengths):
    return lambda sequence, _: (0, lengths[sequence] - 1)


def alternating(_, position):
    """Intervals that are not in the order of the positions."""
    return (0, position) if position % 3 else (position // 2, 99)


PROBLEMS = {
    "causal": problem(100, [scattered(100, 40)], causal),
    "fillers": problem(70, [scattered(70, 24, fillers=15), scattered(70, 24)], causal),
    "nothing selected": problem(70, [scattered(70, 24, fillers=24), scattered(70, 24)], causal),
    "whole sequence": problem(70, [torch.arange(70)], causal),
    "suffix": problem(130, [torch.arange(98, 130)], causal),
    "sliding window": problem(150, [scattered(150, 60)], lambda _, p: (max(0, p - 69), p)),
    "packed documents": problem(130, [scattered(130, 50)], packed(0, 11, 50, 64, 115)),
    "bidirectional": problem(100, [scattered(80, 35), scattered(37, 35, fillers=10)], padded(80, 37)),
    "out of order": problem(100, [scattered(100, 48)], alternating),
}


def draw(p, *, heads, kv_heads, size, value_size, dtype, int8=False, spread=1.0):
    """Query, gradient of the output, keys and values with their scales, all on the device."""
    generator = torch.Generator().manual_seed(0)
    batch, slots = p.position.shape

    def normal(*shape):
        return spread * torch.randn(*shape, generator=generator)

    # Strided as a model's projections are.
    query = normal(batch, slots, heads, size).to(DEVICE, dtype).transpose(1, 2)
    grad = normal(batch, slots, heads, value_size).to(DEVICE, dtype).transpose(1, 2)
    matrices, scales = [], []
    for width in (size, value_size):
        matrix = normal(batch, kv_heads, p.tokens, width).to(DEVICE)
        if int8:
            scales.append(matrix.abs().amax(-1, keepdim=True) / 127)
            matrices.append((matrix / scales[-1]).round().to(torch.int8))
        else:
            scales.append(None)
            matrices.append(matrix.to(dtype))
    return query, grad, matrices, scales


def take(matrix, position):
    """`[batch, kv_heads, tokens, size]` at the positions, with some row in fillers."""
    index = position.clamp(min=0).long()[:, None, :, None].to(matrix.device)
    return matrix.gather(2, index.expand(-1, matrix.shape[1], -1, matrix.shape[-1]))


def reference(p, query, grad, key, value, scale, softcap=None):
    """Output, log-sum-exp and gradients by autograd on all scores, in float64."""
    query, grad, key, value = (tensor.double().cpu() for tensor in (query, grad, key, value))
    query.requires_grad_()
    rows = [take(matrix, p.position).requires_grad_() for matrix in (key, value)]
    group = query.shape[1] // key.shape[1]
    full = []
    for matrix, selected in zip((key, value), rows, strict=True):
        matrix = matrix.clone()
        for b, slots in enumerate(p.position >= 0):
            matrix[b, :, p.position[b, slots].long()] = selected[b][:, slots]
        full.append(matrix.repeat_interleave(group, 1))
    scores = scale * query @ full[0].mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    positions = torch.arange(p.tokens)
    seen = (p.first[..., None] <= positions) & (positions <= p.last[..., None])
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    sees = seen.any(-1)[:, None, :, None]
    weights = torch.where(sees, torch.where(sees, scores, 0.0).softmax(-1), 0.0)
    output = weights @ full[1]
    gradients = torch.autograd.grad(output, [query, *rows], grad)
    return output.detach(), scores.logsumexp(-1).detach(), gradients


def error(actual, expected):
    return ((actual.double().cpu() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def check(
    p, *, heads=1, kv_heads=1, size=64, value_size=None, dtype=torch.float32, softcap=None, int8=False, spread=1.0
):
    """Compare all results; returns the kernels' inputs and results."""
    value_size = value_size or size
    query, grad, matrices, scales = draw(
        p, heads=heads, kv_heads=kv_heads, size=size, value_size=value_size, dtype=dtype, int8=int8, spread=spread
    )
    exact = [m if s is None else (m * s).to(dtype) for m, s in zip(matrices, scales, strict=True)]
    scale = size**-0.5
    output, lse, gradients = reference(p, query, grad, *exact, scale, softcap)
    first, last, position = (tensor.to(DEVICE) for tensor in (p.first, p.last, p.position))
    options = {"scale": scale, "softcap": softcap, "key_scale": scales[0], "value_scale": scales[1]}
    got, got_lse = attend(query, *matrices, first, last, **options)
    selected = [take(matrix, position) for matrix in exact]
    got_gradients = attend_backward(grad, query, *matrices, got, got_lse, first, last, *selected, position, **options)
    tolerance = TOLERANCE[dtype]
    assert got.dtype == dtype and got.shape == output.shape and error(got, output) < tolerance
    assert got_lse.dtype == torch.float32
    finite = torch.isfinite(lse)
    assert torch.equal(torch.isfinite(got_lse.cpu()), finite) and torch.all(got_lse.cpu()[~finite] == -torch.inf)
    torch.testing.assert_close(got_lse.cpu()[finite].double(), lse[finite], rtol=tolerance, atol=tolerance)
    for name, actual, expected in zip(("query", "key", "value"), got_gradients, gradients, strict=True):
        assert actual.dtype == dtype and actual.shape == expected.shape
        assert error(actual, expected) < tolerance, name
    for results in (got, got_gradients[0]):
        assert torch.all(results.transpose(1, 2)[(p.first > p.last).to(DEVICE)] == 0)
    for results in got_gradients[1:]:
        assert torch.all(results.transpose(1, 2)[(p.position < 0).to(DEVICE)] == 0)
    return query, grad, matrices, selected, got, got_lse, got_gradients, options


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_kind_of_interval(name):
    check(PROBLEMS[name])


@pytest.mark.parametrize("tile", [Tile(32, 16, 4, 1), Tile(64, 128, 4, 1)], ids=str)
def test_results_do_not_depend_on_tiles(monkeypatch, tile):
    set_tiles(monkeypatch, tile)
    check(PROBLEMS["sliding window"])


@pytest.mark.parametrize(("size", "value_size"), [(16, 16), (80, 80), (128, 128), (256, 256), (96, 64), (64, 80)])
def test_head_sizes(size, value_size):
    check(PROBLEMS["fillers"], size=size, value_size=value_size)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
def test_grouped_heads(heads, kv_heads):
    check(PROBLEMS["fillers"], heads=heads, kv_heads=kv_heads, size=32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("int8", [False, True])
def test_sixteen_bits(dtype, int8):
    check(PROBLEMS["causal"], dtype=dtype, int8=int8)


def test_int8_keys_and_values_in_float32():
    check(PROBLEMS["fillers"], int8=True, heads=2, kv_heads=2)


@pytest.mark.parametrize("softcap", [2.0, 30.0])
def test_soft_cap(softcap):
    # Scores up to about 20: well beyond the smaller cap.
    check(PROBLEMS["causal"], softcap=softcap, spread=2.0)


def test_output_and_log_sum_exp_of_another_kernel():
    p = PROBLEMS["suffix"]
    query, grad, matrices, selected, _, _, expected, options = check(p)
    output, lse, _ = reference(p, query, grad, *matrices, options["scale"])
    # As a gathered copy of all rows' is strided.
    lse = lse.float().to(DEVICE).mT.contiguous().mT
    first, last, position = (tensor.to(DEVICE) for tensor in (p.first, p.last, p.position))
    output = output.float().to(DEVICE)
    actual = attend_backward(grad, query, *matrices, output, lse, first, last, *selected, position, **options)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_gradients_keep_layouts_and_may_come_expanded():
    p = PROBLEMS["fillers"]
    query, _, matrices, selected, output, lse, _, options = check(p)
    first, last, position = (tensor.to(DEVICE) for tensor in (p.first, p.last, p.position))
    arguments = (query, *matrices, output, lse, first, last, *selected, position)
    ones = torch.ones_like(output)
    expected = attend_backward(ones, *arguments, **options)
    actual = attend_backward(ones[:1, :1, :1, :1].expand_as(ones), *arguments, **options)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)
    assert actual[0].stride() == query.stride() and output.transpose(1, 2).is_contiguous()


def test_default_tiles(monkeypatch):
    monkeypatch.undo()
    check(problem(300, [scattered(300, 200)], causal), heads=1, dtype=torch.bfloat16)


@pytest.mark.parametrize("size", [40, 320])
def test_other_sizes_are_refused(size):
    query = torch.zeros(1, 1, 1, size)
    bounds = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"multiples of 16 up to 256, not of {size} and {size}"):
        attend(query, query, query, bounds, bounds, scale=1.0)
