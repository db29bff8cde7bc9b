"""Compiles the C sources into one shared library beside this file. Standard library only: the package's build runs it.

The library carries a digest of the sources and flags it was made from, so that a stale one is told from a fresh one.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
LIBRARY = Path(__file__).parent / "libcluster_cpu.so"

_COMMON_FLAGS = (
    "-O3",
    "-std=gnu11",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-pthread",
    "-Werror=implicit",
)
_ISA_FLAGS = {
    "avx512": (
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ),
    "avxvnni": ("-mavx2", "-mfma", "-mf16c", "-mavxvnni"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "portable": (),
}
_ONCE = ("library.c", "pool.c", "program.c")  # sources that do not depend on the instruction set


class BuildError(Exception):
    """No compiler, or it refused the sources."""


def instruction_sets() -> tuple[str, ...]:
    """Those that a library for this machine's architecture holds, best first."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return tuple(_ISA_FLAGS) if is_x86 else ("portable",)


def source_digest() -> str:
    """Of every source, header and flag."""
    digest = hashlib.sha256(repr((_COMMON_FLAGS, _ISA_FLAGS, _ONCE)).encode())
    for path in sorted(SOURCES.glob("*.[ch]")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def build(target: Path = LIBRARY) -> None:
    """Compiles and links; ``target`` is replaced at once, so that others never load half a library.

    Raises:
        BuildError: what the compiler said.
    """
    compiler = _compiler()
    with tempfile.TemporaryDirectory(prefix="cluster-cpu-") as folder:
        jobs = []
        for source in sorted(SOURCES.glob("*.c")):
            if source.name in _ONCE:
                jobs.append((source, Path(folder) / f"{source.stem}.o", (f'-DSOURCE_DIGEST="{source_digest()}"',)))
                continue
            for isa in instruction_sets():
                jobs.append((source, Path(folder) / f"{source.stem}_{isa}.o", (f"-DISA={isa}", *_ISA_FLAGS[isa])))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for done in [
                pool.submit(_run, [*compiler, *_COMMON_FLAGS, *flags, "-c", str(source), "-o", str(object_file)])
                for source, object_file, flags in jobs
            ]:
                done.result()
        linked = Path(folder) / target.name
        objects = [str(object_file) for _, object_file, _ in jobs]
        _run([*compiler, "-shared", "-pthread", "-o", str(linked), *objects, "-lm"])
        fresh = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copyfile(linked, fresh)
        fresh.replace(target)


def is_fresh(target: Path = LIBRARY) -> bool:
    """Whether the library is there and was made from these sources."""
    return target.is_file() and source_digest().encode() in target.read_bytes()


def build_if_stale(target: Path = LIBRARY) -> None:
    """Builds unless the library is fresh; of several processes that find it stale, one builds and the others wait.

    Raises:
        BuildError: what the compiler said, or the folder cannot be written to.
    """
    if is_fresh(target):
        return
    try:
        with open(target.with_name(f".{target.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_fresh(target):
                build(target)
    except OSError as error:
        raise BuildError(f"{target}: {error.strerror}") from error


def _compiler() -> list[str]:
    for name in filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")):
        command = name.split()
        if shutil.which(command[0]):
            return command
    raise BuildError("no C compiler: neither cc nor gcc nor clang is on the path, and CC names none")


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{result.stderr.strip()}")


if __name__ == "__main__":
    try:
        build()
    except BuildError as error:
        sys.exit(f"error: {error}")
