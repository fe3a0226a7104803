"""The transform that makes a model's blocks token-selective, and what it leaves on the model."""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, Never

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from framework.retention import recurrent
from framework.retention.attention import KERNELS, register_attention, selective_name
from framework.retention.block import SelectiveBlock, block_of, map_first_output, selective_call
from framework.retention.blocks import blocks_of
from framework.retention.compiled import compiled
from framework.retention.formats import KV_FORMATS
from framework.retention.host import HostStore
from framework.retention.linears import check_retained, release_linears, retain_linears
from framework.retention.locality import try_block
from framework.retention.randomness import draws_in_blocks
from framework.retention.rows import KeepGradientRows, SelectedRows
from framework.retention.runs import RunRows
from framework.retention.seam import Seam
from framework.retention.visibility import described_masks
from framework.selection import Selection

logger = logging.getLogger(__name__)

PLACEMENTS = ("device", "host")
"""Where retained tensors can be; by the config's `retention.placement`."""

register_attention()


class SelectiveRetention:
    """The checkpointing function of a model's blocks, and its options.

    While `selection` is set, blocks record and replay. `fallbacks` names the blocks that
    mix tokens where a replay cannot follow, with the reason: they are recomputed whole, with the gradient of
    unselected rows cut at their input and output. `in_runs` names those that hand a state on from token to token and
    are replayed from it. Which way a block goes is found out on its first input and never depends on what is selected,
    since every rank has to call its modules equally often.

    Args:
        model: the Hugging Face model; changed in place.
        retain_linears: keep the linears' outputs at selected rows, so that the replay multiplies no large matrices; of
            all but an adapter's up-projections, of none, or of those with these names (see `framework.linear_names`).
        kv_format: how keys and values of all tokens are kept: `model` (as they are), `int8`, `int4` or
            `recompute` (not: the block's input is).
        placement: where blocks keep all that their replay needs: `device`, or `host`, from where a block's tensors come
            back while the block after it is replayed. Blocks that fall back keep their input on the device.
        correction: see `SelectedRows`.
        runs: selected tokens are neighbours, as a rule: blocks with recurrent state are replayed from the first one of
            a sequence to the last (see `RunRows`). Otherwise they fall back.
        compile: run blocks through torch.compile (see `framework.retention.compiled`).

    Raises:
        ValueError: no blocks; unknown `kv_format` or `placement`; a name that no linear layer has; an attention
            implementation that cannot be replayed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        retain_linears: bool | Collection[str],
        kv_format: str,
        placement: str = "device",
        correction: float = 0.0,
        runs: bool = False,
        compile: bool = False,
    ) -> None:
        for option, value, known in (("kv_format", kv_format, KV_FORMATS), ("placement", placement, PLACEMENTS)):
            if value not in known:
                raise ValueError(f"retention.{option}: {value!r} is none of {', '.join(known)}")
        # A model built over the config of one with token selection enabled has the selective name from there.
        self.kernel = model.config._attn_implementation.removeprefix(selective_name(""))
        if self.kernel not in KERNELS:
            raise ValueError(
                f"model.attention: {self.kernel!r} cannot be replayed on selected rows; "
                f"load the model with attn_implementation set to one of {', '.join(KERNELS)}"
            )
        self.model = model
        self.blocks = blocks_of(model)
        check_retained(self.blocks.values(), retain_linears)
        self.seam = Seam(model, self.blocks)
        self.retain_linears, self.kv_format, self.correction = retain_linears, kv_format, correction
        self.placement, self.runs, self.compile = placement, runs, compile
        self.selection: Selection | Callable[[Tensor], Selection] | None = None
        self.fallbacks: dict[str, str] = {}
        self.in_runs: set[str] = set()
        self._rows: SelectedRows | None = None
        self._run_rows: RunRows | None = None
        self._store: HostStore | None = None
        self._names = {block: name for name, block in self.blocks.items()}
        parts = (part for block in self.blocks.values() for part in block.modules() if part is not block)
        self._inner = {part for part in parts if isinstance(part, GradientCheckpointingLayer)}
        self._tried: set[str] = set()
        self._switched: list[PreTrainedModel] = []
        self._random = draws_in_blocks([*self.blocks.values()], model.config)

    def __deepcopy__(self, memo: dict[int, Any]) -> SelectiveRetention:
        # By itself a copy would go the way of pickling, which is refused.
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __reduce__(self) -> Never:
        raise pickle.PicklingError(
            "a model cannot be pickled while token selection is enabled on it: call "
            "framework.disable_token_selection(model) first; save_pretrained and state_dict do without"
        )

    def install(self) -> None:
        """Switch the model's blocks, attention and linears over."""
        self.seam.hold(self.run_block)
        self.model.set_attn_implementation(selective_name(self.kernel))
        parts = (module for module in self.model.modules() if isinstance(module, PreTrainedModel))
        self._switched = [part for part in parts if part.config._attn_implementation == selective_name(self.kernel)]
        for block in self.blocks.values():
            retain_linears(block, self.retain_linears)

    def remove(self) -> None:
        """Give the model back as it was."""
        self.seam.release()
        self.model.set_attn_implementation(self.kernel)
        for block in self.blocks.values():
            release_linears(block)
            recurrent.remove(block)

    @contextlib.contextmanager
    def selecting(self, selection: Selection | Callable[[Tensor], Selection]) -> Iterator[None]:
        """Within this context the model's forward pass is recorded for a selection; replays hold what they need.

        A callable is called with the first block's `hidden [batch, tokens, width]`, for models whose number of tokens
        is known only there (images).

        Raises:
            RuntimeError: checkpointing or attention was changed since `install`, so that gradients would be others;
                or the forward pass did not go through the blocks, so that its gradients are not token-selective.
        """
        self.seam.check()
        self._check_attention()
        self.selection = selection
        try:
            with described_masks():
                yield
            if self._rows is None:
                raise RuntimeError(
                    f"the forward of {type(self.model).__name__} did not call its blocks: it was replaced by one that "
                    "token selection cannot work in"
                )
        finally:
            self.selection, self._rows, self._run_rows, self._store = None, None, None, None

    def _check_attention(self) -> None:
        expected = selective_name(self.kernel)
        for part in self._switched:
            if (found := part.config._attn_implementation) != expected:
                raise RuntimeError(
                    f"the config of {type(part).__name__} asks for attention {found!r} instead of {expected!r}: it was "
                    "set while token selection was enabled, on this model or on another over the same config object. "
                    "Call framework.disable_token_selection, set the attention, and enable again; build other models "
                    "over copy.deepcopy(config)"
                )

    def run_block(self, function: Callable[..., Any], hidden: Tensor, *others: Any) -> Any:
        """Run one block; set as the blocks' checkpointing function. `hidden [batch, tokens, width]`.

        Raises:
            RuntimeError: a forward pass for training that no selection was drawn for, which would silently be an
                ordinary one.
        """
        block = block_of(function)
        if not torch.is_grad_enabled() or block in self._inner:
            return function(hidden, *others)
        if self.selection is None:
            raise RuntimeError(
                "token selection is enabled, but the blocks were called for training without its forward: the model's "
                "forward was replaced after framework.enable_token_selection (TRL's trainers do that when they are "
                "constructed, Liger's when training starts), or a part of the model was called by itself. Enable "
                "token selection on the model that the trainer holds, after constructing it: "
                "framework.enable_token_selection(trainer.model); and set use_liger_kernel=False"
            )
        if block not in self._names:
            raise ValueError(f"{type(block).__name__} asks for checkpointing, but is not one of the model's blocks")
        name = self._names[block]
        rows = self._resolve(hidden, name)
        if not hidden.requires_grad and not any(p.requires_grad for p in block.parameters()):
            return function(hidden, *others)
        if name not in self._tried:
            self._try(name, function, hidden, others)
        if self.compile:
            function = compiled(function)
        if name in self.fallbacks:
            output = checkpoint(function, KeepGradientRows.apply(rows, hidden), *others, use_reentrant=False)
            return map_first_output(output, lambda out: KeepGradientRows.apply(rows, out))
        retain_linears = bool(self.retain_linears)
        if name in self.in_runs:
            rows = self._runs_of(rows)
            # Where tokens in between are replayed too, their outputs may be as many as those of all tokens.
            retain_linears = retain_linears and rows.contiguous
        call = selective_call(
            function,
            hidden,
            others,
            rows,
            name=name,
            retain_linears=retain_linears,
            kv_format=self.kv_format,
            random=self._random,
            store=self._store,
        )
        anchor = torch.empty(0, device=hidden.device, requires_grad=True)
        in_graph = [p for p in block.parameters() if p.requires_grad] if _graph_is_searched() else []
        return SelectiveBlock.apply(call, anchor, hidden, *in_graph)

    def _try(self, name: str, function: partial[Any], hidden: Tensor, others: tuple[Any, ...]) -> None:
        """Find out which way a block goes."""
        self._tried.add(name)
        trial = try_block(function, hidden.detach(), others, runs=self.runs)
        self._random = self._random or trial.draws
        unlike = trial.reason or (
            f"it is replayed from the state of {', '.join(trial.mixers)}" if trial.mixers else None
        )
        if self.correction and unlike is not None:
            raise ValueError(
                f"selection.correction: block {name} hands on more than keys and values of selected tokens, which "
                f"cannot be corrected: {unlike}; set the correction to 0"
            )
        if trial.reason is not None:
            self.fallbacks[name] = trial.reason
            logger.warning("block %s falls back to plain checkpointing: %s", name, trial.reason)
        elif trial.mixers:
            self.in_runs.add(name)
            recurrent.install(self.blocks[name], trial.mixers)
            logger.info("block %s is replayed from the state of %s", name, ", ".join(trial.mixers))

    def _runs_of(self, rows: SelectedRows) -> RunRows:
        """The runs of this forward pass."""
        if self._run_rows is None:
            self._run_rows = RunRows(rows)
        return self._run_rows

    def _resolve(self, hidden: Tensor, name: str) -> SelectedRows:
        """The selected rows of this forward pass, checked against the block's input."""
        if self._rows is None:
            selection = self.selection(hidden) if callable(self.selection) else self.selection
            assert selection is not None
            selection.check_fits(*hidden.shape[:2])
            tokens, device = hidden.shape[1], hidden.device
            self._rows = SelectedRows(selection, tokens, device, correction=self.correction)
            self._store = HostStore() if self.placement == "host" else None
        if hidden.dim() != 3 or hidden.shape[:2] != (self._rows.batch, self._rows.tokens):
            raise ValueError(
                f"block {name} takes {[*hidden.shape]}, but the selection is over {self._rows.batch} sequences of "
                f"{self._rows.tokens} tokens: models that change the number of tokens on the way are not supported"
            )
        return self._rows


def _graph_is_searched() -> bool:
    """Whether DistributedDataParallel looks for unused parameters in this forward pass.

    It takes those that are not in the graph of the output for unused, as those of a replay would be.
    """
    active = DistributedDataParallel._active_ddp_module
    return active is not None and active.find_unused_parameters and not active.static_graph


def apply_checkpointing(model: PreTrainedModel, *, compile: bool = False) -> None:
    """Recompute every block whole in the backward pass (policy `checkpoint`). A transform, applied after adapters.

    Args:
        model: changed in place.
        compile: run blocks through torch.compile.

    Raises:
        ValueError: the model has no blocks.
    """
    blocks_of(model)
    recompute = partial(_checkpoint_compiled if compile else checkpoint, use_reentrant=False)
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=recompute)


def _checkpoint_compiled(function: partial[Any], *args: Any, use_reentrant: bool) -> Any:
    return checkpoint(compiled(function), *args, use_reentrant=use_reentrant)
