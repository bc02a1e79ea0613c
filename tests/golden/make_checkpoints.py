"""Writes the checkpoints of this folder: run with an interpreter that has the released bitsandbytes 0.50.2.

checkpoint_source.safetensors        the bf16 weight and bias that were quantized
checkpoint_<type>_<nested|plain>.safetensors
    the state of a Linear4bit per storage dtype ("uint8.weight", "bfloat16.weight.absmax", ...), and "expected": what
    the released package dequantizes it to
checkpoint_int8.safetensors          the same of a Linear8bitLt, and "x" and "y": y = layer(x), with a threshold of 6
"""

from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

import bitsandbytes as bnb
from bitsandbytes import functional as F

STORAGES = {"uint8": torch.uint8, "bfloat16": torch.bfloat16}
# 260 blocks of 64; two nested blocks of 256. Rows of whole blocks: the released CPU package errs on others
ROWS, COLUMNS = 65, 256


def layer(source: dict[str, torch.Tensor], quant_type: str, nested: bool, storage: torch.dtype) -> bnb.nn.Linear4bit:
    linear = bnb.nn.Linear4bit(
        COLUMNS,
        ROWS,
        compute_dtype=torch.bfloat16,
        compress_statistics=nested,
        quant_type=quant_type,
        quant_storage=storage,
    ).bfloat16()
    linear.load_state_dict(source)
    return linear.to("cpu")


def main() -> None:
    folder, metadata = (
        Path(__file__).parent,
        {"bitsandbytes": version("bitsandbytes"), "torch": version("torch").split("+")[0]},
    )
    torch.manual_seed(3)
    weight = torch.randn(ROWS, COLUMNS) * torch.rand(ROWS, 1).add(0.1)
    weight[::7, ::5] = 0
    weight[3, :128] = 0
    source = {"weight": weight.bfloat16(), "bias": torch.randn(ROWS).bfloat16()}
    save_file(source, folder / "checkpoint_source.safetensors", metadata)
    for quant_type in ("nf4", "fp4"):
        for nested in (False, True):
            tensors = {}
            for name, storage in STORAGES.items():
                linear = layer(source, quant_type, nested, storage)
                tensors |= {f"{name}.{key}": value.clone() for key, value in linear.state_dict().items()}
                tensors["expected"] = F.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
            save_file(
                tensors, folder / f"checkpoint_{quant_type}_{'nested' if nested else 'plain'}.safetensors", metadata
            )
    linear = bnb.nn.Linear8bitLt(COLUMNS, ROWS, has_fp16_weights=False, threshold=6.0).bfloat16()
    linear.load_state_dict(source)
    linear = linear.to("cpu").eval()
    x = torch.randn(9, COLUMNS).bfloat16()
    x[:, 17] *= 20
    expected = F.int8_vectorwise_dequant(linear.weight.data, linear.weight.SCB)
    with torch.no_grad():
        y = linear(x)
    tensors = {key: value.clone() for key, value in linear.state_dict().items()}
    save_file(tensors | {"expected": expected, "x": x, "y": y}, folder / "checkpoint_int8.safetensors", metadata)


if __name__ == "__main__":
    main()
