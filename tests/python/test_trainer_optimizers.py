"""transformers' Trainer with every optimizer of this package that it knows by name, on a tiny Llama."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import reference as ref
import torch
from torch import Tensor

import bitsandbytes as bnb

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("quiet", "manager")

STEPS = 8


class Expected(NamedTuple):
    cls: str
    bits: int
    paged: bool
    lr: float


ADAMW, ADEMAMIX, LION, RMSPROP = ("AdamW", 5e-3), ("AdEMAMix", 5e-3), ("Lion", 2e-3), ("RMSprop", 5e-4)
NAMES = {
    name: Expected(rule[0], bits, name.startswith("paged"), rule[1])
    for name, rule, bits in (
        ("adamw_bnb_8bit", ADAMW, 8),
        ("adamw_8bit", ADAMW, 8),
        ("paged_adamw_32bit", ADAMW, 32),
        ("paged_adamw_8bit", ADAMW, 8),
        ("ademamix", ADEMAMIX, 32),
        ("ademamix_8bit", ADEMAMIX, 8),
        ("paged_ademamix_32bit", ADEMAMIX, 32),
        ("paged_ademamix_8bit", ADEMAMIX, 8),
        ("lion_32bit", LION, 32),
        ("lion_8bit", LION, 8),
        ("paged_lion_32bit", LION, 32),
        ("paged_lion_8bit", LION, 8),
        ("rmsprop_bnb", RMSPROP, 32),
        ("rmsprop_bnb_8bit", RMSPROP, 8),
        ("rmsprop_bnb_32bit", RMSPROP, 32),
    )
}
ELSEWHERE = ("adamw_torch", "galore", "apollo")  # beginnings of names with bits that belong to other packages


@pytest.fixture
def manager() -> Iterator[None]:
    """The manager of overrides, into which a Trainer writes, is empty before and after."""
    found = bnb.optim.GlobalOptimManager.get_instance()
    found.initialize()
    yield
    found.initialize()


def tiny() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.LlamaForCausalLM(config)


def rows() -> list[dict[str, Tensor]]:
    """32 rows that count modulo 128 from different beginnings, so that the next token can be learnt."""
    ids = (torch.arange(24) + 5 * torch.arange(32)[:, None]) % 128
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(name: str, folder: Path, save_steps: int = 0) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), optim=name, learning_rate=NAMES[name].lr, max_steps=STEPS, use_cpu=True,
        per_device_train_batch_size=8, logging_steps=1, report_to=[], disable_tqdm=True, seed=1,
        dataloader_pin_memory=False, save_strategy="steps" if save_steps else "no", save_steps=save_steps or 1,
    )  # fmt: skip
    return transformers.Trainer(model=tiny(), args=arguments, train_dataset=rows())


def losses(trained: Any) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def test_all_names_are_here() -> None:
    marks = ("bnb", "bit", "paged", "lion", "ademamix")
    offered = [str(name.value) for name in transformers.training_args.OptimizerNames]
    ours = {name for name in offered if any(m in name for m in marks) and not name.startswith(ELSEWHERE)}
    assert ours == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_trains_and_resumes(name: str, tmp_path: Path) -> None:
    """A run resumed from a checkpoint ends with the bits of the run that was not interrupted."""
    expected = NAMES[name]
    run = trainer(name, tmp_path, save_steps=STEPS // 2)
    run.train()
    found = losses(run)
    assert len(found) == STEPS and found[-1] < 0.9 * found[0], found

    optimizer = run.optimizer.optimizer  # below accelerate's
    assert type(optimizer) is getattr(bnb.optim, expected.cls)
    assert (optimizer.args.optim_bits, optimizer.is_paged) == (expected.bits, expected.paged)
    for module in (m for m in run.model.modules() if hasattr(m, "weight")):
        # The Trainer asks for 32 bits for embeddings; norms are smaller than min_8bit_size.
        coded = expected.bits == 8 and isinstance(module, torch.nn.Linear)
        state = optimizer.state[module.weight]
        assert state["state1"].dtype == (torch.uint8 if coded else torch.float32), module
        assert state["step"] == STEPS

    again = trainer(name, tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert losses(again)[-STEPS // 2 :] == found[-STEPS // 2 :]
    for (key, p), q in zip(run.model.named_parameters(), again.model.parameters(), strict=True):
        assert (ref.raw(p.detach()) == ref.raw(q.detach())).all(), key
    for p, q in zip(run.model.parameters(), again.model.parameters(), strict=True):
        state, other = optimizer.state[p], again.optimizer.optimizer.state[q]
        assert state.keys() == other.keys()
        for key, value in state.items():
            assert torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key], key
