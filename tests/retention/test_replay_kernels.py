"""The replay's attention kernels against dense attention in float64."""

import pytest
import torch
from interpreted_triton import INTERPRETED, mend
from replay_problems import KINDS, Inputs, Problem, by_kernels, causal, dense, scattered

from framework.retention.attention import replay_kernels, replay_key_programs
from framework.retention.attention.replay_kernels import Tile, attend

DEVICE = "cpu" if INTERPRETED else "cuda"
# Largest error over largest magnitude. Weights, their gradients and the results are rounded to 16 bits.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}


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


def out_of_order(_, position):
    """Intervals that are not in the order of the positions."""
    return (0, position) if position % 3 else (position // 2, 99)


PROBLEMS = KINDS | {"out of order": Problem.of(100, [scattered(100, 48)], out_of_order)}


def check(problem, dtype=torch.float32, **options):
    """Compare all results; returns the problem, its inputs and the kernels' results."""
    problem = problem.to(DEVICE)
    inputs = Inputs.draw(problem, dtype=dtype, **options)
    expected, actual = dense(problem, inputs), by_kernels(problem, inputs)
    for name, right in vars(expected).items():
        left = getattr(actual, name)
        assert left.shape == right.shape and left.dtype == (torch.float32 if name == "lse" else dtype), name
    assert max(actual.errors(expected).values()) < TOLERANCE[dtype], actual.errors(expected)
    blind, unselected = problem.first > problem.last, problem.position < 0
    assert torch.all(actual.lse.transpose(1, 2)[blind] == -torch.inf)
    for result, zero in (
        ("output", blind),
        ("grad_query", blind),
        ("grad_key", unselected),
        ("grad_value", unselected),
    ):
        assert torch.all(getattr(actual, result).transpose(1, 2)[zero] == 0), result
    return problem, inputs, actual


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_kind_of_interval(name):
    check(PROBLEMS[name])


@pytest.mark.parametrize("tile", [Tile(32, 16, 4, 1), Tile(32, 64, 4, 1)], ids=str)
def test_results_do_not_depend_on_tiles(monkeypatch, tile):
    set_tiles(monkeypatch, tile)
    check(PROBLEMS["sliding window"], size=32)


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
    problem, inputs, ours = check(PROBLEMS["suffix"], heads=2)
    others = dense(problem, inputs)
    # Rows that were gathered from those of all tokens are strided like this.
    lse = others.lse.float().mT.contiguous().mT
    gradients = inputs.backward(problem, others.output.float(), lse)
    for actual, expected in zip(gradients, (ours.grad_query, ours.grad_key, ours.grad_value), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_layouts_are_kept_and_gradients_may_come_expanded():
    problem, inputs, ours = check(PROBLEMS["fillers"])
    ones = torch.ones_like(ours.output)
    expected = inputs.backward(problem, ours.output, ours.lse, ones)
    actual = inputs.backward(problem, ours.output, ours.lse, ones[:1, :1, :1, :1].expand_as(ones))
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)
    assert ours.output.transpose(1, 2).is_contiguous() and ours.grad_query.stride() == inputs.query.stride()


def test_default_tiles(monkeypatch):
    monkeypatch.undo()
    check(Problem.of(300, [scattered(300, 200)], causal), dtype=torch.bfloat16)


@pytest.mark.parametrize("size", [40, 320])
def test_other_sizes_are_refused(size):
    query = torch.zeros(1, 1, 1, size)
    bounds = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"multiples of 16 up to 256, not of {size} and {size}"):
        attend(query, query, query, bounds, bounds, scale=1.0)


@pytest.mark.skipif(not INTERPRETED, reason="a compiled kernel keeps its constants")
def test_bounds_of_many_tiles_are_looked_at_in_turn(monkeypatch):
    monkeypatch.setattr(replay_key_programs, "_SCAN", 2)
    check(PROBLEMS["sliding window"])
