"""The whole configuration: one frozen, typed tree. Unknown keys are refused; every field says what it means.

This module imports neither torch nor any other heavy library. `vlm-dist config --explain` prints it, `vlm-dist config --schema`
gives the JSON schema for editors. Reading YAML is `config_load`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

Fraction = Annotated[float, Field(ge=0, le=1)]
Side = Literal["vision", "projector", "language"]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Paths = Annotated[list[str], BeforeValidator(_as_list)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


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


class ModelConfig(Section):
    """Which model is trained, and in which form it is held."""

    name: str | None = None
    """A folder with a Hugging Face checkpoint, or a hub id such as Qwen/Qwen2.5-VL-7B-Instruct."""
    scratch: ScratchConfig | None = None
    """Start from random weights of these sizes instead of `name`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    load_in_4bit: bool = True
    """Hold the base in NF4 with double quantisation (bitsandbytes); needs lora."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number type of weights and computation; auto: bfloat16 on a GPU that has it, else float32."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention kernel that transformers uses; auto: sdpa."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: much less memory, about a third more time."""
    freeze: list[Side] = []
    """Parts left untrained when every weight trains (lora: null): vision, projector, language."""
    trust_remote_code: bool = False
    """Run Python code that the checkpoint brings along. Read it first."""
    processor: dict[str, Any] = {}
    """Settings handed to the processor, e.g. {min_pixels: 200704, max_pixels: 602112}."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.name is None) == (self.scratch is None):
            raise ValueError("give exactly one of model.name (a checkpoint) and model.scratch (sizes of a new model)")
        if self.scratch is not None and self.load_in_4bit:
            raise ValueError("a model from scratch cannot be loaded in 4 bit; set model.load_in_4bit: false")
        return self


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), through PEFT. `lora: null` trains every weight instead."""

    r: PositiveInt = 16
    """Rank of the update."""
    alpha: PositiveFloat = 16
    """The update is scaled by alpha / r."""
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
    projector: Literal["frozen", "lora", "full"] = "frozen"
    """The module between vision tower and language model: left as it is, adapted, or trained itself (then it is not quantised)."""
    rslora: bool = False
    """Scale the update by alpha / sqrt(r) instead (Kalajdzievski 2023, arXiv:2312.03732): for high ranks."""
    dora: bool = False
    """Learn magnitudes apart from directions (Liu et al. 2024, arXiv:2402.09353): slower."""

    @model_validator(mode="after")
    def _something_to_adapt(self) -> LoraConfig:
        sides = self.vision or self.language
        if sides and not (self.attention or self.mlp):
            raise ValueError("nothing would be adapted; turn on lora.attention or lora.mlp")
        if not sides and self.projector == "frozen":
            raise ValueError("nothing would be adapted; turn on lora.vision or lora.language, or set lora.projector")
        return self


class DataConfig(Section):
    """Where the samples come from and how they become tokens."""

    train: Paths
    """Tar shards to train on: paths, globs (data/*.tar) or brace patterns (data/{000..099}.tar); one or a list."""
    heldout: Paths = []
    """Tar shards for evaluation. Without any, nothing is evaluated."""
    max_seq_length: PositiveInt = 2048
    """Longest sample in tokens, image tokens included."""
    on_too_long: Literal["refuse", "truncate"] = "refuse"
    """A longer sample is refused (counted, named in quarantine.jsonl) or its text is cut at the end. Image tokens are never cut."""
    caption_prompt: str = "Describe the picture."
    """The question put before a sample that has only a caption (KEY.txt)."""
    shuffle_window: PositiveInt = 2000
    """Samples are shuffled within a window of this many; shards are shuffled as a whole each epoch."""
    max_image_pixels: PositiveInt = 64_000_000
    """Larger pictures are refused from their header, before decoding."""
    max_bad_fraction: Fraction = 0.01
    """Stop when more than this share of the samples is unusable (checked from the first 1,000 samples on)."""
    prefetch: PositiveInt = 2
    """Optimizer steps that are prepared ahead in the background."""


class OptimConfig(Section):
    """The optimizer and the learning rate over time."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw (torch), or adamw_8bit (bitsandbytes: moments in one byte each; needs engine.zero_stage 0)."""
    lr: PositiveFloat = 2e-4
    """Highest learning rate."""
    lr_vision: PositiveFloat | None = None
    """Highest learning rate of the vision tower, if another."""
    lr_projector: PositiveFloat | None = None
    """Highest learning rate of the projector, if another."""
    lr_language: PositiveFloat | None = None
    """Highest learning rate of the language model, if another."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of the first and the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay, on matrices only (not on biases, norms and embeddings of one dimension)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_steps: NonNegativeFloat = 0.03
    """Steps of linear warm-up; below 1: a share of all steps."""
    min_lr_ratio: Fraction = 0.0
    """The learning rate ends at this share of lr."""
    grad_clip: NonNegativeFloat = 1.0
    """Largest gradient norm; 0: no clipping."""


class TrainingConfig(Section):
    """How long, and in which portions."""

    steps: PositiveInt | None = None
    """Optimizer steps to train."""
    epochs: PositiveFloat | None = None
    """Passes over data.train, instead of steps."""
    global_batch: PositiveInt = 8
    """Samples in one optimizer step, over all ranks and accumulation rounds."""
    micro_batch: PositiveInt = 1
    """Samples that one rank computes at a time; global_batch / (micro_batch x ranks) rounds are accumulated."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of training.steps and training.epochs")
        if self.global_batch % self.micro_batch:
            raise ValueError(f"global_batch={self.global_batch} is not a multiple of micro_batch={self.micro_batch}")
        return self


class EngineConfig(Section):
    """DeepSpeed."""

    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    """ZeRO stage: what is sharded over ranks. auto: 0 on one rank, 2 on several."""
    deepspeed: dict[str, Any] = {}
    """Further DeepSpeed settings, passed through as they are; settings that this file owns are refused."""


class EvaluationConfig(Section):
    """Answers are generated for held-out questions and compared with the truth: before, during and after training."""

    every: NonNegativeInt = 0
    """Evaluate every so many steps during training; 0: only before and after."""
    samples: PositiveInt | None = 200
    """Use the first so many held-out samples; null: all."""
    batch_size: PositiveInt = 16
    """Samples that one rank answers at a time."""
    max_new_tokens: PositiveInt = 64
    """Longest answer, in tokens."""


class CheckpointConfig(Section):
    """When the state is saved. Running the same command again continues from the newest whole checkpoint."""

    save_every: NonNegativeInt = 200
    """Save every so many steps; 0: only at the end and when interrupted."""
    keep_last: PositiveInt = 2
    """Older checkpoints are deleted."""


class LogConfig(Section):
    """What is written while training runs. metrics.jsonl always is."""

    every: PositiveInt = 10
    """One log line every so many steps where there is no terminal for a progress bar."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases; auto: online where an API key is set, else disabled. Its failures never stop a run."""
    wandb_project: str = "vlm_dist"
    """Project name in Weights & Biases."""


class Config(Section):
    """One run. Every section has defaults; only `name`, `model`, `data.train` and the length of training must be given."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run; its files go to OUTPUT_DIR/NAME."""
    output_dir: str = "runs"
    """Folder that holds the runs."""
    seed: NonNegativeInt = 0
    """Seed of every random choice: order of the data, new weights, dropout."""
    model: ModelConfig
    lora: LoraConfig | None = LoraConfig()
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    training: TrainingConfig
    engine: EngineConfig = EngineConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _parts_agree(self) -> Config:
        if self.lora is None and self.model.load_in_4bit:
            raise ValueError("4-bit weights cannot be trained themselves; give a lora section, or set model.load_in_4bit: false")
        if self.lora is not None and self.model.freeze:
            raise ValueError(
                "model.freeze is for full training (lora: null); with lora the base is frozen anyway: use lora.vision / lora.language"
            )
        if self.lora is not None and self.model.scratch is not None:
            raise ValueError("a model from scratch has nothing to adapt; set lora: null")
        return self
