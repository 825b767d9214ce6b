"""Windowed vision attention all at once, against transformers' loop over windows: Qwen2.5-VL's tower at its real width, in turn.

    python scripts/bench/vision_windows.py --out docs/benchmarks/vision_windows.json

Four blocks (three windowed, one over the whole picture) of 1280 wide, 16 heads, in float32; forward, and backward to the pixels. Results
are compared too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from vlm_dist import distributed
from vlm_dist.environment import describe_environment
from vlm_dist.models.patches import Patches
from vlm_dist.models.patching_vision import patch_vision_windows
from vlm_dist.run_dir import write_json


def build(device: torch.device):
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

    config = Qwen2_5_VLVisionConfig(hidden_size=1280, num_heads=16, depth=4, fullatt_block_indexes=[3], out_hidden_size=512)
    torch.manual_seed(0)
    return qwen.Qwen2_5_VisionTransformerPretrainedModel._from_config(config, attn_implementation="sdpa").to(device)


def run(tower, pixels: torch.Tensor, grid: torch.Tensor) -> tuple[float, float, torch.Tensor]:
    """Seconds forward, seconds backward, gradient of the pixels."""
    pixels = pixels.clone().requires_grad_(True)

    def now() -> float:
        if pixels.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    out = tower(pixels, grid_thw=grid).last_hidden_state
    middle = now()
    out.square().sum().backward()
    assert pixels.grad is not None
    return middle - start, now() - middle, pixels.grad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", type=int, default=[16, 32, 48], help="patches along the picture's height")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loop, batched, patches = build(device), build(device), Patches()
    patch_vision_windows(batched, patches)
    rows = []
    for side in arguments.sides:
        grid = torch.tensor([[1, side, side + 4]], device=device)
        pixels = torch.randn(side * (side + 4), 1176, generator=torch.Generator().manual_seed(0)).to(device)
        run(loop, pixels, grid), run(batched, pixels, grid)
        pairs = [(run(loop, pixels, grid), run(batched, pixels, grid)) for _ in range(arguments.rounds)]
        difference = float((pairs[0][0][2] - pairs[0][1][2]).abs().max() / pairs[0][0][2].abs().max())
        ratios = {
            name: round(statistics.median(ours[part] / theirs[part] for theirs, ours in pairs), 3)
            for part, name in enumerate(("forward", "backward"))
        }
        rows.append(
            {"patches": len(pixels), "windows": -(-side // 8) * -(-(side + 4) // 8), "share_of_time": ratios, "difference": difference}
        )
        print(rows[-1], flush=True)
    if arguments.out:
        environment = describe_environment(distributed.Ranks(0, 0, 1, device))
        write_json(arguments.out, {"environment": environment, "rounds": arguments.rounds, "rows": rows})


if __name__ == "__main__":
    main()
