"""Machine code read by NVIDIA's tools: what kernels compiled for GPUs that are not here use and do."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from importlib import metadata
from pathlib import Path

from shipped import Figures, Kernel

from numlstm.kernels.cuda.persistent.compile import build


def tool(name: str, *arguments: str | Path) -> str:
    """What one of NVIDIA's binary tools prints; its wheels put it beside the other CUDA packages."""
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    found = [p for place in places for p in Path(place).glob(f"cu*/bin/{name}*")]
    assert found, f"{name} is not installed: pip install 'numlstm[gpu-test]'"
    return subprocess.run([found[0], *arguments], capture_output=True, text=True, check=True).stdout


def usage(file: Path) -> list[tuple[int, int, int, int]]:
    """(registers, stack, shared, local) of each function in a binary."""
    found = re.findall(
        r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", tool("cuobjdump", "-res-usage", file)
    )
    return [tuple(map(int, f)) for f in found]  # type: ignore[misc]


def compiled(kernel: Kernel, folder: Path) -> Figures:
    """A kernel compiled as on a GPU's first launch, and read; `folder` is for its binary."""
    file = folder / "kernel.cubin"
    file.write_bytes(build(kernel.text, kernel.arguments, kernel.warps, kernel.capability).cubin)
    ((registers, stack, shared, local),) = usage(file)
    code = tool("nvdisasm", "-c", "-ndf", file)  # without its analysis of branches, half of its time
    count = lambda *names: len(re.findall(rf"\b({'|'.join(names)})\b", code))
    looks = re.search(r"LDG\.E\.128\.STRONG\.GPU", code)
    loads = len(re.findall(r"LDG\.E\.128\.CONSTANT", code[: looks.start() if looks else 0]))
    return Figures(
        registers, stack, local, shared, count("HMMA"), count("LDL", "STL"), count("MEMBAR", "CCTL"), loads
    )


def versions() -> dict[str, str]:
    """The compilers that machine code depends on."""
    packages = ("numba-cuda", "nvidia-nvvm", "nvidia-nvjitlink", "cuda-core")
    return {name: metadata.version(name) for name in packages}
