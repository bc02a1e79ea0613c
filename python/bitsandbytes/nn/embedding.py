"""Embedding layers over quantized tables."""

import logging
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import _checks as check
from .. import functional as F
from .._ops_fourbit import check_packed
from .._variants import fixed
from ..functional.blockwise import scales
from ..functional.cpu_layout import stored
from ..optim import GlobalOptimManager
from .linear import is_tied, weight_and_state
from .params import Int8Params, Params4bit

logger = logging.getLogger("bitsandbytes.nn.modules")  # by the public name, which programs silence

_lookup = torch.nn.functional.embedding


class _XavierEmbedding(torch.nn.Embedding):
    """An embedding that begins with Xavier's uniform values, and whose optimizer state has 32 bits always."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        GlobalOptimManager.get_instance().register_module_override(self, "weight", {"optim_bits": 32})

    def reset_parameters(self) -> None:
        torch.nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()


class StableEmbedding(_XavierEmbedding):
    """An embedding with a layer norm behind it, whose sums stay even (8-bit Optimizers, arXiv 2110.02861).

    The norm computes in the default dtype; the result has the dtype of the table.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = (padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight)
        super().__init__(num_embeddings, embedding_dim, *options, device=device, dtype=dtype)
        self.norm = torch.nn.LayerNorm(embedding_dim, device=device)

    def forward(self, input: Tensor) -> Tensor:
        rows = super().forward(input).to(torch.get_default_dtype())
        return self.norm(rows).to(self.weight.dtype)


class Embedding(_XavierEmbedding):
    """An embedding that begins with Xavier's uniform values."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        options = (padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight)
        super().__init__(num_embeddings, embedding_dim, *options, device=device)


class Embedding8bit(torch.nn.Embedding):
    """An embedding stored as int8 with one fp32 scale per row; quantized when it first moves to a device.

    Forward: x = code * scale / 127 for the rows asked for, in the dtype the layer was made with.
    """

    weight: Int8Params

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.weight = Int8Params(self.weight.data, has_fp16_weights=False, requires_grad=False)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> NoReturn:
        raise NotImplementedError("Saving Embedding8bit module is not implemented")

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if is_tied(weight, self.num_embeddings, self.embedding_dim):
            return _lookup(input, weight).to(self.dtype)
        CB, SCB = getattr(weight, "CB", None), getattr(weight, "SCB", None)
        if SCB is None:
            raise RuntimeError(
                "Embedding8bit: weight is not quantized, expected .to(device) to be called on the layer first"
            )
        check.exactly("Embedding8bit", "SCB", SCB.numel(), self.num_embeddings)
        rows = _lookup(input, weight.data if CB is None else CB)
        return (rows * (_lookup(input, SCB.view(-1, 1)) / 127)).to(self.dtype)


class Embedding4bit(torch.nn.Embedding):
    """An embedding stored in 4 bits; quantized when it first moves to a device.

    Forward dequantizes the rows asked for, in the dtype the layer was made with. Rows that are not whole blocks
    (embedding_dim not a multiple of the blocksize, 64) need the whole table to be dequantized, which is slow.
    """

    weight: Params4bit

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        name = type(self).__name__
        check.one_of(name, "quant_type", quant_type, check.QUANT_TYPES)
        check.one_of(name, "quant_storage", quant_storage, check.STORAGES)
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.weight = Params4bit(
            self.weight.data,
            requires_grad=False,
            compress_statistics=False,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.quant_state: F.QuantState | None = None
        self.quant_storage = quant_storage
        if embedding_dim % self.weight.blocksize:
            logger.warning(
                f"Embedding size {embedding_dim} is not divisible by block size {self.weight.blocksize}. "
                "This will lead to slow inference."
            )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> NoReturn:
        raise NotImplementedError("Saving Embedding4bit module is not implemented")

    def _forward_with_partial_dequantize(self, input: Tensor) -> Tensor:
        weight, state = weight_and_state(self)
        packed, state = stored(weight.data, state)
        dim, blocksize = self.embedding_dim, state.blocksize or 64
        n = self.num_embeddings * dim
        check_packed(type(self).__name__, "weight", packed, n)
        packed = packed.view(torch.uint8).view(-1)[: n // 2]
        absmax = scales(state)
        check.exactly(type(self).__name__, "absmax", absmax.numel(), n // blocksize)
        rows = _lookup(input, packed.view(self.num_embeddings, -1))
        row_scales = _lookup(input, absmax.view(self.num_embeddings, -1))
        return torch.ops.bitsandbytes.dequantize_4bit.default(
            rows, row_scales, blocksize, state.quant_type, (*input.shape, dim), self.dtype
        )

    def forward(self, input: Tensor) -> Tensor:
        if is_tied(self.weight, self.num_embeddings, self.embedding_dim):
            return _lookup(input, self.weight).to(self.dtype)
        weight, state = weight_and_state(self)
        if self.embedding_dim % (state.blocksize or 64) == 0:
            return self._forward_with_partial_dequantize(input)
        return _lookup(input, F.dequantize_4bit(weight.data, state)).to(self.dtype)


class EmbeddingFP4(Embedding4bit):
    """Embedding4bit with an FP4 table."""

    __init__ = fixed(Embedding4bit, quant_type="fp4")


class EmbeddingNF4(Embedding4bit):
    """Embedding4bit with an NF4 table."""

    __init__ = fixed(Embedding4bit, quant_type="nf4")
