"""The operators of the optimizers: every rule against its paper in doubles, plain torch against the native bytes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import reference as ref
import torch
from test_default_backend import on_other_device

import bitsandbytes.functional as F
from bitsandbytes._codes import philox
from bitsandbytes._ops_optim import RULES, SCHEMAS, TWO_STATES

ops = torch.ops.bitsandbytes
every_rule = pytest.mark.parametrize("rule", RULES)
N = 700  # two blocks of 256 and a part of one
DECOUPLED = ("adam", "lamb", "ademamix", "lion")
SETS: list[dict[str, Any]] = [
    {},
    {"beta1": 0.5, "beta2": 0.9, "beta3": 0.99, "eps": 1e-3, "lr": 0.1, "weight_decay": 0.1, "alpha": 2.0},
    {"beta1": 0.95, "beta2": 0.98, "weight_decay": 0.01, "t_alpha": 30, "t_beta3": 50, "dampening": 0.5},
    {"max_unorm": 0.05, "lr": 0.5, "nesterov": True, "bias_correction": False, "coupled_decay": True},
]
DEFAULTS: dict[str, Any] = {
    "lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "beta3": 0.9999, "alpha": 5.0, "eps": 1e-8, "weight_decay": 0.0,
    "t_alpha": 0, "t_beta3": 0, "max_unorm": 0.0, "skip_zeros": False, "dampening": 0.0, "nesterov": False,
    "bias_correction": True, "coupled_decay": False, "seed": None,
}  # fmt: skip


def states(rule: str, n: int, bits: int) -> dict[str, Any]:
    """The arguments of optimizer_step that hold state, before the first step."""
    dtype, blocks = (torch.uint8 if bits == 8 else torch.float32), (n + 255) // 256
    first = (2, n) if rule == "ademamix" else (n,)
    found: dict[str, Any] = {"state1": [torch.zeros(first, dtype=dtype)], "state2": [], "absmax1": [], "absmax2": []}
    if rule in TWO_STATES:
        found["state2"] = [torch.zeros(n, dtype=dtype)]
    if bits == 8:
        found["absmax1"] = [torch.zeros(*first[:-1], blocks)]
        found["absmax2"] = [torch.zeros(blocks)] if found["state2"] else []
    found["unorm"] = [torch.zeros(1)]
    maps = (F.create_dynamic_map(True), F.create_dynamic_map(False)) if bits == 8 else (None, None)
    return found | {"qmap1": maps[0], "qmap2": maps[1]}


def step(rule: str, p: Any, g: Any, state: dict[str, Any], t: int, call: Any = None, **options: Any) -> None:
    """One tensor through optimizer_step; `call` instead of the operator."""
    lists = [state[key] for key in ("state1", "state2", "absmax1", "absmax2", "unorm")]
    extra = (options.pop("offsets", []), options.pop("gnorm_scales", []), options.pop("p_norms", []))
    numbers = (DEFAULTS | options).values()
    (call or ops.optimizer_step.default)(rule, [p], [g], *lists, state["qmap1"], state["qmap2"], [t], *numbers, *extra)


def tensors(state: dict[str, Any]) -> list[torch.Tensor]:
    return [t for key in ("state1", "state2", "absmax1", "absmax2") for t in state[key]]


class Paper:
    """The rules as the papers write them, in doubles. s: m, v, and m2 of AdEMAMix."""

    def __init__(self, rule: str, p: torch.Tensor, **options: Any) -> None:
        self.rule, self.p, self.t = rule, p.double().clone(), 0
        self.m, self.v, self.m2 = (torch.zeros_like(self.p) for _ in range(3))
        self.o = DEFAULTS | options

    def direction(self, g: torch.Tensor) -> torch.Tensor:
        o, t = self.o, self.t
        if self.rule == "lion":
            u = (o["beta1"] * self.m + (1 - o["beta1"]) * g).sign()
            self.m = o["beta2"] * self.m + (1 - o["beta2"]) * g
            return u
        if self.rule in ("momentum", "lars"):
            self.m = g if t == 1 else o["beta1"] * self.m + (1 - o["dampening"]) * g
            return g + o["beta1"] * self.m if o["nesterov"] else self.m
        if self.rule in ("rmsprop", "adagrad"):
            old, new = (1, 1) if self.rule == "adagrad" else (o["beta1"], 1 - o["beta1"])
            self.v = old * self.v + new * g * g
            return torch.where(g == 0, 0, g / (self.v.sqrt() + o["eps"]))
        self.m = o["beta1"] * self.m + (1 - o["beta1"]) * g
        self.v = o["beta2"] * self.v + (1 - o["beta2"]) * g * g
        first, second = (1 - o["beta1"] ** t, 1 - o["beta2"] ** t) if o["bias_correction"] else (1, 1)
        m = self.m / first
        if self.rule == "ademamix":
            alpha, beta3 = o["alpha"], o["beta3"]
            if o["t_alpha"]:
                alpha *= min(1, t / o["t_alpha"])
            if o["t_beta3"]:
                low, high, part = math.log(o["beta1"]), math.log(beta3), t / o["t_beta3"]
                beta3 = min(beta3, math.exp(low * high / ((1 - part) * high + part * low)))
            self.m2 = beta3 * self.m2 + (1 - beta3) * g
            m = m + alpha * self.m2
        return torch.where(m == 0, 0, m / ((self.v / second).sqrt() + o["eps"]))

    def step(self, g: torch.Tensor) -> None:
        o = self.o
        self.t += 1
        decoupled = self.rule in DECOUPLED and not o["coupled_decay"]
        g = g.double() + (0 if decoupled else o["weight_decay"]) * self.p
        u = self.direction(g)
        longest = o["max_unorm"] * self.p.norm()
        if 0 < longest < u.norm():
            u = u * longest / u.norm()
        self.p = self.p * (1 - o["lr"] * o["weight_decay"] if decoupled else 1) - o["lr"] * u


def gradients(steps: int, n: int = N) -> Iterator[torch.Tensor]:
    """Of all sizes; some tensors and some elements of each are 0."""
    for t in range(steps):
        g = torch.randn(n) * 10.0 ** (t % 7 - 4)
        g[:: 7 + t] = 0
        yield g * (t % 11 != 5)


@pytest.mark.parametrize("options", SETS, ids=("defaults", "other betas", "schedules", "norms"))
@every_rule
def test_100_steps_in_32_bits_are_those_of_the_paper(rule: str, options: dict[str, Any]) -> None:
    p = torch.randn(N)
    paper, state = Paper(rule, p, **options), states(rule, N, 32)
    for t, g in enumerate(gradients(100), 1):
        step(rule, p, g, state, t, **options)
        paper.step(g)
    wrong = (p - paper.p).abs() > 2e-5 * (1 + paper.p.abs())
    # Where m or beta1 * m + g cancels to almost nothing, its sign is one of rounding, which is all that Lion takes.
    assert wrong.sum() <= (3 if rule == "lion" else 0), (p - paper.p).abs().max()
    for found, expected in ((state["state1"][0], paper.m), (state["state2"], paper.v)):
        if rule in ("adam", "lamb") or (rule in ("lion", "momentum", "lars") and expected is paper.m):
            found = found[0] if isinstance(found, list) else found
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_rule
def test_16_bit_parameters_are_the_32_bit_ones_rounded_each_step(rule: str, dtype: torch.dtype) -> None:
    p = torch.randn(N).to(dtype)
    wide, state, expected = p.float(), states(rule, N, 32), states(rule, N, 32)
    for t, g in enumerate(gradients(20), 1):
        for options, grad in (({"weight_decay": 0.1}, g.to(dtype)), ({}, g)):
            step(rule, p, grad, state, t, **options)
            step(rule, wide, grad.float(), expected, t, **options)
            wide = wide.to(dtype).float()
    ref.assert_bits(p.float(), wide)


@every_rule
def test_8_bit_states_follow_32_bit_ones_within_their_quantization(rule: str) -> None:
    """On a parabola with its minimum at 0: both arrive, from 1, at distances of the same size."""
    options = {"lr": 1e-2 if rule not in ("rmsprop", "adagrad") else 3e-2, "max_unorm": 0.0, "beta1": 0.9}
    distance = {}
    for bits in (32, 8):
        torch.manual_seed(1)
        p, state = torch.ones(N), states(rule, N, bits)
        start = p.norm()
        for t in range(1, 101):
            step(rule, p, p * (1 + 0.1 * torch.randn(N)), state, t, **options)
        distance[bits] = (p.norm() / start).item()
        assert p.isfinite().all()
    print(rule, distance)
    assert distance[32] < 0.9 and abs(distance[8] - distance[32]) < 0.05


@every_rule
def test_8_bit_states_are_the_nearest_codes_of_what_the_rule_gives(rule: str) -> None:
    p, state, wide = torch.randn(N), states(rule, N, 8), states(rule, N, 32)
    maps = [state["qmap1"]] * len(state["state1"]) + [state["qmap2"]] * len(state["state2"])
    for t, g in enumerate(gradients(5), 1):
        step(rule, p.clone(), g, wide, t)
        step(rule, p, g, state, t)
        both = zip(("1", "2"), maps, strict=False)
        for number, qmap in both:
            x = wide[f"state{number}"][0].reshape(-1, N)
            codes = state[f"state{number}"][0].reshape(-1, N)
            absmax = state[f"absmax{number}"][0].reshape(len(x), -1).repeat_interleave(256, 1)[:, :N]
            if t == 1:
                blocks = torch.nn.functional.pad(x, (0, 768 - N)).view(len(x), 3, 256)
                ref.assert_bits(absmax[:, ::256].contiguous(), blocks.abs().amax(2))
                error = (qmap[codes.int()].double() * absmax - x).abs()
                gap = qmap.diff().max() * absmax
                assert (error <= gap).all()
                assert ((x < 0) == (qmap[codes.int()] < 0)).all(), "a state below 0 stays below 0"
            wide[f"state{number}"][0].copy_((qmap[codes.int()] * absmax).view_as(wide[f"state{number}"][0]))


@pytest.mark.parametrize("bits", [32, 8])
@every_rule
def test_gradients_that_are_not_finite_are_passed_over(rule: str, bits: int) -> None:
    p, state = torch.randn(N), states(rule, N, bits)
    step(rule, p, torch.randn(N), state, 1)
    bad = torch.zeros(N, dtype=torch.bool)
    bad[::5] = True
    g, before, old = torch.randn(N), p.clone(), [t.clone() for t in tensors(state)]
    g[bad] = torch.tensor([math.nan, math.inf, -math.inf]).repeat(N)[: int(bad.sum())]
    step(rule, p, g, state, 2)
    assert torch.equal(p[bad], before[bad]) and (p[~bad] != before[~bad]).any()
    assert all(t.float().isfinite().all() for t in [p, *tensors(state)])
    if bits == 32:
        assert all(torch.equal(t[..., bad], o[..., bad]) for t, o in zip(tensors(state), old, strict=True))
    step(rule, p, torch.full((N,), math.nan), state, 3)
    assert p.isfinite().all()


@every_rule
def test_skip_zeros_leaves_elements_with_zero_gradients(rule: str) -> None:
    p, state = torch.randn(N), states(rule, N, 32)
    step(rule, p, torch.randn(N), state, 1)
    g, before, old = torch.randn(N), p.clone(), [t.clone() for t in tensors(state)]
    g[::3] = 0
    step(rule, p, g, state, 2, skip_zeros=True, weight_decay=0.1)
    assert torch.equal(p[::3], before[::3]) and not torch.equal(p, before)
    assert all(torch.equal(t[..., ::3], o[..., ::3]) for t, o in zip(tensors(state), old, strict=True))
    step(rule, p, g, state, 3, skip_zeros=False, weight_decay=0.1)
    assert not torch.equal(p[::3], before[::3])


@pytest.mark.parametrize("bits", [32, 8])
@every_rule
def test_max_unorm_bounds_the_step_and_tells_the_norm(rule: str, bits: int) -> None:
    p, state = torch.randn(N), states(rule, N, bits)
    before, g = p.clone(), torch.randn(N)
    step(rule, p, g, state, 1, max_unorm=0.01, lr=1.0)
    assert (before - p).norm().item() == pytest.approx(0.01 * before.norm().item(), rel=1e-4)
    paper = Paper(rule, before)
    paper.t = 1
    assert state["unorm"][0].item() == pytest.approx(paper.direction(g.double()).norm().item(), rel=1e-4)
    zero, state = torch.zeros(N), states(rule, N, bits)
    step(rule, zero, g, state, 1, max_unorm=0.01, lr=1.0)
    assert zero.norm() > 1, "a parameter of zeros moves"


@every_rule
def test_huge_and_tiny_gradients(rule: str) -> None:
    for scale, bits in itertools.product((1e38, 1e30, 1e19, 1e-38, 1e-45), (32, 8)):
        p, state = torch.randn(N), states(rule, N, bits)
        before = p.clone()
        for t in (1, 2, 3):
            step(rule, p, torch.randn(N).clamp(-3, 3) * scale, state, t, lr=1e-3)
        finite = p.isfinite().all() or rule in ("momentum", "lars")
        if bits == 32 and rule not in ("momentum", "lars"):
            assert (p - before).abs().max() < 3 * 1e-3 * 20, (scale, "a step is about lr whatever the gradient")
        assert finite and all(x.float().isfinite().all() for x in tensors(state)), (scale, bits)


# ---- plain torch and the native kernel


def calls() -> Iterator[tuple[str, int, torch.dtype, torch.dtype, dict[str, Any]]]:
    types = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)]
    for rule, bits, (p, g), options in itertools.product(RULES, (32, 8), types, SETS):
        yield rule, bits, p, g, options
    for dtype in (torch.bfloat16, torch.float16):
        yield "adam", 8, dtype, dtype, {"seed": 2**40 + 5, "offsets": [1027], "skip_zeros": True}
        yield "ademamix", 8, dtype, dtype, {"beta1": 0.0, "beta3": 0.99, "t_beta3": 9, "t_alpha": 9}
        yield "ademamix", 32, dtype, dtype, {"beta3": 0.0, "t_beta3": 9}
        yield "lamb", 32, dtype, dtype, {"seed": 7, "gnorm_scales": [0.3], "p_norms": [2.0], "max_unorm": 0.5}


def test_plain_torch_gives_the_native_bytes() -> None:
    """Sums of squares, for the norms, may differ in their last bit, and so what is scaled by them."""

    def plain(*args: Any) -> None:
        on_other_device("optimizer_step", *args)

    for rule, bits, p_dtype, g_dtype, options in calls():
        p = (torch.randn(N) * 3).to(p_dtype)
        q, native, other = p.clone(), states(rule, N, bits), states(rule, N, bits)
        for t, g in enumerate(gradients(4), 1):
            g[3:9] = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e-30, -0.0])
            g = g.to(g_dtype)
            step(rule, p, g, native, t, **options)
            step(rule, q, g, other, t, call=plain, **options)
            for a, b in zip(tensors(native), tensors(other), strict=True):
                if options.get("max_unorm"):
                    torch.testing.assert_close(b.float(), a.float(), rtol=1e-5, atol=2 if bits == 8 else 1e-6)
                else:
                    ref.assert_bits(b, a)
            if options.get("max_unorm"):
                torch.testing.assert_close(q, p, rtol=2e-2 if p_dtype != torch.float32 else 1e-5, atol=1e-6)
                q.copy_(p)
                for a, b in zip(tensors(native), tensors(other), strict=True):
                    b.copy_(a)
            else:
                ref.assert_bits(q, p)


def test_philox_gives_the_answers_its_authors_know() -> None:
    zero = philox(0, torch.tensor([0]), 0)
    assert zero.tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]
    ones = philox(2**64 - 1, torch.tensor([-1]), 2**64 - 1)
    assert ones.tolist() == [[0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]]


def test_stochastic_rounding_is_right_on_average_and_depends_on_the_place_alone() -> None:
    n, lr = 4096, 2.0**-10
    for dtype in (torch.bfloat16, torch.float16):
        p = torch.full((n,), 4.0, dtype=dtype)
        whole, parts = p.clone(), [p[:1001].clone(), p[1001:].clone()]
        g = torch.ones(n)
        step("momentum", whole, g, states("momentum", n, 32), 1, lr=lr, seed=1)
        for part, offset in zip(parts, (0, 1001), strict=True):
            state = states("momentum", len(part), 32)
            step("momentum", part, g[: len(part)], state, 1, lr=lr, seed=1, offsets=[offset])
        ref.assert_bits(torch.cat(parts), whole)
        step("momentum", p, g, states("momentum", n, 32), 1, lr=lr, seed=2)
        assert not torch.equal(p, whole) and len(whole.unique()) == 2
        assert whole.double().mean().item() == pytest.approx(4 - lr, abs=lr / 4)


# ---- the public operators and functions


@every_rule
def test_public_functions_are_the_step_of_one_tensor(rule: str) -> None:
    for bits in (32, 8):
        p, g = torch.randn(20, 35), torch.randn(20, 35)
        q, state, other = p.clone(), states(rule, N, bits), states(rule, N, bits)
        second = other["state2"][0] if other["state2"] else None
        beta = {"beta1": 0.9, "eps": 1e-8, "step": 3, "lr": 0.01, "beta2": 0.99, "beta3": 0.999, "alpha": 2.0}
        beta |= {"weight_decay": 0.1, "gnorm_scale": 0.5, "skip_zeros": True}
        options = {k: v for k, v in beta.items() if k not in ("step", "gnorm_scale")}
        if bits == 32:
            unorm = torch.zeros(1)
            F.optimizer_update_32bit(
                rule, g, q, other["state1"][0], state2=second, unorm_vec=unorm, max_unorm=0.02, **beta
            )
            step(rule, p, g, state, 3, gnorm_scales=[0.5], max_unorm=0.02, **options)
            assert unorm.item() == pytest.approx(state["unorm"][0].item(), rel=1e-5)
            torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-7)
        else:
            absmax = [*other["absmax1"], *other["absmax2"], None][:2]
            maps = {"qmap1": other["qmap1"], "qmap2": other["qmap2"], "absmax1": absmax[0], "absmax2": absmax[1]}
            F.optimizer_update_8bit_blockwise(rule, g, q, other["state1"][0], second, **maps, **beta)
            step(rule, p, g, state, 3, gnorm_scales=[0.5], **options)
            ref.assert_bits(q, p)
        for a, b in zip(tensors(state), tensors(other), strict=True):
            ref.assert_bits(b, a)


def test_functions_take_any_strides() -> None:
    p, g = torch.randn(30, 50), torch.randn(30, 50)
    for view in (lambda x: x.t().contiguous().t(), lambda x: torch.stack([x, x], -1)[..., 0]):
        q = view(p.clone())
        state1, state2 = torch.zeros_like(q), torch.zeros_like(q)
        F.optimizer_update_32bit("adam", g, q, state1, 0.9, 1e-8, 1, 0.1, state2, 0.999)
        expected, first, second = p.clone(), torch.zeros(30, 50), torch.zeros(30, 50)
        F.optimizer_update_32bit("adam", g, expected, first, 0.9, 1e-8, 1, 0.1, second, 0.999)
        assert torch.equal(q, expected) and torch.equal(state1, first) and torch.equal(state2, second)


WRONG = [
    ("optimizer_name", "sgd"),
    ("g", torch.zeros(10)),
    ("g", torch.zeros(N, dtype=torch.float64)),
    ("p", torch.zeros(N, dtype=torch.int32)),
    ("state1", torch.zeros(10, dtype=torch.uint8)),
    ("state1", torch.zeros(N)),
    ("state2", None),
    ("state2", torch.zeros(3, dtype=torch.uint8)),
    ("absmax1", torch.zeros(2)),
    ("absmax2", torch.zeros(2)),
    ("absmax2", None),
    ("qmap1", torch.zeros(16)),
    ("qmap2", None),
    ("step", 0),
]


@pytest.mark.parametrize("where", ["functional", "cpu", "default", "fake"])
@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda v: str(v)[:20].partition("\n")[0])
def test_wrong_arguments_are_named(name: str, value: Any, where: str) -> None:
    state = states("adam", N, 8)
    arguments = {"optimizer_name": "adam", "g": torch.zeros(N), "p": torch.zeros(N)}
    arguments |= {key: state[key][0] for key in ("state1", "state2")}
    arguments |= {"beta1": 0.9, "beta2": 0.99, "beta3": 0.0, "alpha": 0.0, "eps": 1e-8, "step": 1, "lr": 0.1}
    arguments |= {"qmap1": state["qmap1"], "qmap2": state["qmap2"]}
    arguments |= {key: state[key][0] for key in ("absmax1", "absmax2")} | {"weight_decay": 0.0, "gnorm_scale": 1.0}
    arguments[name] = value
    op = "optimizer_update_8bit_blockwise"
    with pytest.raises(
        (RuntimeError, ValueError), match="optimizer_" if where == "cpu" else f"{op}: ({name}|state2|g)"
    ):
        if where == "functional":
            getattr(F, op)(**arguments)
        elif where == "cpu":
            getattr(ops, op)(**arguments)
        elif where == "default":
            on_other_device(op, *arguments.values())
        else:
            fake = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
            with fake:
                fakes = {k: fake.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
                getattr(ops, op)(**fakes)


@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck(name: str) -> None:
    state, g, p = states("adam", N, 8), torch.randn(N), torch.randn(N)
    numbers = (0.9, 0.99, 0.0, 0.0, 1e-8)
    one, two = torch.zeros(N), torch.zeros(N)
    scales = (state["qmap1"], state["qmap2"], state["absmax1"][0], state["absmax2"][0])
    arguments = {
        "optimizer_update_32bit": ("adam", g, p, one, two, torch.zeros(1), 0.0, 0.0, *numbers, 0.0, 1, 0.1, 1.0),
        "optimizer_update_8bit_blockwise": (
            *("adam", g, p, state["state1"][0], state["state2"][0], *numbers, 1, 0.1, *scales, 0.0, 1.0),
        ),
        "optimizer_step": (
            *("adam", [p], [g], state["state1"], state["state2"], state["absmax1"], state["absmax2"], []),
            *(state["qmap1"], state["qmap2"], [1], 0.1, *numbers, 0.0),
        ),
    }[name]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(ops, name).default, arguments, test_utils=checks)


def test_schemas_equal_the_released_ones() -> None:
    released = {
        "optimizer_update_32bit": (
            "str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, Tensor(a3!)? state2, "
            "Tensor(a4!)? unorm_vec, float max_unorm, float param_norm, float beta1, float beta2, float beta3, "
            "float alpha, float eps, float weight_decay, int step, float lr, float gnorm_scale, bool skip_zeros=False"
        ),
        "optimizer_update_8bit_blockwise": (
            "str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, Tensor(a3!)? state2, float beta1, "
            "float beta2, float beta3, float alpha, float eps, int step, float lr, Tensor(a4!) qmap1, "
            "Tensor(a5!)? qmap2, Tensor(a6!) absmax1, Tensor(a7!)? absmax2, float weight_decay, float gnorm_scale, "
            "bool skip_zeros=False"
        ),
    }
    for name, arguments in released.items():
        assert str(getattr(ops, name).default._schema) == f"bitsandbytes::{name}({arguments}) -> ()"
    assert str(ops.optimizer_step.default._schema) == f"bitsandbytes::optimizer_step{SCHEMAS['optimizer_step']}"


def test_clock_counts_the_steps() -> None:
    for call in (None, lambda *args: on_other_device("optimizer_step", *args)):
        p, q, state, other = torch.ones(N), torch.ones(N), states("adam", N, 32), states("adam", N, 32)
        clock = torch.tensor([0])
        for t, g in enumerate(gradients(3), 1):
            lists = [state[key] for key in ("state1", "state2", "absmax1", "absmax2", "unorm")]
            run = call or ops.optimizer_step.default
            run("adam", [p], [g], *lists, None, None, [1], *DEFAULTS.values(), [], [], [], clock)
            step("adam", q, g, other, t, call=call)
        assert torch.equal(p, q) and clock.item() == 3
