"""Our kernels put into a loaded model: object by object, never into another library's modules; all of it can be taken back.

What a kernel computes is compared with what the module computed, on a small input, before it takes its place. A module that it does
not fit stays as it is, and is named.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch

import vlm_kernels
from vlm_dist.config import Kernel
from vlm_dist.errors import ConfigError
from vlm_dist.models.patches import Patches, bind, with_names
from vlm_dist.models.patching_loss import patch_linear_cross_entropy, patch_supervised_rows
from vlm_dist.models.patching_nf4 import patch_nf4_lora_linear
from vlm_dist.models.patching_vision import patch_patch_embedding, patch_picture_places, patch_vision_windows
from vlm_dist.upstream.deepspeed import gathered
from vlm_kernels import reference
from vlm_kernels.geglu import geglu_gradients
from vlm_kernels.swiglu import swiglu_gradients

ON_CPU: tuple[Kernel, ...] = ("linear_cross_entropy", "supervised_rows")
"""What helps where the kernels run as PyTorch."""


def patch_model(
    model: Any, kernels: Literal["auto", "all", "off"] | Sequence[Kernel] = "auto", *, balances: bool = False
) -> Patches:  # fmt: skip
    """Put kernels into a model, adapted by PEFT or not: "all" that fit it, or those of a list.

    Args:
        balances: experts are trained to an even load, which is that of all rows: the last layer computes them all.

    Raises:
        ConfigError: a kernel that was asked for by name fits nothing in this model.
    """
    patches = Patches()
    if kernels == "off":
        return patches
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    on_gpu = next(base.parameters()).device.type == "cuda"
    by_name = not isinstance(kernels, str)
    wanted = kernels if by_name else (ON_CPU if kernels == "auto" and not on_gpu else tuple(PATCHERS))
    for kernel in PATCHERS:  # in their order: the loss must stand before its rows are used
        if kernel in wanted and kernel == "supervised_rows" and balances:
            patches.kept[kernel] = "training.router_aux_loss is of all rows"
        elif kernel in wanted:
            PATCHERS[kernel](base, patches)
            if by_name and not patches.counts[kernel]:
                raise ConfigError(
                    f"kernels: {kernel} fits nothing in this model ({patches.kept.get(kernel, 'no such module')}); leave it out"
                )
    return patches


def kernels_agree(device: torch.device) -> bool:
    """Whether a kernel of ours gives the numbers of its reference on this device."""
    x = torch.linspace(-3, 3, 4 * 256, device=device).view(4, 256)
    weight = torch.linspace(0.5, 1.5, 256, device=device)
    y = vlm_kernels.rms_norm(x, weight, 1e-6)
    return isinstance(y, torch.Tensor) and torch.allclose(y, reference.rms_norm(x, weight, 1e-6), rtol=1e-4, atol=1e-4)


def _rms_norm(model: Any, patches: Patches) -> None:
    forms: dict[type, dict[str, Any] | None] = {}
    for module in model.modules():
        kind = type(module)
        if "RMSNorm" not in kind.__name__ or getattr(getattr(module, "weight", None), "ndim", 0) != 1:
            continue
        if kind not in forms:
            forms[kind] = _rms_form(module)
        form = forms[kind]
        if form is None:
            patches.kept["rms_norm"] = f"{kind.__name__} computes something else"
            continue
        eps = getattr(module, "variance_epsilon", None) or module.eps
        patches.put("rms_norm", module, "forward", bind(module, _rms_forward, eps=eps, **form))


def _rms_forward(module: Any, hidden_states: torch.Tensor, *, eps: float, offset: float, multiply_wide: bool) -> Any:
    return vlm_kernels.rms_norm(hidden_states, module.weight, eps, offset=offset, multiply_wide=multiply_wide)


def _rms_form(module: Any) -> dict[str, Any] | None:
    """Which of the conventions a class follows, found by comparing in bfloat16, where they differ; None: none of them."""
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    needed = [
        p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    if eps is None or len(needed) != 1:
        return None
    with gathered(module.parameters()):
        twin = copy.deepcopy(module).to_empty(device="cpu").to(torch.bfloat16)  # to_empty: it may have no numbers yet
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), torch.device("cpu"):
        twin.weight.copy_(torch.randn(twin.weight.shape, generator=generator))
        x = torch.randn((8, len(twin.weight)), generator=generator).to(torch.bfloat16)
        expected = twin(x)
        for offset in (0.0, 1.0):
            for multiply_wide in (False, True):
                form = {"offset": offset, "multiply_wide": multiply_wide}
                if torch.equal(reference.rms_norm(x, twin.weight, eps, **form), expected):
                    return form
    return None


def _layer_norm(model: Any, patches: Patches) -> None:
    for module in model.modules():
        if type(module) is torch.nn.LayerNorm:
            if module.weight is None or module.bias is None or len(module.normalized_shape) != 1:
                patches.kept["layer_norm"] = "a LayerNorm without weight or bias"
                continue
            patches.put("layer_norm", module, "forward", bind(module, _layer_norm_forward))


def _layer_norm_forward(module: Any, input: torch.Tensor) -> torch.Tensor:
    return vlm_kernels.layer_norm(input, module.weight, module.bias, module.eps)


def _mlp(model: Any, patches: Patches) -> None:
    checked: dict[tuple[type, type], Callable | None] = {}
    for module in model.modules():
        if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            continue
        key = type(module), type(module.act_fn)
        if key not in checked:
            checked[key] = _gate_of(module, _dtype_of(module, model.dtype))
        gate = checked[key]
        if gate is None:
            patches.kept["mlp"] = f"{type(module).__name__} with {type(module.act_fn).__name__} computes something else"
            continue
        patches.put("mlp", module, "forward", bind(module, _mlp_forward, gate=gate))
        patches.put("mlp", module, "gate", (gate, GATES[gate]))
        patches.counts["mlp"] -= 1


def _mlp_forward(module: Any, x: torch.Tensor, *, gate: Callable) -> torch.Tensor:
    whole = vars(module).get("reads_with")
    if whole is not None and (z := whole.of(x)) is not None:
        return z
    return module.down_proj(gate(module.gate_proj(x), module.up_proj(x)))


def _dtype_of(module: Any, of_model: torch.dtype) -> torch.dtype:
    """What a module computes in: the model's where its weights are in 4 bit, else their own (what trains may be in float32 already)."""
    weights = list(module.parameters())
    return of_model if any(hasattr(weight, "quant_state") for weight in weights) else weights[0].dtype


def _gate_of(module: Any, dtype: torch.dtype) -> Callable | None:
    """The kernel that computes act(gate) * up, if the module computes down(act(gate) * up)."""
    probe = torch.linspace(-6, 6, 64, device="cpu").view(1, 64)
    device = next(module.parameters()).device
    width = next(part.in_features for part in module.gate_proj.modules() if hasattr(part, "in_features"))
    x = torch.randn((1, 2, width), generator=torch.Generator().manual_seed(0), device="cpu").to(device, dtype)
    was_training = {part: part.training for part in module.modules()}
    module.eval()  # dropout would make two calls differ
    try:
        with torch.no_grad():
            for gate in GATES:
                if torch.allclose(gate(probe, torch.ones_like(probe)), module.act_fn(probe), rtol=1e-6, atol=1e-6):
                    if device.type == "meta":  # no numbers to compare
                        return gate
                    expected = module(x).float()
                    difference = _mlp_forward(module, x, gate=gate).float() - expected
                    return gate if difference.norm() <= 1e-2 * expected.norm() else None
    finally:
        for part, training in was_training.items():
            part.training = training
    return None


def _geglu_tanh(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return vlm_kernels.geglu(gate, up)


def _geglu_exact(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return vlm_kernels.geglu(gate, up, tanh=False)


GATES: dict[Callable, Callable] = {
    vlm_kernels.swiglu: swiglu_gradients,
    _geglu_tanh: geglu_gradients,
    _geglu_exact: partial(geglu_gradients, tanh=False),
}
"""Gates, and what gives their gradients and their result again."""


def _rope(model: Any, patches: Patches) -> None:
    """Attention forwards that call a function of ROTATIONS get a copy of themselves that calls ours."""
    for module in model.modules():
        forward = inspect.unwrap(type(module).forward)
        names = getattr(getattr(forward, "__code__", None), "co_names", ())
        name = next((name for name in ROTATIONS if name in names), None)
        rotate = getattr(forward, "__globals__", {}).get(name)
        if name is None or rotate is None:
            continue
        ours, is_plain = ROTATIONS[name]
        if forward is not type(module).forward or not is_plain(rotate):
            patches.kept["rope"] = f"{type(module).__name__} rotates in another way"
            continue
        patches.put("rope", module, "forward", with_names(module, {name: ours}))


def _rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1) -> tuple:
    if unsqueeze_dim == 0:  # one sequence: cos and sin are [T, R]
        cos, sin = cos.unsqueeze(0), sin.unsqueeze(0)
    return vlm_kernels.rope(q, k, cos, sin)


def _is_plain_rope(rotate: Callable) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k, half = (torch.randn(shape, generator=generator, device="cpu") for shape in ((2, 4, 3, 8), (2, 2, 3, 8), (2, 3, 4)))
    cos, sin = (torch.cat((f(half), f(half)), -1) for f in (torch.cos, torch.sin))
    if list(inspect.signature(rotate).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False
    return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(rotate(q, k, cos, sin), reference.rope(q, k, cos, sin), strict=True))


def _rotate_patches(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple:
    """q, k [N, H, D] of a vision tower, whose patches are one sequence; cos, sin [N, D]."""
    turned = vlm_kernels.rope(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
    return tuple(one.squeeze(0).transpose(0, 1) for one in turned)


def _is_plain_rope_of_patches(rotate: Callable) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k, half = (torch.randn(shape, generator=generator, device="cpu").bfloat16() for shape in ((3, 4, 8), (3, 4, 8), (3, 4)))
    cos, sin = (torch.cat((f(half), f(half)), -1) for f in (torch.cos, torch.sin))
    if list(inspect.signature(rotate).parameters) != ["q", "k", "cos", "sin"]:
        return False
    expected = rotate(q, k, cos, sin)
    wide = (tensor.float() for tensor in (q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None]))
    return all(torch.equal(a, b[0].transpose(0, 1).bfloat16()) for a, b in zip(expected, reference.rope(*wide), strict=True))


ROTATIONS: dict[str, tuple[Callable, Callable]] = {
    "apply_rotary_pos_emb": (_rotate, _is_plain_rope),
    "apply_rotary_pos_emb_vision": (_rotate_patches, _is_plain_rope_of_patches),
}
"""Functions of transformers' attention: ours, and whether one of that name computes the same."""


PATCHERS: dict[Kernel, Callable[[Any, Patches], None]] = {
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "mlp": _mlp,
    "rope": _rope,
    "nf4_lora_linear": patch_nf4_lora_linear,
    "linear_cross_entropy": patch_linear_cross_entropy,
    "supervised_rows": patch_supervised_rows,
    "vision_windows": patch_vision_windows,
    "patch_embedding": patch_patch_embedding,
    "picture_places": patch_picture_places,
}
