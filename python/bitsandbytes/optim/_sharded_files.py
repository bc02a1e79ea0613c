"""States of sharded parameters in state dicts: those of the whole parameter, whatever the number of ranks.

The state of a DTensor is a DTensor cut alike, beside the absmax of all blocks, gathered from the ranks: a collective
call. torch.distributed.checkpoint takes both, and a file of any number of ranks serves any other, and a model that is
not sharded.

FullyShardedDataParallel gathers and cuts states by itself, if each is an fp32 tensor like its parameter. So it gets
codes as numbers, and the absmax of each element; -1 where a state is fp32.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._ops_optim import BLOCK
from ._place import Place, is_dtensor, is_flattened, local_part
from ._sharding import Moment, Sharding, State, moments_of
from ._state_dict import unwrap, wrap

_OP = "load_state_dict"

Maps = Callable[[int, torch.device], Tensor]  # the map of state 1 or 2 on a device


def make_whole(
    rule: str, sharding: Sharding, params: Sequence[Tensor], states: dict[Any, State], inner: Collection[str]
) -> None:
    """Lets the states of sharded parameters, by number, be those of whole ones. inner: keys as for wrap."""
    keys = [key for key, p in enumerate(params) if key in states and id(p) in sharding.places]
    for key in filter(lambda key: is_flattened(params[key]), keys):
        place = sharding.places[id(params[key])]
        states[key] = _spread(rule, params[key], place, unwrap(states[key]), bool(sharding.coded))
    keys = [key for key in keys if not is_flattened(params[key])]
    own = [(params[key], sharding.places[id(params[key])], unwrap(states[key])) for key in keys]
    for key, entry in zip(keys, _gathered(rule, own), strict=True):
        states[key] = wrap(entry, inner)


def part_of(name: str, saved: Any, p: Tensor, sharding: Sharding, rule: str, qmap: Maps) -> Any:
    """The part of a saved state that belongs to the local part of a parameter."""
    place = sharding.places.get(id(p))
    if place is None or not isinstance(saved, Mapping) or not unwrap(saved):
        return saved
    if is_flattened(p):
        return _collected(name, saved, p, place, rule, qmap)
    return _local(name, unwrap(saved), p, place, rule)


def _shape(moment: Moment, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the state of a parameter of this one."""
    return (*((moment.rows,) if moment.rows > 1 else ()), *shape)


def _gathered(rule: str, states: Sequence[tuple[Tensor, Place, State]]) -> list[State]:
    """The states of DTensors with the absmax of the whole parameters; the same call on all ranks."""
    moments = moments_of(rule)
    rows: dict[Any, list[Tensor]] = {}
    found = []
    for p, place, state in states:
        entry = dict(state)
        for moment in moments:
            key = f"absmax{moment.number}"
            if key in state:
                if moment.row == 0:
                    shape = _shape(moment, (check.blocks(place.size, BLOCK),))
                    entry[key] = torch.zeros(shape, dtype=torch.float32, device=state[key].device)
                    rows.setdefault((place.group, p.device), []).append(entry[key])
                own = slice(place.first_block, place.first_block + place.blocks)
                moment.absmax(entry)[own] = moment.absmax(state)
            if moment.row == 0:
                entry[f"state{moment.number}"] = _like(p, state[f"state{moment.number}"], moment)
        found.append(entry)
    for (group, _), parts in rows.items():
        if group is not None:
            row = torch.cat([x.view(-1) for x in parts])
            torch.distributed.all_reduce(row, torch.distributed.ReduceOp.MAX, group=group)
            for part, whole in zip(parts, row.split([x.numel() for x in parts]), strict=True):
                part.copy_(whole.view(part.shape))
    return found


def _like(p: Any, local: Tensor, moment: Moment) -> Any:
    """A local state as a DTensor cut as its parameter is."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = p.placements
    if moment.rows > 1:
        if any(type(x) not in (Shard, Replicate) for x in placements):
            raise NotImplementedError(
                f"state_dict: a parameter has placements {placements}, expected Shard or Replicate"
            )
        placements = [Shard(x.dim + 1) if x.is_shard() else x for x in placements]
    shape = torch.Size(_shape(moment, p.shape))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, p.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def _local(name: str, entry: Mapping[str, Any], p: Any, place: Place, rule: str) -> State:
    """The inverse of _gathered. What is no tensor stays as it is."""
    found = dict(entry)
    for moment in moments_of(rule):
        key, scales = f"state{moment.number}", f"absmax{moment.number}"
        if moment.row or not isinstance(entry.get(key), Tensor):
            continue
        check.equal(_OP, f"{name}.{key}", "shape", tuple(entry[key].shape), _shape(moment, p.shape))
        if is_dtensor(entry[key]):
            like = _like(p, p.to_local().new_empty(_shape(moment, p.to_local().shape), device="meta"), moment)
            found[key] = entry[key].redistribute(p.device_mesh, like.placements).to_local()
        elif place.starts:
            part = entry[key].reshape(moment.rows, -1)[:, place.start : place.stop]
            found[key] = part.contiguous().view(_shape(moment, p.to_local().shape))
        else:
            raise ValueError(f"{_OP}: {name}.{key} is a Tensor, expected a DTensor as the parameter is")
        if entry[key].dtype == torch.uint8 and isinstance(entry.get(scales), Tensor):
            size = moment.rows * check.blocks(place.size, BLOCK)
            check.equal(_OP, f"{name}.{scales}", "size", entry[scales].numel(), size)
            own = slice(place.first_block, place.first_block + place.blocks)
            part = local_part(entry[scales]).reshape(moment.rows, -1)[:, own]
            found[scales] = part.contiguous().view(_shape(moment, (place.blocks,)))
    return found


def _names(moment: Moment) -> tuple[str, str]:
    more = f"_{moment.row + 1}" if moment.row else ""
    return f"state{moment.number}{more}", f"absmax{moment.number}{more}"


def _block_of_each(place: Place, device: torch.device) -> Tensor:
    return torch.arange(place.start, place.stop, device=device) // BLOCK - place.first_block


def _spread(rule: str, p: Tensor, place: Place, state: State, any_coded: bool) -> State:
    """The state of a flat parameter, or of a parameter in one, as FullyShardedDataParallel takes it."""
    entry: State = {"step": state["step"]}
    for moment in moments_of(rule):
        name, scales = _names(moment)
        entry[name] = moment.codes(state).reshape(p.shape).float()
        if any_coded:
            entry[scales] = torch.full_like(entry[name], -1)
            if f"absmax{moment.number}" in state:
                each = moment.absmax(state)[_block_of_each(place, p.device)]
                entry[scales].view(-1)[: len(each)] = each
    return entry


def _collected(name: str, entry: Mapping[str, Any], p: Tensor, place: Place, rule: str, qmap: Maps) -> State:
    """The inverse of _spread."""
    found: State = {"step": entry["step"]} if "step" in entry else {}
    for moment in moments_of(rule):
        key, scales = _names(moment)
        values = entry.get(key)
        if not isinstance(values, Tensor):
            raise ValueError(f"{_OP}: {name}.{key} is {type(values).__name__}, expected a tensor")
        check.equal(_OP, f"{name}.{key}", "shape", tuple(values.shape), tuple(p.shape))
        each = entry[scales].reshape(-1)[: place.stop - place.start] if scales in entry else values.new_full((1,), -1)
        parts = [values]
        if each.numel() and each[0] >= 0:
            blocks = _block_of_each(place, each.device)
            absmax = each.new_zeros(place.blocks)
            absmax[blocks] = each
            if not torch.equal(absmax[blocks], each):
                raise ValueError(f"{_OP}: {name}.{scales} changes within a block, expected a file of the same layout")
            parts = [values.to(torch.uint8), absmax]
            found[f"qmap{moment.number}"] = qmap(moment.number, p.device)
        for what, part in zip((f"state{moment.number}", f"absmax{moment.number}"), parts, strict=False):
            shaped = part.reshape(1, *part.shape) if moment.rows > 1 else part
            found[what] = torch.cat([found[what], shaped]) if moment.row else shaped
    return found
