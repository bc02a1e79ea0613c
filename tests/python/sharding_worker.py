"""One rank of the tests of sharded optimizers: torchrun sharding_worker.py save|continue|refuse DIRECTORY CASE ..

save trains each case, writes a checkpoint and takes one step more; continue loads the checkpoint and takes that step.
Rank 0 writes what came of it, as whole tensors, to DIRECTORY/CASE/RANKS.pt. refuse does what cannot be; rank 0 writes
the messages to DIRECTORY/refused.pt.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import bitsandbytes as bnb

WHOLE = StateDictOptions(full_state_dict=True)
FEATURES = 37
SMALL = {"min_8bit_size": 64}


def make_model(dtype: torch.dtype, outputs: int) -> nn.Sequential:
    """Rows that are no multiple of a block, a bias of one block, and few outputs."""
    torch.manual_seed(5)
    sizes = (FEATURES, 61, 256, outputs)
    layers: list[nn.Module] = []
    for i, o in pairwise(sizes):
        layers += [nn.Linear(i, o), nn.Tanh()]
    return nn.Sequential(*layers).to(dtype)


def fsdp2(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def hybrid(model: nn.Module) -> nn.Module:
    """Half of the ranks hold what the other half does."""
    copies = min(2, dist.get_world_size())
    names = ("copy", "shard")
    mesh = init_device_mesh("cpu", (copies, dist.get_world_size() // copies), mesh_dim_names=names)
    return fully_shard(model, mesh=mesh)


def flat(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def flat_with_params(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


@dataclass
class Case:
    optimizer: Callable[..., torch.optim.Optimizer]
    shard: Callable[[nn.Module], nn.Module] = fsdp2
    dtype: torch.dtype = torch.float32
    outputs: int = 3  # fewer than ranks
    options: dict[str, Any] = field(default_factory=lambda: dict(SMALL))
    group: dict[str, Any] = field(default_factory=dict)

    def make(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = self.shard(make_model(self.dtype, self.outputs))
        return model, self.optimize(model)

    def optimize(self, model: nn.Module) -> torch.optim.Optimizer:
        return self.optimizer([{"params": list(model.parameters()), **self.group}], lr=1e-2, **self.options)


CASES = {
    "adamw8bit": Case(bnb.optim.AdamW8bit),
    "adamw8bit-bf16-stochastic": Case(bnb.optim.AdamW8bit, dtype=torch.bfloat16, group={"seed": 7}),
    "ademamix8bit": Case(bnb.optim.AdEMAMix8bit),
    "lion8bit-bf16": Case(bnb.optim.Lion8bit, dtype=torch.bfloat16),
    "sgd8bit": Case(bnb.optim.SGD8bit, options={**SMALL, "momentum": 0.9}),
    "adamw32bit": Case(bnb.optim.AdamW32bit),
    "adamw8bit-hybrid": Case(bnb.optim.AdamW8bit, hybrid),
    "adamw8bit-flat": Case(bnb.optim.AdamW8bit, flat, outputs=16),
    "adamw8bit-flat-params": Case(bnb.optim.AdamW8bit, flat_with_params, outputs=16),
    "ademamix8bit-flat-bf16": Case(bnb.optim.AdEMAMix8bit, flat, torch.bfloat16, outputs=16),
    "adamw8bit-ddp": Case(bnb.optim.AdamW8bit, ddp),
}


def backward(model: nn.Module, dtype: torch.dtype, step: int) -> None:
    x = torch.randn(8, FEATURES, generator=torch.Generator().manual_seed(step)).to(dtype)
    model(x).float().square().mean().backward()


def whole_gradients(case: Case) -> nn.Module:
    """A model whose parameters are the gradients of the step after the checkpoint, which no number of ranks rounds."""
    model = make_model(case.dtype, case.outputs)
    generator = torch.Generator().manual_seed(99)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def set_gradients(case: Case, model: nn.Module) -> None:
    gradients = case.shard(whole_gradients(case))
    for p, g in zip(model.parameters(), gradients.parameters(), strict=True):
        p.grad = g.detach().clone() if g.numel() or isinstance(g, DTensor) else None


def states(model: nn.Module, optimizer: torch.optim.Optimizer, options: StateDictOptions | None = None) -> dict:
    return {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def load(model: nn.Module, optimizer: torch.optim.Optimizer, found: dict, options: StateDictOptions | None) -> None:
    set_model_state_dict(model, found["model"], options=options)
    set_optimizer_state_dict(model, optimizer, found["optimizer"], options=options)


def next_step(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, to: Path) -> None:
    set_gradients(case, model)
    optimizer.step()
    optimizer.zero_grad()
    found = states(model, optimizer, WHOLE)
    if dist.get_rank() == 0:
        torch.save(found, to)


def save(case: Case, at: Path) -> None:
    model, optimizer = case.make()
    for step in range(3):
        optimizer.zero_grad()
        backward(model, case.dtype, step)
        optimizer.step()
    optimizer.zero_grad()
    dcp.save(states(model, optimizer), checkpoint_id=at / "sharded")
    found = states(model, optimizer, WHOLE)
    if dist.get_rank() == 0:
        torch.save(found, at / "whole.pt")
    next_step(case, model, optimizer, at / f"{dist.get_world_size()}.pt")


def resume(case: Case, at: Path) -> None:
    model, optimizer = case.make()
    found = states(model, optimizer)
    dcp.load(found, checkpoint_id=at / "sharded")
    load(model, optimizer, found, None)
    next_step(case, model, optimizer, at / f"{dist.get_world_size()}.pt")
    model, optimizer = case.make()
    load(model, optimizer, torch.load(at / "whole.pt", weights_only=True), WHOLE)
    next_step(case, model, optimizer, at / f"{dist.get_world_size()}-from-whole.pt")


def message_of(step: Callable[[], Any]) -> str:
    try:
        step()
    except (NotImplementedError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def columns(kind: Callable[..., torch.optim.Optimizer] = bnb.optim.AdamW8bit) -> torch.optim.Optimizer:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = nn.Parameter(distribute_tensor(torch.ones(64, 64), mesh, [Shard(1)]))
    p.grad = torch.ones_like(p)
    return kind([p], **SMALL)


def columns_in_32_bits() -> dict[str, torch.Tensor]:
    """What a step makes of a parameter cut between columns, and its state."""
    optimizer = columns(bnb.optim.AdEMAMix32bit)
    (p,) = optimizer.param_groups[0]["params"]
    optimizer.step()
    state = optimizer.state_dict()["state"][0]["__bnb_optimizer_quant_state__"]
    return {"p": p.detach().full_tensor(), "state1": state["state1"].full_tensor()}


def trust() -> torch.optim.Optimizer:
    model, optimizer = Case(bnb.optim.LAMB8bit).make()
    backward(model, torch.float32, 0)
    return optimizer


def one_sided() -> torch.optim.Optimizer:
    model, optimizer = Case(bnb.optim.AdamW8bit).make()
    for p in model.parameters() if dist.get_rank() == 0 else []:
        p.grad = torch.ones_like(p)
    return optimizer


def refuse(to: Path) -> None:
    found: dict[str, Any] = {f.__name__: message_of(f().step) for f in (columns, trust, one_sided)}
    found |= columns_in_32_bits()
    if dist.get_rank() == 0:
        torch.save(found, to)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    command, directory, *names = sys.argv[1:]
    if command == "refuse":
        refuse(Path(directory) / "refused.pt")
    for name in names:
        at = Path(directory) / name
        at.mkdir(exist_ok=True)
        {"save": save, "continue": resume}[command](CASES[name], at)
    dist.destroy_process_group()


def leave() -> None:
    """End without the interpreter's own end, which aborts now and then: pytorch/pytorch#179291.

    DTensor's caches keep gloo's threads alive past destroy_process_group, and one that still has a tensor of Python's
    to release waits for the GIL of an interpreter that is ending.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
    leave()
