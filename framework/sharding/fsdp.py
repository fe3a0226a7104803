"""The engine of PyTorch's FSDP2: every rank holds its rows of every weight, gradient and moment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from framework.config import LossScaleConfig
from framework.errors import UserError
from framework.models.wrapping import unwrapped
from framework.sharding.fragments import Fragment, StoredTensors, whole
from framework.sharding.groups import check_parameters, gathered_modules
from framework.sharding.local_shards import LocalShards, local_tensor
from framework.sharding.loss_scale import LossScale
from framework.sharding.older_torch import FILLS_GRADIENTS, fill_gradients, keep_integers
from framework.sharding.optimizer_states import check_states, exported, take_over
from framework.sharding.precision import PRECISIONS
from framework.sharding.protocol import Held, InitialTensors, OptimizerFactory, StepResult
from framework.sharding.ranks import Ranks
from framework.sharding.shards import Shard
from framework.sharding.stepping import clipped_step
from framework.sharding.weight_names import WeightNames, tensors_by_name

_SHARD, _REPLICA = "shard", "replica"
_LISTED_NAMES = 8


class FsdpEngine:
    """Shards each parameter by rows; a block's weights are gathered for its passes only.

    Parameters are float32 but in `pure_bf16`. With `fp32_master` and `fp16` they are gathered in the lower precision,
    in which everything computes that does not ask for float32 itself (norms and the loss do), and gradients are summed
    in float32. There is no autocast.

    A trained parameter that had no gradient on this rank counts as one with a gradient of zeros, so that all ranks
    exchange the same tensors whatever their data; its moments and weight decay go on.
    """

    sharded = True
    model: nn.Module

    def __init__(
        self,
        precision: str,
        ranks: Ranks,
        *,
        reshard_after_forward: bool,
        replicas: int,
        offload: bool,
        loss_scale: float | LossScaleConfig | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Lay out the ranks; their processes must be connected (`joined_ranks`).

        Args:
            precision: a key of `PRECISIONS`.
            ranks: of the run.
            reshard_after_forward: free a block's gathered weights between its forward and its backward pass.
            replicas: number of copies of the model, each sharded over neighbouring ranks.
            offload: hold shards and the optimiser in the host's memory, and update there.
            loss_scale: of fp16: a constant, or how it follows the gradients; None for the latter's defaults.
            device: for computing; None for the place's.

        Raises:
            UserError: `replicas` does not divide the number of ranks.
        """
        if ranks.world_size % replicas:
            raise UserError(f"sharding.replicas: {replicas} does not divide the number of ranks, {ranks.world_size}")
        self.device = device or ranks.place.device()
        self._ranks = ranks
        self._precision = PRECISIONS[precision]
        self._scale = LossScale(loss_scale) if self._precision.loss_scaling else None
        self._reshard_after_forward, self._offload = reshard_after_forward, offload
        self._shard_count = ranks.world_size // replicas
        self._replica, self._shard_index = divmod(ranks.rank, self._shard_count)
        self._mesh = _mesh(self.device, replicas, self._shard_count)

    def prepare(
        self, model: nn.Module, build_optimizer: OptimizerFactory, initial: InitialTensors | None = None
    ) -> None:
        """See `Engine.prepare`; weights that the model has must be equal on all ranks.

        Raises:
            UserError: the model has parameters that cannot be sharded, or tensors without a value.
        """
        self._shard(model)
        self.model = model
        self._shards = self._shards_of(model)
        self._fill(initial or ())
        # From now on the same objects: FSDP2 puts others into the modules while weights are gathered.
        self._shards = self._shards_of(model)
        self._tensors, self._names = tensors_by_name(model), WeightNames.of(model)
        self.optimizer = build_optimizer(model)
        self._local = LocalShards(self.optimizer, self._shard_index)
        by_parameter = {shard.parameter: shard for shard in self._shards.values()}
        self._trained = {plain: by_parameter[sharded] for plain, sharded in self._local.sharded.items()}

    def _shards_of(self, model: nn.Module) -> dict[str, Shard]:
        return {n: Shard(n, p, self._shard_index, self._shard_count) for n, p in model.named_parameters()}

    def _shard(self, model: nn.Module) -> None:
        """Make the model's parameters this rank's shards, on the meta device where they are there."""
        inner = unwrapped(model)
        modules = gathered_modules(inner)
        check_parameters(model, inner, modules)
        options: dict[str, Any] = {
            "mesh": self._mesh,
            "mp_policy": self._mixed_precision(),
            "offload_policy": self._offload_policy(),
        }
        head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
        # From the last to the first: blocks inside of others come before these.
        for module in reversed(modules.values()):
            # The head's backward pass follows at once, and evaluations call it as often as their data wants.
            reshard = module is not head and self._reshard_after_forward
            fully_shard(module, reshard_after_forward=reshard, **options)
        fully_shard(inner, **options)
        if isinstance(embedding, FSDPModule):
            embedding.set_unshard_in_backward(False)
        for module in inner.modules():
            if isinstance(module, FSDPModule):
                # Sums: the loss is divided by the global count already.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        if FILLS_GRADIENTS:
            inner.set_reduce_scatter_unused_params(True)
        else:
            keep_integers(inner)
            fill_gradients(inner)

    def _mixed_precision(self) -> MixedPrecisionPolicy:
        compute = self._precision.autocast
        dtype = None if compute is None else getattr(torch, compute)
        return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)

    def _offload_policy(self) -> OffloadPolicy:
        return CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if self._offload else OffloadPolicy()

    @torch.no_grad()
    def _fill(self, initial: InitialTensors) -> None:
        """Give tensors on the meta device their memory and their values, of which this rank keeps its rows."""
        buffers = dict(self.model.named_buffers())
        places = _places(self.model)
        empty = {name for name, shard in self._shards.items() if shard.parameter.is_meta}
        empty |= {name for name, buffer in buffers.items() if buffer.is_meta}
        for name, value in initial:
            if name not in empty:
                raise ValueError(f"{name}: a value for a tensor that has one, or that the model does not have")
            empty.remove(name)
            if name in buffers:
                filled: Tensor = torch.empty_like(buffers[name], device=self.device).copy_(value)
                held = buffers[name]
            else:
                held = self._shards[name].parameter
                home = torch.device("cpu") if self._offload else self.device
                filled = nn.Parameter(torch.empty_like(held, device=home), requires_grad=held.requires_grad)
                Shard(name, filled, self._shard_index, self._shard_count).take(value)
            for module, attribute in places[held]:
                setattr(module, attribute, filled)
            # Before the next one comes.
            del value
        if empty:
            first = ", ".join(sorted(empty)[:_LISTED_NAMES])
            raise UserError(f"model.path: no values for {first}; {len(empty)} of the model's tensors lack them")

    def autocast(self) -> AbstractContextManager[object]:
        """Nothing: weights are gathered in the precision that computes."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See `Engine.backward`; scaled in fp16."""
        (loss if self._scale is None else loss * self._scale.value).backward()

    def step(self, *, loss: Tensor, max_grad_norm: float | None, learning_rate: float) -> StepResult:
        """See `Engine.step`."""
        gradients = self._local.take_gradients()
        scale = 1.0 if self._scale is None else self._scale.value
        loss_value, norm = self._agree(loss, gradients)
        norm /= scale
        result = clipped_step(
            self.optimizer,
            gradients,
            self._scale,
            loss=loss_value,
            norm=norm,
            max_grad_norm=max_grad_norm,
            learning_rate=learning_rate,
        )
        self.discard_gradients()
        return result

    @torch.no_grad()
    def _agree(self, loss: Tensor, gradients: list[Tensor]) -> tuple[float, float]:
        """The loss summed over ranks, and the global norm in float32; the step's one wait for the device."""
        device = torch.device("cpu") if self._offload else self.device
        numbers = torch.zeros(2, dtype=torch.float64, device=device)
        numbers[0] = loss.detach()
        # Copies of the model have equal gradients: one of them counts.
        if gradients and self._replica == 0:
            norms = torch.stack([torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients])
            numbers[1] = norms.double().square().sum()
        dist.all_reduce(numbers)
        loss_value, norm = torch.stack((numbers[0], numbers[1].sqrt())).float().tolist()
        return loss_value, norm

    def discard_gradients(self) -> None:
        """See `Engine.discard_gradients`."""
        self._local.drop_gradients()

    def weights(self) -> Iterator[Fragment]:
        """See `Engine.weights`."""
        for name in self._names.saved:
            shard = self._shards.get(name)
            if shard is None:
                if self._ranks.is_first:
                    yield whole(name, self._tensors[name])
            elif self._replica == 0 and shard.local.numel() > 0:
                yield shard.fragment(name, shard.local)

    def optimizer_state(self) -> Iterator[Fragment]:
        """See `Engine.optimizer_state`."""
        if self._replica == 0:
            for parameter, shard in self._trained.items():
                yield from shard.state_fragments(exported(self.optimizer, parameter), scalars=self._ranks.is_first)

    def state_dict(self) -> dict[str, Any]:
        """See `Engine.state_dict`."""
        return {} if self._scale is None else {"loss_scale": self._scale.state_dict()}

    @torch.no_grad()
    def load(self, weights: StoredTensors, optimizer: StoredTensors, state: Mapping[str, Any]) -> None:
        """See `Engine.load`."""
        self._names.check(weights)
        trained = {name: tuple(shard.parameter.shape) for name, shard in self._shards.items() if shard.trained}
        states = check_states(optimizer, trained)
        self._reshard()
        for name in weights.names():
            shard = self._shards.get(self._names.first[name])
            if shard is None:
                tensor = self._tensors[name]
                tensor.copy_(weights.read(name).view(tensor.shape))
            else:
                shard.local.copy_(shard.read(weights, name))
        for parameter, shard in self._trained.items():
            read = {key: shard.read(optimizer, f"{key}.{shard.name}") for key in states[shard.name]}
            take_over(self.optimizer, parameter, read)
        if self._scale is not None and "loss_scale" in state:
            self._scale.load_state_dict(state["loss_scale"])

    def held(self) -> Held:
        """See `Engine.held`; without the weights that are gathered at the time."""
        parameters = [shard.parameter for shard in self._shards.values()]
        return Held(
            weights=[*map(local_tensor, parameters), *self.model.buffers()],
            gradients=[local_tensor(p.grad) for p in parameters if p.grad is not None],
            optimizer=[value for state in self.optimizer.state.values() for value in state.values()],
        )

    def close(self) -> None:
        """See `Engine.close`: nothing would be kept."""

    def _reshard(self) -> None:
        """Free gathered weights, which an evaluation leaves behind: they would not see a change of the shards."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _mesh(device: torch.device, replicas: int, shards: int) -> DeviceMesh:
    """The ranks in their order, neighbours in one copy of the model."""
    if replicas == 1:
        return init_device_mesh(device.type, (shards,), mesh_dim_names=(_SHARD,))
    return init_device_mesh(device.type, (replicas, shards), mesh_dim_names=(_REPLICA, _SHARD))


def _places(model: nn.Module) -> dict[Tensor, list[tuple[nn.Module, str]]]:
    """Where each parameter and buffer of a model is registered: module and attribute."""
    found: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found.setdefault(tensor, []).append((module, attribute))
    return found
