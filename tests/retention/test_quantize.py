"""Levels and scales of retained keys and values, and the Triton kernels against torch."""

import pytest
import torch

from framework.retention.quantize import quantize, restore

interpreter = pytest.importorskip("triton.runtime.interpreter")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = (64, 16, 7, 1)


@pytest.fixture
def kernels(monkeypatch):
    """The kernels' module; where Triton's interpreter runs them it rounds to bfloat16 as GPUs do, not towards zero."""
    plain = interpreter._convert_float

    def rounding(values, input_dtype, output_dtype, mode):
        if output_dtype.name != "bf16":
            return plain(values, input_dtype, output_dtype, mode)
        bits = values.view("uint32")
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("uint16")

    monkeypatch.setattr(interpreter, "_convert_float", rounding)
    return pytest.importorskip("framework.retention.quantize_kernels")


def drawn(size, dtype, tokens=5, layout="tokens"):
    """`[2, 3, tokens, size]` as projections give it, fused ones (whose rows begin anywhere), or contiguous."""
    generator = torch.Generator().manual_seed(size)
    if layout == "heads":
        return torch.randn(2, 3, tokens, size, generator=generator).to(dtype)
    wide = torch.randn(2, tokens, 9, size, generator=generator).to(dtype)
    tensor = (wide[:, :, 3:6] if layout == "fused" else wide[:, :, :3].contiguous()).transpose(1, 2)
    tensor[0, 1, -1] = 0
    return tensor


def replacement(size, dtype):
    """Rows `[1, 3, 4, size]` and the tokens of `[2, 5]` that they stand for."""
    row_of_token = torch.full((2, 5), -1, dtype=torch.int32)
    row_of_token[0, 1], row_of_token[0, 3], row_of_token[1, 0], row_of_token[1, 4] = range(4)
    rows = torch.randn(1, 4, 3, size, generator=torch.Generator().manual_seed(1)).to(dtype).transpose(1, 2)
    return rows, row_of_token


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_element_is_off_by_half_a_scale_at_most(bits, dtype):
    for size in SIZES:
        tensor = drawn(size, dtype)
        levels, scales = quantize(tensor, bits)
        restored = restore(levels, scales, bits, size, dtype)
        assert restored.dtype == dtype and restored.shape == tensor.shape
        rounding = torch.finfo(dtype).eps / 2 * tensor.double().abs() if dtype.itemsize < 4 else 1e-5 * scales.double()
        error = (restored.double() - tensor.double()).abs()
        assert (error <= scales.double() / 2 + 1.01 * rounding).all()
        assert restored[0, 1, -1].eq(0).all()


@pytest.mark.parametrize(
    ("bits", "dtype", "scale"), [(8, torch.bfloat16, 4), (4, torch.bfloat16, 2), (4, torch.float32, 4)]
)
def test_bytes(bits, dtype, scale):
    for size in SIZES:
        levels, scales = quantize(drawn(size, dtype), bits)
        assert levels.nbytes == 2 * 3 * 5 * (size if bits == 8 else (size + 1) // 2)
        assert scales.nbytes == 2 * 3 * 5 * scale
        assert levels.untyped_storage().nbytes() == levels.nbytes


def test_what_is_on_the_grid_comes_back_exactly():
    for bits, largest in ((8, 127), (4, 7)):
        levels = torch.randint(-largest, largest + 1, (1, 2, 4, 9), generator=torch.Generator().manual_seed(1))
        levels[..., 0] = largest
        tensor = (levels * 0.5).to(torch.bfloat16)
        assert restore(*quantize(tensor, bits), bits, 9, torch.bfloat16).equal(tensor)


def test_long_sequences_are_done_in_parts_with_the_same_result(monkeypatch):
    tensor = drawn(16, torch.bfloat16, tokens=23)
    for bits in (8, 4):
        whole = quantize(tensor, bits)
        restored = restore(*whole, bits, 16, torch.bfloat16)
        with monkeypatch.context() as patch:
            patch.setattr("framework.retention.quantize._PART", 400)
            assert all(map(torch.equal, quantize(tensor, bits), whole))
            assert restore(*whole, bits, 16, torch.bfloat16).equal(restored)


def test_replaced_rows_are_those_given():
    rows, row_of_token = replacement(7, torch.float32)
    for bits in (8, 4):
        kept = quantize(drawn(7, torch.float32), bits)
        plain = restore(*kept, bits, 7, torch.float32)
        got = restore(*kept, bits, 7, torch.float32, rows, row_of_token)
        for sequence, token in row_of_token.ge(0).nonzero().tolist():
            plain[sequence, :, token] = rows[0, :, row_of_token[sequence, token]]
        assert got.equal(plain)


@pytest.mark.parametrize("layout", ["tokens", "fused", "heads"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_give_the_same_bits(kernels, dtype, bits, layout):
    for size in SIZES:
        tensor = drawn(size, dtype, layout=layout)
        levels, scales = quantize(tensor, bits)
        its_levels, its_scales = torch.empty_like(levels), torch.empty_like(scales)
        kernels.quantize_into(its_levels, its_scales, tensor, bits)
        assert its_levels.equal(levels) and its_scales.equal(scales)
        for given in ((None, None), replacement(size, dtype)):
            wanted = restore(levels, scales, bits, size, dtype, *given)
            restored = torch.empty_like(wanted)
            kernels.restore_into(restored, levels, scales, *given)
            assert restored.equal(wanted)


def test_a_kernel_is_compiled_once_for_all_lengths(kernels):
    """All that varies with the number of tokens is exempt from specialisation, and no constant comes from it."""
    varying = {
        kernels._quantize: {"count", "tokens", "batch_stride", "head_stride", "token_stride"},
        kernels._restore: {"count", "tokens", "head_stride", "row_stride"},
    }
    for kernel, names in varying.items():
        assert set(kernel.kwargs["do_not_specialize"]) == names
    lengths = (1, 5, 16, 4096)
    constants = [kernels._Launch(quantize(drawn(16, torch.bfloat16, n), 4)[0]).constants for n in lengths]
    assert all(each == constants[0] for each in constants)
    for size, unit in ((16, 16), (24, 1), (7, 1)):
        for layout in ("tokens", "fused", "heads"):
            strides = [drawn(size, torch.bfloat16, n, layout).stride()[:3] for n in lengths]
            assert {kernels._units(*each)[0] for each in strides} == {unit}
