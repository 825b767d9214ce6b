"""Models that are yet to be made: a new LLaVA, or a vision encoder and a language model joined."""

from __future__ import annotations

from vlm_dist.config import Config
from vlm_dist.data.dataset import open_storage
from vlm_dist.data.index import open_index
from vlm_dist.data.samples import parse_sample
from vlm_dist.data.shards import find_paths, read_in_order
from vlm_dist.distributed import Ranks
from vlm_dist.errors import BadSample, DataError
from vlm_dist.run_dir import RunDir
from vlm_dist.waiting import waiting


def model_source(config: Config, run: RunDir, ranks: Ranks) -> str:
    """Where to load the model from; a new model (model.scratch, model.mini_vlm) is made first, once, in the run directory."""
    if config.model.name is not None:
        return config.model.name
    if ranks.is_first and not (run.initial_model / "config.json").exists():
        _make(config, run)
    ranks.patient_barrier()
    return str(run.initial_model)


def _make(config: Config, run: RunDir) -> None:
    from vlm_dist.models.save import fresh_folder, put_in_place

    temporary = fresh_folder(run.initial_model)
    if config.model.mini_vlm is not None:
        from vlm_dist.models.compose import compose

        with waiting("joining the two models"):
            parts = compose(config.model.mini_vlm.vision, config.model.mini_vlm.language, temporary, seed=config.seed)
        print(f"mini VLM: {parts}", flush=True)
    elif config.model.scratch is not None:
        from vlm_dist.models.scratch import build_checkpoint

        build_checkpoint(config.model.scratch, training_texts(config), config.seed, temporary)
    put_in_place(temporary, run.initial_model)


def training_texts(config: Config, limit: int = 20_000) -> list[str]:
    """Texts for a new tokenizer, from the shards of data.train and whatever model.scratch.texts adds."""
    assert config.model.scratch is not None
    storage = open_storage(config.data)
    patterns = [*config.data.train_shards, *config.model.scratch.texts]
    shards = find_paths(patterns, "data.train", storage, allow_commands=config.data.allow_commands)
    open_index(shards, "data.train", storage)  # refuses what is no whole shard
    texts: list[str] = []
    for raw in read_in_order(shards, storage):
        try:
            sample = parse_sample(raw, max_image_pixels=config.data.max_image_pixels, caption_prompt=config.data.caption_prompt)
        except BadSample:
            continue  # named in the quarantine when it is trained on
        texts += [part["text"] for message in sample.messages for part in message["content"] if part["type"] == "text"]
        if len(texts) >= limit:
            break
    if not texts:
        raise DataError("data.train: no readable text to train a tokenizer on")
    return texts
