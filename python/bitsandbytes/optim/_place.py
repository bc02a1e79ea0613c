"""Where the part of a parameter that this process holds lies in the whole parameter.

Parameters are sharded by torch.distributed.fsdp: `fully_shard` makes each a DTensor, cut between rows;
FullyShardedDataParallel lays several in a row, a flat parameter, and cuts that anywhere.
"""

import gc
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .._checks import blocks
from .._ops_optim import BLOCK


@dataclass(frozen=True)
class Place:
    """Elements [start, stop) of the `size` elements of a parameter, in the order of rows.

    `starts` are those of the parts of all ranks of `group`, in their order. A part that is not a range of elements, as
    columns are not, has no starts; it counts as whole.
    """

    size: int
    rank: int = 0
    starts: tuple[int, ...] = ()
    group: Any = None  # of torch.distributed

    @property
    def start(self) -> int:
        return self.starts[self.rank] if self.starts else 0

    @property
    def stop(self) -> int:
        return (*self.starts, self.size)[self.rank + 1] if self.starts else self.size

    @property
    def is_cut(self) -> bool:
        return not self.starts or len(self.starts) > 1

    @cached_property
    def cut_blocks(self) -> tuple[int, ...]:
        """The blocks of the parameter of which more than one rank has elements."""
        return tuple(sorted({s // BLOCK for s in self.starts if s < self.size and s % BLOCK}))

    @property
    def first_block(self) -> int:
        return self.start // BLOCK

    @property
    def blocks(self) -> int:
        """How many blocks the part has elements of."""
        return blocks(self.stop, BLOCK) - self.first_block if self.stop > self.start else 0


def is_dtensor(x: Any) -> TypeGuard["torch.distributed.tensor.DTensor"]:
    module = sys.modules.get("torch.distributed.tensor")  # whoever has one has imported it
    return module is not None and isinstance(x, module.DTensor)


def is_flattened(p: Tensor) -> bool:
    """Whether a parameter is one of FullyShardedDataParallel's flat ones or lies in one."""
    return getattr(p, "_fsdp_flattened", False)


def is_sharded(p: Tensor) -> bool:
    return is_dtensor(p) or is_flattened(p)


def local_part(x: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return x.to_local() if is_dtensor(x) else x


def places_of(params: Sequence[Tensor]) -> list[Place]:
    """The places of the local parts of sharded parameters."""
    flattened = _flattened() if any(map(is_flattened, params)) else {}
    return [_of_dtensor(p) if is_dtensor(p) else flattened.get(id(p), Place(p.numel())) for p in params]


def _of_dtensor(p: "torch.distributed.tensor.DTensor") -> Place:
    cuts = [(i, placement) for i, placement in enumerate(p.placements) if not placement.is_replicate()]
    if not cuts:
        return Place(p.numel(), 0, (0,))
    (i, placement), mesh = cuts[0], p.device_mesh
    if len(cuts) > 1 or not placement.is_shard(0) or type(placement).__name__ != "Shard":
        return Place(p.to_local().numel())
    ranks, rows = mesh.size(i), p.shape[0]
    rows_of_rank, row = math.ceil(rows / ranks), math.prod(p.shape[1:])
    starts = tuple(min(rank * rows_of_rank, rows) * row for rank in range(ranks))
    place = Place(p.numel(), mesh.get_local_rank(i), starts, mesh.get_group(i))
    if place.stop - place.start != p.to_local().numel():
        return Place(p.to_local().numel())
    return place


def _flattened() -> dict[int, Place]:
    """The places of all flat parameters alive, and of the parameters in them, by id.

    Their handles lead to parameters, but no way leads from a parameter to its handle.
    """
    kind = sys.modules["torch.distributed.fsdp._flat_param"].FlatParamHandle
    found: dict[int, Place] = {}
    for handle in (x for x in gc.get_objects() if type(x) is kind):
        flat = handle.flat_param
        found[id(flat)] = _in_flat(handle, 0, flat._unpadded_unsharded_size.numel())
        begin, params, sizes = 0, iter(flat._params or ()), iter(flat._numels)
        for length, is_padding in zip(flat._numels_with_padding, flat._is_padding_mask, strict=True):
            if not is_padding and flat._params:
                found[id(next(params))] = _in_flat(handle, begin, next(sizes))
            begin += length
    return found


def _in_flat(handle: Any, begin: int, size: int) -> Place:
    if not handle.uses_sharded_strategy:
        return Place(size, 0, (0,))
    length = handle.flat_param._sharded_size.numel()
    starts = tuple(min(max(rank * length - begin, 0), size) for rank in range(handle.world_size))
    return Place(size, handle.rank, starts, handle.process_group)
