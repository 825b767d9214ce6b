"""What each rank holds of the model at ZeRO stage 3: a JSON line from rank 0.

torchrun --nproc-per-node 2 tests/launch/held.py CONFIG
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vlm_dist import distributed, load_config
from vlm_dist.inputs.opened import open_inputs
from vlm_dist.models.loss import summed_loss
from vlm_dist.run_dir import RunDir
from vlm_dist.training.engine import start_engine
from vlm_dist.training.prepare import load_trainable


def main() -> None:
    config = load_config(sys.argv[1], sys.argv[2:])
    ranks = distributed.start()
    inputs = open_inputs(config, RunDir(Path(config.output_dir) / "held"), ranks)
    loaded = load_trainable(inputs, ranks)
    whole = {  # a base that was loaded in shares is whole nowhere, and says how large it would be
        name: getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        for name, parameter in loaded.model.named_parameters()
        if not parameter.requires_grad
    }
    engine = start_engine(loaded.model, loaded.family, config, loaded.dtype, ranks)
    base = {name: parameter for name, parameter in engine.module.named_parameters() if not parameter.requires_grad}
    shares = {name: parameter.ds_tensor.nbytes for name, parameter in base.items()}

    def gathered() -> int:
        return sum(parameter.data.nbytes for parameter in base.values())

    most, at_rest = 0, gathered()

    def look(*_) -> None:
        nonlocal most
        most = max(most, gathered())

    for module in engine.module.modules():
        module.register_forward_pre_hook(look)
    stream = inputs.stream(ranks.rank, ranks.world_size)
    engine.backward(summed_loss(engine, stream.next_step().micro_batches[0]))
    engine.step()
    stream.close()
    found = ranks.gather({"whole": sum(whole.values()), "share": sum(shares.values()), "at_rest": at_rest, "most_gathered": most})
    if ranks.is_first:
        print("HELD " + json.dumps({"ranks": found, "largest": max(whole.values())}))


if __name__ == "__main__":
    main()
