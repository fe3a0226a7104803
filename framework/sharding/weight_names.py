"""What the weights of a model are called, and whether a checkpoint's are the same: for every engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peft import PeftModel
from torch import Tensor, nn

from framework.errors import UserError
from framework.sharding.fragments import StoredTensors

_LISTED_NAMES = 8


@dataclass(frozen=True)
class WeightNames:
    """The names and whole shapes of a model's parameters and buffers, however they are held.

    Attributes:
        first: the first name of a tensor by each of its names; tied ones have several.
        shapes: the whole shape of a tensor by its first name.
        saved: first names of what a checkpoint holds, see `saved_tensors`.
    """

    first: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    saved: list[str]

    @classmethod
    def of(
        cls, model: nn.Module, whole_shape: Callable[[Tensor], tuple[int, ...]] = lambda tensor: tuple(tensor.shape)
    ) -> WeightNames:
        """Of a model, plain or wrapped by PEFT.

        Args:
            model: on any device, the meta device included, whole or sharded.
            whole_shape: of a tensor that is held in part, where its own shape does not say it.
        """
        first_names: dict[int, str] = {}
        tensors = tensors_by_name(model)
        first = {name: first_names.setdefault(id(tensor), name) for name, tensor in tensors.items()}
        shapes = {name: whole_shape(tensors[name]) for name in first_names.values()}
        return cls(first, shapes, [first_names[id(tensor)] for tensor in saved_tensors(model).values()])

    def mismatches(self, stored: StoredTensors) -> list[str]:
        """Lines about what stored weights lack, have too much, or have in another shape; none if they fit.

        Tied weights may be stored under any of their names, and what `saved` lacks may be there.
        """
        names = list(stored.names())
        found = {self.first[name] for name in names if name in self.first}
        missing = [name for name in self.saved if name not in found]
        unexpected = [name for name in names if name not in self.first]
        wrong_shape = [
            f"{name} {list(stored.shape(name))} in the file, {list(self.shapes[self.first[name]])} in the model"
            for name in names
            if name in self.first and stored.shape(name) != self.shapes[self.first[name]]
        ]
        kinds = (("missing", missing), ("unexpected", unexpected), ("other shape", wrong_shape))
        return [f"  {title}: {_listed(entries)}" for title, entries in kinds if entries]

    def check(self, stored: StoredTensors) -> None:
        """Refuse weights that do not fit.

        Raises:
            UserError: names or shapes are not those of the model; all are named.
        """
        if problems := self.mismatches(stored):
            raise UserError(
                f"{stored}: these weights are not those of the configured model; "
                "use the `model` section that they were saved with\n" + "\n".join(problems)
            )


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that a checkpoint of `model` holds, by their first name: the model's own, not copies.

    Args:
        model: The model, plain or wrapped by PEFT.

    Returns:
        Parameters in the order of `named_parameters` (only trainable ones with PEFT), then persistent buffers.
    """
    adapted = isinstance(model, PeftModel)
    trained: dict[str, Tensor] = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad or not adapted
    }
    return trained | _persistent_buffers(model)


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of `model` under every name it has."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    buffers: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                buffers[f"{prefix}.{name}" if prefix else name] = buffer
    return buffers


def _listed(entries: list[str]) -> str:
    more = f", and {len(entries) - _LISTED_NAMES} more" if len(entries) > _LISTED_NAMES else ""
    return ", ".join(entries[:_LISTED_NAMES]) + more
