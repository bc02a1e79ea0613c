"""Products with quantized weights that gradients flow through: 4-bit (QLoRA, arXiv 2305.14314), whose weight is frozen,
and int8 (LLM.int8(), arXiv 2208.07339)."""

import warnings
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from .. import _checks as check
from .._derivatives import derivatives_wanted
from .._ops_int8 import as_rows, check_threshold
from ..functional.blockwise import fill
from ..functional.deprecated import warn_once
from ..functional.fourbit import dequantize_4bit, dequantized, gemm_4bit
from ..functional.int8 import single
from ..functional.quant_state import QuantState, Statistic

_ops = torch.ops.bitsandbytes
_int8_forward = _ops.int8_linear.forward


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
            grad_A = torch.matmul(grad, dequantized(ctx.weight, ctx.state, grad.dtype))
        if ctx.needs_input_grad[3]:
            grad_bias = as_rows(grad).sum(0, dtype=ctx.bias_dtype)
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
        quant_state: of a weight of shape [N, K]. One of [K, N] is deprecated: it is dequantized for A @ W + bias, with
            a DeprecationWarning.
        out: optional tensor to receive y.
        bias: N values.

    Returns:
        [..., N]. Differentiable in A and bias, forward and backward and by torch.func.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong argument, which the message names.
    """
    if quant_state is None:
        raise ValueError("matmul_4bit: quant_state is None, expected the QuantState from quantize_4bit")
    check.tensor("matmul_4bit", "A", A)
    check.tensor("matmul_4bit", "B", B)
    check.state("matmul_4bit", quant_state)
    if _is_transposed(A, quant_state.shape):
        y = _transposed_product(A, B, quant_state, bias)
    elif _learns(A, bias) and not derivatives_wanted():
        return MatMul4Bit.apply(A, B, out, bias, quant_state)
    else:
        y = gemm_4bit(A, B, quant_state, bias)
    return y if out is None else fill("matmul_4bit", "out", out, y)


def _learns(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _is_transposed(A: Tensor, shape: Any) -> bool:
    """Whether a weight of this shape fits A as [K, N] and not as [N, K]."""
    return shape is not None and len(shape) == 2 and A.dim() > 0 and shape[0] == A.shape[-1] != shape[1]


def _transposed_product(A: Tensor, B: Tensor, quant_state: QuantState, bias: Tensor | None) -> Tensor:
    shape = quant_state.shape or ()
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"matmul_4bit: weight was quantized from a [K, N] tensor (quant_state.shape={list(shape)}, A has shape "
            f"{tuple(A.shape)}), expected [N, K]: quantize weight.t(); this is slow and will be an error.",
            DeprecationWarning,
            stacklevel=3,
        )
    weight = dequantize_4bit(B.t() if B.dim() == 2 and B.shape[0] == 1 else B, quant_state).to(A.dtype)
    return torch.nn.functional.linear(A, weight.t(), None if bias is None else bias.to(A.dtype))


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

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

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


MatmulLtState.SCB = Statistic("SCB")  # type: ignore[assignment]  # after dataclass() took the default


def int8_weight(op: str, B: Tensor, state: MatmulLtState) -> tuple[Tensor, Tensor]:
    """The codes and scales of a weight. Floats are quantized: now, or once if the state says so."""
    SCB = state.SCB  # read once: another thread may use the state too
    CB = B if B.dtype == torch.int8 else None if state.has_fp16_weights else state.CB
    if CB is None or (SCB is None and CB is not B):
        CB, SCB = quantized_rows(B)
        state.SCB = SCB
        state.CB = CB  # last: whoever finds codes finds their scales
    if SCB is None:
        raise ValueError(f"{op}: state.SCB is None, expected the scales of B, which has dtype int8")
    return CB, SCB


def _dequantized(CB: Tensor, SCB: Tensor, dtype: torch.dtype, B: Tensor | None = None) -> Tensor:
    """The weight that is multiplied with. Its derivative by B, floats that were rounded to it, is 1."""
    weight = _ops.int8_vectorwise_dequant.default(CB, SCB).to(dtype)
    return weight if B is None else weight + (B - B.detach()).to(dtype)


class _Int8Product(torch.autograd.Function):
    """y = A @ W^T + bias with a W in int8. Gradients: for A, grad @ W with the dequantized W; for B, if it is floats,
    grad^T @ A, which passes through the rounding; for bias."""

    @staticmethod
    def keep(ctx: Any, A: Tensor, B: Tensor, out: Tensor | None, bias: Tensor | None, *weight: Tensor) -> None:
        """Keeps what the backward pass needs; the activations only if the weight learns."""
        learns = ctx.needs_input_grad[1]
        ctx.save_for_backward(A if learns else None)
        ctx.weight = weight  # not saved: it may have been made under inference_mode
        ctx.B = B if learns else None  # not saved: it may change before the backward pass
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
            B = ctx.B if torch.is_grad_enabled() else None  # for a second derivative
            grad_A = torch.matmul(grad, _dequantized(CB, SCB, grad.dtype, B)).to(ctx.A_dtype)
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
        return fill("matmul", "out", out, _int8_forward(A, CB, SCB, bias, state.threshold))


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


class _LearnedInt8Product(torch.autograd.Function):
    """y = A @ W^T + bias with codes CB and scales SCB of a float B, which learns: for forward mode and torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(A: Tensor, B: Tensor, CB: Tensor, SCB: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
        return _ops.int8_linear.default(A, CB, SCB, bias, threshold)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        A, B, CB, SCB, bias, _ = inputs
        ctx.save_for_backward(A, B, CB, SCB, bias)
        ctx.save_for_forward(A, B, CB, SCB, bias)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        A, B, CB, SCB, bias = ctx.saved_tensors
        (grad,) = grads
        grad_A = grad_B = grad_bias = None
        if grad is not None:
            if ctx.needs_input_grad[0]:
                grad_A = (as_rows(grad) @ _dequantized(CB, SCB, grad.dtype, B)).view(A.shape)
            if ctx.needs_input_grad[1]:
                grad_B = (as_rows(grad).t() @ as_rows(A)).to(B.dtype)
            if bias is not None and ctx.needs_input_grad[4]:
                grad_bias = as_rows(grad).sum(0, dtype=bias.dtype)
        return grad_A, grad_B, None, None, grad_bias, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        A, B, CB, SCB, _ = ctx.saved_tensors
        of_A, of_B, _, _, of_bias, _ = tangents
        y = A.new_zeros((*A.shape[:-1], CB.shape[0]))
        if of_A is not None:
            y = y + torch.matmul(of_A, _dequantized(CB, SCB, A.dtype, B).t())
        if of_B is not None:
            y = y + torch.matmul(A, of_B.to(A.dtype).t())
        return y if of_bias is None else y + of_bias.to(A.dtype)


def int8_product(A: Tensor, B: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """matmul with a float B and all derivatives."""
    CB, SCB = quantized_rows(B)
    return _LearnedInt8Product.apply(A, B, CB, SCB, bias, threshold)


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
        state: of the weight. By default B is floats, and is quantized for this product. If the state has CB and not
            has_fp16_weights, CB is the weight, whatever B is.
        threshold: above 0 it becomes that of the state: columns of A with |x| >= threshold are computed as floats.
        bias: N values.

    Returns:
        [..., N]. Differentiable in A, bias, and B if it is floats, forward and backward and by torch.func; a derivative
        passes through the rounding of A and B.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong argument, which the message names.
    """
    check.tensor("matmul", "A", A)
    if bias is not None:
        check.tensor("matmul", "bias", bias)
    check_threshold("matmul", threshold)
    if state is None:
        state = MatmulLtState()
    elif not isinstance(state, MatmulLtState):
        raise TypeError(f"matmul: state is {type(state).__name__}, expected a MatmulLtState")
    if threshold > 0.0:
        state.threshold = threshold
    if state.CB is not None and not state.has_fp16_weights and not getattr(B, "requires_grad", False):
        B = state.CB
    check.tensor("matmul", "B", B)
    check.dtype("matmul", "B", B, *check.FLOATS, torch.float64, torch.int8)
    if A.dim() == 0 or B.dim() != 2 or B.shape[1] != A.shape[-1]:
        raise ValueError(
            f"matmul: B has shape {tuple(B.shape)}, expected [N, K] for A of shape {tuple(A.shape)}, [..., K]"
        )
    if A.dtype == torch.float64:
        return matmul(A.float(), B, out, state, 0.0, bias).double()
    bias = None if bias is None else single(bias)
    if derivatives_wanted():
        # No state is written: under torch.func tensors do not outlive their transform.
        if B.is_floating_point() and (state.has_fp16_weights or state.CB is None or B.requires_grad):
            y = int8_product(A, B, bias, state.threshold)
        else:
            y = _ops.int8_linear.default(A, *int8_weight("matmul", B, state), bias, state.threshold)
    elif _learns(A, B, bias):
        return MatMul8bitLt.apply(A, B, out, bias, state)
    else:
        y = _int8_forward(A, *int8_weight("matmul", B, state), bias, state.threshold)
    return y if out is None else fill("matmul", "out", out, y)
