"""How the state of a parameter is made: before the first step, and from a file. And the numbers that go with it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._ops_optim import MOMENTUM, TWO_STATES, Numbers, first_states
from ..functional.optim import HISTORY
from ..functional.paged import paged_strided
from ._batch import State
from ._file_states import FileStates
from ._place import local_part

PAGED_SIZE = 100_000  # elements from which on a state is worth paging

QMap = Callable[[int, torch.device], Tensor]  # of state 1 or 2, on a device


def numbers_of(rule: str, config: Mapping[str, Any], options: Mapping[str, bool]) -> Numbers:
    """What the operator is told, from the options of a parameter and those of the optimizer."""
    betas = config["betas"]
    beta2 = float(betas[1])
    return Numbers(
        lr=float(config["lr"]),
        beta1=float(betas[0]),
        beta2=beta2,
        beta3=float(betas[2]) if len(betas) > 2 else 0.0,
        alpha=float(config["alpha"]),
        eps=float(config["eps"]),
        weight_decay=float(config["weight_decay"]),
        t_alpha=config["t_alpha"] or 0,
        t_beta3=config["t_beta3"] or 0,
        max_unorm=float(config["max_unorm"]),
        skip_zeros=bool(config["skip_zeros"]),
        dampening=beta2 if rule in MOMENTUM else 0.0,
        nesterov=options.get("nesterov", False),
        bias_correction=options.get("bias_correction", True),
        coupled_decay=options.get("coupled_decay", False),
        seed=config.get("seed"),
    )


def first_shape(rule: str, part: Tensor) -> tuple[int, ...]:
    """The shape of state 1 of (the local part of) a parameter."""
    return (2, *part.shape) if first_states(rule) == 2 else tuple(part.shape)


class StateMemory:
    """Where new states live: beside their parameters, in paged memory, or in files."""

    def __init__(self, is_paged: bool, files: FileStates | None) -> None:
        self.is_paged, self.files = is_paged, files

    def like(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros of the shape and memory order of a parameter."""
        part = local_part(p)
        return self._zeros(part.shape, torch.empty_like(part, device="meta").stride(), dtype, part.device)

    def doubled(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        """Two states one after the other, each in the memory order of the parameter."""
        part = local_part(p)
        stride = torch.empty_like(part, device="meta").stride()
        return self._zeros((2, *part.shape), (part.numel(), *stride), dtype, part.device)

    def _zeros(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.is_paged and device.type == "cuda" and math.prod(shape) >= PAGED_SIZE:
            return paged_strided(shape, stride, dtype, device)
        if self.files is not None and device.type == "cpu":
            return self.files.zeros(shape, stride, dtype)
        return torch.empty_strided(shape, stride, dtype=dtype, device=device).zero_()


def new_state(
    rule: str,
    p: Tensor,
    config: Mapping[str, Any],
    memory: StateMemory,
    buffer: Callable[[Tensor, torch.dtype], Tensor],
    blocks: int | None,
    qmap: QMap,
) -> State:
    """The state before the first step: codes with the scales of `blocks` blocks each, fp32 if that
    is None. `buffer` makes one state of the shape of p."""
    dtype = torch.float32 if blocks is None else torch.uint8
    state: State = {"step": 0}
    for number in (1, 2) if rule in TWO_STATES else (1,):
        copies = first_states(rule) if number == 1 else 1
        state[f"state{number}"] = memory.doubled(p, dtype) if copies == 2 else buffer(p, dtype)
        if blocks is not None:
            state[f"qmap{number}"] = qmap(number, p.device)
            absmax = (2, blocks) if copies == 2 else (blocks,)
            state[f"absmax{number}"] = torch.zeros(absmax, dtype=torch.float32, device=p.device)
    if config["max_unorm"] > 0:
        state["unorm_vec"] = torch.zeros(1, dtype=torch.float32, device=p.device)
    if config["percentile_clipping"] < HISTORY:
        state["gnorm_vec"] = torch.zeros(HISTORY, dtype=torch.float32, device=p.device)
    return state


def loaded_value(
    key: str, value: Any, p: Tensor, device: torch.device, buffer: Callable[[Tensor, torch.dtype], Tensor], qmap: QMap
) -> Any:
    """An entry of a state from a file as this optimizer keeps it: its own map, its own memory."""
    if not isinstance(value, Tensor):
        return value
    if key in ("qmap1", "qmap2"):
        own = qmap(int(key[-1]), device)
        if torch.equal(own, value.to(device)):
            return own
    if key in ("state1", "state2"):
        part = local_part(p)
        ordered = value.dtype == torch.float32 or value.stride() == part.stride()  # blocks follow the order of codes
        if ordered and device == p.device and value.shape == part.shape:
            return buffer(p, value.dtype).copy_(value)
    return value.to(device, copy=True)
