"""Adapter + base -> 16-bit checkpoint, streamed: each file of the base is read, merged and written before the next one is opened.

Keys and files stay those of the base, so whatever loads the base loads the result. The sums are PEFT's own (`merge()` of each layer),
in float32, on one layer at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlm_dist.config import ModelConfig
from vlm_dist.errors import ModelError
from vlm_dist.families import Family
from vlm_dist.models.adapters import WEIGHTS, put_on_shapes
from vlm_dist.models.experts import expert_weights
from vlm_dist.models.load import kept_in_16bit, read_model_config
from vlm_dist.models.merge_experts import ExpertParts, add_delta
from vlm_dist.models.rounding import dequantise, quantised, round_to_nf4
from vlm_dist.models.save import fresh_folder, put_in_place
from vlm_dist.models.source import weight_files

if TYPE_CHECKING:
    import torch

Onto = Literal["original", "dequantised"]
NF4_STATISTICS = re.compile(r"\.(weight|experts\.\w+)\.(absmax|nested_absmax|nested_quant_map|quant_map|quant_state\.\w+)$")


def merge_16bit(
    base: ModelConfig, adapter: Path, processor: Any, out: Path, onto: Onto, trained_dtype: torch.dtype, dtype: str = "auto"
) -> None:
    """Write `out`: a checkpoint that transformers loads by itself. Whole or not there; most memory held: one file of the base.

    Args:
        base: the base that the adapter was trained on; `base.name` is a folder or hub id.
        adapter: a PEFT adapter folder.
        onto: "original": the base's weights as they are stored; "dequantised": rounded to NF4 and back, as the adapter met them.
        trained_dtype: the number type that the base was loaded in for training; decides how NF4 rounds.
        dtype: number type of what is written; "auto": the base's own 16-bit type, bfloat16 for a base that is stored in float32.

    Raises:
        ModelError: the base holds no 16-bit weights, or a part of the adapter finds no module.
    """
    import torch

    assert base.name is not None
    hf_config, family = read_model_config(base, base.name)
    stored_as_nf4 = getattr(hf_config, "quantization_config", None) is not None
    if stored_as_nf4 and onto == "original":
        raise ModelError(f"export: '{base.name}' itself is stored in 4 bit, so the original weights are not there; use --onto dequantised")
    files = weight_files(base.name, base.revision)
    layers = Layers(hf_config, family, adapter, base, onto, trained_dtype, files)
    written = _sixteen_bit(hf_config) if dtype == "auto" else getattr(torch, dtype)
    temporary = fresh_folder(out)
    index: dict[str, str] = {}
    total = 0
    for file in files:
        from safetensors.torch import save_file

        tensors = {key: tensor.to(written) if tensor.is_floating_point() else tensor for key, tensor in layers.merged(file)}
        save_file(tensors, temporary / file.name, {"format": "pt"})
        index.update(dict.fromkeys(tensors, file.name))
        total += sum(tensor.nbytes for tensor in tensors.values())
    layers.check_all_used()
    if len(set(index.values())) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (temporary / "model.safetensors.index.json").write_text(json.dumps(content, indent=1) + "\n")
    if layers.untied:
        hf_config.tie_word_embeddings = hf_config.get_text_config().tie_word_embeddings = False
    hf_config.dtype = written
    if stored_as_nf4:
        del hf_config.quantization_config
    hf_config.save_pretrained(temporary)
    _copy_generation_config(base, temporary)
    processor.save_pretrained(temporary)
    put_in_place(temporary, out)


class Layers:
    """The adapted model without its base weights; each layer gets them for the moment of its merging."""

    def __init__(
        self, hf_config: Any, family: Family, adapter: Path, base: ModelConfig, onto: Onto, trained_dtype: torch.dtype, files: list[Path]
    ):
        import torch
        from transformers import AutoModelForImageTextToText
        from transformers.conversion_mapping import get_model_conversion_mapping

        def empty() -> Any:
            with torch.device("meta"):
                return AutoModelForImageTextToText.from_config(hf_config, trust_remote_code=base.trust_remote_code)

        model = empty()
        model.tie_weights()
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        tied = head is not None and head.weight is embedding.weight
        self.head = f"{family.head}.weight"
        self.embedding = next(f"{name}.weight" for name, module in model.named_modules() if module is embedding)
        self.names = set(model.state_dict())
        self.prefix = model.base_model_prefix
        self.conversions = get_model_conversion_mapping(model)
        self.trained_dtype = trained_dtype
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self.model = _with_adapter(model, adapter, self.device)
        whole = self.model.peft_config["default"].modules_to_save or ()
        stored_as_nf4 = getattr(hf_config, "quantization_config", None) is not None  # then what is to be rounded has been
        self.rounded = (
            quantised(empty(), family, kept_in_16bit(base, family, whole)) if onto == "dequantised" and not stored_as_nf4 else set()
        )
        self.unused = {name for name, parameter in self.model.named_parameters() if not parameter.is_meta}
        self.replaced = _base_weights(adapter, self.names)
        self.untied = tied and any(self._is_changed(name) for name in (self.head, self.embedding))
        """Head and embeddings share their weights in the base, and no more after training: PEFT changes the one that it adapts, so the
        merged checkpoint holds both."""
        places = {key: (file, self._model_name(key)[0]) for file in files for key in _keys(file)}
        self.lacks_head = not any(name == self.head for _, name in places.values())
        shapes = {name: weight.shape for name, weight in expert_weights(empty()).items()}
        self.experts = ExpertParts(shapes, places, [rule for rule in self.conversions if hasattr(rule, "operations")])

    def merged(self, file: Path) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of one file of the base, adapter added, by the file's own keys."""
        from safetensors import safe_open

        with safe_open(file, "pt") as stored:
            keys = set(stored.keys())
            for key in sorted(keys):
                if NF4_STATISTICS.search(key):
                    continue
                tensor = stored.get_tensor(key)
                if key + ".quant_map" in keys:
                    statistics = {other: stored.get_tensor(other) for other in keys if other.startswith(key + ".")}
                    yield key, self._merge(key, dequantise(tensor, statistics, key, self.trained_dtype), exact=True)
                else:
                    yield key, self._merge(key, tensor)
                if self.untied and self.lacks_head and self._model_name(key)[0] == self.embedding:
                    yield self.head, self._merge(self.head, tensor).clone()

    def check_all_used(self) -> None:
        if self.unused:
            raise ModelError(
                f"export: {len(self.unused)} parts of the adapter find no weight in the base, e.g. {sorted(self.unused)[0]}; "
                "was the base saved by another version of transformers?"
            )

    def _merge(self, key: str, tensor: torch.Tensor, exact: bool = False) -> torch.Tensor:
        """The base's tensor after training. `exact`: it has been rounded to NF4 already."""
        import torch
        from peft.tuners.lora import LoraLayer
        from peft.utils.other import ModulesToSaveWrapper

        name, converted = self._model_name(key)
        path, _, leaf = name.rpartition(".")
        module, whole = self._find(path)
        if name in self.experts.shapes and exact:
            return self._merge_experts(name, module, tensor.float())
        if name in self.experts.shapes:
            return self.experts.part(key, name, lambda weight: self._merge_experts(name, module, weight))
        if isinstance(whole, ModulesToSaveWrapper):
            return self._trained(module, leaf, key, converted)
        tensor = self.replaced.get(name, tensor)
        adapted = isinstance(module, LoraLayer)
        parameters: Any = module.get_base_layer() if adapted else module
        own = dict(parameters.named_parameters(recurse=False)) if module is not None else {}
        if leaf in own and not own[leaf].is_meta:
            return self._trained(parameters, leaf, key, converted)  # a bias that was trained
        if path in self.rounded and leaf == "weight" and not exact:
            tensor = round_to_nf4(tensor, self.trained_dtype, self.device)
        if not adapted or leaf != "weight":
            return tensor
        if converted:
            raise ModelError(f"export: '{key}' is stored in another layout than the adapted layer '{path}' has; this base cannot be merged")
        self._use(module)
        parameters.weight = torch.nn.Parameter(tensor.float().to(self.device), requires_grad=False)
        bias = getattr(parameters, "bias", None)
        if bias is not None:
            parameters.bias = None
        module.merge()
        merged = parameters.weight.data.cpu()
        parameters.weight = torch.nn.Parameter(tensor.to("meta"), requires_grad=False)
        if bias is not None:
            parameters.bias = bias
        return merged

    def _merge_experts(self, name: str, module: Any, weight: torch.Tensor) -> torch.Tensor:
        from vlm_dist.upstream.peft import ParamWrapper

        if module is not None and not isinstance(module, ParamWrapper):
            trained = getattr(module, name.rpartition(".")[2])
            if not trained.is_meta:  # whole, by lora.modules_to_save
                self._use(module)
                return trained.detach().float().cpu()
        if name in self.rounded:
            weight = round_to_nf4(weight, self.trained_dtype, self.device).float()
        if not isinstance(module, ParamWrapper):
            return weight
        self._use(module)
        return add_delta(weight, module, name, self.device)

    def _is_changed(self, weight: str) -> bool:
        from peft.tuners.lora import LoraLayer

        module, whole = self._find(weight.removesuffix(".weight"))
        return whole is not None or isinstance(module, LoraLayer) or weight in self.replaced

    def _model_name(self, key: str) -> tuple[str, bool]:
        """The parameter's name in the model, and whether it is more than renamed there; by transformers' own rules of loading."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [rule for rule in self.conversions if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in self.conversions if isinstance(rule, WeightConverter)]
        name, pattern = rename_source_key(key, renamings, converters, self.prefix, dict.fromkeys(self.names, True))
        return (key, False) if name not in self.names and key in self.names else (name, pattern is not None)

    def _find(self, path: str) -> tuple[Any, Any]:
        """The module that a parameter belongs to, and the wrapper of a module that trained whole, if it lies in one."""
        from peft.utils.other import ModulesToSaveWrapper

        module: Any = self.model.base_model.model
        wrapper = None
        for part in filter(None, path.split(".")):
            if isinstance(module, ModulesToSaveWrapper):
                wrapper, module = module, module.modules_to_save["default"]
            module = getattr(module, part, None)
            if module is None:
                return None, None  # a tensor that this model does not use, such as a buffer of an older version
        if isinstance(module, ModulesToSaveWrapper):
            wrapper, module = module, module.modules_to_save["default"]
        return module, wrapper

    def _trained(self, module: Any, leaf: str, key: str, converted: bool) -> torch.Tensor:
        if converted:
            raise ModelError(f"export: '{key}' is stored in another layout than it was trained in; this base cannot be merged")
        parameter = getattr(module, leaf)
        self.unused -= {name for name, other in self.model.named_parameters() if other is parameter}
        return parameter.detach().cpu()

    def _use(self, module: Any) -> None:
        own = {id(parameter) for parameter in module.parameters()}
        self.unused -= {name for name, parameter in self.model.named_parameters() if id(parameter) in own}


def _with_adapter(model: Any, adapter: Path, device: torch.device) -> Any:
    """The model of meta tensors, with the adapter's own parameters real."""
    import torch
    from peft import load_peft_weights, set_peft_model_state_dict

    adapted = put_on_shapes(model, adapter)
    for name, parameter in list(adapted.named_parameters()):
        if parameter.requires_grad:
            path, _, leaf = name.rpartition(".")
            empty = torch.empty(parameter.shape, dtype=torch.float32, device=device)
            setattr(adapted.get_submodule(path), leaf, torch.nn.Parameter(empty))
    for name, buffer in list(adapted.named_buffers()):
        if ".modules_to_save." in name:
            path, _, leaf = name.rpartition(".")
            setattr(adapted.get_submodule(path), leaf, torch.empty_like(buffer, device=device))
    stored = load_peft_weights(str(adapter), device="cpu")
    found = set_peft_model_state_dict(adapted, stored)
    if found.unexpected_keys:
        raise ModelError(f"export: '{found.unexpected_keys[0]}' of {adapter} finds no module in '{model.config.model_type}'")
    return adapted


def _base_weights(adapter: Path, names: set[str]) -> dict[str, torch.Tensor]:
    """What an adapter on the head or the embeddings holds of the base itself, by the model's names; PEFT loads it over the base's."""
    from safetensors import safe_open

    with safe_open(adapter / WEIGHTS, "pt") as stored:
        found = {key.removeprefix("base_model.model.").replace(".base_layer.", "."): key for key in stored.keys()}  # noqa: SIM118
        return {name: stored.get_tensor(key) for name, key in found.items() if name in names}


def _keys(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        return list(stored.keys())


def _sixteen_bit(hf_config: Any) -> torch.dtype:
    """The base's own 16-bit type; bfloat16 for one that is stored in float32."""
    import torch

    return torch.float16 if hf_config.dtype == torch.float16 else torch.bfloat16


def _copy_generation_config(base: ModelConfig, out: Path) -> None:
    from transformers import GenerationConfig

    try:
        settings: Any = GenerationConfig.from_pretrained(str(base.name), revision=base.revision or "main")
    except OSError:
        return  # the base has none; transformers then makes one from the model's configuration
    settings.save_pretrained(out)
