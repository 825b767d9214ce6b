"""What GPUs have, by their makers' data sheets: dense bfloat16 products with float32 sums, without sparsity."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_dist.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """One card."""

    name: str
    memory: int
    """Bytes, as the driver reports them."""
    flops: float
    """bfloat16 products a second."""
    bandwidth: float
    """Bytes a second of its own memory."""
    link: float
    """Bytes a second to a neighbour, one way: NVLink, else PCIe."""


MIB = 2**20
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("rtx3090", 24_576 * MIB, 71e12, 936e9, 25e9),
        Gpu("rtx4090", 24_564 * MIB, 165e12, 1008e9, 25e9),
        Gpu("rtx5090", 32_607 * MIB, 209e12, 1792e9, 50e9),
        Gpu("a10", 23_028 * MIB, 125e12, 600e9, 25e9),
        Gpu("l4", 23_034 * MIB, 121e12, 300e9, 25e9),
        Gpu("a6000", 49_140 * MIB, 155e12, 768e9, 25e9),
        Gpu("l40s", 46_068 * MIB, 362e12, 864e9, 25e9),
        Gpu("a100-40gb", 40_536 * MIB, 312e12, 1555e9, 300e9),
        Gpu("a100", 81_920 * MIB, 312e12, 2039e9, 300e9),
        Gpu("h100", 81_559 * MIB, 989e12, 3350e9, 450e9),
        Gpu("h200", 143_771 * MIB, 989e12, 4800e9, 450e9),
        Gpu("b200", 183_359 * MIB, 2250e12, 8000e9, 900e9),
        Gpu("mi300x", 196_288 * MIB, 1307e12, 5300e9, 64e9),
    )
}


def find_gpu(name: str) -> Gpu:
    """A row of the table.

    Raises:
        ConfigError: there is none of that name.
    """
    key = name.lower().replace("_", "-").removeprefix("nvidia-")
    if key not in GPUS:
        raise ConfigError(f"--gpu: no card '{name}' in the table; there are {', '.join(GPUS)}")
    return GPUS[key]


def this_gpu() -> Gpu | None:
    """The card of this machine: its row of the table, with the memory that it really has. None: no GPU, or one that the table lacks."""
    import torch

    if not torch.cuda.is_available():
        return None
    said = torch.cuda.get_device_name().lower().replace(" ", "").replace("-", "")
    found = [gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in said]
    if not found:
        return None
    total = torch.cuda.mem_get_info()[1]
    nearest = min(found, key=lambda gpu: abs(gpu.memory - total))
    return Gpu(nearest.name, total, nearest.flops, nearest.bandwidth, nearest.link)
