"""`FastVisionModel`: the two calls that users of Unsloth know, over the same loading and the same adapters as `vlm-dist train`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlm_dist.cards import device_here
from vlm_dist.config import LoraConfig, ModelConfig
from vlm_dist.errors import ModelError
from vlm_dist.models.offloading import offload_inputs
from vlm_dist.quiet import quiet_libraries


class FastVisionModel:
    """Load a vision-language model in 4 bit and put adapters on it.

        model, processor = FastVisionModel.from_pretrained("Qwen/Qwen2.5-VL-7B-Instruct", load_in_4bit=True)
        model = FastVisionModel.get_peft_model(model, r=16, finetune_vision_layers=True)

    Both return ordinary transformers and PEFT objects.
    """

    @staticmethod
    def from_pretrained(
        model_name: str,
        max_seq_length: int = 2048,
        load_in_4bit: bool = True,
        dtype: Any = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        use_gradient_checkpointing: bool | str = False,
        base_model: str | None = None,
    ) -> tuple[Any, Any]:
        """Load a checkpoint folder or hub id; of an adapter folder or a finished run, the adapter on its base.

        Args:
            max_seq_length: longest sample in tokens; kept as `processor.tokenizer.model_max_length`.
            dtype: None (bfloat16 where the GPU has it, float16 on an older one, float32 on a CPU), torch.bfloat16, torch.float16 (train
                with SFTConfig(fp16=True), which scales the loss) or torch.float32.
            use_gradient_checkpointing: True recomputes activations in the backward pass; with "unsloth" what layers keep (their inputs)
                lies in host memory meanwhile, where there is a GPU.
            base_model: where an adapter's base is now, if not where its files say.

        Returns:
            (model, processor)

        Raises:
            ModelError: no such checkpoint, or an architecture that is not supported.
            MachineError: bfloat16 where the device has none.
        """
        import torch

        from vlm_dist.models.adapters import base_of, find_adapter
        from vlm_dist.models.export import allow_merging
        from vlm_dist.models.load import load_model
        from vlm_dist.models.trained import load_adapter

        quiet_libraries()
        names = {None: "auto"} | {key: name for name in ("bfloat16", "float16", "float32") for key in (name, getattr(torch, name))}
        if dtype not in names:
            raise ModelError(f"dtype={dtype} is not supported; use None, torch.bfloat16, torch.float16 or torch.float32")
        device = device_here()
        settings: dict[str, Any] = {
            "load_in_4bit": load_in_4bit,
            "dtype": names[dtype],
            "trust_remote_code": trust_remote_code,
        }
        if (adapter := find_adapter(model_name)) is not None:
            model, processor = load_adapter(adapter, base_of(adapter, base_model, **settings), device)
            model = allow_merging(model)
        else:
            model, processor, _ = load_model(ModelConfig(name=model_name, revision=revision, **settings), model_name, device)
        processor.tokenizer.model_max_length = max_seq_length  # pyright: ignore[reportAttributeAccessIssue]
        _checkpoint_gradients(model, use_gradient_checkpointing)
        return model, processor

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int = 16,
        target_modules: str | Sequence[str] = "all-linear",
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        finetune_vision_layers: bool = True,
        finetune_language_layers: bool = True,
        finetune_attention_modules: bool = True,
        finetune_mlp_modules: bool = True,
        layers_to_transform: int | Sequence[int] | None = None,
        modules_to_save: Sequence[str] | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
        use_gradient_checkpointing: bool | str = False,
        random_state: int = 3407,
        loftq_config: None = None,
    ) -> Any:
        """Put LoRA adapters on the chosen sides and kinds of modules; everything else is frozen.

        Args:
            target_modules: "all-linear": all that the four switches choose; or names such as ["q_proj", "v_proj"] among these.
            bias: "none", "lora_only" or "all", as PEFT means them.
            layers_to_transform: adapt only these layers of the chosen sides; negative numbers count from the end.
            modules_to_save: modules that train whole; they must not be in 4 bit.
            use_gradient_checkpointing: True recomputes activations in the backward pass; with "unsloth" what layers keep (their inputs)
                lies in host memory meanwhile, where there is a GPU.
            random_state: seed of the adapters' first values.
            loftq_config: scripts for Unsloth name it; only None is taken.

        Returns:
            A `peft.PeftModel` that also has `save_pretrained_merged`.

        Raises:
            ModelError: an argument that cannot be honoured, or nothing to adapt.
        """
        import torch

        from vlm_dist.models.export import allow_merging
        from vlm_dist.models.introspect import family_of
        from vlm_dist.models.lora import add_lora
        from vlm_dist.models.modes import hold_frozen

        layers = [layers_to_transform] if isinstance(layers_to_transform, int) else layers_to_transform
        sides = {"vision": finetune_vision_layers, "language": finetune_language_layers}
        config = _lora_config(
            loftq_config, r=r, alpha=lora_alpha, dropout=lora_dropout, **sides, attention=finetune_attention_modules,
            mlp=finetune_mlp_modules, modules=_leaf_names(target_modules),
            layers={} if layers is None else {side: list(layers) for side, on in sides.items() if on},
            modules_to_save=list(modules_to_save or []), bias=bias, rslora=use_rslora, dora=use_dora,
        )  # fmt: skip
        torch.manual_seed(random_state)
        adapted = allow_merging(hold_frozen(add_lora(model, family_of(model), config)))
        _checkpoint_gradients(adapted, use_gradient_checkpointing)
        return adapted

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: bool | str = True) -> Any:
        """Training mode: dropout on, no KV cache, activations recomputed unless told otherwise. Returns the model."""
        model.config.get_text_config().use_cache = False
        _checkpoint_gradients(model, use_gradient_checkpointing)
        return model.train()

    @staticmethod
    def for_inference(model: Any) -> Any:
        """Evaluation mode: dropout off, KV cache on, nothing recomputed. Returns the model."""
        model.gradient_checkpointing_disable()
        model.config.get_text_config().use_cache = True
        return model.eval()


def _leaf_names(target_modules: str | Sequence[str]) -> list[str]:
    if isinstance(target_modules, str) and target_modules != "all-linear":
        raise ModelError(f"target_modules={target_modules!r} is not supported; use 'all-linear' or a list of names")
    return [] if isinstance(target_modules, str) else list(target_modules)


def _lora_config(loftq_config: Any, **settings: Any) -> LoraConfig:
    from pydantic import ValidationError

    if loftq_config is not None:
        raise ModelError("get_peft_model: loftq_config is not supported; leave it None")
    try:
        return LoraConfig(**settings)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "switches"
        raise ModelError(f"get_peft_model: {where}: {problem['msg'].removeprefix('Value error, ')}") from None


def _checkpoint_gradients(model: Any, wanted: bool | str) -> None:
    if wanted not in (True, False, "unsloth"):
        raise ModelError(f"use_gradient_checkpointing={wanted!r} is not supported; use True, False or 'unsloth'")
    if wanted:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if wanted == "unsloth":
        offload_inputs(model)
