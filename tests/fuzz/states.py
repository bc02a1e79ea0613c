"""Broken states of quantized tensors and of optimizers: each is refused in the documented way, or works.

    python tests/fuzz/states.py quant_state|optimizer [--seconds 60] [--seed 1] [--cases N] [--only CASE]

Case number i of a seed is always the same. A case takes what the package itself saved and changes a few places of it:
keys, types, sizes, values, the bytes and the text of packed JSON. Loading must end in one of REFUSED, or in a state
with which the next operation returns or raises one of EXPECTED.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

import bitsandbytes as bnb
import bitsandbytes.functional as F

REFUSED = (ValueError, TypeError)
EXPECTED = (ValueError, TypeError, RuntimeError)  # of what is done with a state that was taken

NUMBERS = [0, 1, -1, 2, 63, 64, 65, 2**31, 2**53, 2**63, -(2**63), 2**64, 10**400, 0.5, -0.0, 1e-46, 1e308, True]
NUMBERS += [float("nan"), float("inf"), float("-inf")]
TEXTS = [
    "",
    "nf4",
    "fp4",
    "int8",
    "float16",
    "bfloat16",
    "float64",
    "complex64",
    "Tensor",
    "torch.float32",
    "__class__",
]
TEXTS += ["ü\0", "absmax", "x" * 10_000, "bitsandbytes__nf4", "quant_state.bitsandbytes__fp4"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int8, torch.int64, torch.bool]
DTYPES += [torch.complex64]
JSON_TEXTS = [
    "",
    "{}",
    "[]",
    "null",
    "1",
    '"nf4"',
    "{" * 5,
    "[" * 20_000,
    '{"a":' * 20_000,
    '{"shape": [1e999]}',
    "NaN",
]
JSON_TEXTS += ['{"quant_type": "nf4", "blocksize": ' + "9" * 5000 + "}", '{"quant_type": "nf4", "quant_type": "fp4"}']


class Mutator:
    """Changes any object that consists of dicts, lists, numbers, texts and tensors; it works on copies."""

    def __init__(self, seed: int, case: int) -> None:
        self.random = random.Random(f"{seed}/{case}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(60))

    def any_object(self) -> Any:
        r = self.random
        makers: list[Callable[[], Any]] = [
            lambda: None,
            lambda: r.choice(NUMBERS),
            lambda: r.choice(TEXTS),
            lambda: r.choice(DTYPES),
            object,
            lambda: [r.choice(NUMBERS) for _ in range(r.randrange(4))],
            lambda: {r.choice(TEXTS): r.choice(NUMBERS)},
            self.any_tensor,
            lambda: b"nf4",
            lambda: torch.Size([2, 3]),
        ]
        return r.choice(makers)()

    def any_tensor(self) -> torch.Tensor:
        r = self.random
        shape = [r.choice([0, 1, 2, 3, 16, 64, 256]) for _ in range(r.choice([0, 1, 1, 1, 2, 3]))]
        dtype = r.choice(DTYPES)
        t = torch.randint(0, 256, shape, generator=self.generator).to(dtype)
        if r.random() < 0.2 and dtype.is_floating_point and t.numel():
            t.view(-1)[r.randrange(t.numel())] = r.choice([float("nan"), float("inf"), -1.0, 1e30])
        if r.random() < 0.1:
            return torch.empty(shape, dtype=dtype, device="meta")
        if r.random() < 0.1 and len(shape) == 2:
            return t.to_sparse()
        return t

    def changed_tensor(self, t: torch.Tensor) -> Any:
        r = self.random
        if t.is_meta or t.layout != torch.strided:  # by an earlier change: it has no elements to change
            return t
        flat = t.detach().clone().reshape(-1)
        changes: list[Callable[[], Any]] = [
            lambda: flat[: r.randrange(flat.numel() + 1)],
            lambda: torch.cat([flat, flat[: r.choice([1, 2, flat.numel()])]]),
            lambda: t.to(r.choice(DTYPES)),
            lambda: t.reshape(1, *t.shape),
            lambda: t.reshape(-1, 1),
            lambda: t.expand(2, *t.shape),
            lambda: t.to("meta"),
            lambda: self.with_element(flat).reshape(t.shape),
            lambda: t.flip(0) if t.dim() else t,
            lambda: t.tolist(),
            self.any_object,
        ]
        if t.dtype == torch.uint8:
            changes += [lambda: self.with_bytes(flat)] * 6 + [lambda: self.json_tensor(flat)] * 6
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return r.choice(changes)()

    def with_element(self, flat: torch.Tensor) -> torch.Tensor:
        if flat.numel() and (flat.dtype.is_floating_point or flat.dtype == torch.uint8):
            special = [float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e38]
            value = self.random.choice(special) if flat.dtype.is_floating_point else self.random.randrange(256)
            flat[self.random.randrange(flat.numel())] = value
        return flat

    def with_bytes(self, flat: torch.Tensor) -> torch.Tensor:
        for _ in range(self.random.choice([1, 2, 8])):
            if flat.numel():
                flat[self.random.randrange(flat.numel())] = self.random.randrange(256)
        return flat

    def json_tensor(self, flat: torch.Tensor) -> torch.Tensor:
        """Other text; if it was a JSON object, most often that with an entry changed."""
        text: str | bytes = self.random.choice(JSON_TEXTS)
        try:
            content = json.loads(bytes(flat.tolist()))
            if self.random.random() < 0.8:
                text = json.dumps(self.changed(content), default=str)
        except (ValueError, RecursionError):
            pass
        raw = text.encode(errors="replace") if isinstance(text, str) else text
        return torch.tensor(list(raw), dtype=torch.uint8)

    def changed_number(self, value: Any) -> Any:
        r = self.random
        return r.choice(
            [-value, value + 1, value - 1, value * 2, value // 2 if value else 1, r.choice(NUMBERS), str(value)]
        )

    def changed(self, value: Any) -> Any:
        """A copy with one place changed."""
        r = self.random
        if isinstance(value, dict) and value and r.random() < 0.97:
            result, key = dict(value), r.choice(list(value))
            how = r.random()
            if how < 0.12:
                del result[key]
            elif how < 0.2:
                result[r.choice(TEXTS + list(value))] = self.any_object()
            elif how < 0.26:
                result[r.choice([f"{key}.{key}", f"a.{key}", f"{key}2", 0, None, -1])] = result.pop(key)
            else:
                result[key] = self.changed(value[key])
            return result
        if isinstance(value, list | tuple) and value and r.random() < 0.95:
            items, place = list(value), r.randrange(len(value))
            how = r.random()
            if how < 0.15:
                del items[place]
            elif how < 0.3:
                items.insert(place, copy.copy(items[place]))
            else:
                items[place] = self.changed(items[place])
            return type(value)(items) if type(value) in (list, tuple) else items
        if isinstance(value, torch.Tensor):
            return self.changed_tensor(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and r.random() < 0.8:
            return self.changed_number(value) if abs(value) < 1e300 else r.choice(NUMBERS)
        return self.any_object()

    def several(self, value: Any) -> Any:
        for _ in range(self.random.choice([1, 1, 1, 2, 3])):
            value = self.changed(value)
        return value


# ---- targets: each prepares what is right once, then tries one broken state after the other


def outcome(load: Callable[[], Any], use: Callable[[Any], Any]) -> str:
    """What became of it; anything undocumented is raised."""
    try:
        loaded = load()
    except REFUSED as error:
        if not str(error).strip():
            raise AssertionError("an exception without a message") from error
        return "refused"
    try:
        use(loaded)
    except EXPECTED:
        return "refused later"
    return "worked"


def quant_states() -> Callable[[Mutator], str]:
    saved = []
    for quant_type in ("nf4", "fp4"):
        for nested in (False, True):
            codes, state = F.quantize_4bit(
                torch.randn(6, 70), quant_type=quant_type, blocksize=64, compress_statistics=nested
            )
            saved += [(codes, state.as_dict(packed=packed)) for packed in (False, True)]
    codes8, state8 = F.quantize_blockwise(torch.randn(700), blocksize=256)
    saved.append((codes8, state8.as_dict()))

    def one(mutator: Mutator) -> str:
        codes, items = mutator.random.choice(saved)
        broken = mutator.several(items)
        if not isinstance(broken, dict):
            broken = {"quant_type": broken}

        def use(state: Any) -> None:
            state.as_dict(packed=True)
            assert state == copy.deepcopy(state) or has_nan(state)
            if state.shape is not None and state.quant_type in ("nf4", "fp4"):
                F.dequantize_4bit(codes, state)
                bnb.matmul_4bit(torch.randn(1, 70), codes.t(), quant_state=state)
            else:
                F.dequantize_blockwise(codes, state)

        return outcome(lambda: F.QuantState.from_dict(dict(broken), device="cpu"), use)

    return one


def has_nan(state: Any) -> bool:
    tensors = [state.absmax, state.code, state.offset]
    if state.state2 is not None:
        tensors += [state.state2.absmax, state.state2.code]
    return any(isinstance(t, torch.Tensor) and t.is_floating_point() and bool(t.isnan().any()) for t in tensors)


def optimizers() -> Callable[[Mutator], str]:
    def make(cls: type, shift: float = 0.0) -> tuple[list[torch.nn.Parameter], Any]:
        generator = torch.Generator().manual_seed(5)
        shapes = [(4096,), (3, 5), (2, 2048)]
        parameters = [torch.nn.Parameter(torch.randn(s, generator=generator) + shift) for s in shapes]
        return parameters, cls(parameters, lr=1e-3)

    def step(parameters: list[torch.nn.Parameter], optimizer: Any) -> None:
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()

    classes = [
        bnb.optim.AdamW8bit,
        bnb.optim.Adam32bit,
        bnb.optim.Lion8bit,
        bnb.optim.AdEMAMix8bit,
        bnb.optim.Adagrad8bit,
    ]
    saved = []
    for cls in classes:
        parameters, optimizer = make(cls)
        step(parameters, optimizer)
        saved.append((cls, copy.deepcopy(optimizer.state_dict())))

    def one(mutator: Mutator) -> str:
        cls, items = mutator.random.choice(saved)
        broken = mutator.several(items)
        parameters, optimizer = make(cls)
        before = copy.deepcopy(optimizer.state_dict())

        def load() -> Any:
            try:
                optimizer.load_state_dict(broken)
            except REFUSED:
                assert str(optimizer.state_dict()) == str(before), "a refused state changed the optimizer"
                raise
            return optimizer

        def use(loaded: Any) -> None:
            step(parameters, loaded)
            loaded.state_dict()

        return outcome(load, use)

    return one


TARGETS: dict[str, Callable[[], Callable[[Mutator], str]]] = {"quant_state": quant_states, "optimizer": optimizers}


def run(
    target: str, seed: int, cases: Iterator[int], seconds: float = float("inf")
) -> tuple[dict[str, int], list[str]]:
    """Counts of outcomes, and faults, of which 20 are enough."""
    torch.manual_seed(0)
    one, counts, faults = TARGETS[target](), dict.fromkeys(("refused", "refused later", "worked"), 0), []
    end = time.monotonic() + seconds
    for case in cases:
        if time.monotonic() > end or len(faults) >= 20:
            break
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                counts[one(Mutator(seed, case))] += 1
        except BaseException as error:  # whatever it is, it is undocumented
            if isinstance(error, KeyboardInterrupt):
                raise
            faults.append(f"{target}, seed {seed}, case {case}: {type(error).__name__}: {str(error)[:300]}")
    return counts, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", type=int, default=sys.maxsize)
    parser.add_argument("--only", type=int, help="one case, with its traceback")
    options = parser.parse_args()
    if options.only is not None:
        torch.manual_seed(0)
        print(TARGETS[options.target]()(Mutator(options.seed, options.only)))
        return 0
    counts, faults = run(options.target, options.seed, iter(range(options.cases)), options.seconds)
    print(f"{options.target}, seed {options.seed}: {counts}")
    for fault in faults:
        print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
