"""Which linear layers to retain first: those whose outputs save most time for their bytes. Must not import torch.

Not to compute the output of a layer [in, out] again saves 2 in out operations a row, and keeping it takes out elements
of it: so the wider a layer's input, the better.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from framework.linear_names import retains, short_names

if TYPE_CHECKING:
    from framework.models.products import LinearLayer, ModelProducts


def retention_order(products: ModelProducts) -> tuple[str, ...]:
    """Names for `retention.retain_linears`, the best first; of equally good ones the smallest, then the first.

    The layers of one name are retained together: those of all blocks, and an adapter's matrices of one kind. All names
    together are what True stands for.
    """
    layers: dict[str, list[LinearLayer]] = {}
    names = short_names(_own(products))
    for block in products.blocks:
        for layer in block.linears:
            if retains(True, layer.path):
                name = names.get(layer.path, layer.path.rpartition(".")[2])
                layers.setdefault(name, []).append(layer)

    def worth(name: str) -> tuple[float, int]:
        outputs = sum(layer.outputs for layer in layers[name])
        return -sum(layer.inputs * layer.outputs for layer in layers[name]) / outputs, outputs

    return tuple(sorted(layers, key=worth))


def _own(products: ModelProducts) -> list[str]:
    """Paths of the layers that are the model's own: no part of another one."""
    paths = dict.fromkeys(layer.path for block in products.blocks for layer in block.linears)
    return [path for path in paths if path.rpartition(".")[0] not in paths]
