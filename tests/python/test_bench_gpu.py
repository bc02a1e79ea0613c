"""The GPU benchmark's cases and report, without a GPU."""

from __future__ import annotations

from typing import Any

import torch

from bench import gpu, gpu_cases

CPU = torch.device("cpu")
CASES = {c.name: c for c in (gpu_cases.copy_case(), *gpu_cases.all_cases())}


def result(**slower: float) -> dict[str, Any]:
    """As if every case ran at 1 TB/s, but for those given, which take that many times as long."""
    times = {name: c.bytes / 1e12 * slower.get(name, 1) for name, c in CASES.items()}
    return {
        "machine": {"gpu": "Some GPU", "date": "now", "commit": "abc", "sms": 1, "l2_bytes": 1 << 20, "driver": "1"},
        "cases": {n: {"bytes": c.bytes, "flops": c.flops, "of": c.of, "reach": c.reach} for n, c in CASES.items()},
        "project": {"seconds": times, "errors": {}, "host": {"Linear4bit": 9.0}, "info": {"torch": "2"}},
        "quick": False,
    }


def test_every_case_runs_and_moves_what_it_says() -> None:
    cases = [
        gpu_cases.copy_case(1 << 10),
        *gpu_cases.block_cases(1 << 12),
        *gpu_cases.product_cases(((64, 512),), (1, 3)),
    ]
    cases += gpu_cases.int8_cases(((64, 512),), (1, 3, 512), 32)
    for case in cases:
        tensors = case.make(CPU)
        out = case.call(*tensors)
        moved = {t.data_ptr(): t.numel() * t.element_size() for t in tensors if t.numel() not in (1, 256)}
        results = out if isinstance(out, tuple) else (out,)
        moved |= {t.data_ptr(): t.numel() * t.element_size() for t in results if t is not None}
        assert sum(moved.values()) == case.bytes, case.name
    assert len({case.name for case in cases}) == len(cases)


def test_optimizer_cases_change_what_they_say() -> None:
    """g, p, then codes, absmax and map or a plain state: all but g and maps are read and written."""
    for case in gpu_cases.optimizer_cases(1 << 13, 5):
        tensors = case.make(CPU)
        before = [t.clone() for t in tensors]
        case.call(*tensors)
        bytes_of = [t.numel() * t.element_size() for t in tensors]
        changed = [not torch.equal(t, b) for t, b in zip(tensors, before, strict=True)]
        maps = [t.numel() == 256 and t.dtype == torch.float32 and len(t) > 0 and t[-1] == 1 for t in tensors]
        gradients = [i for i, (c, m) in enumerate(zip(changed, maps, strict=True)) if not c and not m]
        assert len(gradients) == (5 if "5 tensors" in case.name else 1), case.name
        moved = sum(2 * b for b, c in zip(bytes_of, changed, strict=True) if c) + sum(bytes_of[i] for i in gradients)
        assert moved == case.bytes, case.name


def test_cases_are_those_of_the_table() -> None:
    for n, k in gpu_cases.SHAPES:
        for m in gpu_cases.BATCHES:
            assert CASES[f"gemm_4bit bf16 {n}x{k} M={m}"].flops == 2 * m * n * k
    for case in CASES.values():
        assert case.of == "copy" or case.of in CASES


def test_rows_state_share_and_whether_it_is_reached() -> None:
    found = {row[0]: row for row in gpu.rows(result(**{"quantize_4bit nf4 bf16": 2}))}
    assert found["quantize_4bit nf4 bf16"][2:5] == ("500", "50% of copy", "85%: NO")
    assert found["dequantize_4bit nf4 bf16"][2:5] == ("1000", "100% of copy", "88%: yes")
    large = found["gemm_4bit bf16 4096x4096 M=512"]
    assert large[3].endswith("of torch.matmul") and large[4] == "85%: yes" and float(large[5]) > 1


def test_small_batches_are_held_against_one_row() -> None:
    (first, *_) = gpu.flatness(result(**{"gemm_4bit bf16 4096x4096 M=48": 1.5}))
    assert first[0] == "4096x4096" and first[1] == "1.00" and first[-1].endswith("NO")


def test_the_report_names_what_failed_and_what_was_not_there() -> None:
    given = result()
    del given["project"]["seconds"]["quantize_4bit nf4 bf16"]
    given["project"]["errors"]["quantize_4bit nf4 bf16"] = "no kernel"
    text = gpu.markdown(given)
    assert "| quantize_4bit nf4 bf16 | failed: no kernel |" in text
    assert "| Linear4bit | 9.0 | 8: NO |" in text and "released package was not there" in text


def test_tensors_are_rotated_through_more_than_the_cache() -> None:
    for case in CASES.values():
        count = gpu.copies_of(case, 60 << 20)
        assert count >= 3 and (count == 64 or count * case.bytes >= 3 * (60 << 20))
