"""The optimizers' common part: states in 32 or 8 bits, options of single parameters, files, and one call per group."""

from __future__ import annotations

import operator
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import _checks as check
from .._ops_optim import Numbers, check_numbers
from ..functional.codebooks import create_dynamic_map
from ..functional.optim import HISTORY
from ..functional.paged import prefetch_tensor
from ._batch import Batch, State, batches_of, same
from ._file_states import FileStates
from ._manager import GlobalOptimManager
from ._place import local_part
from ._sharded_files import make_whole, part_of
from ._sharding import Sharding
from ._state_dict import QUANT_STATE_KEY, check_key, checked_groups, checked_state, is_mapping, wrap
from ._states import StateMemory, first_shape, loaded_value, new_state, numbers_of

_grad, _layout = operator.attrgetter("grad"), operator.attrgetter("layout")


class _Plan(NamedTuple):
    """How a group was stepped the last time."""

    members: list[Tensor]
    params: list[Tensor]  # those with gradients
    states: list[State]
    version: int  # of the manager
    batches: list[Batch]


class Optimizer8bit(torch.optim.Optimizer):
    """Base of all optimizers. One step is one call of the operator for each group of parameters.

    State of a parameter: `step` and `state1`, `state2` of its shape, in fp32 or, with 8 bits, as codes in blocks of
    256 with `absmax1`, `qmap1` and so on (8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861).
    """

    _FSDP_WRAPPED_QUANT_STATE_KEY = QUANT_STATE_KEY

    args: Any
    optimizer_name: str
    _files: FileStates | None = None

    def __init__(self, params: Any, defaults: dict[str, Any], optim_bits: int = 32, is_paged: bool = False) -> None:
        """
        Args:
            optim_bits: 32, or 8 for states in 8 bits.
            is_paged: let states of large parameters on a GPU live in memory that it shares with the CPU.
        """
        super().__init__(params, defaults)
        self.initialized = False
        self.name2qmap: dict[str, Tensor] = {}
        self._maps: dict[tuple[str, torch.device], Tensor] = {}  # copies on other devices
        self.is_paged = is_paged
        self.mng = GlobalOptimManager.get_instance()
        self.non_castable_tensor_keys = {
            *("qmap1", "qmap2", "max1", "max2", "new_max1", "new_max2", "state1", "state2"),
            *("gnorm_vec", "absmax1", "absmax2", "unorm_vec"),
        }
        # What the rule has beyond the groups: nesterov, bias_correction, coupled_decay.
        self.options: dict[str, bool] = {}
        self._plans: dict[int, _Plan] = {}
        self._sharding: tuple[Any, Sharding] | None = None
        self._first_places: Any = None  # of parameters, by group and number, since places have options
        if optim_bits == 8:
            self.fill_qmap()

    def fill_qmap(self) -> None:
        """Makes the maps of 8-bit states: signed for state 1, unsigned for state 2."""
        self.name2qmap["dynamic"] = create_dynamic_map(signed=True)
        self.name2qmap["udynamic"] = create_dynamic_map(signed=False)

    def keep_states_in_files(self, limit: int, directory: str | None = None) -> None:
        """Lets states of parameters on the CPU live in memory-mapped files, except for `limit` bytes of them.

        Call it before the first step. The bits are the same; a step brings in at most 256 MiB of files at a time, or
        one parameter's states. Files have no names and are gone with the optimizer, also after a crash.

        Args:
            directory: on a disk with room for the states; that of temporary files if None.
        Raises:
            OSError: by the first step, before it changes anything, if the directory has no room.
        """
        check.at_least("keep_states_in_files", "limit", limit, 0, "bytes")
        if any(self.state.values()):
            raise RuntimeError(
                "keep_states_in_files: there are states in memory, expected a call before the first step"
            )
        self._files = FileStates(limit, tempfile.gettempdir() if directory is None else directory)

    # ---- files and copies

    def __getstate__(self) -> dict[str, Any]:
        own = (
            "initialized",
            "name2qmap",
            "_maps",
            "is_paged",
            "non_castable_tensor_keys",
            "options",
            "args",
            "optimizer_name",
        )
        return super().__getstate__() | {key: vars(self)[key] for key in own if key in vars(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.mng = GlobalOptimManager.get_instance()
        self._plans = {}
        self._sharding = None
        self._first_places = None

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.Optimizer's, with the tensors of each state in a dict of their own, which FSDP leaves.

        States of parameters that no group has any more are not in it.
        """
        params = list(chain.from_iterable(group["params"] for group in self.param_groups))
        numbers = {id(p): i for i, p in enumerate(params)}
        states = self.state
        kept = {p: entry for p, entry in states.items() if id(p) in numbers or not isinstance(p, Tensor)}
        if len(kept) < len(states):
            self.state = defaultdict(dict, kept)
        try:
            result = super().state_dict()
        finally:
            self.state = states
        late = {
            numbers[id(p)]: steps
            for batch in self._batches()
            if (steps := batch.late())
            for p in batch.params
            if id(p) in numbers
        }
        for key, steps in late.items():
            result["state"][key] = result["state"][key] | {"step": result["state"][key]["step"] + steps}
        result["state"] = {key: wrap(entry, self.non_castable_tensor_keys) for key, entry in result["state"].items()}
        make_whole(self.optimizer_name, self.sharding, params, result["state"], self.non_castable_tensor_keys)
        return result

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Takes over what state_dict gave, here or in another release; nothing changes if it cannot be.

        Raises:
            ValueError: groups or states are not those of this optimizer's parameters; the entry is named.
        """
        state_dict = dict(state_dict)
        for pre in self._optimizer_load_state_dict_pre_hooks.values():
            if (given := pre(self, state_dict)) is not None:
                state_dict = given
        for key in ("state", "param_groups"):
            if key not in state_dict:
                raise ValueError(f"load_state_dict: {key} is missing, expected what state_dict() gives")
        groups = checked_groups(self.param_groups, state_dict["param_groups"], self.defaults)
        is_mapping("state", state_dict["state"])
        numbers = chain.from_iterable(group["params"] for group in groups)
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        by_number = dict(zip(numbers, params, strict=True))
        states: defaultdict[Any, Any] = defaultdict(dict)
        for key, saved in state_dict["state"].items():
            if key not in by_number:
                check_key(key, saved)
                states[key] = saved
                continue
            p = by_number[key]
            part = local_part(p)
            name, rule = f"state[{key}]", self.optimizer_name
            saved = part_of(name, saved, p, self.sharding, rule, self._qmap)
            entry = checked_state(name, saved, rule, part, first_shape(rule, part))
            if entry and self.args.max_unorm > 0:  # files of other rules have none
                entry.setdefault("unorm_vec", torch.zeros(1, dtype=torch.float32, device=p.device))
            states[p] = {}
            for k, value in entry.items():
                device = value.device if isinstance(value, Tensor) and not move_to_device else p.device
                states[p][k] = loaded_value(k, value, p, device, self.get_state_buffer, self._qmap)
        for group, own in zip(groups, self.param_groups, strict=True):
            group["params"] = own["params"]
        self.__setstate__({"state": states, "param_groups": groups})
        for post in self._optimizer_load_state_dict_post_hooks.values():
            post(self)

    def _qmap(self, number: int, device: torch.device) -> Tensor:
        """The map of state 1 or 2."""
        name = "dynamic" if number == 1 else "udynamic"
        if not self.name2qmap:
            self.fill_qmap()
        own = self.name2qmap[name]
        if own.device == device:
            return own
        if (name, device) not in self._maps:  # states on a device share one: they are stepped together
            self._maps[name, device] = own.to(device, non_blocking=True)  # a constant need not be waited for
        return self._maps[name, device]

    def to_gpu(self) -> None:
        """Moves the states to where their parameters are."""
        for p in chain.from_iterable(group["params"] for group in self.param_groups):
            for key, value in self.state.get(p, {}).items():
                if isinstance(value, Tensor) and value.device != p.device and not getattr(value, "is_paged", False):
                    self.state[p][key] = value.to(p.device)

    # ---- options

    @property
    def sharding(self) -> Sharding:
        """What is sharded, for all parameters as they are told now."""
        groups = [group["params"] for group in self.param_groups]
        key = (self.mng.version, list(map(len, groups)))
        if self._sharding is None or self._sharding[0] != key:
            entries = [(g, i, p) for g, params in enumerate(groups) for i, p in enumerate(params)]
            configs = {p: self.get_config(g, i, self.param_groups[g]) for g, i, p in entries}
            self._sharding = (key, Sharding(self.optimizer_name, configs))
        return self._sharding[1]

    def check_overrides(self) -> None:
        """Looks up what modules have told the manager about their parameters."""
        self.mng.resolve_modules(chain.from_iterable(group["params"] for group in self.param_groups))

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """The options of one parameter: those of its group, and what the manager has for it alone."""
        config = {key: group[key] for key in ("betas", "eps", "weight_decay", "lr")}
        config |= {"alpha": group.get("alpha", 0.0), "t_alpha": group.get("t_alpha"), "t_beta3": group.get("t_beta3")}
        config |= {key: getattr(self.args, key) for key in ("optim_bits", "min_8bit_size", "max_unorm", "skip_zeros")}
        config["percentile_clipping"] = getattr(self.args, "percentile_clipping", HISTORY)
        if "seed" in group:
            config["seed"] = group["seed"]
        return config | self._own_options(group["params"][pindex], gindex, pindex)

    def _own_options(self, p: Tensor, gindex: int, pindex: int) -> dict[str, Any]:
        """What the manager has for a parameter alone: for itself, else for the place where it was found first."""
        if self.mng.index2config:
            if self._first_places is None:
                found = enumerate(group["params"] for group in self.param_groups)
                self._first_places = WeakTensorKeyDictionary(
                    {p: (g, i) for g, params in found for i, p in enumerate(params)}
                )
            gindex, pindex = self._first_places.setdefault(p, (gindex, pindex))
        return self.mng.options_of(p, gindex, pindex)

    def _numbers(self, config: dict[str, Any]) -> Numbers:
        return numbers_of(self.optimizer_name, config, self.options)

    # ---- steps

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have gradients.

        Args:
            closure: computes the loss again, which is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        self._step_groups()
        return loss

    @torch._disable_dynamo  # torch.compile leaves steps as they are
    def _step_groups(self) -> None:
        owner = type(self).__name__
        work: list[tuple[Batch, Numbers, list[Tensor], int]] = []
        for gindex, group in enumerate(self.param_groups):
            params, grads = group["params"], list(map(_grad, group["params"]))
            if type(None) in set(map(type, grads)):
                params = [p for p, g in zip(params, grads, strict=True) if g is not None]
                grads = [g for g in grads if g is not None]
            if not params:
                continue
            if set(map(_layout, grads)) != {torch.strided}:
                raise RuntimeError(f"{owner}: a gradient of group {gindex} is sparse, expected dense ones")
            plan = self._plan(gindex, group, params)
            if self.is_paged and params[0].is_cuda and not torch.cuda.is_current_stream_capturing():
                for p in params:
                    self.prefetch_state(p)
            for batch in plan.batches:
                config = self.get_config(gindex, batch.pindex, group)
                if batch.shards is not None:
                    batch.shards.check(owner, config["max_unorm"], config.get("seed"))
                batch.check(owner, config["percentile_clipping"])
                own = [grads[i] for i in batch.places]
                work.append((batch, self._numbers(config), own, config["percentile_clipping"]))
        if len(work) > 1:  # of one, the operator does it
            for batch, numbers, *_ in work:
                if batch.numbers != numbers:
                    check_numbers(owner, f" of group {batch.gindex}", self.optimizer_name, numbers)
                    batch.numbers = numbers
                batch.check_dtypes(owner)
        for file in {id(file): file for batch, *_ in work for file in batch.files}.values():
            file.begin_step()
        for batch, numbers, own, percentile in work:  # nothing has changed until here
            batch.run(numbers, own, percentile)
        self.sharding.exchange.run(batch.shards for batch, *_ in work if batch.shards is not None)

    def _plan(self, gindex: int, group: dict[str, Any], params: list[Tensor]) -> _Plan:
        plan = self._plans.get(gindex)
        if (
            plan is not None
            and plan.version == self.mng.version
            and same(plan.members, group["params"])
            and same(plan.params, params)
            and same(plan.states, list(map(self.state.get, params)))
            and all(batch.is_current() for batch in plan.batches)
        ):
            return plan
        self._sharding = None  # parameters may be others, in the same number
        places = {id(p): i for i, p in enumerate(group["params"])}
        self._count_graphs(gindex)
        for p in params:
            if not self.state[p]:
                self._check_parameter(gindex, places[id(p)], p)
                self.init_state(group, p, gindex, places[id(p)])
        states = [self.state[p] for p in params]
        indices = [places[id(p)] for p in params]
        options = [self._own_options(p, gindex, i) for p, i in zip(params, indices, strict=True)]
        entries = list(zip(indices, params, states, options, strict=True))
        batches = batches_of(type(self).__name__, gindex, self.optimizer_name, entries, self.sharding.places)
        plan = _Plan(list(group["params"]), list(params), states, self.mng.version, batches)
        self._plans[gindex] = plan
        return plan

    def _batches(self) -> Iterable[Batch]:
        return chain.from_iterable(plan.batches for plan in self._plans.values())

    def _count_graphs(self, gindex: int) -> None:
        """Lets the states of a group count the steps of captured graphs, before its batches are made anew."""
        plan = self._plans.pop(gindex, None)
        for batch in plan.batches if plan is not None else []:
            late = batch.late()
            for state in batch.states if late else []:
                state["step"] += late

    def _check_parameter(self, gindex: int, pindex: int, p: Tensor) -> None:
        op, name = type(self).__name__, f"parameter {pindex} of group {gindex}"
        check.dtype(op, name, p, *check.FLOATS)
        if p.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{op}: the first step is captured into a CUDA graph, expected one step before that")

    @torch.no_grad()
    def init_state(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Gives a parameter its state before the first step."""
        config = self.get_config(gindex, pindex, group)
        bits = config["optim_bits"]
        if bits not in (8, 32):
            raise NotImplementedError(f"Amount of optimizer bits not supported: {bits}")
        blocks = self.sharding.blocks(p) if self.sharding.is_coded(p, config) else None
        buffer = self.get_state_buffer
        self.state[p] = new_state(self.optimizer_name, p, config, self._memory, buffer, blocks, self._qmap)

    @property
    def _memory(self) -> StateMemory:
        return StateMemory(self.is_paged, self._files)

    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """One step of one parameter, for optimizers that have a step of their own."""
        if p.grad is None:
            raise RuntimeError(f"{type(self).__name__}: parameter {pindex} of group {gindex} has no gradient")
        options = self._own_options(p, gindex, pindex)
        if id(p) in self.sharding.places:
            raise NotImplementedError(f"{type(self).__name__}: parameter {pindex} is sharded, expected step() for it")
        entries = [(pindex, p, self.state[p], options)]
        (batch,) = batches_of(type(self).__name__, gindex, self.optimizer_name, entries, {})
        config = self.get_config(gindex, pindex, group)
        batch.check(type(self).__name__, config["percentile_clipping"])
        for file in batch.files:
            file.begin_step()
        batch.run(self._numbers(config), [p.grad], config["percentile_clipping"])

    def get_state_buffer(self, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros of the shape and memory order of a parameter, for a state of it."""
        return self._memory.like(p, dtype)

    def prefetch_state(self, p: Tensor) -> None:
        """Brings the paged states of a parameter to its device; others are there."""
        for value in self.state[p].values():
            if getattr(value, "is_paged", False):
                prefetch_tensor(value)
