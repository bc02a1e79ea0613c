"""The bases of the optimizers: those with one state and those with two."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from .._ops_optim import LARGEST
from ..functional.optim import HISTORY, check_percentile
from ._base import Optimizer8bit
from ._manager import GlobalOptimManager
from ._state_dict import QUANT_STATE_KEY

__all__ = ["QUANT_STATE_KEY", "GlobalOptimManager", "MockArgs", "Optimizer1State", "Optimizer2State", "Optimizer8bit"]

# Pickles and messages name their public home.
GlobalOptimManager.__module__ = Optimizer8bit.__module__ = __name__


class MockArgs:
    """Options as attributes."""

    def __init__(self, initial_data: Mapping[str, Any]) -> None:
        vars(self).update(initial_data)


def _betas(given: Any) -> tuple[float, ...]:
    if isinstance(given, str):  # "(0.9, 0.999)"
        given = [float(x) for x in given.strip("() ").split(",")]
    return tuple(given)


class _Common(NamedTuple):
    optim_bits: int
    args: Any
    min_8bit_size: int
    max_unorm: float
    skip_zeros: bool
    is_paged: bool
    percentile_clipping: int
    block_wise: bool


def _setup(self: Optimizer8bit, name: str, params: Any, defaults: dict[str, Any], common: _Common) -> None:
    """What both kinds of optimizers check and keep."""
    if not 0.0 <= defaults["lr"] <= LARGEST:
        raise ValueError(f"Invalid learning rate: {defaults['lr']}")
    if not 0.0 <= defaults["eps"] <= LARGEST:
        raise ValueError(f"Invalid epsilon value: {defaults['eps']}")
    defaults["betas"] = _betas(defaults["betas"])
    for i, beta in enumerate(defaults["betas"]):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
    if not 0.0 <= defaults["weight_decay"] <= LARGEST:
        raise ValueError(f"Invalid weight_decay value: {defaults['weight_decay']}")
    op, other = type(self).__name__, "percentile_clipping and block_wise go by name"
    if common.is_paged not in (True, False):  # as by releases that had percentile_clipping in this place
        raise TypeError(f"{op}: is_paged is {common.is_paged!r}, expected True or False; {other}")
    for options in (common, common.args):
        check_percentile(op, "percentile_clipping", getattr(options, "percentile_clipping", HISTORY))
        if not getattr(options, "block_wise", True):
            raise ValueError(
                f"{op}: block_wise is False, expected True: states have a scale for each block, not one alone"
            )
    Optimizer8bit.__init__(self, params, defaults, common.optim_bits, common.is_paged)
    options = {key: value for key, value in common._asdict().items() if key not in ("args", "is_paged", "block_wise")}
    self.args = MockArgs(options) if common.args is None else common.args
    self.optimizer_name = name


class Optimizer2State(Optimizer8bit):
    """Base of the optimizers with two moments: Adam, AdamW, AdEMAMix, LAMB."""

    def __init__(
        self,
        optimizer_name: str,
        params: Any,
        lr: float = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
        alpha: float = 0.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        *,
        percentile_clipping: int = 100,
        block_wise: bool = True,
    ) -> None:
        """
        Args:
            optimizer_name: adam, ademamix or lamb.
            lr, eps, weight_decay: 0 or more.
            betas: from 0 to below 1.
            optim_bits: 32, or 8 for states in 8 bits, in blocks of 256 with a scale each.
            args: an object with the attributes optim_bits, min_8bit_size, max_unorm and skip_zeros, and with
                percentile_clipping if wanted, instead of those.
            min_8bit_size: parameters with fewer elements have states of 32 bits.
            max_unorm: the update becomes no longer than this times the norm of the parameter; 0 for no limit.
            skip_zeros: pass over elements whose gradient is 0.
            is_paged: let states of large parameters on a GPU live in memory that it shares with the CPU.
            alpha, t_alpha, t_beta3: of AdEMAMix.
            percentile_clipping: a gradient becomes no longer than this percentile of the last 100 norms of it, which
                the state `gnorm_vec` holds; 100 for no limit.
            block_wise: True: there is no other way.

        Raises:
            ValueError: a number out of its range.
        """
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"alpha": alpha, "t_alpha": t_alpha, "t_beta3": t_beta3}
        own = (percentile_clipping, block_wise)
        common = _Common(optim_bits, args, min_8bit_size, max_unorm, skip_zeros, is_paged, *own)
        _setup(self, optimizer_name, params, defaults, common)


class Optimizer1State(Optimizer8bit):
    """Base of the optimizers with one moment: SGD, LARS, RMSprop, Adagrad, Lion."""

    def __init__(
        self,
        optimizer_name: str,
        params: Any,
        lr: float = 1e-3,
        betas: Any = (0.9, 0.0),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
        *,
        percentile_clipping: int = 100,
        block_wise: bool = True,
    ) -> None:
        """
        Args:
            optimizer_name: momentum, lars, rmsprop, adagrad or lion.
            The others as in Optimizer2State.

        Raises:
            ValueError: a number out of its range.
        """
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        own = (percentile_clipping, block_wise)
        common = _Common(optim_bits, args, min_8bit_size, max_unorm, skip_zeros, is_paged, *own)
        _setup(self, optimizer_name, params, defaults, common)
