"""`FastVisionModel`: the two calls that users of Unsloth know, over the same loading and the same adapters as `vlm-dist train`."""

from __future__ import annotations

from typing import Any

from vlm_dist.config import LoraConfig, ModelConfig
from vlm_dist.errors import ModelError


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
    ) -> tuple[Any, Any]:
        """Load a checkpoint folder or hub id.

        Args:
            max_seq_length: longest sample in tokens; kept as `processor.tokenizer.model_max_length`.
            dtype: None (bfloat16 where the GPU has it, else float32), torch.bfloat16 or torch.float32.
            use_gradient_checkpointing: True or "unsloth" recompute activations in the backward pass.

        Returns:
            (model, processor)

        Raises:
            ModelError: no such checkpoint, or an architecture that is not supported.
            MachineError: bfloat16 where the device has none.
        """
        import torch

        from vlm_dist.models.load import load_model

        names = {None: "auto", torch.bfloat16: "bfloat16", torch.float32: "float32", "bfloat16": "bfloat16", "float32": "float32"}
        if dtype not in names:
            raise ModelError(f"dtype={dtype} is not supported; use None, torch.bfloat16 or torch.float32")
        config = ModelConfig(
            name=model_name,
            load_in_4bit=load_in_4bit,
            dtype=names[dtype],  # pyright: ignore[reportArgumentType]
            trust_remote_code=trust_remote_code,
            revision=revision,
        )
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        model, processor, _ = load_model(config, model_name, device)
        processor.tokenizer.model_max_length = max_seq_length  # pyright: ignore[reportAttributeAccessIssue]
        _checkpoint_gradients(model, use_gradient_checkpointing)
        return model, processor

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int = 16,
        target_modules: str = "all-linear",
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        finetune_vision_layers: bool = True,
        finetune_language_layers: bool = True,
        finetune_attention_modules: bool = True,
        finetune_mlp_modules: bool = True,
        use_gradient_checkpointing: bool | str = False,
        random_state: int = 3407,
    ) -> Any:
        """Put LoRA adapters on the chosen sides and kinds of modules; everything else is frozen.

        Args:
            target_modules: "all-linear": chosen by the four switches. Nothing else is supported yet.
            bias: "none". Nothing else is supported yet.
            use_gradient_checkpointing: True or "unsloth" recompute activations in the backward pass.
            random_state: seed of the adapters' first values.

        Returns:
            A `peft.PeftModel`.

        Raises:
            ModelError: an argument that cannot be honoured, or nothing to adapt.
        """
        import torch

        from vlm_dist.families import family_of
        from vlm_dist.models.lora import add_lora

        if target_modules != "all-linear":
            raise ModelError(f"target_modules={target_modules!r} is not supported; use 'all-linear' and the four finetune_... switches")
        if bias != "none":
            raise ModelError(f"bias={bias!r} is not supported; use 'none'")
        config = LoraConfig(
            r=r,
            alpha=lora_alpha,
            dropout=lora_dropout,
            vision=finetune_vision_layers,
            language=finetune_language_layers,
            attention=finetune_attention_modules,
            mlp=finetune_mlp_modules,
        )
        torch.manual_seed(random_state)
        adapted = add_lora(model, family_of(model.config.model_type), config)
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


def _checkpoint_gradients(model: Any, wanted: bool | str) -> None:
    if wanted not in (True, False, "unsloth"):
        raise ModelError(f"use_gradient_checkpointing={wanted!r} is not supported; use True, False or 'unsloth'")
    if wanted:
        model.gradient_checkpointing_enable({"use_reentrant": False})
