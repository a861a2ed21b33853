"""Compile `cutlass_sparse.cu` where CUTLASS's headers and nvcc are, once: the library stays in rtlynx's cache folder.

CUTLASS is headers only. rtlynx neither ships nor fetches them, and nothing but this peer of the bench needs them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from rtlynx.bench.peer import Unavailable
from rtlynx.io import atomic_path
from rtlynx.plans import cache_folder

logger = logging.getLogger("rtlynx")

SOURCE = Path(__file__).with_name("cutlass_sparse.cu")
_OPTIONS = (
    "-shared",
    "-Xcompiler=-fPIC",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-std=c++17",
    "-O3",
    "-DNDEBUG",
    "--expt-relaxed-constexpr",
)


def include_folder() -> Path:
    """``include/`` of the checkout that the variable CUTLASS_PATH names, else of the wheel ``nvidia-cutlass``.

    Raises:
        Unavailable: There is neither.
    """
    if checkout := os.environ.get("CUTLASS_PATH"):
        roots, missing = [Path(checkout)], f"CUTLASS_PATH={checkout} has no include/cutlass/version.h"
    else:  # found without importing it, which needs more packages
        wheel = importlib.util.find_spec("cutlass_library")
        roots = [Path(folder, "source") for folder in (wheel and wheel.submodule_search_locations) or ()]
        missing = "CUTLASS's headers are not there: set CUTLASS_PATH to a checkout, or pip install nvidia-cutlass"
    for root in roots:
        if (root / "include" / "cutlass" / "version.h").is_file():
            return root / "include"
    raise Unavailable(missing)


def cutlass_version(include: Path) -> str:
    """Release of the headers, e.g. ``4.2.0``."""
    text = (include / "cutlass" / "version.h").read_text()
    return ".".join(re.findall(r"#define CUTLASS_(?:MAJOR|MINOR|PATCH)\s+(\d+)", text))


def nvcc() -> Path:
    """The compiler, from the places where rtlynx's own build looks: NVCC, CUDA_HOME, CUDA_PATH, PATH, NVIDIA's wheels.

    Raises:
        Unavailable: There is none.
    """
    if named := os.environ.get("NVCC"):
        return Path(named)
    homes = [Path(home, "bin", "nvcc") for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if home]
    on_path = [Path(found) for found in [shutil.which("nvcc")] if found]
    wheels = [Path(place, "nvidia", "cu13", "bin", "nvcc") for place in sys.path]
    for compiler in (*homes, *on_path, *wheels):
        if compiler.is_file():
            return compiler
    raise Unavailable("CUTLASS must be compiled and there is no nvcc: set NVCC or CUDA_HOME")


def nvcc_version(compiler: Path) -> str:
    """Its release, e.g. ``13.0.88``.

    Raises:
        Unavailable: It does not run.
    """
    try:
        printed = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"{compiler} does not run: {error}") from error
    release = re.search(r", V([\d.]+)", printed)
    return release.group(1) if release else printed


def library_path(cutlass: str, compiler: str) -> Path:
    """Where the library of these releases is, or will be. Another source or other options make another one."""
    parts = "\0".join((SOURCE.read_text(), " ".join(_OPTIONS), cutlass, compiler))
    return cache_folder() / "cutlass" / f"{hashlib.sha256(parts.encode()).hexdigest()[:16]}.so"


def described() -> str:
    """What a result file names: the release of CUTLASS, and the compiler's."""
    return f"CUTLASS: {cutlass_version(include_folder())}, nvcc {nvcc_version(nvcc())}"


@cache
def _compiled() -> Path | Unavailable:
    """The library; or what is missing, remembered so that it is not tried again for every layer."""
    try:
        include, compiler = include_folder(), nvcc()
        version = cutlass_version(include)
        path = library_path(version, nvcc_version(compiler))
        if not path.is_file():
            logger.warning("compiling the sparse GEMM of CUTLASS %s into %s: a few minutes, once", version, path)
            _compile(compiler, include, path)
    except Unavailable as missing:
        return missing
    except OSError as error:  # a folder that cannot be written
        return Unavailable(f"CUTLASS cannot be compiled: {error}")
    return path


def _compile(compiler: Path, include: Path, path: Path) -> None:
    libraries = compiler.parent.parent / "lib"  # where NVIDIA's wheels have them; a toolkit's nvcc knows its own
    with atomic_path(path) as temporary:
        command = [str(compiler), *_OPTIONS, f"-I{include}", f"-L{libraries}", "-o", str(temporary), str(SOURCE)]
        try:
            subprocess.run(command, capture_output=True, text=True, check=True)
        except subprocess.CalledProcessError as error:
            logger.warning("%s", error.stderr)
            first = next((line for line in error.stderr.splitlines() if "error" in line), f"nvcc ends with {error.returncode}")
            raise Unavailable(f"CUTLASS does not compile: {first}") from error


def library() -> Path:
    """The compiled library, which the first call compiles.

    Raises:
        Unavailable: CUTLASS or nvcc is not there, or the one does not compile with the other.
    """
    found = _compiled()
    if isinstance(found, Unavailable):
        raise found
    return found
