"""The results of a benchmark as lines on the terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from bench import cases

WIDTHS = (46, 10, 10, 7, 6, 4, 7, 24, 16)


def progress(message: str) -> None:
    """A line that the next one overwrites; nothing where there is no terminal."""
    if sys.stdout.isatty():
        print(f"\r\033[K{message}", end="", flush=True)


def header(result: dict[str, Any]) -> str:
    machine, limits = result["machine"], result["limits"]
    lines = [f"{machine['cpu']}, {machine['cores']} cores, {' '.join(machine['isa'])}"]
    for title, info in result["packages"].items():
        lines.append(f"{title}: bitsandbytes {info['bitsandbytes']}, torch {info['torch']}, Python {info['python']}")
    for threads, found in limits["threads"].items():
        operations = [key for key in found if f"{key}_isa" in limits]
        figures = ", ".join(f"{key} {found[key]:.1f} GB/s" for key in found if key not in operations)
        peaks = ", ".join(f"{key} {found[key]:.0f} GFLOP/s ({limits[f'{key}_isa']})" for key in operations)
        lines.append(f"limits, {threads} thread{'s' * (threads != '1')}: {figures}, {peaks}")
    return "\n".join(lines)


def milliseconds(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:.1f}" if ms >= 100 else f"{ms:.3g}" if ms >= 0.1 else f"{ms:.4f}"


def rate_and_share(case: dict[str, Any], limits: dict[str, Any], threads: str) -> str:
    """What the project moves or computes a second, and how much of the limit of its kind that is."""
    seconds, bound = case["seconds"][threads]["ours"], case["bound"]
    if not bound:
        return ""
    limit = limits["threads"][threads][bound]
    work, unit = (case["flops"], "GFLOP/s") if f"{bound}_isa" in limits else (case["bytes"], "GB/s")
    rate = work / seconds / 1e9
    return (
        f"{rate:.0f} {unit}, {rate / limit:.0%} of {bound}"
        if rate >= 100
        else f"{rate:.1f} {unit}, {rate / limit:.0%} of {bound}"
    )


def case_cells(case: dict[str, Any], result: dict[str, Any]) -> tuple[str, ...]:
    threads = str(result["machine"]["cores"])
    seconds, ratio = case["seconds"][threads], case["ratio"][threads]
    reach = case["reach"]
    name = case["name"] if not case["versus"] else f"{case['versus'].split()[0]} vs {case['name']}"
    return (
        name,
        milliseconds(seconds["ours"]),
        milliseconds(seconds["reference"]),
        f"{ratio:.2f}",
        "" if reach is None else f"{reach:g}",
        "" if reach is None else ("yes" if ratio >= reach else "NO"),
        f"{case['ratio']['1']:.2f}",
        rate_and_share(case, result["limits"], threads),
        rate_and_share(case, result["limits"], "1").split(",")[0],
    )


def column_titles(result: dict[str, Any]) -> tuple[str, ...]:
    ours, reference = result["titles"]
    return (
        "case",
        f"{ours} ms",
        f"{reference} ms",
        "ratio",
        "reach",
        "met",
        "1 thread",
        "rate, share of the limit",
        "1 thread rate",
    )


def case_line(case: dict[str, Any] | None, result: dict[str, Any]) -> str:
    cells = column_titles(result) if case is None else case_cells(case, result)
    first = f"{cells[0]:{WIDTHS[0]}}"
    return first + " " + " ".join(f"{cell:>{width}}" for cell, width in zip(cells[1:], WIDTHS[1:], strict=True))


def import_line(found: dict[str, Any]) -> str:
    ours, reference = found["seconds"]["ours"], found["seconds"]["reference"]
    met = "yes" if ours <= found["limit_s"] else "NO"
    return f"{cases.IMPORT_NAME}: {ours:.3f} s, reference {reference:.3f} s; at most {found['limit_s']} s: {met}"


def model_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for figure in cases.MODEL_FIGURES:
        ours, reference = (found["figures"][side][figure.key] for side in ("ours", "reference"))
        ratio = ours / reference if figure.more_is_better else reference / ours
        reach = figure.reach.get(found["mode"])
        met = "" if reach is None else ("yes" if ratio >= reach else "NO")
        name = f"{found['name']}: {figure.title}"
        rows.append(
            (name, f"{ours:.4g}", f"{reference:.4g}", f"{ratio:.2f}", "" if reach is None else f"{reach:g}", met)
        )
    return rows


def model_lines(found: dict[str, Any]) -> list[str]:
    return [
        f"{row[0]:46} " + " ".join(f"{c:>{w}}" for c, w in zip(row[1:], WIDTHS[1:6], strict=True))
        for row in model_rows(found)
    ]


def table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [titles, ("---", *("---:" for _ in titles[1:])), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown(result: dict[str, Any]) -> str:
    machine = result["machine"]
    ours, reference = result["titles"]
    parts = [
        f"# {ours} against {reference}",
        f"{machine['date']}, commit {machine['commit']}{', quick' if result['quick'] else ''}. "
        "Best of many calls, the two taking turns case by case. "
        f'Ratio = time of {reference} / time of {ours}; "1 thread" is the same ratio with torch.set_num_threads(1). '
        "Limits are those of 256 MiB in memory (cache: 8 MiB), so a case that fits the cache can exceed them.",
        "```\n" + header(result) + "\n```",
    ]
    if result["cases"]:
        parts.append(table(column_titles(result), [case_cells(case, result) for case in result["cases"]]))
    if "import" in result:
        parts.append(import_line(result["import"]))
    if result["models"]:
        rows = [row for found in result["models"] for row in model_rows(found)]
        parts.append(table(("SmolLM2-135M-Instruct", ours, reference, "ratio", "reach", "met"), rows))
    return "\n\n".join(parts) + "\n"


def write(result: dict[str, Any], folder: Path, isa: str | None) -> list[Path]:
    """One pair of files for each machine, instruction set and filter; a later run replaces it."""
    words = [
        re.sub(r"\(R\)|\(TM\)|\(family|CPU|Processor|@.*", " ", result["machine"]["cpu"]),
        result["limits"]["bf16_isa"],
    ]
    words += [f"only {isa}"] if isa else []
    words += [result["filter"]] if result["filter"] else []
    words += ["quick"] if result["quick"] else []
    name = re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.json", folder / f"{name}.md"]
    paths[0].write_text(json.dumps(result, indent=1) + "\n")
    paths[1].write_text(markdown(result))
    return paths
