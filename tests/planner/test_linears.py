"""Which linear layers are retained first."""

from __future__ import annotations

from framework.models.products import BlockProducts, LinearLayer, ModelProducts, Products
from framework.planner.linears import retention_order

LLAMA = (
    LinearLayer("self_attn.q_proj", 64, 64),
    LinearLayer("self_attn.k_proj", 64, 16),
    LinearLayer("self_attn.o_proj", 64, 64),
    LinearLayer("mlp.gate_proj", 64, 224),
    LinearLayer("mlp.down_proj", 224, 64),
)


def order(*linears: LinearLayer) -> tuple[str, ...]:
    block = BlockProducts("block", Products(), None, True, linears)
    return retention_order(ModelProducts((block, block), Products(), Products()))


def test_the_widest_inputs_come_first_then_the_smallest_outputs() -> None:
    assert order(*LLAMA) == ("down_proj", "k_proj", "q_proj", "o_proj", "gate_proj")


def test_layers_of_the_same_name_are_told_apart() -> None:
    found = order(
        LinearLayer("attn.c_proj", 64, 64), LinearLayer("mlp.c_fc", 64, 256), LinearLayer("mlp.c_proj", 256, 64)
    )
    assert found == ("mlp.c_proj", "attn.c_proj", "c_fc")


def test_an_adapters_matrices_go_together_and_its_up_projections_are_left_out() -> None:
    adapter = [
        LinearLayer(f"{layer.path}.lora_{side}", *sizes)
        for layer in LLAMA
        for side, sizes in (("A", (layer.inputs, 4)), ("B", (4, layer.outputs)))
    ]
    found = order(*LLAMA, *adapter)
    # On average their inputs are wider than the hidden state, since one is on the down projection.
    assert found == ("down_proj", "lora_A", "k_proj", "q_proj", "o_proj", "gate_proj")
