"""Which parameters share a learning rate and a weight decay."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from framework.config import OptimizerConfig, ParameterGroupConfig
from framework.errors import UserError

LISTED_NAMES = 5


def parameter_groups(model: nn.Module, settings: OptimizerConfig) -> list[dict[str, Any]]:
    """The trainable parameters in the groups of a torch optimiser.

    A parameter belongs to the first of `settings.groups` that matches one of its names (tied parameters have several),
    else to the default. By default matrices decay, and norms and biases do not; a bias is told by its name too, because
    experts hold theirs as matrices. Embeddings decay if `settings.decay_embeddings` says so.

    Args:
        model: with its final parameters.
        settings: `weight_decay`, `decay_embeddings`, `groups` and `learning_rate` count.

    Returns:
        Groups that are not empty, in the order of `settings.groups` and the default last. Beside `params` and
        `weight_decay` each has `learning_rate_scale`, what it multiplies the step's learning rate with, and `pattern`,
        None for the default.

    Raises:
        UserError: a pattern matches no trainable parameter, or only such that an earlier one took; all are named.
    """
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    matched: set[int] = set()
    for parameter, own in names.items():
        if not parameter.requires_grad:
            continue
        place = _first_match(settings.groups, own)
        matched.add(place)
        group = settings.groups[place] if place < len(settings.groups) else None
        plain = parameter.dim() < 2 or own[0].endswith("bias")
        plain |= parameter in embeddings and not settings.decay_embeddings
        decay = 0.0 if plain else settings.weight_decay
        if group is not None and group.weight_decay is not None:
            plain, decay = False, group.weight_decay
        made = groups.setdefault(
            (place, plain),
            {
                "params": [],
                "weight_decay": decay,
                "learning_rate_scale": _scale(group, settings.learning_rate),
                "pattern": group and group.pattern,
            },
        )
        made["params"].append(parameter)
    unused = [group for place, group in enumerate(settings.groups) if place not in matched]
    if unused:
        raise UserError("\n".join(_unused(group, settings.groups, names) for group in unused))
    return [groups[key] for key in sorted(groups)]


def describe_groups(groups: Sequence[dict[str, Any]], learning_rate: float) -> list[str]:
    """What is trained alike, a line each: pattern, number of parameters, peak learning rate and weight decay."""
    counts: dict[tuple[str, float, float], int] = {}
    for group in groups:
        name = "" if group["pattern"] is None else f'"{group["pattern"]}": '
        alike = (name, learning_rate * group["learning_rate_scale"], group["weight_decay"])
        counts[alike] = counts.get(alike, 0) + sum(parameter.numel() for parameter in group["params"])
    return [
        f"{name}{count:,} parameters, learning rate {rate:g}, weight decay {decay:g}"
        for (name, rate, decay), count in counts.items()
    ]


def _first_match(groups: Sequence[ParameterGroupConfig], names: list[str]) -> int:
    """The place of the first group that matches a name; behind the last for none."""
    matches = (place for place, group in enumerate(groups) if any(re.search(group.pattern, name) for name in names))
    return next(matches, len(groups))


def _scale(group: ParameterGroupConfig | None, learning_rate: float) -> float:
    if group is None:
        return 1.0
    if group.learning_rate is not None:
        return group.learning_rate / learning_rate
    return 1.0 if group.learning_rate_scale is None else group.learning_rate_scale


def _unused(group: ParameterGroupConfig, groups: Sequence[ParameterGroupConfig], names: dict[Tensor, list[str]]) -> str:
    found = {name: parameter for parameter, own in names.items() for name in own if re.search(group.pattern, name)}
    start = f'optimizer.groups: "{group.pattern}" matches no '
    if any(parameter.requires_grad for parameter in found.values()):
        earlier = [other.pattern for other in groups[: groups.index(group)]]
        taken = dict.fromkeys(pattern for pattern in earlier for name in found if re.search(pattern, name))
        patterns = ", ".join(f'"{pattern}"' for pattern in taken)
        return f"{start}parameter that the groups before it ({patterns}) leave over; put it before them"
    if found:
        listed = ", ".join(list(found)[:LISTED_NAMES])
        return f"{start}trained parameter; it matches frozen ones: {listed}"
    trainable = [name for parameter, own in names.items() if parameter.requires_grad for name in own]
    near = _near(group.pattern, trainable)
    return f"{start}parameter; {'near' if near else 'there are'}: {', '.join(near or trainable[:LISTED_NAMES])}"


def _near(pattern: str, names: list[str]) -> list[str]:
    """Names with a part of similar spelling: whole names are too long to be similar to what people search for."""
    word = max(re.findall(r"\w+", pattern), key=len, default="")
    parts = {part for name in names for part in name.split(".")}
    similar = difflib.get_close_matches(word, sorted(parts), n=3)
    return [name for name in names if any(part in similar for part in name.split("."))][:LISTED_NAMES]
