"""Byte counts of the storage tracker against hand-computed ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from framework.training.memory import CpuMemoryTracker, device_peak_memory, reset_device_peak

FLOAT = 4


def test_chain_of_products_counts_each_output_and_frees_it() -> None:
    """Two intermediate products live at once, the first dies when the name is reused."""
    a = torch.ones(8, 16)
    with CpuMemoryTracker() as tracker:
        x = a @ torch.ones(16, 32)  # the ones live during the product only
        assert tracker.current == 8 * 32 * FLOAT
        assert tracker.peak == (16 * 32 + 8 * 32) * FLOAT
        tracker.reset_peak()
        w = torch.ones(32, 4)
        x = x @ w
        assert tracker.current == (32 * 4 + 8 * 4) * FLOAT
        assert tracker.peak == (8 * 32 + 32 * 4 + 8 * 4) * FLOAT
    del x, w
    assert tracker.current == 0  # frees are seen after the block, too


def test_views_and_in_place_writes_are_not_counted_again() -> None:
    """One storage, many tensors."""
    with CpuMemoryTracker() as tracker:
        x = torch.zeros(4, 6)
        views = [x.t(), x[1:], x.view(-1), x.detach(), *x.unbind(0), *x.split(2)]
        x.add_(1).mul_(2)
        torch.add(x, 1, out=x)
        assert tracker.current == tracker.peak == 4 * 6 * FLOAT
        del x
        assert tracker.current == 4 * 6 * FLOAT  # the views keep the storage
        del views
        assert tracker.current == 0


def test_storages_from_before_count_only_when_tracked() -> None:
    """Views of, and writes into, foreign storages stay foreign until `track`."""
    before = torch.zeros(10, 10)
    with CpuMemoryTracker() as tracker:
        view = before.t()
        before.add_(1)
        torch.mul(before, 2, out=before)
        assert tracker.current == 0
        tracker.track([before, view, before[2:]])
        assert tracker.current == 400
        tracker.track([before])
        assert tracker.current == 400
    del before, view
    assert tracker.current == 0


def test_resizes_change_the_count() -> None:
    """By operator, by out-variant and of the bare storage."""
    with CpuMemoryTracker() as tracker:
        x = torch.zeros(10)
        x.resize_(30)
        assert tracker.current == 120
        out = torch.empty(0)
        torch.add(x, 1, out=out)
        assert tracker.current == 240
        out.untyped_storage().resize_(0)
        assert tracker.current == 120
        out.untyped_storage().resize_(400)
        assert tracker.current == 520
        assert tracker.peak == 520
    plain = torch.UntypedStorage.resize_
    with CpuMemoryTracker(), CpuMemoryTracker():
        assert torch.UntypedStorage.resize_ is not plain
    assert torch.UntypedStorage.resize_ is plain


def test_literal_tensors_and_lists_of_results() -> None:
    """`torch.tensor` reports through `lift_fresh`; operators that return lists count each."""
    with CpuMemoryTracker() as tracker:
        literal = torch.tensor([1.0, 2.0, 3.0])
        assert tracker.current == 12
        results = torch._foreach_add([literal, literal], 1.0)
        assert tracker.current == 36
        del results
        assert tracker.current == 12


def test_two_trackers_nest() -> None:
    """The inner one sees its block only."""
    with CpuMemoryTracker() as outer:
        x = torch.zeros(5)
        with CpuMemoryTracker() as inner:
            y = torch.zeros(7)
        assert (outer.current, inner.current) == (48, 28)
        del x, y
        assert (outer.current, inner.current) == (0, 0)


def mlp(width: int, depth: int) -> nn.Sequential:
    """Linear and tanh in turn, no bias."""
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(width, width, bias=False), nn.Tanh())))


@pytest.mark.parametrize("rows", [8, 24])  # a row tensor is smaller, or larger, than a weight
@pytest.mark.parametrize("depth", [2, 3, 6])
def test_peak_of_a_multilayer_perceptron_is_the_closed_form(depth: int, rows: int) -> None:
    """Forward keeps each tanh output; backward trades them for weight gradients."""
    width = 16
    model, x = mlp(width, depth), torch.randn(rows, width)
    act, weight = rows * width * FLOAT, width * width * FLOAT
    with CpuMemoryTracker() as tracker:
        out = model(x)
        # Tanh keeps its output, which is the next linear's input; the linear's own output has died by then.
        assert tracker.current == depth * act
        assert tracker.peak == (depth + 1) * act
        tracker.reset_peak()
        grad = torch.ones_like(out)
        out.backward(grad)
        assert tracker.current == 2 * act + depth * weight
        # Live in the backward of the i-th linear from the end: out, grad, the outputs of the layers before it, the
        # gradient that came in and the one that goes out, i + 1 weight gradients. The first layer's input needs none.
        inner = [(2 + (depth - 1 - i) + 2) * act + (i + 1) * weight for i in range(depth - 1)]
        assert tracker.peak == max(*inner, 3 * act + depth * weight)
    del model, out, grad
    assert tracker.current == 0


def test_checkpointing_keeps_inputs_only_and_is_recomputed_under_the_mode() -> None:
    """Non-reentrant checkpointing of every layer: one row tensor each instead of two."""
    rows, width, depth = 24, 16, 4
    layers = [nn.Sequential(nn.Linear(width, width, bias=False), nn.Tanh(), nn.Tanh()) for _ in range(depth)]
    act, weight = rows * width * FLOAT, width * width * FLOAT
    kept, peaks = {}, {}
    for recompute in (False, True):
        x = torch.randn(rows, width)
        for layer in layers:
            layer.zero_grad()
        with CpuMemoryTracker() as tracker:
            h = x
            for layer in layers:
                h = checkpoint(layer, h, use_reentrant=False, preserve_rng_state=False) if recompute else layer(h)
            kept[recompute] = tracker.current
            tracker.reset_peak()
            h.sum().backward()
            peaks[recompute] = tracker.peak
            del h
        assert tracker.current == depth * weight
    assert kept == {False: 2 * depth * act, True: depth * act}
    # The recomputed layer's two tanh outputs exist during its backward: without a mode there they would be missing.
    assert peaks[True] >= depth * act + 2 * act


def test_reentrant_nested_backward_is_seen() -> None:
    """An autograd function that runs a backward pass inside its backward."""
    sizes: list[int] = []

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                out = leaf.exp()
                start = tracker.current
                torch.autograd.backward(out, grad)
                sizes.append(tracker.current - start)
            return leaf.grad

    x = torch.randn(100, requires_grad=True)
    with CpuMemoryTracker() as tracker:
        Replay.apply(x).sum().backward()
    assert sizes == [400]  # leaf.grad
    assert tracker.current == 400  # x.grad


def test_autocast_copies_are_counted_while_they_live() -> None:
    """The weight's bfloat16 copy is kept by autocast's cache and by the graph."""
    linear = nn.Linear(16, 32, bias=False)
    x = torch.randn(8, 16)
    with CpuMemoryTracker() as tracker:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = linear(x)
            assert tracker.current == 2 * (16 * 32 + 8 * 16 + 8 * 32)
        y.sum().backward()
        del y
    assert tracker.current == FLOAT * 16 * 32  # the gradient


class Doubled(torch.autograd.Function):
    """Adds in Python in its backward pass."""

    @staticmethod
    def forward(ctx, rows):
        return rows * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 1.5 + gradient * 0.5


def test_gradients_are_added_in_place_by_autograd_and_not_by_python() -> None:
    weights = torch.ones(1000, requires_grad=True)

    def peak(use) -> int:
        loss = use(weights * 1.0).sum()
        weights.grad, tracker = None, CpuMemoryTracker()
        with tracker:
            loss.backward()
        assert weights.grad is not None and tracker.current == weights.grad.nbytes
        return tracker.peak

    # A number for the loss, and two or three vectors: the sum is one of its summands, or another.
    assert peak(lambda rows: rows * 1.5 + rows * 0.5) == 4 + 2 * 4000
    assert peak(Doubled.apply) == 4 + 3 * 4000


def test_cpu_has_no_allocator_count() -> None:
    """The CUDA helpers are inert elsewhere."""
    reset_device_peak(torch.device("cpu"))
    assert device_peak_memory(torch.device("cpu")) is None
