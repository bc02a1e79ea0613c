"""Optimizers on a real language model: through transformers' Trainer, TRL's with QLoRA, and the example."""

from __future__ import annotations

import copy
import json
import math
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import reference as ref
import torch
from test_real_model import fingerprint, load

import bitsandbytes as bnb
from bench import real_model

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("quiet")]

EXAMPLE = Path(__file__).parents[2] / "examples" / "train.py"


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_adamw8bit_trains_and_resumes(ids: torch.Tensor, tmp_path: Path) -> None:
    """All 134.5M parameters in bf16. The resumed run gives the bits of the one that was not interrupted."""
    import transformers

    original = real_model.load().train()

    def trainer(save: str) -> Any:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), optim="adamw_bnb_8bit", learning_rate=1e-4, lr_scheduler_type="constant",
            max_steps=3, per_device_train_batch_size=2, use_cpu=True, logging_steps=1, report_to=[],
            disable_tqdm=True, dataloader_pin_memory=False, save_strategy=save, save_steps=2,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in ids]
        return transformers.Trainer(model=copy.deepcopy(original), args=arguments, train_dataset=rows)

    run = trainer("steps")
    run.train()
    found = losses(run)
    print("losses:", " ".join(f"{loss:.3f}" for loss in found))
    assert found[-1] < found[0] - 0.1
    states = run.optimizer.optimizer.state
    layer = run.model.model.layers[0].mlp.gate_proj.weight
    assert states[layer]["state1"].dtype == states[layer]["state2"].dtype == torch.uint8
    assert states[run.model.model.embed_tokens.weight]["state1"].dtype == torch.float32  # so the Trainer asks

    again = trainer("no")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again)[-1] == found[-1]
    for (name, p), q in zip(run.model.named_parameters(), again.model.parameters(), strict=True):
        assert (ref.raw(p.detach()) == ref.raw(q.detach())).all(), name
    for checkpoint in tmp_path.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)  # 0.7 GB each, which pytest would keep for a while


def test_trl_trains_qlora_with_paged_adamw8bit(tok: Any, tmp_path: Path) -> None:
    import datasets
    import peft
    import trl

    text = real_model.text()
    data = datasets.Dataset.from_dict({"text": [text[:400], text[400:800]]})
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), optim="paged_adamw_8bit", learning_rate=2e-3, lr_scheduler_type="constant",
        max_steps=5, per_device_train_batch_size=2, max_length=64, use_cpu=True, bf16=False, report_to=[],
        logging_steps=1, save_strategy="no", dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    lora = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    trainer = trl.SFTTrainer(model=load(), args=arguments, train_dataset=data, processing_class=tok, peft_config=lora)
    before = fingerprint(trainer.model)
    trainer.train()
    found = losses(trainer)
    print("losses:", " ".join(f"{loss:.3f}" for loss in found))
    assert found[-1] < found[0] - 0.2
    assert fingerprint(trainer.model) == before, "training left the 4-bit weights alone"
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is bnb.optim.AdamW and optimizer.is_paged
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert set(optimizer.state) == set(trained)
    for p in trained:
        state = optimizer.state[p]
        assert state["state1"].dtype == (torch.uint8 if p.numel() >= 4096 else torch.float32) and state["step"] == 5
    assert any(p.numel() >= 4096 for p in trained)


def test_example_writes_a_table_and_a_plot(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), "--steps", "2", "--rules", "Lion", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    wide, coded = json.loads((tmp_path / "training.json").read_text())
    assert (wide["bits"], coded["bits"]) == (32, 8)
    assert wide["losses"][0] == coded["losses"][0] and math.isclose(wide["losses"][1], coded["losses"][1], rel_tol=0.01)
    assert wide["state_mb"] == pytest.approx(538.1, abs=0.1)  # 4 bytes a parameter
    assert coded["state_mb"] < 0.26 * wide["state_mb"]
    assert f"| Lion8bit | {sum(coded['losses']) / 2:.4f} |" in (tmp_path / "training.md").read_text()
    plot = ET.parse(tmp_path / "training.svg").getroot()
    assert len(plot.findall("{*}polyline")) == 2
