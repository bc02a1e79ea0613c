"""Steps of sharded parameters: blocks of 256 are those of the whole parameter, on any number of ranks.

A block that lies on two or more ranks is cut. Each of them has its codes of the block, and the absmax of the whole
block. The operator steps the uncut blocks of a part as codes, and its pieces of cut blocks, at most one at each end, as
fp32. Then one all_reduce tells all ranks the absmax of all cut blocks of the optimizer, and the pieces become codes
again. So a parameter and its states get the same bytes on any number of ranks, one included.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import blocks
from .._codes import state_codes
from .._ops_optim import BLOCK, TWO_STATES, first_states, is_root
from ._place import Place, is_sharded, local_part, places_of

State = dict[str, Any]
_KEYS = ("state1", "state2", "absmax1", "absmax2", "unorm_vec")


class Moment(NamedTuple):
    """One of the averages that a rule keeps: row `row` of the `rows` of state `number`."""

    number: int
    row: int
    rows: int
    is_root: bool

    def codes(self, state: State) -> Tensor:
        return state[f"state{self.number}"].view(self.rows, -1)[self.row]

    def absmax(self, state: State) -> Tensor:
        return state[f"absmax{self.number}"].view(self.rows, -1)[self.row]


def moments_of(rule: str) -> list[Moment]:
    first = first_states(rule)
    found = [Moment(1, row, first, is_root(rule, 1)) for row in range(first)]
    return [*found, Moment(2, 0, 1, True)] if rule in TWO_STATES else found


class Piece(NamedTuple):
    """Elements [begin, end) of the local part of parameter `at`, all of one block of the whole parameter."""

    at: int
    begin: int
    end: int
    block: int


class Body(NamedTuple):
    """Elements [begin, end) of the local part of parameter `at`, from the begin of a block on."""

    at: int
    begin: int
    end: int


def cut(index: int, place: Place, coded: bool) -> tuple[list[Body], list[Piece]]:
    """The uncut and the cut blocks of a part."""
    begin, end = 0, place.stop - place.start
    pieces = []
    if coded and begin < end and place.start % BLOCK:
        head = min(end, BLOCK - place.start % BLOCK)
        pieces.append(Piece(index, 0, head, place.first_block))
        begin = head
    if coded and begin < end and place.stop % BLOCK and place.stop < place.size:
        tail = max(begin, end - place.stop % BLOCK)
        pieces.append(Piece(index, tail, end, place.stop // BLOCK))
        end = tail
    return [Body(index, begin, end)] if begin < end else [], pieces


class Lists(NamedTuple):
    """What the operator gets that changes from step to step."""

    p: list[Tensor]
    g: list[Tensor]
    tensors: dict[str, list[Tensor]]
    steps: list[int]
    copies: list[tuple[Tensor, Tensor]]  # a part of a state with gaps, and what stands for it


class Shards:
    """Sharded parameters that go through the operator together."""

    def __init__(self, rule: str, params: Sequence[Tensor], states: Sequence[State], places: Sequence[Place]) -> None:
        self.rule, self.params, self.states, self.places = rule, params, states, places
        self.bodies: list[Body] = []
        self.pieces: list[Piece] = []
        for i, (place, state) in enumerate(zip(places, states, strict=True)):
            bodies, pieces = cut(i, place, "qmap1" in state)
            self.bodies += bodies
            self.pieces += pieces
        self.ranges = [(i, begin, end) for i, begin, end, *_ in (*self.bodies, *self.pieces)]
        self.offsets = [places[i].start + begin for i, begin, _ in self.ranges]
        self.moments = moments_of(rule)
        self.slots: tuple[Exchange, Tensor] | None = None
        self.checked: tuple[float, int | None] | None = None
        self.plain: list[dict[str, Tensor]] = []  # states 1 and 2 of a piece in fp32, as the operator takes them
        if self.pieces:
            self._allocate()
        keys = [key for key in _KEYS if any(key in state for state in states)]
        if self.pieces and "unorm_vec" in keys:
            keys.remove("unorm_vec")
        empty = torch.empty(0, device=states[0]["state1"].device)
        self.tensors = {
            key: [self._of_body(key, *body, empty) for body in self.bodies] + [x.get(key, empty) for x in self.plain]
            for key in keys
        }
        self.gaps = [
            (key, at) for key, found in self.tensors.items() for at, x in enumerate(found) if not x.is_contiguous()
        ]  # two averages of AdEMAMix

    def _allocate(self) -> None:
        """Rows of 256 elements, one for each moment of each piece, and their places in the states."""
        device = self.states[0]["state1"].device
        shape = (len(self.moments), len(self.pieces))
        self.codes = torch.zeros((*shape, BLOCK), dtype=torch.uint8, device=device)
        self.values = torch.zeros((*shape, BLOCK), dtype=torch.float32, device=device)
        self.absmax = torch.zeros(shape, dtype=torch.float32, device=device)
        self._codes: list[tuple[Tensor, Tensor]] = []  # in rows, in a state
        self._absmax: list[tuple[Tensor, Tensor]] = []
        self._values: list[tuple[Tensor, Tensor]] = []  # in rows, in `plain`
        for j, (i, begin, end, block) in enumerate(self.pieces):
            n, state, at = end - begin, self.states[i], block - self.places[i].first_block
            plain = {
                f"state{x.number}": torch.empty((x.rows, n), dtype=torch.float32, device=device) for x in self.moments
            }
            self.plain.append(plain)
            for k, moment in enumerate(self.moments):
                self._codes.append((self.codes[k, j, :n], moment.codes(state)[begin:end]))
                self._absmax.append((self.absmax[k, j], moment.absmax(state)[at]))
                self._values.append((self.values[k, j, :n], plain[f"state{moment.number}"][moment.row]))

    def _of_body(self, key: str, index: int, begin: int, end: int, empty: Tensor) -> Tensor:
        whole, place = self.states[index].get(key), self.places[index]
        if whole is None or key == "unorm_vec":
            return empty if whole is None else whole
        rows = whole.view(first_states(self.rule) if key.endswith("1") else 1, -1)
        if key.startswith("absmax"):
            first = (place.start + begin) // BLOCK - place.first_block
            begin, end = first, first + blocks(end - begin, BLOCK)
        return rows[:, begin:end]

    def check(self, op: str, max_unorm: float, seed: int | None) -> None:
        if self.checked == (max_unorm, seed):
            return
        for p, place, state in zip(self.params, self.places, self.states, strict=True):
            name = f"{op}: a sharded parameter of {place.size} elements"
            if max_unorm > 0 and place.is_cut:
                raise NotImplementedError(f"{name} has max_unorm {max_unorm}, expected 0: norms are those of one rank")
            if not place.starts and ("qmap1" in state or seed is not None):
                what = "states of 8 bits" if "qmap1" in state else "stochastic rounding"
                raise NotImplementedError(f"{name} is not cut between rows, expected that for {what}")
            if not local_part(p).is_contiguous():
                raise NotImplementedError(f"{name} is not contiguous, expected contiguous ones")
        self.checked = (max_unorm, seed)

    def _maps(self) -> Iterator[tuple[int, Tensor, bool]]:
        for k, moment in enumerate(self.moments):
            yield k, self.states[0][f"qmap{moment.number}"], moment.is_root

    def lists(self, grads: Sequence[Tensor], steps: Sequence[int]) -> Lists:
        """The arguments of a step: uncut blocks, then pieces."""
        if self.params[0].is_cuda and torch.cuda.is_current_stream_capturing():
            raise NotImplementedError("optimizer step: a CUDA graph has a sharded parameter, expected only whole ones")
        if self.pieces:
            self._decode()
        p = [local_part(x).detach().view(-1) for x in self.params]
        g = [local_part(x).reshape(-1) for x in grads]
        tensors, copies = self.tensors, []
        if self.gaps:
            tensors = {key: list(found) for key, found in tensors.items()}
            for key, at in self.gaps:
                part = tensors[key][at]
                tensors[key][at] = part.contiguous()
                copies.append((part, tensors[key][at]))
        return Lists(
            [p[i][begin:end] for i, begin, end in self.ranges],
            [g[i][begin:end] for i, begin, end in self.ranges],
            tensors,
            [steps[i] for i, _, _ in self.ranges],
            copies,
        )

    def _decode(self) -> None:
        _copy(self._codes)
        _copy(self._absmax)
        for k, qmap, _ in self._maps():
            self.values[k] = qmap[self.codes[k].int()] * self.absmax[k][:, None]
        _copy([(plain, rows) for rows, plain in self._values])

    def after(self, lists: Lists) -> None:
        """Takes over what the operator wrote into copies."""
        for part, copy in lists.copies:
            part.copy_(copy)
        if self.pieces:
            self.values.zero_()
            _copy(self._values)
            torch.amax(self.values.abs(), -1, out=self.absmax)

    def encode(self, absmax: Tensor) -> None:
        """Makes codes of the pieces, whose blocks have this absmax."""
        for k, qmap, root in self._maps():
            self.codes[k] = state_codes(self.values[k], absmax[k], qmap, root)
        self.absmax.copy_(absmax)
        _copy([(state, rows) for rows, state in self._codes])
        _copy([(state, row) for row, state in self._absmax])


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copies the second of each pair to the first."""
    if pairs:
        torch._foreach_copy_([to for to, _ in pairs], [of for _, of in pairs])


class Exchange:
    """The absmax of all cut blocks of an optimizer, in one row for each group of ranks, the same on each of them."""

    def __init__(self, coded: Iterable[tuple[Tensor, Place]], rule: str) -> None:
        """coded: all sharded parameters with 8-bit states, whether this rank has elements of them or not."""
        self.moments = len(moments_of(rule))
        self.sizes: dict[Any, int] = {}  # of the rows, by group and device
        self.places: dict[int, tuple[Tensor, Place, int]] = {}  # by id of a parameter, with its begin in the row
        for p, place in coded:
            if place.cut_blocks:
                key = (place.group, p.device)
                begin = self.sizes.get(key, 0)
                self.places[id(p)] = (p, place, begin)
                self.sizes[key] = begin + self.moments * len(place.cut_blocks)

    def _slots(self, p: Tensor, block: int) -> list[int]:
        _, place, begin = self.places[id(p)]
        return [begin + k * len(place.cut_blocks) + place.cut_blocks.index(block) for k in range(self.moments)]

    def run(self, stepped: Iterable[Shards]) -> None:
        """Lets the pieces of a step become codes. All ranks call it after each step, whatever they stepped."""
        rows = {key: torch.zeros(n, dtype=torch.float32, device=key[1]) for key, n in self.sizes.items()}
        work = [(shards, *self._of(shards)) for shards in stepped if shards.pieces]
        done = {id(shards.params[i]) for shards, _, _ in work for i, _, _, _ in shards.pieces}
        for p, place, _ in (entry for i, entry in self.places.items() if i not in done):
            for piece in cut(0, place, True)[1]:  # not stepped, which the ranks that step the rest must know
                rows[place.group, p.device][self._slots(p, piece.block)] = torch.inf
        for shards, key, slots in work:
            rows[key][slots] = shards.absmax
        for (group, _), row in rows.items():
            torch.distributed.all_reduce(row, torch.distributed.ReduceOp.MAX, group=group)
        for shards, key, slots in work:
            absmax = rows[key][slots]
            torch._assert_async(
                absmax.isfinite().all(),
                "optimizer step: a sharded parameter has a gradient on some ranks only, expected it on all or on none",
            )
            shards.encode(absmax)

    def _of(self, shards: Shards) -> tuple[Any, Tensor]:
        """The row of the pieces, and their slots in it."""
        first = shards.pieces[0].at
        key = (shards.places[first].group, shards.params[first].device)
        if shards.slots is None or shards.slots[0] is not self:
            slots = [self._slots(shards.params[i], block) for i, _, _, block in shards.pieces]
            shards.slots = (self, torch.tensor(slots, device=key[1]).t().contiguous())
        return key, shards.slots[1]


class Sharding:
    """The sharded parameters of an optimizer."""

    def __init__(self, rule: str, params: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """params: all parameters, with their options."""
        sharded = [p for p in params if is_sharded(p)]
        self.places = dict(zip(map(id, sharded), places_of(sharded), strict=True))
        self.coded = [(p, self.places[id(p)]) for p in sharded if self.is_coded(p, params[p])]
        self.exchange = Exchange(self.coded, rule)

    def size(self, p: Tensor) -> int:
        """Elements of the whole parameter."""
        return self.places[id(p)].size if id(p) in self.places else p.numel()

    def blocks(self, p: Tensor) -> int:
        """Blocks of the part that this process holds."""
        return self.places[id(p)].blocks if id(p) in self.places else blocks(p.numel(), BLOCK)

    def is_coded(self, p: Tensor, config: Mapping[str, Any]) -> bool:
        return config["optim_bits"] == 8 and self.size(p) >= config["min_8bit_size"]
