"""Fails if code of one instruction set could be linked in place of another: check_isa_symbols.py NM LIBRARY.

Of a weak function the linker keeps one copy, from whichever object comes first. So an isa_*.o may define none: neither
one that another object of the library defines, nor one that an object of a program may. Weak data (V) is the same
wherever it comes from.
"""

import subprocess
import sys


def weak_functions(nm: str, library: str) -> dict[str, list[str]]:
    """Those of every object of the library."""
    listing = subprocess.run([nm, "--demangle", "--defined-only", library], check=True, capture_output=True, text=True)
    objects: dict[str, list[str]] = {}
    current = ""
    for line in listing.stdout.splitlines():
        if line.endswith(".o:"):
            current = line[:-1]
            objects[current] = []
        elif len(fields := line.split(None, 2)) == 3 and fields[1] in "Ww":
            objects[current].append(fields[2])
    return objects


def main() -> int:
    objects = {name: symbols for name, symbols in weak_functions(*sys.argv[1:]).items() if name.startswith("isa_")}
    if len(objects) < 2:
        print(f"{sys.argv[2]} holds {len(objects)} isa_*.o, expected one per instruction set")
        return 1
    for name, symbols in objects.items():
        for symbol in symbols:
            print(f"{name}: {symbol}")
    found = sum(map(len, objects.values()))
    print(f"{found} weak functions in {len(objects)} objects: " + ", ".join(sorted(objects)))
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
