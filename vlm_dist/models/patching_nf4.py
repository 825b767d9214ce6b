"""4-bit linear layers with adapters: each alone, those that read the same input together (Q, K and V; gate and up), and a gated MLP whole.

Together and whole need one adapter each, gradients, and more rows than generation has; all else goes layer by layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

import vlm_kernels
from vlm_dist.models.patches import Patches, bind
from vlm_kernels.nf4_gated_mlp import nf4_gated_mlp
from vlm_kernels.nf4_lora_group import Copies, Layer, nf4_lora_group
from vlm_kernels.nf4_lora_linear import SMALL

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
OTHER_INPUTS = {"cross_attention_states", "encoder_hidden_states", "key_value_states"}
"""Arguments of attention whose keys and values are of something else than its queries."""


def patch_nf4_lora_linear(model: Any, patches: Patches) -> None:
    from peft.tuners.lora.bnb import Linear4bit

    fitting = []
    for module in model.modules():
        if isinstance(module, Linear4bit):
            if module.lora_variant or any(module.lora_bias.values()):
                patches.kept["nf4_lora_linear"] = "DoRA and biases in the adapter keep PEFT's own code"
                continue
            fitting.append(module)
            patches.put("nf4_lora_linear", module, "forward", bind(module, _nf4_forward), reads=partial(_nf4_reads, module))
    count = patches.counts["nf4_lora_linear"]
    known = set(map(id, fitting))
    for group in _groups(model, known) + [[module] for module in fitting]:
        together = Together(group)
        for module in group:
            if "reads_with" not in vars(module):
                patches.put("nf4_lora_linear", module, "reads_with", together)
    for module in model.modules():
        parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if "gate" in vars(module) and all(id(part) in known for part in parts):
            patches.put("nf4_lora_linear", module, "reads_with", Whole(parts, module.gate))
    if count:
        patches.counts["nf4_lora_linear"] = count


def _groups(model: Any, known: set[int]) -> list[list[Any]]:
    found = []
    for parent in model.modules():
        children = dict(parent.named_children())
        if OTHER_INPUTS & set(inspect.signature(type(parent).forward).parameters):
            continue
        for names in SAME_INPUT:
            group = [children[name] for name in names if id(children.get(name)) in known]
            found += [group] if len(group) > 1 else []
    return found


def _nf4_reads(module: Any) -> list[torch.nn.Parameter]:
    layers = [module.base_layer, *module.lora_A.values(), *module.lora_B.values()]
    return [parameter for layer in layers for parameter in layer.parameters(recurse=False)]


def _nf4_forward(module: Any, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
    if not arguments and not options and (y := module.reads_with.of(module, x)) is not None:
        return y
    names = _names(module)
    if arguments or options or module.merged or not all(_fits(module, name, x) for name in names):
        return type(module).forward(module, x, *arguments, **options)
    adapters: tuple = () if module.disable_adapters else tuple(
        (module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]) for name in names
    )  # fmt: skip
    dropouts = {_dropout(module, name) for name in names} if adapters else {0.0}
    if len(dropouts) > 1:
        return type(module).forward(module, x)
    base, dtype = module.base_layer, _dtype(module, x)
    y = vlm_kernels.nf4_lora_linear(x.to(dtype), base.weight, base.weight.quant_state, base.bias, adapters=adapters, dropout=dropouts.pop())
    return y.to(x.dtype)


def _names(module: Any) -> list[str]:
    return [name for name in module.active_adapters if name in module.lora_A]


def _dtype(module: Any, x: torch.Tensor) -> torch.dtype:
    return module.base_layer.compute_dtype or x.dtype


def _fits(module: Any, name: str, x: torch.Tensor) -> bool:
    """Whether the adapter would be computed in the number type of the base."""
    kind = x.device.type
    return (torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else module.lora_A[name].weight.dtype) == _dtype(module, x)


def _dropout(module: Any, name: str) -> float:
    return getattr(module.lora_dropout[name], "p", 0.0) if module.training else 0.0


def _ready(modules: Sequence[Any], x: torch.Tensor) -> tuple[list[Layer], float] | None:
    """The layers as one function takes them, and their dropout; None: they go one by one."""
    if not torch.is_grad_enabled() or x.numel() <= SMALL * x.shape[-1] or torch.compiler.is_compiling():
        return None
    layers, dropouts = [], set()
    for module in modules:
        names, base = _names(module), module.base_layer
        if len(names) != 1 or module.disable_adapters or module.merged or not _fits(module, names[0], x):
            return None
        if base.bias is not None and base.bias.requires_grad:
            return None
        pair = module.lora_A[names[0]].weight, module.lora_B[names[0]].weight
        layers.append(Layer(base.weight, base.weight.quant_state, base.bias, *pair, module.scaling[names[0]]))
        dropouts.add(_dropout(module, names[0]))
    same = len(dropouts) == len({_dtype(module, x) for module in modules}) == len({layer.A.dtype for layer in layers}) == 1
    return (layers, dropouts.pop()) if same else None


class Together:
    """Layers that read the same input: the first that is called computes all of them."""

    def __init__(self, modules: Sequence[Any]):
        self.modules = list(modules)
        self.apart = False
        """Each by itself, where ZeRO-3 gathers weights around the call of one module."""
        self._copies = Copies()
        self._input: torch.Tensor | None = None
        self._waiting: dict[int, torch.Tensor] = {}

    def without(self, module: Any) -> Together:
        """The others stay together; returns one for this module alone."""
        self.modules.remove(module)
        return Together([module])

    def of(self, module: Any, x: torch.Tensor) -> torch.Tensor | None:
        """What this layer makes of x; None: it is to be computed by itself."""
        if self._input is x and id(module) in self._waiting:
            y = self._waiting.pop(id(module))
        elif self.apart or (ready := _ready(self.modules, x)) is None:
            return None
        else:
            layers, dropout = ready
            ys = nf4_lora_group(x.to(_dtype(module, x)), layers, self._copies, dropout=dropout)
            self._input, self._waiting = x, {id(one): y.to(x.dtype) for one, y in zip(self.modules, ys, strict=True)}
            y = self._waiting.pop(id(module))
        if not self._waiting:
            self._input = None
        return y


class Whole:
    """A gated MLP: (gate, up, down) with what it computes between them."""

    def __init__(self, modules: Sequence[Any], gate: tuple[Callable, Callable]):
        self.modules, self.gate, self.apart = list(modules), gate, False
        self._copies = Copies()

    def of(self, x: torch.Tensor) -> torch.Tensor | None:
        """What it makes of x; None: its layers are to be computed by themselves."""
        if self.apart or (ready := _ready(self.modules, x)) is None:
            return None
        layers, dropout = ready
        return nf4_gated_mlp(x.to(_dtype(self.modules[0], x)), layers, self.gate, self._copies, dropout=dropout).to(x.dtype)


def keep_apart(model: Any) -> None:
    """Layers compute one by one from now on."""
    for module in model.modules():
        if (reading := vars(module).get("reads_with")) is not None:
            reading.apart = True
