"""LLM.int8() on a real language model (SmolLM2-135M) through unmodified transformers and PEFT."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import reference as ref
import torch
from process import run_reference
from test_real_model import divergence, logits

import bitsandbytes as bnb
import bitsandbytes.functional as F
from bench import real_model

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("quiet")]

# exp of the mean loss over two windows of 256 tokens of real_model.text(), as the released package 0.50.2 gives it.
RELEASED_PERPLEXITY = {"int8": 19.783, "int8-4": 19.557, "int8-0": 20.086}
THRESHOLDS = {"int8": 6.0, "int8-4": 4.0, "int8-0": 0.0}


@pytest.fixture(scope="module")
def bf16_logits(ids: torch.Tensor) -> torch.Tensor:
    return logits(real_model.load("bf16"), ids)


def layers(model: Any) -> dict[str, bnb.nn.Linear8bitLt]:
    return {name: m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear8bitLt)}


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {n: F.int8_vectorwise_dequant(m.weight.data, m.weight.SCB) for n, m in layers(model).items()}


# ---- every threshold


@dataclass
class Loaded:
    model: Any
    mode: str
    logits: torch.Tensor


@pytest.fixture(scope="module", params=THRESHOLDS)
def loaded(request: pytest.FixtureRequest, ids: torch.Tensor) -> Iterator[Loaded]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = real_model.load(request.param)
        yield Loaded(model, request.param, logits(model, ids))


def test_layers_are_quantized(loaded: Loaded, bf16_logits: torch.Tensor) -> None:
    found = layers(loaded.model)
    assert len(found) == 7 * loaded.model.config.num_hidden_layers
    assert not isinstance(loaded.model.lm_head, bnb.nn.Linear8bitLt)
    for layer in found.values():
        assert layer.weight.dtype == torch.int8 and layer.weight.SCB.dtype == torch.float32
        assert layer.state.threshold == THRESHOLDS[loaded.mode] and not layer.weight.requires_grad
        assert layer.state.CB.data_ptr() == layer.weight.data_ptr(), "stored once"
    assert real_model.model_mb(loaded.model) < 164  # bf16: 269 MB, of them 57 embedding
    moved = divergence(bf16_logits, loaded.logits)
    print(f"{loaded.mode}: KL to bf16 {moved:.4f} nats per token")
    assert moved < 0.08


def test_perplexity_is_that_of_the_released_package(loaded: Loaded, tok: Any) -> None:
    found = real_model.perplexity(loaded.model, tok, windows=2, length=256)
    print(f"{loaded.mode}: perplexity {found:.3f}, released package {RELEASED_PERPLEXITY[loaded.mode]:.3f}")
    assert found == pytest.approx(RELEASED_PERPLEXITY[loaded.mode], rel=0.02)


def test_save_and_reload_give_equal_logits(loaded: Loaded, ids: torch.Tensor, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert layers(again).keys() == layers(loaded.model).keys()
    for name, layer in layers(again).items():
        before = layers(loaded.model)[name]
        assert torch.equal(layer.weight.data, before.weight.data) and layer.state.threshold == before.state.threshold
        ref.assert_bits(layer.weight.SCB, before.weight.SCB)
    assert torch.equal(logits(again, ids), loaded.logits)


def test_dequantized_model_is_close(loaded: Loaded, ids: torch.Tensor) -> None:
    """Also of a deep copy, which leaves the original as it is. What remains is the rounding of the activations."""
    plain = copy.deepcopy(loaded.model)
    assert torch.equal(logits(plain, ids), loaded.logits)
    expected = weights(plain)
    plain = plain.dequantize(dtype=torch.bfloat16)
    assert not layers(plain) and layers(loaded.model)
    for name, weight in expected.items():
        assert torch.equal(plain.get_submodule(name).weight, weight.bfloat16())
    assert divergence(loaded.logits, logits(plain, ids)) < 0.08


def test_generation(loaded: Loaded, tok: Any) -> None:
    prompt = tok("The capital of France is", return_tensors="pt")
    out = loaded.model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in tok.decode(out[0])


# ---- one configuration more closely


def test_skipped_modules_stay_as_they_are() -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head", "down_proj"])
    path = real_model.model_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=config)
    found = layers(model)
    assert len(found) == 6 * model.config.num_hidden_layers and not any("down_proj" in name for name in found)
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype, ids: torch.Tensor, bf16_logits: torch.Tensor) -> None:
    """Computed as they are: nothing is cast, and nothing warns."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True)
    path = real_model.model_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=config).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = logits(model, ids)
    assert divergence(bf16_logits, found) < 0.08


def test_released_package_loads_our_folder(reference_python: str, tmp_path: Path) -> None:
    """And its layers hold our codes and scales."""
    model = real_model.load("int8")
    model.save_pretrained(tmp_path)
    code = """
import torch, transformers
from safetensors.torch import save_file
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
found = {n: m for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear8bitLt)}
state = {f"{n}.weight": m.weight.data for n, m in found.items()}
state |= {f"{n}.SCB": m.weight.SCB for n, m in found.items()}
save_file(state, sys.argv[2])
"""
    run_reference(reference_python, code, str(tmp_path), str(tmp_path / "found"))
    from safetensors.torch import load_file

    found = load_file(tmp_path / "found")
    for name, layer in layers(model).items():
        assert torch.equal(found.pop(f"{name}.weight"), layer.weight.data)
        ref.assert_bits(found.pop(f"{name}.SCB"), layer.weight.SCB)
    assert not found


@pytest.mark.parametrize("mode", ["int8", "int8-0"])
def test_compiled_layer(mode: str, ids: torch.Tensor) -> None:
    """fullgraph, on the activations of a real batch and on those of a single token."""
    model = real_model.load(mode)
    name = "model.layers.3.mlp.gate_proj"
    layer = layers(model)[name]
    found: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    logits(model, ids)
    hook.remove()
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        for x in (found[0], found[0][:1, :1]):
            ref.assert_bits(compiled(x), layer(x))


# ---- training


@pytest.fixture(scope="module")
def trained(ids: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[float], Path]:
    """A LoRA adapter trained for some steps on an int8 model, its losses, and where it was saved."""
    import peft

    torch.manual_seed(0)
    model = real_model.load("int8")
    model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    targets = ["q_proj", "v_proj", "gate_proj"]
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora)
    before = {name: weight.clone() for name, weight in weights(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    model.train()
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    for name, weight in weights(model).items():
        assert torch.equal(weight, before[name]), "training left the int8 weights alone"
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return model, losses, folder


def test_lora_training_lowers_the_loss(trained: tuple[Any, list[float], Path]) -> None:
    import peft

    model, losses, _ = trained
    print("losses:", " ".join(f"{loss:.3f}" for loss in losses))
    assert any(isinstance(m, peft.tuners.lora.bnb.Linear8bitLt) for m in model.modules())
    assert losses[-1] < losses[0] - 0.2


def test_adapter_saves_and_reloads(trained: tuple[Any, list[float], Path], ids: torch.Tensor) -> None:
    import peft

    model, _, folder = trained
    base = peft.prepare_model_for_kbit_training(real_model.load("int8"), use_gradient_checkpointing=False)
    again = peft.PeftModel.from_pretrained(base, folder).eval()
    assert torch.equal(logits(again, ids), logits(model, ids))


@pytest.mark.filterwarnings("ignore:Merge lora module to 8-bit linear")
def test_merge_and_unload(trained: tuple[Any, list[float], Path], ids: torch.Tensor, tmp_path: Path) -> None:
    """Merging quantizes the sum again: each weight is the nearest code to it. The merged model saves and reloads."""
    import peft
    from transformers import AutoModelForCausalLM

    model, _, _ = trained
    sums = {
        name.removeprefix("base_model.model."): F.int8_vectorwise_dequant(
            m.base_layer.weight.data, m.base_layer.weight.SCB
        )
        + m.get_delta_weight("default").float()
        for name, m in model.named_modules()
        if isinstance(m, peft.tuners.lora.bnb.Linear8bitLt)
    }
    expected = logits(model, ids)
    merged = copy.deepcopy(model).merge_and_unload()
    assert len(layers(merged)) == len(layers(model)) and len(sums) == 3 * model.config.num_hidden_layers
    for name, weight in sums.items():
        layer = layers(merged)[name]
        step = layer.weight.SCB[:, None] / 127
        found = F.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
        assert ((found - weight).abs() <= 0.501 * step).all(), name
    moved = divergence(expected, logits(merged, ids))
    print(f"KL of the merged model: {moved:.4f} nats per token")
    assert moved < 0.5, "changes of less than half a step are lost"
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for name, layer in layers(again).items():
        assert torch.equal(layer.weight.data, layers(merged)[name].weight.data)
        ref.assert_bits(layer.weight.SCB, layers(merged)[name].weight.SCB)
