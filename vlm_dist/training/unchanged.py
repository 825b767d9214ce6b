"""Whether a run goes on with what it began with: the model's configuration, processor, tokenizer, chat template, and the bytes of the
shards. (Names, sizes and counts of shards are the stream's affair, the base's weights the checkpoint's.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_dist.checkpoints.form import read_state
from vlm_dist.data.content import content_digests
from vlm_dist.data.dataset import open_heldout
from vlm_dist.distributed import Ranks
from vlm_dist.errors import CheckpointError
from vlm_dist.inputs.opened import Inputs
from vlm_dist.models.record import UNSTEADY, describe_processor
from vlm_dist.models.source import looks_like_path, read_config_file
from vlm_dist.training.log import Log

HARMLESS = {*UNSTEADY, "dtype", "torch_dtype", "use_cache", "attn_implementation", "_attn_implementation", "_commit_hash"}
MOST_NAMED = 6


def describe_inputs(inputs: Inputs, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """What is compared, by part and name; only the first rank reads it. Every rank must call it."""
    if not ranks.is_first:
        return {}
    config = inputs.config
    data = {f"{one.name}: {shard}": digest for one in inputs.datasets for shard, digest in content_digests(one).items()}
    if (heldout := open_heldout(config.data)) is not None:
        data |= {f"heldout: {shard}": digest for shard, digest in content_digests(heldout).items()}
    return {
        "model": dict(_flat(read_config_file(inputs.source, config.model.revision))) | _code(inputs.source),
        "processor": describe_processor(inputs.processor) | {"tokenizer.sha256": _tokenizer(inputs.processor.tokenizer)},
        "data": data,
    }


def compare_inputs(checkpoint: Path, now: dict[str, dict[str, Any]], ranks: Ranks, log: Log, *, insist: bool) -> None:
    """Compare what a checkpoint's run began with and what there is now. Every rank must call it.

    Args:
        now: of `describe_inputs`.
        insist: only tell.

    Raises:
        CheckpointError: something differs; it is named with what it was and is.
    """
    changed: list[str] = []
    if ranks.is_first:
        state = read_state(checkpoint)
        if "inputs" in state:
            changed = differences(state["inputs"], now)
        else:
            log.say(f"{checkpoint.name} is of an earlier vlm_dist: processor, tokenizer and shards cannot be compared with its own")
    changed = ranks.gather(changed)[0]
    if not changed:
        return
    more = f"; and {len(changed) - MOST_NAMED} more" if len(changed) > MOST_NAMED else ""
    words = "; ".join(changed[:MOST_NAMED]) + more
    if not insist:
        raise CheckpointError(
            f"{checkpoint}: this is not what the run was trained with ({words}); put it back, start a run of another name, or continue "
            "all the same with --resume-anyway"
        )
    log.event("inputs changed", read_state(checkpoint)["step"], f"going on all the same (--resume-anyway): {words}")


def differences(then: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> list[str]:
    """What is not the same, in words; a part that one side does not know is not compared."""
    found = []
    for part in [part for part in then if part in now]:
        for name in sorted({*then[part], *now[part]}):
            a, b = then[part].get(name), now[part].get(name)
            if a != b:
                is_digest = part == "data" or name.endswith("sha256")
                found.append(f"{part} {name}: {'other content' if is_digest and a and b else f'was {_short(a)}, is {_short(b)}'}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested objects by their path."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        if key not in HARMLESS:
            yield from _flat(inner, f"{name}.{key}" if name else str(key))


def _code(source: str) -> dict[str, str]:
    """Python files that come with a folder's checkpoint."""
    files = sorted(Path(source).glob("*.py")) if looks_like_path(source) else []
    return {f"{file.name} sha256": hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _tokenizer(tokenizer: Any) -> str:
    """Everything that makes tokens of text, where the tokenizer can say it; else its special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        said: Any = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    else:
        said = {name: value for name, value in json.loads(backend.to_str()).items() if name not in ("truncation", "padding", "version")}
        said["special"] = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
