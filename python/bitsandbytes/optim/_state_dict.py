"""The states of optimizers as files have them, checked before they count."""

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._ops_optim import TWO_STATES, check_state, is_root
from ..functional.optim import HISTORY

_OP = "load_state_dict"
QUANT_STATE_KEY = "__bnb_optimizer_quant_state__"
LATER_OPTIONS = ("alpha", "t_alpha", "t_beta3")  # that files of old releases lack
_MOST_STEPS = 2**53
_LARGEST = torch.finfo(torch.float32).max
TORCH_OPTION = "differentiable"  # that torch adds to the defaults of an optimizer when it is loaded, not to its groups


def wrap(entry: Any, keys: Iterable[str]) -> Any:
    """The state of a parameter with its `keys` in a dict of their own, which FSDP leaves as they are.

    What a user keeps beside the states of parameters may be anything, and stays.
    """
    if not isinstance(entry, Mapping):
        return entry
    inner = {k: v for k, v in entry.items() if k in keys}
    outer = {k: v for k, v in entry.items() if k not in keys}
    return outer | ({QUANT_STATE_KEY: inner} if inner else {})


def unwrap(entry: Mapping[Any, Any]) -> dict[Any, Any]:
    """The inverse of wrap; files of old releases are as they are in memory."""
    outer = {k: v for k, v in entry.items() if k != QUANT_STATE_KEY}
    return outer | dict(entry.get(QUANT_STATE_KEY, {}))


def is_mapping(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{_OP}: {name} is {type(value).__name__}, expected a dict")


def checked_groups(groups: list[dict[str, Any]], saved: Any, defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The saved groups, if they are like those of the optimizer."""
    if not isinstance(saved, list | tuple):
        raise ValueError(f"{_OP}: param_groups is {type(saved).__name__}, expected a list")
    if len(saved) != len(groups):
        raise ValueError("loaded state dict has a different number of parameter groups")
    result = []
    for i, (group, given) in enumerate(zip(groups, saved, strict=True)):
        is_mapping(f"param_groups[{i}]", given)
        if "params" not in given:
            raise ValueError(f"{_OP}: param_groups[{i}].params is missing, expected the numbers of parameters")
        if not isinstance(given["params"], list | tuple):
            found = type(given["params"]).__name__
            raise ValueError(f"{_OP}: param_groups[{i}].params is {found}, expected a list of numbers of parameters")
        if len(given["params"]) != len(group["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
            )
        for key in defaults:
            if key not in given and key not in (*LATER_OPTIONS, TORCH_OPTION):
                raise ValueError(f"{_OP}: param_groups[{i}].{key} is missing, expected the options of {list(defaults)}")
        _check_options(f"param_groups[{i}]", given)
        result.append({key: defaults[key] for key in LATER_OPTIONS if key in defaults} | dict(given))
    return result


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta else value


def _is_within(number: Any, low: float, high: float) -> bool:
    return low <= number <= high and math.isfinite(number)  # a large int, which has no float, can be compared


def _check_number(name: str, value: Any, low: float = 0.0, high: float = _LARGEST) -> None:
    number: Any = _plain(value)
    allowed = f"a finite number of {low:g} or more" if high == _LARGEST else f"numbers from {low:g} to {high:g}"
    if not isinstance(number, Real) or not _is_within(number, low, high):
        raise ValueError(f"{_OP}: {name} is {value!r}, expected {allowed}")


def _check_options(name: str, given: Mapping[str, Any]) -> None:
    """Those that a step reads."""
    for key in ("lr", "eps", "weight_decay"):
        if key in given:
            _check_number(f"{name}.{key}", given[key])
    betas = given.get("betas", (0, 0))
    if not isinstance(betas, list | tuple) or len(betas) < 2:
        raise ValueError(f"{_OP}: {name}.betas is {betas!r}, expected a tuple of 2 or more numbers")
    for i, beta in enumerate(betas):
        _check_number(f"{name}.betas[{i}]", beta, high=1.0)
    _check_number(f"{name}.alpha", given.get("alpha", 0.0), low=-_LARGEST)
    for key in ("t_alpha", "t_beta3"):
        if given.get(key) is not None:
            _step(f"{name}.{key}", given[key])


def check_key(key: Any, saved: Any) -> None:
    """An entry of `state` whose key is no parameter's: what a user keeps there stays, a lost state is an error."""
    if isinstance(key, int) or (isinstance(saved, Mapping) and "state1" in unwrap(saved)):
        raise ValueError(f"{_OP}: state[{key!r}] is of no parameter, expected those that param_groups names")


def _step(name: str, value: Any) -> int:
    step = _plain(value)
    if isinstance(step, bool) or not isinstance(step, int | float) or step != step // 1 or not 0 <= step <= _MOST_STEPS:
        raise ValueError(f"{_OP}: {name} is {value!r}, expected a whole number of steps")
    return int(step)


def _check_values(name: str, x: Tensor, low: float = -math.inf) -> None:
    """That all are finite, and none is below `low`."""
    if x.numel() and not x.is_meta:
        found = [bound.item() for bound in torch.aminmax(x.detach())]
        if not all(map(math.isfinite, found)) or found[0] < low:
            allowed = "finite values" if low == -math.inf else f"finite values of {low:g} or more"
            raise ValueError(f"{_OP}: {name} has values from {found[0]} to {found[1]}, expected {allowed}")


def _tensor(name: str, entry: Mapping[str, Any], key: str, like: Tensor) -> Tensor:
    if key not in entry:
        raise ValueError(f"{_OP}: {name}.{key} is missing, expected a tensor")
    if not isinstance(entry[key], Tensor):
        raise ValueError(f"{_OP}: {name}.{key} is {type(entry[key]).__name__}, expected a tensor")
    if layout := check.odd_layout(entry[key]):
        raise ValueError(f"{_OP}: {name}.{key} has layout {layout}, expected a dense tensor")
    if entry[key].is_meta and not like.is_meta:
        raise ValueError(f"{_OP}: {name}.{key} is on meta, expected a tensor with values")
    return entry[key]


def checked_state(name: str, saved: Any, rule: str, like: Tensor, first_shape: tuple[int, ...]) -> dict[str, Any]:
    """The state of one parameter, if it can be one: `like` has its shape, `first_shape` is that of state1."""
    is_mapping(name, saved)
    is_mapping(f"{name}.{QUANT_STATE_KEY}", saved.get(QUANT_STATE_KEY, {}))
    entry = unwrap(saved)
    if not entry:
        return entry
    if "step" not in entry:
        raise ValueError(f"{_OP}: {name}.step is missing, expected a number of steps")
    entry["step"] = _step(f"{name}.step", entry["step"])
    shapes = {1: first_shape} | ({2: tuple(like.shape)} if rule in TWO_STATES else {})
    for number, shape in shapes.items():
        state = _tensor(name, entry, f"state{number}", like)
        check.equal(_OP, f"{name}.state{number}", "shape", tuple(state.shape), shape)
        coded = state.dtype == torch.uint8
        maps = (f"qmap{number}", f"absmax{number}")
        qmap, absmax = (_tensor(name, entry, key, like).reshape(-1) if coded else None for key in maps)
        try:
            check_state(_OP, number, "", rule, like.numel(), state.reshape(-1), qmap, absmax)
        except ValueError as error:
            raise ValueError(str(error).replace(f"{_OP}: ", f"{_OP}: {name}.", 1)) from None
        if qmap is not None and not bool((qmap[1:] >= qmap[:-1]).all()):
            raise ValueError(f"{_OP}: {name}.qmap{number} is not in ascending order, expected a sorted map without NaN")
        if qmap is None or absmax is None:
            _check_values(f"{name}.state{number}", state, 0.0 if is_root(rule, number) else -math.inf)
        else:
            _check_values(f"{name}.qmap{number}", qmap, 0.0 if number == 2 else -math.inf)
            _check_values(f"{name}.absmax{number}", absmax, 0.0)
    if 2 in shapes:
        check.dtype(_OP, f"{name}.state2", entry["state2"], entry["state1"].dtype)
    for key, size in (("unorm_vec", 1), ("gnorm_vec", HISTORY)):
        if key in entry:
            check.dtype(_OP, f"{name}.{key}", _tensor(name, entry, key, like), torch.float32)
            check.equal(_OP, f"{name}.{key}", "size", entry[key].numel(), size)
    return entry
