"""Installs the C++ package and uses it as other projects would.

    check_package.py BUILD C++-COMPILER

BUILD is a build folder of this project with BNB_INSTALL. What is checked: the files that are installed, also after
they have been moved; that libbnb.so exports the public functions and nothing else; a project that finds the package by
CMake, one in C99, with each compiler there is; pkg-config; a version that does not fit; a project that contains this
one, by add_subdirectory and by FetchContent, which sees none of its flags.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1]
PUBLIC = re.compile(
    r"^(bnb_\w+|(typeinfo|typeinfo name|vtable) for bnb::\w+|bnb::[\w:~]+(\[abi:\w+\])?(\(.*\))?( const)?)$"
)
PRIVATE = re.compile(r"bnb::(cpu|json|\(anonymous)")


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise SystemExit(f"{shlex.join(map(str, command))}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def say(text: str) -> None:
    print(text, flush=True)


def install(build: Path, folder: Path) -> Path:
    """Into one folder, then moved: nothing may remember where it was."""
    run("cmake", "--install", build, "--prefix", folder / "first", "--component", "bnb")
    there = (folder / "first").rename(folder / "moved")
    headers = {path.name for path in (SOURCE / "include" / "bnb").iterdir()}
    assert {path.name for path in (there / "include" / "bnb").iterdir()} == headers, "headers"
    for name in ("libbnb.a", "libbnb.so", "bnb.pc", "bitsandbytesConfig.cmake", "bitsandbytesConfigVersion.cmake"):
        assert len(list(there.rglob(name))) == 1, name
    for path in there.rglob("*"):
        if path.suffix in {".cmake", ".pc"}:
            for place in (build, folder, SOURCE):
                assert str(place) not in path.read_text(), f"{path.name} names {place}"
    say(f"installed {len([p for p in there.rglob('*') if p.is_file()])} files")
    return there


def check_exports(there: Path) -> None:
    library = next(there.rglob("libbnb.so"))
    lines = run("nm", "--dynamic", "--defined-only", "--demangle", library).splitlines()
    names = [line.split(" ", 2)[2].split("@")[0] for line in lines]
    wrong = [name for name in names if not PUBLIC.fullmatch(name)]
    assert not wrong, f"libbnb.so exports {wrong}"
    assert len(names) > 50, f"{len(names)} exports: this check has gone blind"
    declared = set(re.findall(r"BNB_API [\w:* <>,]*?\*?\b(bnb_\w+)\(", (there / "include/bnb/c.h").read_text()))
    assert declared and declared == {name for name in names if name.startswith("bnb_")}, "functions of c.h"
    say(f"libbnb.so exports {len(names)} names, all public")


def configure(source: Path, build: Path, cxx: str, *options: str) -> subprocess.CompletedProcess[str]:
    c = re.sub(r"(clang|g|c)\+\+(?=[^/]*$)", lambda m: {"clang": "clang", "g": "gcc", "c": "cc"}[m[1]], cxx)
    env = {k: v for k, v in os.environ.items() if not k.startswith("CMAKE_")}
    command = ["cmake", "-S", source, "-B", build, "-G", "Ninja" if shutil.which("ninja") else "Unix Makefiles"]
    command += [f"-DCMAKE_CXX_COMPILER={cxx}", f"-DCMAKE_C_COMPILER={c}", *options]
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, env=env)


def check_find_package(there: Path, folder: Path, cxx: str) -> None:
    build = folder / f"app-{Path(cxx).name}"
    done = configure(HERE / "app", build, cxx, f"-DCMAKE_PREFIX_PATH={there}")
    assert done.returncode == 0, done.stdout + done.stderr
    run("cmake", "--build", build)
    say(f"find_package with {Path(cxx).name}:")
    for name in ("app", "app_shared", "c99"):
        say("  " + run(build / name).strip())
    linked = run("readelf", "--dynamic", build / "app_shared")
    assert "libbnb.so.0.50" in linked and "libbnb" not in run("readelf", "--dynamic", build / "app")


def check_wrong_version(there: Path, folder: Path, cxx: str) -> None:
    source = folder / "wrong"
    shutil.copytree(HERE / "app", source)
    text = (source / "CMakeLists.txt").read_text()
    (source / "CMakeLists.txt").write_text(text.replace("bitsandbytes 0.50", "bitsandbytes 0.49"))
    done = configure(source, folder / "wrong-build", cxx, f"-DCMAKE_PREFIX_PATH={there}")
    assert done.returncode and "requested version" in done.stderr, done.stderr
    say("a version that does not fit is refused")


def check_pkg_config(there: Path, folder: Path, cxx: str) -> None:
    if not shutil.which("pkg-config"):
        say("no pkg-config: not checked")
        return
    env = os.environ | {"PKG_CONFIG_PATH": str(next(there.rglob("bnb.pc")).parent)}
    flags = run("pkg-config", "--cflags", "--libs", "bnb", env=env).split()
    version = run("pkg-config", "--modversion", "bnb", env=env).strip()
    assert f'"{version}+' in (there / "include/bnb/version.h").read_text(), version
    target = folder / "by-pkg-config"
    run(cxx, "-std=c++20", HERE / "app" / "app.cpp", *flags, "-o", target)
    library = next(there.rglob("libbnb.so")).parent
    say("pkg-config: " + run(target, env=os.environ | {"LD_LIBRARY_PATH": str(library)}).strip())


def check_inside(folder: Path, cxx: str, fetch: bool) -> None:
    """Configures, and compiles what is the parent's own; the library itself has been compiled before."""
    build = folder / f"inside-{fetch}"
    options = [f"-DBNB_SOURCE={SOURCE}", f"-DFETCH={fetch}", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    done = configure(HERE / "inside", build, cxx, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    commands = json.loads((build / "compile_commands.json").read_text())
    own = {Path(c["file"]).name: c for c in commands if Path(c["file"]).is_relative_to(HERE)}
    assert set(own) == {"app.cpp", "bystander.cpp"} and len(commands) > 15, own
    flags = set(shlex.split(own["bystander.cpp"]["command"]))
    assert not [f for f in flags if f.startswith(("-f", "-W", "-D", "-O", "-I", "-std", "-m", "-isystem"))], flags
    flags = {f for f in shlex.split(own["app.cpp"]["command"]) if f.startswith(("-f", "-W", "-D", "-O", "-m"))}
    assert not flags, flags
    for command in own.values():
        Path(command["directory"], "CMakeFiles/app.dir").mkdir(parents=True, exist_ok=True)
        run(*shlex.split(re.sub(r" -o \S+", f" -o {folder}/own.o", command["command"])), cwd=command["directory"])
    assert (
        not (build / "bnb" / "cmake_install.cmake").exists()
        or "libbnb" not in (build / "bnb" / "cmake_install.cmake").read_text()
    )
    say(f"{'FetchContent' if fetch else 'add_subdirectory'}: no flag, variable or test leaks into the parent")


def main() -> int:
    build, cxx = Path(sys.argv[1]).resolve(), sys.argv[2]
    others = [f"clang++{suffix}" for suffix in ("", *(f"-{v}" for v in range(22, 13, -1)))]
    clang = next((found for name in others if (found := shutil.which(name))), None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        there = install(build, folder)
        check_exports(there)
        for compiler in dict.fromkeys([cxx, clang] if clang else [cxx]):
            check_find_package(there, folder, compiler)
        check_wrong_version(there, folder, cxx)
        check_pkg_config(there, folder, cxx)
        for fetch in (False, True):
            check_inside(folder, cxx, fetch)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
