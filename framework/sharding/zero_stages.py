"""What DeepSpeed's optimisers hold on a rank at each ZeRO stage, and how a window's gradients get there.

The three classes have the same methods. They reach into DeepSpeed 0.19's optimisers, whose public interface counts
micro-batches and looks at gradients in ways that differ between stages; here gradients are summed up in one way, and
the engine clips and unscales by a norm that it computes once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from framework.sharding.stepping import clip_factor
from framework.sharding.zero_filling import partition_range


@dataclass(frozen=True)
class Piece:
    """A range of a trainable parameter inside a tensor that the optimiser updates.

    Attributes:
        parameter: of the model.
        start: the range's first element in it.
        flat: `[elements]`, what the optimiser updates, with the ranges of other parameters and padding.
        owner: the same as the optimiser knows it, to which its state belongs.
        offset: the range's first element in `flat`.
        count: number of its elements.
    """

    parameter: nn.Parameter
    start: int
    flat: Tensor
    owner: Tensor
    offset: int
    count: int

    @property
    def values(self) -> Tensor:
        """`[count]`, a view."""
        return self.flat[self.offset : self.offset + self.count]


class WholeParameters:
    """Stage 0: every rank has everything, and the gradients are summed once a step."""

    averages = False
    """Whether DeepSpeed divides the sum over ranks by their number."""
    replicated = True
    """Whether every rank has all gradients after `reduce`."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        engine.gradient_average = False
        # Gradients are clipped below, by the norm of the engine.
        engine._config.gradient_clipping = 0.0
        self._bucket = engine.zero_reduce_bucket_size()

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a loss, already scaled."""
        self._engine.set_gradient_accumulation_boundary(False)
        self._engine.backward(loss, scale_wrt_gas=False)

    def reduce(self) -> None:
        """Sum the window's gradients over the ranks."""
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.allreduce_gradients(bucket_size=self._bucket)

    def gradients(self) -> list[Tensor]:
        """What this rank has of the window's gradients."""
        return [p.grad for p in self._engine.module.parameters() if p.grad is not None]

    def update(self, norm: float, max_norm: float | None, divisor: float) -> None:
        """Divide the gradients, clip them, update the weights and free the gradients.

        Args:
            norm: global norm of the gradients as they are held.
            max_norm: bound of the global norm after the division; None for none.
            divisor: of the gradients.
        """
        factor = clip_factor(norm / divisor, max_norm) / divisor
        if factor != 1.0:
            torch._foreach_mul_(self.gradients(), factor)
        self._engine.step()

    def discard(self) -> None:
        """Free the gradients."""
        self._engine.zero_grad()

    def pieces(self) -> Iterator[Piece]:
        """What this rank holds of the trainable parameters and does not share with a lower one."""
        if self._engine.global_rank == 0:
            yield from self.all_pieces()

    def all_pieces(self) -> Iterator[Piece]:
        """What this rank holds of the trainable parameters."""
        for group in self._engine.basic_optimizer.param_groups:
            for parameter in group["params"]:
                yield Piece(parameter, 0, parameter.detach().view(-1), parameter, 0, parameter.numel())

    def refresh(self) -> None:
        """Let the model have the weights that were written to the pieces."""

    def weights(self) -> list[Tensor]:
        """Parameters and copies of them on this rank."""
        return [*self._engine.module.parameters()]

    def buckets(self) -> list[Tensor]:
        """Buffers that are there between steps, too."""
        return []


class _Zero(ABC):
    """What stages 1 to 3 have in common: an optimiser that unscales and clips by a norm it is told."""

    averages = True
    replicated = False

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._optimizer = engine.optimizer
        self._norm = torch.zeros(())
        self._optimizer.custom_loss_scaler = True
        self._optimizer.external_loss_scale = 1.0
        # The engine has looked at loss and norm before it lets an optimiser step.
        self._optimizer.check_overflow = lambda *_, **__: None

    def _backward(self, loss: Tensor, *, boundary: bool, micro_step: int) -> None:
        # engine.forward would do it, but the model is called directly.
        self._optimizer.clear_backward_seen_flag()
        self._optimizer.micro_step_id = micro_step
        self._optimizer.external_loss_scale = 1.0
        self._engine.set_gradient_accumulation_boundary(boundary)
        self._engine.backward(loss, scale_wrt_gas=False)

    def _update(self, norm: float, max_norm: float | None, divisor: float) -> None:
        self._norm = torch.tensor(norm)
        self._optimizer.external_loss_scale = divisor
        self._optimizer.clip_grad = max_norm or 0.0
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.step()

    def all_pieces(self) -> Iterator[Piece]:
        """What this rank holds of the trainable parameters."""
        return self.pieces()

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """See `WholeParameters.pieces`."""


class FlatPartitions(_Zero):
    """Stages 1 and 2: whole weights, and of all else a partition of all parameters of a group laid end to end.

    In 16 bits every micro-batch's gradients are reduced and summed up in `sum_dtype` by themselves, because DeepSpeed
    would sum them up in 16 bits. Stage 1 in float32 reduces once a step.
    """

    def __init__(self, engine: Any, sum_dtype: torch.dtype) -> None:
        super().__init__(engine)
        zero = self._optimizer
        zero.check_grad_overflow = False
        zero.scaled_global_norm = lambda *_: self._norm
        self._dtype = sum_dtype
        self._each_backward = zero.partition_gradients or zero.overlap_comm or zero.cpu_offload
        self._each_backward |= zero.dtype != sum_dtype
        self._sums: dict[int, list[Tensor]] = {}

    def backward(self, loss: Tensor) -> None:
        """See `WholeParameters.backward`."""
        # Always the first: sums of micro-batches are made here, not there.
        self._backward(loss, boundary=self._each_backward, micro_step=-1)
        if self._each_backward:
            self._add_up()

    def reduce(self) -> None:
        """See `WholeParameters.reduce`."""
        if not self._each_backward:
            self._engine.set_gradient_accumulation_boundary(True)
            self._engine.allreduce_gradients()
            self._add_up()

    def _add_up(self) -> None:
        """Move the partition of the reduced gradients from the optimiser into the window's sums."""
        zero = self._optimizer
        alone = not self._each_backward or self._engine.gradient_accumulation_steps() == 1
        for index, master in enumerate(zero.single_partition_of_fp32_groups):
            reduced = [master.grad] if zero.cpu_offload else zero.averaged_gradients[index]
            if index in self._sums:
                for total, part in zip(self._sums[index], reduced, strict=True):
                    total.add_(part)
            else:
                reused = zero.cpu_offload and not alone
                self._sums[index] = [part.detach().to(self._dtype, copy=reused) for part in reduced]
            if not zero.cpu_offload:
                zero.averaged_gradients[index] = None

    def gradients(self) -> list[Tensor]:
        """See `WholeParameters.gradients`."""
        return [part for parts in self._sums.values() for part in parts]

    def update(self, norm: float, max_norm: float | None, divisor: float) -> None:
        """See `WholeParameters.update`."""
        zero = self._optimizer
        for index, master in enumerate(zero.single_partition_of_fp32_groups):
            if not zero.cpu_offload:
                zero.averaged_gradients[index] = self._sums.pop(index)
            elif self._sums[index][0].data_ptr() != master.grad.data_ptr():
                master.grad.copy_(self._sums[index][0])
        self._update(norm, max_norm, divisor)
        self._forget()

    def discard(self) -> None:
        """See `WholeParameters.discard`."""
        zero = self._optimizer
        zero.zero_grad(set_to_none=True)
        zero._release_ipg_buffers()
        for index in zero.averaged_gradients:
            zero.averaged_gradients[index] = None
            zero.all_grad_tensors[index] = None
        self._forget()

    def _forget(self) -> None:
        self._sums.clear()
        if self._optimizer.cpu_offload:
            self._optimizer.reset_cpu_buffers()
            for master in self._optimizer.single_partition_of_fp32_groups:
                # A parameter without a gradient in the next window would keep this one's.
                master.grad.zero_()

    def pieces(self) -> Iterator[Piece]:
        """See `WholeParameters.pieces`."""
        zero = self._optimizer
        for index, master in enumerate(zero.single_partition_of_fp32_groups):
            first = master.numel() * torch.distributed.get_rank(zero.real_dp_process_group[index])
            begin = 0
            for parameter in zero.round_robin_bit16_groups[index]:
                end = begin + parameter.numel()
                low, high = max(begin, first), min(end, first + master.numel())
                if low < high:
                    yield Piece(parameter, low - begin, master.detach(), master, low - first, high - low)
                begin = end

    def refresh(self) -> None:
        """See `WholeParameters.refresh`."""
        self._optimizer.update_lp_params()

    def weights(self) -> list[Tensor]:
        """See `WholeParameters.weights`."""
        zero = self._optimizer
        frozen = [p for p in self._engine.module.parameters() if not p.requires_grad]
        return [*frozen, *zero.bit16_groups_flat, *zero.single_partition_of_fp32_groups]

    def buckets(self) -> list[Tensor]:
        """See `WholeParameters.buckets`; those of reductions are there during backward passes only."""
        zero = self._optimizer
        return [zero.temp_grad_buffer_for_gpu_offload] if zero.cpu_offload else []


class PartitionedParameters(_Zero):
    """Stage 3: of every parameter a rank holds one partition, also of its gradient and its state.

    Gradients are summed up in one flat buffer, whose dtype is `data_types.grad_accum_dtype`; what is not yet in it is
    zero, so that a parameter without a gradient in a window gets none of an earlier one.
    """

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._optimizer._get_norm_groups = lambda: [self._norm]

    def backward(self, loss: Tensor) -> None:
        """See `WholeParameters.backward`."""
        # Anything but the first: add to the buffer, do not overwrite it.
        self._backward(loss, boundary=False, micro_step=1)

    def reduce(self) -> None:
        """See `WholeParameters.reduce`; nothing is left to be done."""

    def gradients(self) -> list[Tensor]:
        """See `WholeParameters.gradients`."""
        return [self._optimizer.grad_partitions_flat_buffer]

    def update(self, norm: float, max_norm: float | None, divisor: float) -> None:
        """See `WholeParameters.update`."""
        zero = self._optimizer
        if zero.offload_optimizer:
            sizes = [master.numel() for master in zero.fp32_partitioned_groups_flat]
            parts = zero.grad_partitions_flat_buffer.split(sizes)
            for master, part in zip(zero.fp32_partitioned_groups_flat, parts, strict=True):
                master.grad.copy_(part)
        self._update(norm, max_norm, divisor)
        zero.grad_partitions_flat_buffer.zero_()

    def discard(self) -> None:
        """See `WholeParameters.discard`."""
        zero = self._optimizer
        zero.zero_grad(set_to_none=True)
        zero.averaged_gradients.clear()
        for bucket in zero.ipg_buckets.values():
            bucket.clear_params()
        zero.grad_partitions_flat_buffer.zero_()

    def pieces(self) -> Iterator[Piece]:
        """See `WholeParameters.pieces`."""
        zero = self._optimizer
        for index, group in enumerate(zero.fp16_groups):
            master = zero.fp32_partitioned_groups_flat[index]
            for parameter in group:
                _, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
                start, count = partition_range(parameter)
                if count:
                    yield Piece(parameter, start, master.detach(), master, offset, count)

    def refresh(self) -> None:
        """See `WholeParameters.refresh`."""
        zero = self._optimizer
        zero._partition_all_parameters()
        for index in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def weights(self) -> list[Tensor]:
        """See `WholeParameters.weights`."""
        parameters = [*self._engine.module.parameters()]
        gathered = [p.data for p in parameters if p.data.numel()]
        return [*gathered, *(p.ds_tensor for p in parameters), *self._optimizer.fp32_partitioned_groups_flat]

    def buckets(self) -> list[Tensor]:
        """See `WholeParameters.buckets`."""
        return [bucket.buffer for bucket in self._optimizer.ipg_buckets.values() if bucket.buffer is not None]
