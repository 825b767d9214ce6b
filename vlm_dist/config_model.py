"""The parts of the configuration that say which model is trained and which of its weights; `config.py` puts the tree together."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Side = Literal["vision", "projector", "language"]
Kernel = Literal[
    "layer_norm",
    "linear_cross_entropy",
    "mlp",
    "nf4_lora_linear",
    "patch_embedding",
    "picture_places",
    "rms_norm",
    "rope",
    "supervised_rows",
    "vision_windows",
]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Paths = Annotated[list[str], BeforeValidator(_as_list)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class VideoConfig(Section):
    """Which frames of a video are shown."""

    fps: PositiveFloat = 2
    """Frames a second."""
    max_frames: PositiveInt = 64
    """A longer clip has as many, evenly over it."""
    min_frames: PositiveInt = 4
    """A shorter clip has as many."""
    max_pixels: PositiveInt = 768 * 28 * 28
    """Larger frames are made as small while they are decoded; what the processor does follows."""

    @model_validator(mode="after")
    def _some_frames(self) -> VideoConfig:
        if self.min_frames > self.max_frames:
            raise ValueError(f"min_frames={self.min_frames} is more than max_frames={self.max_frames}")
        return self


class ScratchConfig(Section):
    """Build a new model with random weights instead of loading one: a LLaVA of any size, with a tokenizer trained on the data."""

    image_size: PositiveInt = 64
    """Pictures are resized to this many pixels on each side."""
    patch_size: PositiveInt = 16
    """Pixels on each side of a vision patch; the picture becomes (image_size / patch_size)^2 tokens."""
    vision_width: PositiveInt = 128
    """Hidden size of the vision tower (CLIP's architecture)."""
    vision_layers: PositiveInt = 4
    """Layers of the vision tower."""
    language_width: PositiveInt = 128
    """Hidden size of the language model (Llama's architecture)."""
    language_layers: PositiveInt = 4
    """Layers of the language model."""
    heads: PositiveInt = 4
    """Attention heads, in both."""
    vocab_size: PositiveInt = 512
    """Most entries in the byte-level BPE vocabulary trained on the texts of data.train; at least 300."""
    texts: Paths = []
    """Further shards whose texts the tokenizer is trained on: those that the model will meet later."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> ScratchConfig:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}")
        for name in ("vision_width", "language_width"):
            if getattr(self, name) % (2 * self.heads):
                raise ValueError(f"{name}={getattr(self, name)} is not a multiple of 2 x heads = {2 * self.heads}")
        if self.vocab_size < 300:
            raise ValueError(f"vocab_size={self.vocab_size} is too small for a byte-level vocabulary; use at least 300")
        return self


class MiniVLMConfig(Section):
    """Join two pretrained models through a new projector (Linear, GELU, LayerNorm, Linear) instead of loading a vision-language model."""

    vision: str = "google/vit-large-patch16-224"
    """Folder or hub id of a vision encoder with its image processor, of any kind that gives a sequence or a map: ViT, CLIP, SigLIP,
    DINOv2, ConvNeXt, ResNet, EfficientNet, timm's (with the package timm), ... ."""
    language: str = "HuggingFaceTB/SmolLM-360M"
    """Folder or hub id of a causal language model with its tokenizer; its chat template is used where it has one."""


class ModelConfig(Section):
    """Which model is trained, and in which form it is held."""

    name: str | None = None
    """A folder with a Hugging Face checkpoint, a hub id such as Qwen/Qwen2.5-VL-7B-Instruct, or an adapter to go on from: its folder, or
    the directory of a finished run."""
    scratch: ScratchConfig | None = None
    """Start from random weights of these sizes instead of `name`."""
    mini_vlm: MiniVLMConfig | None = None
    """Start from a pretrained vision encoder and a pretrained language model instead of `name`; the projector between them is new."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    load_in_4bit: bool = True
    """Hold the base in NF4 with double quantisation (bitsandbytes), experts too; needs lora."""
    keep_16bit: Paths = []
    """What of it stays in model.dtype all the same: vision, projector, or regular expressions that the path of a module contains, e.g.
    [vision, mlp.experts]. Head, embeddings, norms and routers always stay."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number type of weights and computation; auto: bfloat16 on a GPU that has it, float16 on an older one (its loss is scaled), float32
    on a CPU."""
    attn_implementation: Literal["auto", "sdpa", "eager", "varlen", "flash_attention_2"] = "auto"
    """How attention is computed; varlen: in training by the lengths of samples, without masks (torch's varlen_attn on a GPU), elsewhere
    sdpa; auto: varlen for packed rows on a GPU, where the architecture and the number type can, else sdpa."""
    gradient_checkpointing: bool | Literal["offload"] | dict[Literal["vision", "language"], bool | PositiveInt] = False
    """Recompute activations in the backward pass: much less memory, about a third more time. true: in all layers; offload: in all, and
    what they keep (their inputs) lies in pinned host memory meanwhile; or by side, in all or in the first so many, e.g. {language: 16,
    vision: true}."""
    freeze: list[Side] = []
    """Parts left untrained when every weight trains (lora: null): vision, projector, language."""
    trust_remote_code: bool = False
    """Run Python code that the checkpoint brings along. Read it first."""
    processor: dict[str, Any] = {}
    """Settings handed to the processor, e.g. {min_pixels: 200704, max_pixels: 602112}."""

    @property
    def kind(self) -> str:
        """What it starts from, in words."""
        return "a checkpoint" if self.name else "a new mini VLM" if self.mini_vlm else "random weights (model.scratch)"

    @field_validator("keep_16bit")
    @classmethod
    def _are_patterns(cls, value: list[str]) -> list[str]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"'{pattern}' is no regular expression ({error})") from None
        return value

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if sum(source is not None for source in (self.name, self.scratch, self.mini_vlm)) != 1:
            raise ValueError(
                "give exactly one of model.name (a checkpoint), model.scratch (sizes of a new model), model.mini_vlm (two models to join)"
            )
        if self.scratch is not None and self.load_in_4bit:
            raise ValueError("a model from scratch cannot be loaded in 4 bit; set model.load_in_4bit: false")
        return self


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), through PEFT. `lora: null` trains every weight instead."""

    r: PositiveInt = 16
    """Rank of the update."""
    r_vision: PositiveInt | None = None
    """Rank in the vision tower, if another."""
    r_projector: PositiveInt | None = None
    """Rank in the projector, if another."""
    r_language: PositiveInt | None = None
    """Rank in the language model, if another."""
    alpha: PositiveFloat = 16
    """The update is scaled by alpha / r."""
    alpha_vision: PositiveFloat | None = None
    """alpha in the vision tower, if another."""
    alpha_projector: PositiveFloat | None = None
    """alpha in the projector, if another."""
    alpha_language: PositiveFloat | None = None
    """alpha in the language model, if another."""
    dropout: Fraction = 0.0
    """Dropout on the adapters' input."""
    vision: bool = True
    """Adapt the vision tower."""
    language: bool = True
    """Adapt the language model."""
    attention: bool = True
    """Adapt the attention projections of the chosen sides."""
    mlp: bool = True
    """Adapt the MLPs of the chosen sides."""
    experts: Literal["auto", "off", "lora"] = "auto"
    """Adapters on the experts of a mixture-of-experts model, one for each; auto: lora where language and mlp are on, neither modules,
    dropout nor dora is set (experts' adapters have none of these), and a step with them fits the card or none does, by the plan."""
    r_experts: PositiveInt = 4
    """Rank of the update of each expert."""
    alpha_experts: PositiveFloat | None = None
    """alpha in the experts, if they are to be scaled otherwise than the rest."""
    router: Literal["frozen", "full"] = "frozen"
    """What chooses among the experts: left as it is, or trained itself."""
    projector: Literal["frozen", "lora", "full"] = "frozen"
    """The module between vision tower and language model: left as it is, adapted, or trained itself (then it is not quantised)."""
    modules: list[str] = []
    """Adapt only linear layers of these names, e.g. [q_proj, v_proj]; none given: all that the switches choose."""
    layers: dict[Literal["vision", "language"], list[int]] = {}
    """Adapt only these layers of a side, numbered from 0, or from the end with -1, e.g. {language: [-2, -1]}."""
    modules_to_save: list[str] = []
    """Further modules that train whole and are saved with the adapter (then they are not quantised), e.g. [lm_head]."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Biases that train too: none, those of adapted layers, or all."""
    rslora: bool = False
    """Scale the update by alpha / sqrt(r) instead (Kalajdzievski 2023, arXiv:2312.03732): for high ranks."""
    dora: bool = False
    """Learn magnitudes apart from directions (Liu et al. 2024, arXiv:2402.09353): slower."""

    @model_validator(mode="after")
    def _something_to_adapt(self) -> LoraConfig:
        sides = self.vision or self.language
        if sides and not (self.attention or self.mlp):
            raise ValueError("nothing would be adapted; turn on lora.attention or lora.mlp")
        if self.experts == "lora" and (self.dropout > 0 or self.dora):
            setting = "dropout: 0" if self.dropout > 0 else "dora: false"
            raise ValueError(f"experts=lora: adapters on experts have no dropout and no DoRA; set lora.{setting}, or lora.experts: off")
        if not sides and self.projector == "frozen":
            raise ValueError("nothing would be adapted; turn on lora.vision or lora.language, or set lora.projector")
        return self
