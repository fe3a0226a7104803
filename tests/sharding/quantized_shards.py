"""Run by test_quantized_shards.py in two processes: NF4 and 8-bit AdamW under `fully_shard` against one process."""

import families
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from framework.config import AdapterConfig
from framework.extras import shards_bytes
from framework.models.adapters import add_adapter
from framework.models.quantization import NF4Linear, quantize
from framework.retention import apply_checkpointing, blocks_of
from framework.sharding.ranks import Place, joined_ranks
from framework.token_selection import enable_token_selection, fixed_selection
from framework.training.eight_bit import EightBitAdamW

OPTIONS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
POSITIONS = torch.tensor([[2, 3, 4, 7, 9, 12], [1, 2, 3, 6, 8, 11]])


def adapted() -> nn.Module:
    model = families.build("llama", dtype=torch.float32)
    quantize(model)
    torch.manual_seed(3)
    model = add_adapter(model, AdapterConfig(kind="lora", rank=4, alpha=8.0), task="causal_lm").train()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def sharded(model: nn.Module, policy: MixedPrecisionPolicy) -> nn.Module:
    for block in blocks_of(model).values():
        fully_shard(block, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def gradients(model: nn.Module, retention: str, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The same batch on every rank, so that their mean is the gradient of one process."""
    base = model.get_base_model()
    if retention == "checkpoint":
        apply_checkpointing(base)
    if retention in ("selective", "retained"):
        enable_token_selection(model, retain_linears=retention == "retained")
    inputs = families.sample_inputs(base)
    for _ in range(2):
        model.zero_grad()
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            if retention in ("selective", "retained"):
                with fixed_selection(model, POSITIONS):
                    loss = model(**inputs).loss
            else:
                loss = model(**inputs).loss
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}


def check_nf4() -> None:
    for retention in ("all", "checkpoint", "selective", "retained"):
        want, model = gradients(adapted(), retention), sharded(adapted(), MixedPrecisionPolicy())
        layer = next(module for module in model.modules() if isinstance(module, NF4Linear))
        whole = (layer.in_features * layer.out_features // 64, 32)
        assert isinstance(layer.weight, DTensor) and layer.weight.shape == whole
        assert layer.weight.to_local().shape == (whole[0] // 2, whole[1])
        got = gradients(model, retention)
        assert want and got.keys() == want.keys()
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-7, msg=lambda m, r=retention: f"{r}: {m}")
    # Float parameters are gathered in bfloat16, the bytes of NF4 as they are.
    want = gradients(adapted().to(torch.bfloat16), "all")
    got = gradients(sharded(adapted(), MixedPrecisionPolicy(param_dtype=torch.bfloat16)), "all")
    for name, value in want.items():
        torch.testing.assert_close(got[name], value.float(), rtol=0.1, atol=0.02 * float(value.norm()))


def check_optimizer(mesh: dist.DeviceMesh) -> None:
    """Blocks begin with a rank's rows, so codes are those of one process where these hold a multiple of 256."""
    torch.manual_seed(0)
    # The third has float32 moments; of the last, one rank holds nothing.
    start = [torch.randn(64, 128), torch.randn(33, 127), torch.randn(5, 3), torch.randn(1, 8192)]
    plain = [nn.Parameter(tensor.clone()) for tensor in start]
    parts = [nn.Parameter(distribute_tensor(tensor.clone(), mesh, [Shard(0)])) for tensor in start]
    reference, optimizer = EightBitAdamW(plain, **OPTIONS), EightBitAdamW(parts, **OPTIONS)
    for _ in range(4):
        for one, part in zip(plain, parts, strict=True):
            one.grad = torch.randn(one.shape)
            part.grad = distribute_tensor(one.grad.clone(), mesh, [Shard(0)])
        reference.step(), optimizer.step()
    for place, (one, part) in enumerate(zip(plain, parts, strict=True)):
        exact = place != 1
        torch.testing.assert_close(part.full_tensor(), one, rtol=0 if exact else 0.1, atol=0 if exact else 0.01)
        state = optimizer.exported_state(part)
        assert state["step"] == 4 and state["exp_avg"].shape == part.to_local().shape
        whole = reference.exported_state(one)
        if exact:
            for name in ("exp_avg", "exp_avg_sq"):
                rows = whole[name].chunk(2)
                mine = rows[dist.get_rank()] if dist.get_rank() < len(rows) else whole[name][:0]
                assert torch.equal(state[name], mine)
        twin = EightBitAdamW([part], **OPTIONS)
        twin.import_state(part, state)
        assert all(torch.equal(value, state[name]) for name, value in twin.exported_state(part).items())


def main() -> None:
    with joined_ranks(Place.of_environment(), timeout_seconds=60) as ranks:
        check_optimizer(dist.device_mesh.init_device_mesh("cpu", (ranks.world_size,)))
        # Older versions of torch shard float parameters only; a run says so.
        if shards_bytes():
            check_nf4()
