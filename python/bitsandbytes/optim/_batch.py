"""Which tensors of a parameter group go through the operator together, remembered from step to step."""

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._ops_optim import TWO_STATES, Numbers, first_states
from ..functional.optim import HISTORY, Flat, clipped_norm, scale_to
from ._file_states import MappedFile, files_of
from ._place import Place, local_part
from ._sharding import Shards

State = dict[str, Any]

_PLAIN, _FLOATS = frozenset((torch.nn.Parameter, Tensor)), frozenset(check.FLOATS)
_shape, _dtype = operator.attrgetter("shape"), operator.attrgetter("dtype")
_TENSORS = ("state1", "state2", "absmax1", "absmax2", "unorm_vec")


def same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


@dataclass
class Batch:
    """The arguments of one call, except for gradients and steps."""

    rule: str
    gindex: int
    pindex: int  # of the first: what it is told counts for all
    indices: list[int] = field(default_factory=list)  # of all, in the group
    params: list[Tensor] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    places: list[int] = field(default_factory=list)  # among the parameters of the group that have gradients
    tensors: dict[str, list[Tensor]] = field(default_factory=dict)  # by key of the state
    files: list[MappedFile] = field(default_factory=list)  # where the states are
    shards: Shards | None = None  # if the parameters are sharded
    shapes: list[torch.Size] = field(default_factory=list)  # of the parameters, which are those of the states
    numbers: Numbers | None = None  # the last ones that passed the checks
    clock: Tensor | None = None  # counts the steps of a captured graph
    captured: bool = False

    def close(self, owner: str) -> None:
        """Lists what the states hold, after the last parameter."""
        device = self.params[0].device
        parts = [local_part(p) for p in self.params]
        self.shapes = [part.shape for part in parts]
        for i, part, state in zip(self.indices, parts, self.states, strict=True):
            made = tuple(state["state1"].shape[first_states(self.rule) - 1 :])
            if made != tuple(part.shape):
                raise self._changed(owner, i, part.shape, made)
        empty = torch.empty(0, device=device)
        for key in _TENSORS:
            found = [state.get(key) for state in self.states]
            if any(x is not None for x in found):  # a mixture of 8-bit and 32-bit states has absmax for some
                self.tensors[key] = [empty if x is None else x for x in found]
        if device.type == "cuda":
            self.clock = torch.zeros(1, dtype=torch.int64, device=device)

    def _changed(self, owner: str, index: int, shape: Sequence[int], made: Sequence[int]) -> ValueError:
        name = f"{owner}: parameter {index} of group {self.gindex}"
        return ValueError(f"{name} has shape {tuple(shape)}, expected {tuple(made)}, that of its state")

    def check(self, owner: str, percentile: int) -> None:
        """That the parameters are still what their states were made for, and gradients can be clipped."""
        if percentile < HISTORY and (self.shards is not None or self._is_captured()):
            what = "a CUDA graph is captured" if self.shards is None else "a parameter is sharded"
            name = f"{owner}: percentile_clipping of group {self.gindex}"
            raise NotImplementedError(f"{name} is {percentile} while {what}, expected {HISTORY}: the CPU reads norms")
        if self.shards is None and (shapes := list(map(_shape, self.params))) != self.shapes:
            for index, shape, made in zip(self.indices, shapes, self.shapes, strict=True):
                if shape != made:
                    raise self._changed(owner, index, shape, made)

    def check_dtypes(self, owner: str) -> None:
        """That the operator takes the parameters, which it would say only after it has stepped those of other calls."""
        if not _FLOATS.issuperset(map(_dtype, self.params)):
            for index, p in zip(self.indices, self.params, strict=True):
                check.dtype(owner, f"parameter {index} of group {self.gindex}", p, *check.FLOATS)

    def is_current(self) -> bool:
        """Whether the states still hold the tensors listed here."""
        return all(
            same([state.get(key) for state in self.states], found)
            if key in ("state1", "state2")
            else all(state.get(key, x) is x for state, x in zip(self.states, found, strict=True))
            for key, found in self.tensors.items()
        )

    def late(self) -> int:
        """Steps of graphs that the states do not count."""
        return int(self.clock.item()) if self.captured and self.clock is not None else 0

    def run(self, numbers: Numbers, grads: Sequence[Tensor], percentile: int = HISTORY) -> None:
        steps = [state["step"] + 1 for state in self.states]
        if percentile < HISTORY:
            return self._run_clipped(numbers, grads, percentile, steps)
        clock = self._clock()
        if self.shards is not None:
            lists = self.shards.lists(grads, steps)
            self._call(numbers, lists.p, lists.g, lists.tensors, lists.steps, self.shards.offsets, clock)
            self.shards.after(lists)
        elif _PLAIN.issuperset(map(type, self.params)) and all(map(Tensor.is_contiguous, chain(self.params, grads))):
            self._call(numbers, self.params, grads, self.tensors, steps, [], clock)
        else:
            self._run_flat(numbers, grads, steps, clock)
        self._count(steps, clock)

    def _run_clipped(self, numbers: Numbers, grads: Sequence[Tensor], percentile: int, steps: list[int]) -> None:
        """With gradients that are no longer than a percentile of their last norms."""
        op, scales, after = "percentile_clipping", [], []
        for state, g, step in zip(self.states, grads, steps, strict=True):
            if "gnorm_vec" not in state:
                state["gnorm_vec"] = torch.zeros(HISTORY, dtype=torch.float32, device=g.device)
            norm, limit, history = clipped_norm(op, g, state["gnorm_vec"], step, percentile)
            scales.append(scale_to(norm, limit))
            after.append(history)
        self._run_flat(numbers, grads, steps, None, scales)
        for state, history in zip(self.states, after, strict=True):
            state["gnorm_vec"].copy_(history)
        self._count(steps, None)

    def _count(self, steps: Sequence[int], clock: Tensor | None) -> None:
        for file in self.files:
            file.release()
        torch.autograd.graph.increment_version(self.params)
        if clock is None:
            for state, step in zip(self.states, steps, strict=True):
                state["step"] = step

    def _run_flat(
        self,
        numbers: Numbers,
        grads: Sequence[Tensor],
        steps: list[int],
        clock: Tensor | None,
        scales: Sequence[float] = (),
    ) -> None:
        """The same with rows in the order of their states."""
        op, reference = "optimizer_step", "state2" if self.rule in TWO_STATES else "state1"
        tensors = dict(self.tensors)
        orders = [Flat(op, x) for x in tensors[reference]]
        p = [flat("p", x) for flat, x in zip(orders, self.params, strict=True)]
        g = [flat("g", x) for flat, x in zip(orders, grads, strict=True)]
        for key in ("state1", "state2"):
            if key in tensors:
                tensors[key] = [flat(key, x) for flat, x in zip(orders, tensors[key], strict=True)]
        self._call(numbers, p, g, tensors, steps, [], clock, scales)
        for flat in orders:
            flat.write_back()

    def _call(
        self,
        numbers: Numbers,
        p: Sequence[Tensor],
        g: Sequence[Tensor],
        tensors: dict[str, list[Tensor]],
        steps: list[int],
        offsets: list[int],
        clock: Tensor | None,
        scales: Sequence[float] = (),
    ) -> None:
        lists = (tensors.get(key, []) for key in _TENSORS)
        maps = (self.states[0].get(key) for key in ("qmap1", "qmap2"))  # tensors with codes come first
        torch.ops.bitsandbytes.optimizer_step.default(
            self.rule, p, g, *lists, *maps, steps, *numbers, offsets, scales, [], clock
        )

    def _is_captured(self) -> bool:
        return self.clock is not None and torch.cuda.is_current_stream_capturing()

    def _clock(self) -> Tensor | None:
        if self._is_captured():
            self.captured = True
        return self.clock if self.captured else None


def batches_of(
    owner: str, gindex: int, rule: str, entries: Sequence[tuple[int, Tensor, State, Any]], places: Mapping[int, Place]
) -> list[Batch]:
    """Splits (place in the group, parameter, state, options of its own) by device, options, shards, files and maps.

    A parameter that a group has twice is stepped twice, one after the other.
    """
    found: dict[Any, Batch] = {}
    times: Counter[int] = Counter()
    for at, (pindex, p, state, options) in sorted(enumerate(entries), key=lambda entry: "qmap1" not in entry[1][2]):
        group = (places[id(p)].group,) if id(p) in places else ()
        files = {id(file): file for file in files_of(state)}
        shared = (times[id(p)], p.device, repr(sorted(options.items())), group, *files)
        times[id(p)] += 1
        if "qmap1" in state:
            key = (shared, id(state["qmap1"]), id(state.get("qmap2")))
        else:  # goes along with any maps
            key = next((k for k in found if k[0] == shared), (shared, 0, 0))
        batch = found.setdefault(key, Batch(rule, gindex, pindex, files=list(files.values())))
        batch.indices.append(pindex)
        batch.params.append(p)
        batch.states.append(state)
        batch.places.append(at)
    for batch in found.values():
        batch.close(owner)
        if id(batch.params[0]) in places:
            batch.shards = Shards(rule, batch.params, batch.states, [places[id(p)] for p in batch.params])
    return list(found.values())
