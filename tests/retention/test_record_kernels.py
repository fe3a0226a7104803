"""Kernels of the record pass that packages bring along, by stand-ins that have their interface."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from framework.retention.attention import record

# As the packages' `flash_attn_func`: `[batch, tokens, heads, size]`, grouped heads; output, log-sum-exp, and for
# version 2 a third result.
STAND_IN = """
import torch

def flash_attn_func(q, k, v, softmax_scale=None, causal=False, return_attn_probs=False):
    assert return_attn_probs
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * softmax_scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    output = scores.softmax(-1) @ v.repeat_interleave(groups, 1)
    return (output.transpose(1, 2), scores.logsumexp(-1), {third})[:{results}]
"""


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Puts modules of these names and sources where they are found."""

    def put(**sources):
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source)
        record.packaged_kernels.cache_clear()

    for name in record.PACKAGES.values():
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    yield put
    record.packaged_kernels.cache_clear()
    for name in record.PACKAGES.values():
        sys.modules.pop(name, None)


@pytest.mark.parametrize("causal", [True, False])
def test_packages_give_output_and_log_sum_exp_in_our_layout(packages, causal):
    packages(
        flash_attn=STAND_IN.format(third=None, results=3), flash_attn_interface=STAND_IN.format(third=None, results=2)
    )
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 7, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 7, 8, generator=generator, dtype=torch.float64)
    want, want_lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), 0.0, causal, scale=0.3
    )
    kernels = record.packaged_kernels()
    assert [*kernels] == ["flash-attn 2", "flash-attn 3"]
    for kernel in kernels.values():
        output, lse = kernel(query, key, value, causal, 0.3)
        torch.testing.assert_close(output, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)


def test_a_package_that_cannot_be_imported_is_left_out(packages, caplog):
    packages(flash_attn="raise ImportError('undefined symbol: _ZN3c10')", flash_attn_interface="")
    with caplog.at_level(logging.WARNING):
        assert record.packaged_kernels() == {}
    first, second = (entry.getMessage() for entry in caplog.records)
    assert first == "flash-attn 2 is installed but cannot be used: undefined symbol: _ZN3c10"
    assert second.startswith("flash-attn 3 is installed but cannot be used:") and "flash_attn_func" in second


@pytest.mark.parametrize(
    ("capability", "size", "names"),
    [
        ((7, 5), 64, []),
        ((8, 0), 128, ["FlashAttention-2", "cuDNN", "flash-attn 2"]),
        ((9, 0), 128, ["FlashAttention-2", "cuDNN", "flash-attn 2", "flash-attn 3"]),
        ((9, 0), 192, ["FlashAttention-2", "flash-attn 2", "flash-attn 3"]),
        ((10, 0), 128, ["FlashAttention-2", "cuDNN", "flash-attn 2"]),
        ((9, 0), 512, []),
    ],
)
def test_devices_and_heads_have_their_kernels(packages, monkeypatch, capability, size, names):
    source = STAND_IN.format(third=None, results=2)
    packages(flash_attn=source, flash_attn_interface=source)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    query = SimpleNamespace(shape=(1, 4, 16, size), device="cuda")
    assert [*record._candidates(query)] == names
