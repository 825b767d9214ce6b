"""The trainable state of an engine as whole tensors on the CPU, and back, at any ZeRO stage and number of ranks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dist.buffers import moving_buffers
from vlm_dist.checkpoints.form import MOMENTS, WEIGHTS, Snapshot, read_state
from vlm_dist.errors import CheckpointError
from vlm_dist.upstream.deepspeed import create_moments, gathered, is_sharded

if TYPE_CHECKING:
    import torch

ADAMW = ("step", "exp_avg", "exp_avg_sq")  # its state of a parameter
BEFORE = "delete this checkpoint to continue from the one before"
OF_A_PARAMETER = ("exp_avg", "exp_avg_sq", "state1", "state2")  # have its shape


def take_snapshot(engine: Any, *, keep: bool) -> Snapshot | None:
    """Every rank must call it; only those that `keep` hold the tensors."""
    weights, moments = gather_weights(engine, keep=keep), _optimizer_state(engine, keep=keep)
    if not keep:
        return None
    adapters = getattr(engine.module, "peft_config", None)
    names = _stored_names(engine.module, weights)
    stored = {names[name]: tensor for name, tensor in weights.items()}
    return Snapshot(stored, moments, adapters["default"] if adapters else None)


def load_checkpoint(path: Path, engine: Any, fingerprint: str) -> dict[str, Any]:
    """Put weights and optimizer state back into the engine, at any ZeRO stage and number of ranks.

    Returns:
        The checkpoint's state.

    Raises:
        CheckpointError: it was trained on another base model, or does not fit the model or its optimizer. Nothing was changed then.
    """
    state = read_state(path)
    if state["base_fingerprint"] != fingerprint:
        raise CheckpointError(
            f"{path}: was trained on another base model than model.name loads now; put the old base back, or start a run of another name"
        )
    weights, moments = (_read(path, name) for name in (next(name for name in WEIGHTS if (path / name).exists()), MOMENTS))
    parameters, buffers = trainable(engine), moving_buffers(engine.module)
    stored = _stored_names(engine.module, [*parameters, *buffers])
    _check_parameters(path, {stored[name]: tensor for name, tensor in {**parameters, **buffers}.items()}, weights)
    _check_moments(path, parameters, moments, _kind_of(engine))
    for name, parameter in parameters.items():
        _set_parameter(engine, parameter, weights[stored[name]])
    for name, buffer in buffers.items():
        buffer.copy_(weights[stored[name]])
    _set_optimizer_state(engine, moments, int(state["progress"]["updates"]))
    return state


def _read(path: Path, name: str) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path / name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {name} cannot be read ({error}); {BEFORE}") from None


def _check_parameters(path: Path, now: dict[str, Any], then: dict[str, Any]) -> None:
    """By the names under which they are stored."""
    if odd := sorted(set(now) ^ set(then)):
        raise CheckpointError(
            f"{path}: holds other parameters than this model trains ({len(odd)} differ, e.g. {odd[0]}); set lora, model and training "
            "back, or start a run of another name"
        )
    odd = [name for name in sorted(now) if _shape(now[name]) != _shape(then[name])]
    if odd:
        raise CheckpointError(
            f"{path}: holds other shapes than this model trains ({len(odd)} of {len(now)} differ, e.g. {odd[0]}: {_shape(then[odd[0]])} "
            f"there, {_shape(now[odd[0]])} now); set lora.r and the model back, or start a run of another name"
        )
    for name, tensor in then.items():
        expected = "torch.float32" if now[name].requires_grad else str(now[name].dtype)  # a buffer is stored as it is
        if str(tensor.dtype) != expected:
            raise CheckpointError(f"{path}: holds '{name}' as {tensor.dtype}, expected {expected}; {BEFORE}")


def _check_moments(path: Path, parameters: dict[str, Any], moments: dict[str, Any], kind: str) -> None:
    import torch

    parts = [(name, *name.rpartition("/")[::2]) for name in moments]
    then = "adamw" if all(entry in ADAMW for _, _, entry in parts) else "adamw_8bit"
    if parts and then != kind:
        raise CheckpointError(
            f"{path}: holds the state of another optimizer ({then}; optim.name is {kind} now); set optim.name back, or start a run of "
            "another name"
        )
    for name, parameter, entry in parts:
        if parameter not in parameters:
            raise CheckpointError(f"{path}: {MOMENTS} holds '{name}' of no parameter that trains; start a run of another name")
        if entry in OF_A_PARAMETER and _shape(moments[name]) != _shape(parameters[parameter]):
            raise CheckpointError(
                f"{path}: {MOMENTS} holds another shape of '{name}' ({_shape(moments[name])} there, {_shape(parameters[parameter])} now); "
                "start a run of another name"
            )
        if entry in ADAMW and moments[name].dtype != torch.float32:
            raise CheckpointError(f"{path}: {MOMENTS} holds '{name}' as {moments[name].dtype}, expected torch.float32; {BEFORE}")
        for partner in _partners(name, entry):
            if partner not in moments:
                raise CheckpointError(f"{path}: {MOMENTS} holds '{name}' without '{partner}'; {BEFORE}")


def _partners(name: str, entry: str) -> list[str]:
    """The other moments that an optimizer has of the same parameter."""
    group = next((group for group in (("exp_avg", "exp_avg_sq"), ("state1", "state2")) if entry in group), ())
    return [f"{name.removesuffix(entry)}{other}" for other in group if other != entry]


def _kind_of(engine: Any) -> str:
    """The optimizer, as optim.name says it."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return "adamw_8bit" if type(inner).__module__.startswith("bitsandbytes") else "adamw"


def _shape(tensor: Any) -> tuple[int, ...]:
    """The whole one, where ZeRO shards a parameter."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def gather_weights(engine: Any, *, keep: bool, frozen: bool = False) -> dict[str, Any]:
    """The trainable parameters, whole and in float32, and the buffers that training moves, by name, on the CPU. Every rank must call it;
    only those that `keep` get them.

    Args:
        frozen: those too that do not train but are sharded (ZeRO stage 3), as they are.
    """
    weights = {}
    for name, parameter in trainable(engine).items():
        value = _full_parameter(engine, parameter)
        if keep:
            weights[name] = _copy(value.float())
    for name, parameter in engine.module.named_parameters() if frozen else ():
        if not parameter.requires_grad and is_sharded(parameter):
            with gathered([parameter]):
                weights |= {name: _copy(parameter)} if keep else {}
    if keep:
        weights |= {name: _copy(buffer) for name, buffer in moving_buffers(engine.module).items()}
    return weights


def _stored_names(module: Any, names: Iterable[str]) -> dict[str, str]:
    """The name under which each trained tensor is stored: for adapters, the one that PEFT itself would give it, if it knows it (buffers of
    the base it does not)."""
    import torch

    names = list(names)
    if not hasattr(module, "peft_config"):
        return {name: name for name in names}
    from peft import get_peft_model_state_dict

    numbered = {name: torch.tensor(number) for number, name in enumerate(names)}
    stored = get_peft_model_state_dict(module, state_dict=numbered, save_embedding_layers=False)
    return dict(zip(names, names, strict=True)) | {names[int(number)]: name for name, number in stored.items()}


def _is_sharded(engine: Any) -> bool:
    return engine.zero_optimization_stage() > 0


def _full_parameter(engine: Any, parameter: Any) -> Any:
    from deepspeed.utils import safe_get_full_fp32_param

    value = safe_get_full_fp32_param(parameter) if _is_sharded(engine) else parameter.detach()
    assert value is not None
    return value


def _copy(tensor: Any) -> Any:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _set_parameter(engine: Any, parameter: Any, value: Any) -> None:
    """Set the working weight and, where ZeRO keeps one apart from it, the master weight."""
    import torch
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_full_fp32_param

    stage = engine.zero_optimization_stage()
    if stage:
        safe_set_full_fp32_param(parameter, value.to(engine.device))
    with GatheredParameters([parameter], modifier_rank=0, enabled=stage == 3), torch.no_grad():
        parameter.copy_(value)


def _optimizer_state(engine: Any, *, keep: bool) -> dict[str, Any]:
    """ "PARAMETER/KEY" -> tensor. Without sharding: all tensors that the optimizer keeps; with: the two moments, gathered. Nothing before
    the first update: every step so far may have been left out."""
    import torch
    from deepspeed.utils import safe_get_full_optimizer_state

    state = {}
    if _is_sharded(engine) and not engine.optimizer.optimizer.state:
        return state
    for name, parameter in trainable(engine).items():
        if _is_sharded(engine):
            entries = {key: safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")}
        else:
            entries = engine.optimizer.state[parameter]
        for key, value in entries.items():
            if keep and isinstance(value, torch.Tensor):
                state[f"{name}/{key}"] = _copy(value)
    return state


def _set_optimizer_state(engine: Any, state: dict[str, Any], updates: int) -> None:
    import torch
    from deepspeed.utils import safe_set_full_optimizer_state

    parameters = trainable(engine)
    sharded = _is_sharded(engine)
    if sharded:
        create_moments(engine)
    for key, value in state.items():
        name, _, entry = key.rpartition("/")
        parameter = parameters[name]
        if not sharded:
            engine.optimizer.state[parameter][entry] = value if value.ndim == 0 else value.to(parameter.device)
        elif entry in ("exp_avg", "exp_avg_sq"):
            safe_set_full_optimizer_state(parameter, value.to(engine.device), entry)
    optimizer = engine.optimizer.optimizer if sharded else engine.optimizer
    of_torch, fused = isinstance(optimizer, torch.optim.AdamW), bool(optimizer.defaults.get("fused"))
    for parameter, entries in optimizer.state.items():  # Adam corrects its bias by it; torch keeps a tensor, bitsandbytes an int
        there = {"device": parameter.device} if fused else {}  # one launch updates all, and reads it on the device
        entries["step"] = torch.tensor(float(updates), **there) if of_torch else updates


def trainable(engine: Any) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters by name."""
    return {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
