"""Products with quantized weights that gradients flow through: 4-bit (QLoRA, arXiv 2305.14314), whose weight is frozen,
and int8 (LLM.int8(), arXiv 2208.07339)."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from .. import _checks as check
from .._ops_int8 import as_rows, check_threshold
from ..functional.blockwise import fill, scales
from ..functional.deprecated import warn_once
from ..functional.fourbit import gemm_4bit
from ..functional.int8 import single
from ..functional.quant_state import QuantState

_ops = torch.ops.bitsandbytes
_int8_linear = _ops.int8_linear.default


class MatMul4Bit(torch.autograd.Function):
    """y = A @ W^T + bias with a 4-bit W. Gradients for A (grad @ W in the dtype of grad) and for bias."""

    @staticmethod
    def forward(
        ctx: Any,
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        quant_state: QuantState | None = None,
    ) -> Tensor:
        if quant_state is None:
            raise ValueError("MatMul4Bit: quant_state is None, expected the QuantState from quantize_4bit")
        ctx.state = quant_state
        ctx.weight = B
        ctx.bias_dtype = None if bias is None else bias.dtype
        if out is not None:
            ctx.mark_dirty(out)
        return fill("matmul_4bit", "out", out, gemm_4bit(A, B, quant_state, bias))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
        (grad,) = grads
        grad_A = grad_bias = None
        if ctx.needs_input_grad[0]:
            state = ctx.state
            with torch._C.DisableTorchFunctionSubclass():
                weight = torch.ops.bitsandbytes.dequantize_4bit.default(
                    ctx.weight, scales(state), state.blocksize, state.quant_type, state.shape, grad.dtype
                )
            grad_A = torch.matmul(grad, weight)
        if ctx.needs_input_grad[3]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=ctx.bias_dtype)
        return grad_A, None, None, grad_bias, None


def matmul_4bit(
    A: Tensor,
    B: Tensor,
    quant_state: QuantState,
    out: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y = A @ W^T + bias for a weight that quantize_4bit packed. The weight is read as stored and not changed.

    Args:
        A: [..., K]; fp32, fp16 or bf16. Products are summed in fp32, and y has the dtype of A.
        B: the packed weight, or its transpose (packed.t()).
        quant_state: of a weight of shape [N, K].
        out: optional tensor to receive y.
        bias: N values.

    Returns:
        [..., N]. Differentiable in A and bias.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong argument, which the message names.
    """
    if quant_state is None:
        raise ValueError("matmul_4bit: quant_state is None, expected the QuantState from quantize_4bit")
    check.tensor("matmul_4bit", "A", A)
    check.tensor("matmul_4bit", "B", B)
    check.state("matmul_4bit", quant_state)
    if torch.is_grad_enabled() and (A.requires_grad or (bias is not None and bias.requires_grad)):
        return MatMul4Bit.apply(A, B, out, bias, quant_state)
    y = gemm_4bit(A, B, quant_state, bias)
    return y if out is None else fill("matmul_4bit", "out", out, y)


class GlobalOutlierPooler:
    """Outlier columns of all layers whose inputs are as wide as those of the first; they tend to be the same ones."""

    _instance: ClassVar[Any] = None

    def __init__(self) -> None:
        raise RuntimeError("GlobalOutlierPooler: it is made once, expected GlobalOutlierPooler.get_instance()")

    def initialize(self) -> None:
        self.outliers: set[int] = set()
        self.model_dim: int | None = None

    @classmethod
    def get_instance(cls) -> Self:
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def add_outliers(self, outlier_idx: Tensor, feature_dim: int) -> None:
        """Adds columns of an input of feature_dim columns, if it is as wide as the first one was."""
        if self.model_dim is None:
            self.model_dim = feature_dim
        if feature_dim == self.model_dim:
            self.outliers.update(outlier_idx.tolist())

    def get_current_outlier_idx(self) -> Tensor:
        return torch.tensor(sorted(self.outliers), dtype=torch.int64)


@dataclass(eq=False)
class MatmulLtState:
    """What int8 products know about their weight.

    CB and SCB are its codes, int8 [N, K], and scales, fp32 [N]; threshold that of outliers in activations, 0 for none.
    has_fp16_weights: the weight is stored as floats, and quantized anew for each product. The other fields are kept for
    programs that name them.
    """

    force_no_igemmlt: bool = False
    CB: Tensor | None = None
    SB: Tensor | None = None
    SCB: Tensor | None = None
    SBt: Tensor | None = None
    CBt: Tensor | None = None
    subB: Tensor | None = None
    outlier_pool: GlobalOutlierPooler | None = None
    idx: Tensor | None = None

    has_accumulated_gradients = False
    threshold = 0.0
    is_training = True
    has_fp16_weights = True
    use_pool = False

    # CB and SCB as a layer last put them here
    _shown: tuple[Any, Any] = field(default=(None, None), init=False, repr=False, compare=False)

    _deprecated_fields = frozenset({"CxB", "CxBt", "formatB", "_tile_indices"})

    def __getattr__(self, name: str) -> None:
        if name in self._deprecated_fields:
            warn_once(f"MatmulLtState.{name}", "weights have one layout, that of CB")
            return None
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MatmulLtState):
            return NotImplemented
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.compare)

    __hash__ = None  # type: ignore[assignment]  # mutable

    def reset_grads(self) -> None:
        """Forgets the quantized weight."""
        self.CB = self.SB = self.SCB = self.SBt = self.CBt = None
        self._shown = None, None


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.device == b.device and torch.equal(a, b)
    return a is b or bool(a == b)


def quantized_rows(B: Tensor) -> tuple[Tensor, Tensor]:
    """The codes and scales of floats."""
    CB, SCB, _ = _ops.int8_vectorwise_quant.default(single(B.detach()))
    return CB, SCB


def int8_weight(op: str, B: Tensor, state: MatmulLtState) -> tuple[Tensor, Tensor]:
    """The codes and scales of a weight. Floats are quantized: now, or once if the state says so."""
    SCB = state.SCB  # read once: another thread may use the state too
    CB = B if B.dtype == torch.int8 else None if state.has_fp16_weights else state.CB
    if CB is None or (SCB is None and CB is not B):
        CB, SCB = quantized_rows(B)
        state.CB, state.SCB = CB, SCB
    if SCB is None:
        raise ValueError(f"{op}: state.SCB is None, expected the scales of B, which has dtype int8")
    return CB, SCB


def _dequantized(CB: Tensor, SCB: Tensor, dtype: torch.dtype) -> Tensor:
    return _ops.int8_vectorwise_dequant.default(CB, SCB).to(dtype)


class _Int8Product(torch.autograd.Function):
    """y = A @ W^T + bias with a W in int8. Gradients: for A, grad @ W with the dequantized W; for B, if it is floats,
    grad^T @ A, which passes through the rounding; for bias."""

    @staticmethod
    def keep(ctx: Any, A: Tensor, B: Tensor, out: Tensor | None, bias: Tensor | None, *weight: Tensor) -> None:
        """Keeps what the backward pass needs; the activations only if the weight learns."""
        ctx.save_for_backward(A if ctx.needs_input_grad[1] else None)
        ctx.weight = weight  # not saved: it may have been made under inference_mode
        ctx.A_dtype, ctx.B_dtype = A.dtype, B.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        if out is not None:
            ctx.mark_dirty(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, Tensor | None, None]:
        (grad,) = grads
        (A,), (CB, SCB) = ctx.saved_tensors, ctx.weight
        rows = as_rows(grad)
        grad_A = grad_B = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_A = torch.matmul(grad, _dequantized(CB, SCB, grad.dtype)).to(ctx.A_dtype)
        if ctx.needs_input_grad[1]:
            grad_B = (rows.t() @ as_rows(A)).to(ctx.B_dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = rows.sum(0, dtype=ctx.bias_dtype)
        return grad_A, grad_B, None, grad_bias, None


class MatMul8bitLt(_Int8Product):
    """The rows of A are quantized too; its columns with outliers stay floats."""

    @staticmethod
    def forward(
        ctx: Any,
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        state: MatmulLtState | None = None,
    ) -> Tensor:
        CB, SCB = int8_weight("MatMul8bitLt", B, state := state or MatmulLtState())
        _Int8Product.keep(ctx, A, B, out, bias, CB, SCB)
        return fill("matmul", "out", out, _int8_linear(A, CB, SCB, bias, state.threshold))


class MatMul8bitFp(_Int8Product):
    """With the dequantized W, in the dtype of A."""

    @staticmethod
    def forward(
        ctx: Any,
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        state: MatmulLtState | None = None,
    ) -> Tensor:
        CB, SCB = int8_weight("MatMul8bitFp", B, state or MatmulLtState())
        _Int8Product.keep(ctx, A, B, out, bias, CB, SCB)
        bias = None if bias is None else bias.to(A.dtype)
        return fill("matmul", "out", out, torch.nn.functional.linear(A, _dequantized(CB, SCB, A.dtype), bias))


def matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """y = A @ B^T + bias in int8 (LLM.int8()): the rows of A are quantized, and B is, or becomes, int8 codes.

    Args:
        A: [..., K]; fp32, fp16 or bf16, and so is y, [..., N]. fp64 is computed in fp32.
        B: [N, K]: floats, or int8 codes whose scales are in state.SCB.
        out: optional tensor to receive y.
        state: of the weight. By default B is floats, and is quantized for this product.
        threshold: above 0 it becomes that of the state: columns of A with |x| >= threshold are computed as floats.
        bias: N values.

    Returns:
        [..., N]. Differentiable in A, bias, and B if it is floats.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong argument, which the message names.
    """
    check.tensor("matmul", "A", A)
    check.tensor("matmul", "B", B)
    if bias is not None:
        check.tensor("matmul", "bias", bias)
    check_threshold("matmul", threshold)
    if state is None:
        state = MatmulLtState()
    elif not isinstance(state, MatmulLtState):
        raise TypeError(f"matmul: state is {type(state).__name__}, expected a MatmulLtState")
    if threshold > 0.0:
        state.threshold = threshold
    check.dtype("matmul", "B", B, *check.FLOATS, torch.float64, torch.int8)
    if A.dim() == 0 or B.dim() != 2 or B.shape[1] != A.shape[-1]:
        raise ValueError(
            f"matmul: B has shape {tuple(B.shape)}, expected [N, K] for A of shape {tuple(A.shape)}, [..., K]"
        )
    if A.dtype == torch.float64:
        return matmul(A.float(), B, out, state, 0.0, bias).double()
    bias = None if bias is None else single(bias)
    learns = A.requires_grad or B.requires_grad or (bias is not None and bias.requires_grad)
    if learns and torch.is_grad_enabled():
        return MatMul8bitLt.apply(A, B, out, bias, state)
    y = _int8_linear(A, *int8_weight("matmul", B, state), bias, state.threshold)
    return y if out is None else fill("matmul", "out", out, y)
