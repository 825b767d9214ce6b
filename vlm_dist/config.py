"""The whole configuration: one frozen, typed tree. Unknown keys are refused; every field says what it means.

This module imports neither torch nor any other heavy library. `vlm-dist config --explain` prints it, `vlm-dist config --schema`
gives the JSON schema for editors. Reading YAML is `config_load`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from vlm_dist.config_cluster import DistributedConfig, RayConfig
from vlm_dist.config_look import EvaluationConfig, LogConfig
from vlm_dist.config_model import Fraction, Kernel, LoraConfig, MiniVLMConfig, ModelConfig, Paths, ScratchConfig, Section, VideoConfig

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DistributedConfig",
    "EngineConfig",
    "EvaluationConfig",
    "HealthConfig",
    "Kernel",
    "LogConfig",
    "LoraConfig",
    "MiniVLMConfig",
    "ModelConfig",
    "OptimConfig",
    "RayConfig",
    "ScratchConfig",
    "SourceConfig",
    "TrainingConfig",
    "VideoConfig",
]


class SourceConfig(Section):
    """One data set of a mixture."""

    shards: Paths
    """Its tar shards, as data.train takes them."""
    weight: PositiveFloat = 1.0
    """Its share of the samples, relative to the others' weights."""


class DataConfig(Section):
    """Where the samples come from and how they become tokens."""

    train: Paths | dict[str, SourceConfig]
    """Tar shards to train on: paths, addresses (s3://, gs://, hf://, https://), globs (data/*.tar) or brace patterns
    (data/{000..099}.tar); one or a list. A mixture: names, each with shards and a weight."""
    heldout: Paths = []
    """Tar shards for evaluation. Without any, nothing is evaluated."""
    max_seq_length: PositiveInt = 2048
    """Longest sample in tokens, image tokens included; with packing also the tokens of a row."""
    packing: bool = False
    """Put several samples into each row of max_seq_length tokens; none sees another. training.global_batch then counts rows. An
    architecture that cannot do that groups samples of similar length instead."""
    pack_lookahead: PositiveInt = 64
    """Samples that each row is chosen among."""
    max_patches: PositiveInt | None = None
    """With packing: most vision patches of a row that holds several samples."""
    on_too_long: Literal["refuse", "truncate"] = "refuse"
    """A longer sample is refused (counted, named in quarantine.jsonl) or its text is cut at the end. Image tokens are never cut."""
    train_on: Literal["all", "last"] = "all"
    """Learn from every assistant turn, or from the last one only. A turn's own `weight`, `loss` or `train` counts besides."""
    keep_tokens: list[str] = []
    """Special tokens of turns and pictures that stay what they are where a text writes them; else they become plain text."""
    split_tokens: list[str] = []
    """Further special tokens (of boxes, thoughts, tools, ...) to make plain text of; else they stay what they are."""
    boxes: Literal["auto", "absolute", "thousand", "qwen2", "gemma", "internvl", "unit", "loc"] = "auto"
    """How a sample's `objects` are written into its text; auto: as the model does."""
    caption_prompt: str = "Describe the picture."
    """The question put before a sample that has only a caption (KEY.txt)."""
    shuffle_window: PositiveInt = 2000
    """Samples are shuffled within a window of this many; shards are shuffled as a whole each epoch."""
    max_image_pixels: PositiveInt = 64_000_000
    """Larger pictures are refused from their header, before decoding."""
    video: VideoConfig | None = None
    """Train on videos too, and which of their frames are shown; null: a sample with a video is refused."""
    max_bad_fraction: Fraction = 0.01
    """Stop when more than this share of the samples is unusable (checked from the first 1,000 samples on)."""
    prefetch: PositiveInt = 2
    """Optimizer steps that are prepared ahead in the background."""
    workers: NonNegativeInt = 2
    """Threads of each rank that read, decode and encode samples; 0: the preparing thread does. Their number changes no order."""
    processes: bool | Literal["auto"] = "auto"
    """Let these workers be processes, which leave Python's lock to the training loop; auto: where it computes on a GPU."""
    cache_features: bool = False
    """Keep what a frozen vision tower gives for each picture, and read it in later epochs and runs instead of computing it again."""
    features_gb: PositiveFloat = 20
    """Gigabytes that these features may take, of all towers together."""
    cache_dir: str | None = None
    """Folder for what is read of remote shards, and in it `features`; none given: ~/.cache/vlm_dist/ranges and `features` beside it."""
    cache_gb: PositiveFloat = 20
    """Gigabytes that it may hold."""
    cache_whole: bool = False
    """Fetch remote shards whole, each once, into ~/.cache/vlm_dist/files, and read them there: for servers that know no ranges."""
    allow_commands: bool = False
    """Let `pipe:COMMAND` stand for a shard: the command is run in a shell when training starts and its output kept in the cache."""

    @property
    def sources(self) -> dict[str, SourceConfig]:
        """The data sets to train on, by name."""
        return self.train if isinstance(self.train, dict) else {"train": SourceConfig(shards=self.train)}

    @property
    def train_shards(self) -> list[str]:
        """The patterns of all of them."""
        return [pattern for source in self.sources.values() for pattern in source.shards]

    @field_validator("train")
    @classmethod
    def _has_a_source(cls, train: Any) -> Any:
        if not train:
            raise ValueError("names no shards; give at least one path")
        return train


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
    lr_experts: PositiveFloat | None = None
    """Highest learning rate of experts, or of the adapters on them, if another."""
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
    """Samples (with data.packing: rows) in one optimizer step, over all ranks and accumulation rounds."""
    micro_batch: PositiveInt = 1
    """Samples that one rank computes at a time; global_batch / (micro_batch x ranks) rounds are accumulated."""
    router_aux_loss: NonNegativeFloat | None = None
    """Weight of the loss that evens out the load of experts; null: the model's own where its routers train, else 0."""

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
    """ZeRO stage: what is sharded over ranks. auto: 0 with lora or on one rank, 2 for full training on several; 2 or 3 with offload."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """optimizer: its moments and the update stay in the host's memory (ZeRO-Offload; zero_stage 1 to 3); all: the weights too (3)."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: a card for each rank, where there are cards; one that CUDA cannot start on is refused. cpu: none is used."""
    nvme_path: str | None = None
    """What is offloaded goes to a folder on an NVMe disk instead of the host's memory (ZeRO-Infinity; zero_stage 3)."""
    sequence_parallel: PositiveInt = 1
    """So many neighbouring ranks share each row, for samples longer than one card can hold; ranks = data parallel x this."""
    deepspeed: dict[str, Any] = {}
    """Further DeepSpeed settings, passed through as they are; settings that this file owns are refused."""


class CheckpointConfig(Section):
    """When the state is saved. Running the same command again continues from the newest whole checkpoint."""

    save_every: NonNegativeInt = 200
    """Save every so many steps; 0: only at the end and when interrupted."""
    keep_last: PositiveInt = 2
    """Older checkpoints are deleted."""
    keep_best: NonNegativeInt = 0
    """But so many of those with the highest score are kept: of those saved at a step that was evaluated (evaluation.every)."""
    best_metric: str = "exact_match"
    """The score that keep_best goes by."""
    grace_s: PositiveFloat = 30
    """Seconds that the process may live after SIGTERM until it is killed (Kubernetes and SLURM: 30; docker stop: 10). A run that needs
    longer for a step and a checkpoint says so."""
    write_async: bool = True
    """Training waits only for a copy in memory; it is written meanwhile. false: it waits for the disk too."""
    mirror: str | None = None
    """Copy each checkpoint to the folder of this run's name at this URL (s3://, gs://, a path; through fsspec), and start from there where
    the run directory has none. Runs of several names may share the URL."""


class HealthConfig(Section):
    """When a step, a rank or the loss goes wrong. What happened is told in events.jsonl."""

    max_skipped: NonNegativeInt = 5
    """A step whose loss or gradient is no finite number is left out on all ranks; more than so many in a row end the run."""
    spike_factor: PositiveFloat | None = 10
    """A loss so many spreads above the median of the last 64 is a spike; null: not looked for."""
    on_spike: Literal["tell", "rollback"] = "tell"
    """tell: go on; rollback: go back to the last checkpoint and leave out the samples seen since."""
    max_rollbacks: NonNegativeInt = 3
    """More rollbacks end the run."""
    slow_factor: PositiveFloat = 1.5
    """A rank that needs so many times as long as the others for its own work is named."""
    timeout_s: PositiveFloat | None = 900
    """Seconds without any progress until the run ends, with the stack of every rank that can be reached; null: wait for ever."""
    on_too_large: Literal["refuse", "tell", "ignore"] = "refuse"
    """On a GPU: what to do where a step is counted to need more memory than the card has; ignore: it is not counted."""
    rehearse: bool | Literal["auto"] = "auto"
    """Compute the fullest micro-batch once before training, so that too little memory shows in the first minute; auto: on a GPU."""


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
    kernels: Literal["auto", "all", "off"] | list[Kernel] = "auto"
    """Triton kernels put into the model. all that fit it; auto: on a CPU only those that help there; off: none; or a list of names."""
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    training: TrainingConfig
    engine: EngineConfig = EngineConfig()
    ray: RayConfig = RayConfig()
    distributed: DistributedConfig = DistributedConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    health: HealthConfig = HealthConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _parts_agree(self) -> Config:
        if isinstance(self.data.train, dict) and self.training.epochs is not None:
            raise ValueError("the data sets of a mixture have epochs of their own; give training.steps instead of training.epochs")
        if self.lora is None and self.model.load_in_4bit:
            raise ValueError("4-bit weights cannot be trained themselves; give a lora section, or set model.load_in_4bit: false")
        if self.lora is not None and self.model.freeze:
            raise ValueError(
                "model.freeze is for full training (lora: null); with lora the base is frozen anyway: use lora.vision / lora.language"
            )
        if self.lora is not None and self.model.scratch is not None:
            raise ValueError("a model from scratch has nothing to adapt; set lora: null")
        return self
