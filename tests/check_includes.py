"""Includes run downwards only. Usage: check_includes.py src

Rooms may include what stands here; no file may include itself by a detour. Every quoted include is a path from src/, so
that it says which room it enters; those of the emulated GPU, from tests/, are let in where the device is named.
"""

import pathlib
import re
import sys

ROOMS = {"common": {"common"}, "cpu": {"common", "cpu"}, "cuda": {"common", "cuda"}}
SEAMS = {"cuda/device/device.cuh", "cuda/device/ptx.cuh"}  # may include cuda_on_host/
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def read(folder: pathlib.Path) -> dict[str, list[str]]:
    files = (path for path in folder.rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})
    return {path.relative_to(folder).as_posix(): INCLUDE.findall(path.read_text()) for path in sorted(files)}


def wrong_rooms(included: dict[str, list[str]]) -> list[str]:
    faults = []
    for name, targets in included.items():
        room = name.split("/")[0]
        for target in targets:
            if target.startswith("cuda_on_host/") and name in SEAMS:
                continue
            if target not in included:
                faults.append(f"{name}: {target} is not a path from src/")
            elif target.split("/")[0] not in ROOMS.get(room, set()):
                faults.append(f"{name}: {target} is not in a room that {room} knows")
    return faults


def cycles(included: dict[str, list[str]]) -> list[str]:
    done: set[str] = set()
    faults = []

    def walk(name: str, path: list[str]) -> None:
        if name in path:
            faults.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for target in included.get(name, []):
                walk(target, [*path, name])
            done.add(name)

    for name in included:
        walk(name, [])
    return faults


def main() -> int:
    included = read(pathlib.Path(sys.argv[1]))
    arrows = sum(map(len, included.values()))
    assert arrows > 100, f"{arrows} includes in {len(included)} files: this check has gone blind"
    faults = wrong_rooms(included) + cycles(included)
    print("\n".join(faults) or f"{arrows} includes in {len(included)} files, none runs back up")
    return bool(faults)


if __name__ == "__main__":
    raise SystemExit(main())
