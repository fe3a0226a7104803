"""NF4 layers against bitsandbytes' own, what is quantised, and what adapters beside it give."""

from __future__ import annotations

import logging
from typing import Any

import families
import pytest
import torch
from torch import nn

from framework.config import AdapterConfig
from framework.config.adapters import ADAPTER_METHODS, CALLS_ITS_LAYERS, packed_problem
from framework.errors import UserError
from framework.extras import bitsandbytes
from framework.models import count_parameters, load_model, read_architecture
from framework.models.adapters import add_adapter
from framework.models.products import matrix_products
from framework.models.quantization import (
    BLOCK,
    NF4Linear,
    pack,
    packed_bytes,
    quantizable,
    quantize,
    unpack,
)
from framework.retention import blocks_of

LORA = {"kind": "lora", "rank": 2, "alpha": 4.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 8.0},
    "vera": {"rank": 4},
    "randlora": {"rank": 4, "alpha": 80.0},
    "oft": {"options": {"oft_block_size": 4}},
    "boft": {"options": {"boft_block_size": 4}},
    "fourierft": {"options": {"n_frequency": 20}},
    "miss": {"rank": 4},
    "trainable_tokens": {"options": {"token_indices": [*range(5, 30)]}},
    "c3a": {"options": {"block_size": 4}},
    "gralora": {"rank": 4, "alpha": 8.0},
    "pvera": {"rank": 4},
    "road": {"options": {"group_size": 4}},
    "vblora": {"rank": 4, "options": {"num_vectors": 16, "vector_length": 4}},
    "waveft": {"options": {"n_frequency": 20}},
}
VARIANTS = {
    "rslora": ("lora", {"rank": 4, "alpha": 8.0, "options": {"use_rslora": True}}),
    "lora with biases": ("lora", {"rank": 4, "alpha": 8.0, "options": {"lora_bias": True, "bias": "all"}}),
    "lora with dropout": ("lora", {"rank": 4, "alpha": 8.0, "dropout": 0.5}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (16, 32), (96, 128), (300, 1088)], ids=str)
def test_outputs_and_gradients_are_those_of_bitsandbytes(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0]).to(dtype)
    theirs = bitsandbytes().nn.Linear4bit(shape[1], shape[0], compute_dtype=dtype, quant_type="nf4").to(dtype)
    theirs.load_state_dict(linear.state_dict())
    theirs.to("cpu")
    ours = NF4Linear(linear, pack(linear.weight))
    x = torch.randn(2, 3, shape[1], dtype=dtype, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    output, expected = ours(x), theirs(other)
    assert output.dtype == dtype and torch.equal(output, expected)
    grad = torch.randn_like(output)
    output.backward(grad), expected.backward(grad)
    assert torch.equal(x.grad, other.grad)
    torch.testing.assert_close(ours.bias.grad, grad.flatten(0, 1).sum(0))
    assert torch.equal(ours.weight.view(-1), theirs.weight.data.view(-1))


@pytest.mark.parametrize(("autocast", "dtype"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)])
def test_under_autocast_it_computes_like_the_dequantised_layer(autocast: torch.dtype, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    packed = pack(linear.weight)
    ours, x = NF4Linear(linear, packed), torch.randn(5, 64, requires_grad=True)
    linear.weight = nn.Parameter(unpack(packed, (32, 64), torch.float32), requires_grad=False)
    with torch.autocast("cpu", autocast):
        results = [layer(x) for layer in (ours, linear)]
    assert results[0].dtype == dtype and torch.equal(*results)
    grads = [torch.autograd.grad(result.float().square().sum(), x)[0] for result in results]
    assert grads[0].dtype == torch.float32 and torch.equal(*grads)


def test_an_element_takes_a_little_more_than_four_bits() -> None:
    for shape in ((4, 16), (64, 64), (300, 1088), (1024, 4096)):
        held = sum(tensor.nbytes for tensor in pack(torch.randn(shape)))
        assert held == packed_bytes(shape[0] * shape[1])
        assert [tensor.shape for tensor in pack(torch.empty(shape, device="meta"))] == [
            tensor.shape for tensor in pack(torch.randn(shape))
        ]
    assert 8 * packed_bytes(4096 * 4096) / 4096**2 == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-5)


def test_slabs_do_not_change_what_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(24, 80).to(torch.bfloat16)
    whole = pack(matrix)
    monkeypatch.setattr("framework.models.quantization._SLAB", 4 * BLOCK)
    assert all(map(torch.equal, pack(matrix), whole))


def test_the_error_is_that_of_sixteen_quantiles() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(512, 512)
    restored = unpack(pack(matrix), (512, 512), torch.float64)
    assert torch.equal(restored, unpack(pack(matrix), (512, 512), torch.float32).double())
    # A normal variable in 4 bits; QLoRA's table 2 and any lossless copy are told apart by it.
    assert 0.08 < float((restored - matrix).norm() / matrix.norm()) < 0.10


def test_a_change_of_the_models_dtype_leaves_the_codes_alone() -> None:
    layer = NF4Linear(linear := nn.Linear(64, 32), pack(linear.weight))
    before = layer.matrix(torch.float32)
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16 and torch.equal(layer.matrix(torch.float32), before)


def test_integers_are_refused() -> None:
    layer = NF4Linear(linear := nn.Linear(64, 32), pack(linear.weight))
    with pytest.raises(UserError, match="converts what a linear layer gets to the dtype of its weight"):
        layer(torch.zeros(2, 64, dtype=torch.uint8))


def load(values: dict[str, Any], *, dtype: torch.dtype = torch.float32, adapter: Any = None, **options: Any) -> Any:
    fixed = {"path": None, "from_config": values, "task": "causal_lm", "attention": "sdpa", "seed": 0}
    adapter = AdapterConfig(**LORA) if adapter is None else adapter
    return load_model(**fixed, dtype=dtype, adapter=adapter, quantization="nf4", **options)


def test_linear_layers_of_the_blocks_are_quantised_and_nothing_else(
    family_config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    base = load(family_config("llama")).get_base_model()
    names = {name.removesuffix(".base_layer") for name, m in base.named_modules() if isinstance(m, NF4Linear)}
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    feed_forward = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert names == {f"model.layers.{block}.{name}" for block in (0, 1) for name in (*attention, *feed_forward)}
    assert not any(p.requires_grad for m in base.modules() if isinstance(m, NF4Linear) for p in m.parameters(False))
    assert caplog.messages == []


def test_experts_and_their_gates_stay_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = families.build("qwen3_moe", dtype=torch.float32)
    matrices = {n: p.numel() for n, p in model.model.layers.named_parameters() if p.dim() > 1}
    rest = {name: size for name, size in matrices.items() if "experts" in name or "gate" in name}
    assert rest and not any("experts" in name or "gate" in name for name in quantizable(model))
    with caplog.at_level(logging.WARNING):
        quantize(model)
    share = 100 * sum(rest.values()) / sum(matrices.values())
    (message,) = caplog.messages
    assert message.startswith(f"model.quantization: {share:.1f}% of the blocks' weights stay in float32: ")
    assert "experts.gate_up_proj" in message and "experts.down_proj" in message


class Gated(nn.Module):
    """Gates as some families have them: a linear layer for each expert's score, and one for a shared expert."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.shared_expert_gate = nn.Linear(64, 4, bias=False), nn.Linear(64, 1)
        self.k_proj, self.odd = nn.Linear(64, 4), nn.Linear(65, 63)


def test_gates_are_known_by_what_they_choose_among() -> None:
    model = families.build("llama", dtype=torch.float32)
    model.config.num_experts = 4
    model.model.layers[0].mlp = Gated()
    assert [name for name in quantizable(model) if "layers.0.mlp" in name] == ["model.layers.0.mlp.k_proj"]


def test_transposed_layers_are_refused(family_config: Any) -> None:
    with pytest.raises(UserError, match=r'model\.quantization: "nf4" finds no linear layer in the blocks of gpt2'):
        load(family_config("gpt2"))


def adapted(kind: str, settings: dict[str, Any], *, quantized: bool, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose adapter is not at its start, quantised or with the same matrices in float."""
    model = families.build("llama", dtype=dtype)
    if quantized:
        quantize(model)
    else:
        for name in quantizable(model):
            weight = model.get_submodule(name).weight
            weight.data = unpack(pack(weight), tuple(weight.shape), dtype)
    torch.manual_seed(3)
    model = add_adapter(model, AdapterConfig(kind=kind, **settings), task="causal_lm").train()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_((0.05 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    return model


def loss_and_gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    inputs = families.sample_inputs(model.get_base_model(), padding=5)
    torch.manual_seed(0)
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", [*CALLS_ITS_LAYERS, *VARIANTS])
def test_adapters_train_as_beside_the_dequantised_model(case: str) -> None:
    kind, settings = VARIANTS.get(case, (case, SETTINGS.get(case, {})))
    assert packed_problem(kind, settings.get("options", {})) is None
    loss, gradients = loss_and_gradients(adapted(kind, settings, quantized=True))
    expected_loss, expected = loss_and_gradients(adapted(kind, settings, quantized=False))
    assert torch.equal(loss, expected_loss)
    assert gradients and gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], value) for name, value in expected.items())


def test_the_other_methods_and_options_are_refused_by_name() -> None:
    refused = {kind for kind in ADAPTER_METHODS if packed_problem(kind, {}) is not None}
    assert refused == {*ADAPTER_METHODS} - {*CALLS_ITS_LAYERS}
    assert packed_problem("dora", {}) == (
        "kind",
        f'"dora" computes with the weights of its layers; use one of {", ".join(CALLS_ITS_LAYERS)}',
    )
    for options in ({"use_dora": True}, {"init_lora_weights": "pissa_niter_4"}, {"init_lora_weights": "olora"}):
        (name,) = options
        key, problem = packed_problem("lora", options) or ("", "")
        assert key == f"options.{name}" and "computes with the weights" in problem
    assert packed_problem("lora", {"use_dora": False, "init_lora_weights": "gaussian"}) is None


def test_quantised_modules_are_not_trained_in_full(family_config: Any) -> None:
    for name in ("up_proj", "mlp", "model.layers.1"):
        with pytest.raises(UserError, match=rf"modules_to_save: {name}: quantised"):
            load(family_config("llama"), adapter=AdapterConfig(**LORA, modules_to_save=[name]))
    model = load(family_config("llama"), adapter=AdapterConfig(**LORA, modules_to_save=["lm_head", "norm"]))
    assert model.get_base_model().lm_head.modules_to_save["default"].weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_adapter_has_the_dtype_that_it_has_beside_float_weights(family_config: Any, dtype: torch.dtype) -> None:
    model = load(family_config("llama"), dtype=dtype)
    expected = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}
    if dtype != torch.float16:
        ids = torch.arange(3, 19).reshape(2, 8)
        model(input_ids=ids, labels=ids).loss.backward()


def test_it_is_counted_as_what_it_stands_for(family_config: Any) -> None:
    values = family_config("llama")
    describe = {"path": None, "from_config": values, "adapter": AdapterConfig(**LORA)}
    plain, quantized = read_architecture(**describe), read_architecture(**describe, quantization="nf4")
    model = load(values)
    assert count_parameters(model) == (plain.parameters, plain.trainable_parameters)
    assert (quantized.parameters, quantized.trainable_parameters) == (plain.parameters, plain.trainable_parameters)
    # Two blocks of four attention matrices, two of them for half as many heads, and three of the feed-forward part.
    sizes = 2 * [32 * 32, 32 * 32, 32 * 16, 32 * 16, 32 * 48, 32 * 48, 32 * 48]
    assert quantized.quantized_parameters == sum(sizes)
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    held = sum(parameter.nbytes for layer in layers for parameter in layer.parameters(recurse=False))
    assert quantized.quantized_bytes == held == sum(map(packed_bytes, sizes))
    assert plain.quantized_parameters == plain.quantized_bytes == 0
    counted = [
        matrix_products(each.get_base_model(), blocks_of(each.get_base_model()))
        for each in (adapted("lora", SETTINGS["lora"], quantized=is_quantized) for is_quantized in (True, False))
    ]
    assert counted[0] == counted[1]
