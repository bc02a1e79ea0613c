"""What single parameters do differently from the rest of their optimizer."""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor


class GlobalOptimManager:
    """Options of single parameters, for every optimizer that has them: `optim_bits`, `lr`, `betas`, ..."""

    _instance: ClassVar[Any] = None

    def __init__(self) -> None:
        raise RuntimeError("Call get_instance() instead")

    def initialize(self) -> None:
        """Forgets all options."""
        self.pid2config: dict[int, dict[str, Any]] = {}  # by id of the parameter
        self.index2config: dict[tuple[int, int], dict[str, Any]] = {}  # by group and place in it
        self.uses_config_override = False
        self.module_weight_config_triple: list[tuple[weakref.ref[torch.nn.Module], str, dict[str, Any]]] = []
        self.version = getattr(self, "version", 0) + 1  # optimizers look again when it changes

    @classmethod
    def get_instance(cls) -> "GlobalOptimManager":
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def register_parameters(self, params: Iterable[Tensor] | Iterable[dict[str, Any]]) -> None:
        """Lets the options of these parameters count for whatever takes their places in an optimizer.

        For a model whose parameters become other tensors before the optimizer is made, as on the way to another device.
        """
        listed: list[Any] = list(params)
        groups = listed if listed and isinstance(listed[0], Mapping) else [{"params": listed}]
        for group_index, group in enumerate(groups):
            for index, p in enumerate(group["params"]):
                if id(p) in self.pid2config:
                    self.index2config[group_index, index] = self.pid2config[id(p)]
        self._changed()

    def override_config(
        self,
        parameters: Tensor | Iterable[Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Sets one option, or those of a dict, for one parameter or several."""
        self.uses_config_override = True
        options = dict(key_value_dict or {}) | ({} if key is None else {key: value})
        for p in [parameters] if isinstance(parameters, Tensor) else parameters:
            self._set(p, options)

    def register_module_override(self, module: torch.nn.Module, param_name: str, config: Mapping[str, Any]) -> None:
        """Sets options for the parameter that a module has under this name when an optimizer makes its first step."""
        self.module_weight_config_triple.append((weakref.ref(module), param_name, dict(config)))
        self._changed()

    def resolve_modules(self, params: Iterable[Tensor]) -> None:
        """Turns the options of modules into those of parameters, where they are among these."""
        known = {id(p) for p in params}
        self.module_weight_config_triple = [t for t in self.module_weight_config_triple if t[0]() is not None]
        for module, name, config in self.module_weight_config_triple:
            p = getattr(module(), name, None)
            if isinstance(p, Tensor) and id(p) in known:
                self._set(p, config)

    def options_of(self, p: Tensor, gindex: int, pindex: int) -> dict[str, Any]:
        """Those set for a parameter itself, else for its place."""
        return self.pid2config.get(id(p)) or self.index2config.get((gindex, pindex)) or {}

    def _set(self, p: Tensor, options: Mapping[str, Any]) -> None:
        if id(p) not in self.pid2config:
            self.pid2config[id(p)] = {}
            weakref.finalize(p, self.pid2config.pop, id(p), None)  # another tensor may get its id
        self.pid2config[id(p)].update(options)
        self._changed()

    def _changed(self) -> None:
        self.version += 1
