"""The engine that shards with DeepSpeed's ZeRO, in stages 0 to 3."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from framework.config import LossScaleConfig
from framework.sharding.deepspeed_package import deepspeed_package, let_go, linear_of_zero3, linear_restored
from framework.sharding.fragments import Fragment, StoredTensors, whole
from framework.sharding.loss_scale import LossScale
from framework.sharding.optimizer_states import exported
from framework.sharding.precision import PRECISIONS
from framework.sharding.protocol import Held, InitialTensors, OptimizerFactory, StepResult
from framework.sharding.ranks import Ranks
from framework.sharding.stepping import judged_step, set_learning_rate
from framework.sharding.weight_names import WeightNames, saved_tensors
from framework.sharding.zero_filling import Masters, Partitioner, fill, partition_range, whole_masters
from framework.sharding.zero_loading import load_state
from framework.sharding.zero_stages import FlatPartitions, PartitionedParameters, WholeParameters

_HELD_DTYPES = {"fp32_master": torch.bfloat16, "pure_bf16": torch.bfloat16, "fp16": torch.float16}
_SUM_DTYPES = {"pure_bf16": torch.bfloat16}


class DeepSpeedEngine:
    """ZeRO: ranks share out the optimiser's state (stage 1), gradients too (2) and weights too (3).

    From stage 1 on, `fp32_master` holds weights in bfloat16 and `fp16` in float16, in which passes run; the optimiser's
    ranks hold float32 master weights of the trainable ones, and gradients are summed over micro-batches in float32.
    `pure_bf16` has no master. Stage 0 holds what the single engine does: float32 weights under autocast, or bfloat16.

    A parameter without a gradient is updated with zeros, because it is part of a flat partition.
    """

    def __init__(
        self, precision: str, ranks: Ranks, options: dict[str, Any], *, device: torch.device | None = None
    ) -> None:
        """Find DeepSpeed.

        Args:
            precision: a key of `PRECISIONS`.
            ranks: connected, also where there is one only.
            options: DeepSpeed's JSON, from `deepspeed_options`.
            device: instead of the place's own.

        Raises:
            UserError: DeepSpeed is not installed, or does not support the precision on this device.
        """
        self.device = device or ranks.place.device()
        self._ranks = ranks
        self._options = _for_backend(options)
        self._stage = options["zero_optimization"]["stage"]
        self.sharded = self._stage == 3
        self._precision = PRECISIONS[precision]
        self._dtype = _HELD_DTYPES.get(precision, torch.float32) if self._stage > 0 else None
        self._sum_dtype = _SUM_DTYPES.get(precision, torch.float32)
        self._scale = _loss_scale(options["fp16"]) if self._precision.loss_scaling else None
        self._deepspeed = deepspeed_package(self.device, options)
        saves_memory = options["zero_optimization"].get("memory_efficient_linear", True)
        self._linear = linear_of_zero3 if self.sharded and saves_memory else nullcontext

    def prepare(
        self, model: nn.Module, build_optimizer: OptimizerFactory, initial: InitialTensors | None = None
    ) -> None:
        """See `Engine.prepare`.

        The optimiser is built before anything is partitioned, while parameters have their shapes. In stage 3 they are
        partitioned one by one, so that the host holds one whole tensor at a time beside its partitions.
        """
        self._deepspeed.init_distributed()
        optimizer = build_optimizer(model)
        for group in optimizer.param_groups:
            # For updates that draw random numbers: ranks with parts of their own need noise of their own.
            group["shard"] = self._ranks.rank if self._stage > 0 else 0
        with linear_restored():
            masters = self._fill(model, initial)
            self._engine = self._deepspeed.initialize(
                model=model, optimizer=optimizer, config=copy.deepcopy(self._options)
            )[0]
        self.model = model
        self._optimizer: torch.optim.Optimizer = self._engine.basic_optimizer
        self._holder = self._made_holder()
        self._restore_masters(masters)

    def _fill(self, model: nn.Module, initial: InitialTensors | None) -> Masters:
        """Give the model its values, in stage 3 this rank's partitions of them; what 16 bits lose."""
        if self._stage == 3:
            assert self._dtype is not None
            partitioner = Partitioner(self._deepspeed.zero, self._options, self._dtype)
            fill(model, initial, partitioner)
            _move_buffers(model, self.device)
            return partitioner.masters
        masters: Masters = {}
        fill(model, initial, lambda _: None)
        if self._dtype not in (None, torch.float32):
            whole_masters(model.parameters(), self._dtype, masters)
        return masters

    def _made_holder(self) -> WholeParameters | FlatPartitions | PartitionedParameters:
        if self._stage == 0:
            return WholeParameters(self._engine)
        if self._stage == 3:
            return PartitionedParameters(self._engine)
        return FlatPartitions(self._engine, self._sum_dtype)

    @torch.no_grad()
    def _restore_masters(self, masters: Masters) -> None:
        """Give the master weights back what DeepSpeed, which made them of the 16-bit weights, has rounded off."""
        for piece in self._holder.all_pieces():
            master = masters.get(piece.parameter)
            if master is not None and piece.flat.dtype == torch.float32:
                start = 0 if self._stage == 3 else piece.start
                piece.values.copy_(master[start : start + piece.count])

    def autocast(self) -> AbstractContextManager[object]:
        """Autocast in stage 0, as the single engine does; else the weights have the precision themselves.

        In stage 3 linears are DeepSpeed's within it, unless the options say otherwise.
        """
        if self._stage > 0 or self._precision.autocast is None:
            return self._linear()
        return torch.autocast(self.device.type, dtype=getattr(torch, self._precision.autocast))

    def backward(self, loss: Tensor) -> None:
        """See `Engine.backward`; scaled in fp16."""
        # Blocks are run again in it.
        with self._linear():
            self._holder.backward(loss if self._scale is None else loss * self._scale.value)

    def step(self, *, loss: Tensor, max_grad_norm: float | None, learning_rate: float) -> StepResult:
        """See `Engine.step`."""
        scale = 1.0 if self._scale is None else self._scale.value
        divisor = scale / self._ranks.world_size if self._holder.averages else scale
        self._holder.reduce()
        loss_value, held_norm = self._totals(loss)
        norm = held_norm / divisor

        def update() -> None:
            set_learning_rate(self._optimizer.param_groups, learning_rate)
            self._holder.update(held_norm, max_grad_norm, divisor)

        result = judged_step(loss_value, norm, self._scale, update)
        if result.skipped:
            self._holder.discard()
        return result

    def _totals(self, loss: Tensor) -> tuple[float, float]:
        """Loss and norm of the gradients as they are held, over all ranks: the step's one wait for the device."""
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in self._holder.gradients() if g.numel()]
        square = torch.stack(norms).double().square().sum() if norms else torch.zeros((), dtype=torch.float64)
        if self._holder.replicated and not self._ranks.is_first:
            square = torch.zeros_like(square)
        totals = torch.stack((loss.detach().double().to(self.device), square.to(self.device)))
        dist.all_reduce(totals)
        loss_value, square_value = totals.tolist()
        return loss_value, math.sqrt(square_value) if square_value >= 0 else math.nan

    def discard_gradients(self) -> None:
        """See `Engine.discard_gradients`."""
        self._holder.discard()

    def weights(self) -> Iterator[Fragment]:
        """See `Engine.weights`; the master weights where there are any."""
        names = _first_names(self.model)
        for piece in self._holder.pieces():
            yield Fragment(names[piece.parameter], shape_of(piece.parameter), piece.start, piece.values)
        for name, tensor in self._other_tensors():
            if self._is_partitioned(tensor):
                start, count = partition_range(tensor)
                if count:
                    yield Fragment(name, shape_of(tensor), start, tensor.ds_tensor[:count])
            elif self._ranks.is_first:
                yield whole(name, tensor)

    def optimizer_state(self) -> Iterator[Fragment]:
        """See `Engine.optimizer_state`; a scalar comes from the rank with a parameter's first element."""
        names = _first_names(self.model)
        states: dict[Tensor, Mapping[str, Any]] = {}
        for piece in self._holder.pieces():
            name, shape = names[piece.parameter], shape_of(piece.parameter)
            if piece.owner not in states:
                states = {piece.owner: exported(self._optimizer, piece.owner)}
            for key, value in states[piece.owner].items():
                if value.dim() > 0:
                    part = value.view(-1)[piece.offset : piece.offset + piece.count]
                    yield Fragment(f"{key}.{name}", shape, piece.start, part)
                elif piece.start == 0:
                    yield Fragment(f"{key}.{name}", (), 0, value.view(1))

    def state_dict(self) -> dict[str, Any]:
        """See `Engine.state_dict`."""
        return {} if self._scale is None else {"loss_scale": self._scale.state_dict()}

    @torch.no_grad()
    def load(self, weights: StoredTensors, optimizer: StoredTensors, state: Mapping[str, Any]) -> None:
        """See `Engine.load`."""
        model = WeightNames.of(self.model, shape_of)
        model.check(weights)
        places = {model.first[name]: name for name in weights.names()}
        pieces = [*self._holder.all_pieces()]
        names = _first_names(self.model)
        trained = {parameter: name for parameter, name in names.items() if parameter.requires_grad}
        load_state(self._optimizer, pieces, trained, model, optimizer)
        for piece in pieces:
            piece.values.copy_(weights.read(places[names[piece.parameter]], piece.start, piece.count))
        for name, tensor in self._other_tensors():
            if self._is_partitioned(tensor):
                start, count = partition_range(tensor)
                tensor.ds_tensor[:count].copy_(weights.read(places[name], start, count))
            else:
                tensor.copy_(weights.read(places[name]).view(tensor.shape))
        if self._scale is not None and "loss_scale" in state:
            self._scale.load_state_dict(state["loss_scale"])
        self._holder.refresh()

    def held(self) -> Held:
        """See `Engine.held`; master weights count as weights."""
        optimizer = [
            value for states in self._optimizer.state.values() for value in states.values() if torch.is_tensor(value)
        ]
        weights = [*self._holder.weights(), *self.model.buffers()]
        # Stage 1 leaves them with the parameters until the step, and stage 0 has no others.
        held_there = () if self._holder.replicated else self.model.parameters()
        unreduced = [parameter.grad for parameter in held_there if parameter.grad is not None]
        return Held(weights, [*self._holder.gradients(), *unreduced], optimizer, self._holder.buckets())

    def close(self) -> None:
        """See `Engine.close`."""
        let_go(self._engine)

    def _other_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What is saved beside trained parameters: buffers, and without an adapter frozen parameters."""
        return ((name, tensor) for name, tensor in saved_tensors(self.model).items() if not tensor.requires_grad)

    def _is_partitioned(self, tensor: Tensor) -> bool:
        return self._stage == 3 and isinstance(tensor, nn.Parameter)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Of the whole tensor, also where ZeRO-3 has partitioned it."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def _first_names(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def _loss_scale(fp16: Mapping[str, Any]) -> LossScale:
    if fp16["loss_scale"]:
        return LossScale(float(fp16["loss_scale"]))
    return LossScale(
        LossScaleConfig(
            initial=2.0 ** fp16["initial_scale_power"],
            growth_interval=fp16["loss_scale_window"],
            minimum=float(fp16["min_loss_scale"]),
        )
    )


def _for_backend(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, over gloo with gathers one by one.

    DeepSpeed 0.19 gathers the parameters that stay whole after an update in one go and waits for the last exchange
    only. NCCL's run in order, so that the last one comes last; gloo's do not, and a norm or a bias may be used before
    it is there.
    """
    own = copy.deepcopy(dict(options))
    if dist.get_backend() == "gloo":
        own["zero_optimization"]["stage3_allgather_sequential"] = True
    return own
