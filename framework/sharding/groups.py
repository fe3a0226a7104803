"""What FSDP2 gathers and reduces together, and what it cannot take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn
from transformers import PreTrainedModel

from framework.errors import UserError
from framework.retention import blocks_of
from framework.retention.linears import PLAIN_CLASSES

_LISTED_NAMES = 5


def gathered_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules whose parameters are gathered together, apart from the rest of the model, by name.

    Each block, and the token embedding and the head, unless these share a parameter with anything else. What is left
    (final norm, position embeddings, tied embeddings) is gathered with the whole model.

    Args:
        model: the Hugging Face model.
    """
    modules = blocks_of(model)
    holders: dict[nn.Parameter, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        holders[parameter] = holders.get(parameter, 0) + 1
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    for name, module in model.named_modules():
        # Plain ones only: another one may be read without being called.
        plain = PLAIN_CLASSES.get(type(module), type(module)) in (nn.Embedding, nn.Linear)
        if module in ends and plain and all(holders[parameter] == 1 for parameter in module.parameters()):
            modules[name] = module
    return modules


def check_parameters(model: nn.Module, inner: PreTrainedModel, modules: Mapping[str, nn.Module]) -> None:
    """Refuse a model with parameters that FSDP2 cannot shard.

    Args:
        model: `inner`, or what wraps it.
        inner: the Hugging Face model.
        modules: of `gathered_modules`.

    Raises:
        UserError: a parameter lies outside of the Hugging Face model, has no dimension or belongs to several groups; or
            those that are trained in one group have different dtypes.
    """
    groups = {module: f"{name}" for name, module in modules.items()} | {inner: "the rest of the model"}
    owners: dict[nn.Parameter, set[str]] = {}
    for module, group in groups.items():
        for parameter in _own_parameters(module, groups):
            owners.setdefault(parameter, set()).add(group)
    problems = []
    dtypes: dict[str, set[str]] = {}
    for name, parameter in model.named_parameters():
        found = owners.get(parameter, set())
        if not found:
            problems.append(f"{name} lies outside of {type(inner).__name__}")
        elif len(found) > 1:
            problems.append(f"{name} is shared by {', '.join(sorted(found))}")
        elif parameter.dim() == 0:
            problems.append(f"{name} is a scalar")
        elif parameter.requires_grad:
            dtypes.setdefault(*found, set()).add(str(parameter.dtype).removeprefix("torch."))
    mixed = (f"{group} trains {' and '.join(sorted(kinds))}" for group, kinds in dtypes.items() if len(kinds) > 1)
    problems += mixed
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems[:_LISTED_NAMES])
        more = f"\n  and {len(problems) - _LISTED_NAMES} more" if len(problems) > _LISTED_NAMES else ""
        raise UserError(
            'sharding.engine: "fsdp" cannot shard this model; choose "deepspeed", or another model.adapter.kind\n'
            f"{listed}{more}"
        )


def _own_parameters(module: nn.Module, groups: Mapping[nn.Module, str]) -> Iterator[nn.Parameter]:
    """A module's parameters without those of groups inside of it."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if child not in groups:
            yield from _own_parameters(child, groups)
