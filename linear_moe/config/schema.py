"""The whole configuration: one tree of dataclasses. Every field's documentation and constraint is here.

`load.py` turns YAML and overrides into the tree and checks types and
single-field constraints; `validate.py` checks what holds between fields.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from linear_moe.modeling.activations import MODULES
from linear_moe.modeling.config import ModelConfig
from linear_moe.options.fields import opt


@dataclass
class ParallelConfig:
    """Data parallelism is what the world size leaves: world / (tensor * sequence * pipeline)."""

    tensor: int = opt(1, "tensor-parallel ranks (heads, FFN columns, vocabulary)", ge=1, le=2**16)
    tensor_sequence: bool | None = opt(
        None, "shard activations between tensor-parallel regions by tokens; null: when tensor > 1"
    )
    pipeline: int = opt(1, "pipeline stages", ge=1, le=2**12)
    virtual_pipeline: int = opt(
        1, "chunks of layers on each pipeline stage; more than one: interleaved 1F1B", ge=1, le=2**12
    )
    pipeline_layers: list[int] | None = opt(
        None,
        "layers of each of the pipeline * virtual_pipeline chunks, in the model's order; null: so that the costliest "
        "stage has the fewest FLOPs (of its layers, and of the head)",
    )
    expert: int = opt(1, "ranks that share out the routed experts", ge=1, le=2**16)
    expert_tensor: int = opt(1, "tensor-parallel ranks inside an expert", ge=1, le=2**16)
    sequence: int = opt(1, "ranks that share out every sequence (Megatron-Core: context parallel)", ge=1, le=2**16)
    sequence_layout: str = opt(
        "zigzag",
        "a rank's tokens of a sequence: those that follow each other (contiguous), or of twice as many pieces the n-th "
        "from the start and the n-th from the end, which balances causal softmax attention (zigzag)",
        choices=("contiguous", "zigzag"),
    )
    sequence_pieces: int | None = opt(
        None,
        "pieces of every sequence on a rank, which recurrences compute side by side: with few rows of long sequences, "
        "one alone does not fill a GPU. Without parallel.sequence too. null: two in zigzag, else one",
        ge=1,
        le=256,
    )
    sequence_exchange: str = opt(
        "all_gather",
        "how recurrent states travel: all at once, or from piece to piece, in blocks; then what a rank sends and "
        "receives does not grow with the ranks",
        choices=("all_gather", "ring"),
    )
    sequence_attention: str = opt(
        "all_gather",
        "how softmax attention sees the other ranks' tokens: all keys at once; keys from rank to rank (ring), while "
        "those at hand are attended to; or all tokens of a share of the heads (ulysses)",
        choices=("all_gather", "ring", "ulysses"),
    )
    sequence_dtype: str = opt(
        "fp32", "in which recurrent states and their gradients travel; they are fp32 there", choices=("fp32", "bf16")
    )


@dataclass
class TokenizerConfig:
    type: str = opt(
        "bpe",
        "bytes: 256 byte tokens; bpe: byte-level BPE trained on the corpus; hf: a Hugging Face tokenizer folder",
        choices=("bytes", "bpe", "hf"),
    )
    path: str | None = opt(None, "folder of an hf tokenizer")
    vocab_size: int = opt(4096, "size of a trained bpe vocabulary", ge=258, le=2**31)


@dataclass
class DataConfig:
    corpus: str = opt(
        "stdlib",
        "stdlib: the running interpreter's standard library; synthetic: random tokens, for benchmarks; else a file or "
        "folder of text files, or the prefix of an indexed dataset made by `linear-moe data`",
    )
    tokenizer: TokenizerConfig = opt(TokenizerConfig, "tokenizer")
    validation_fraction: float = opt(0.02, "share of the files held out for validation", ge=0, le=0.5)
    cache: str = opt("runs/data", "folder of tokenized corpora, keyed by corpus and tokenizer")
    isolate_documents: bool = opt(
        False, "reset recurrent states, attention, convolutions and positions at document boundaries (packing)"
    )
    workers: int = opt(0, "loader worker processes per rank", ge=0)


@dataclass
class MuonConfig:
    """Muon (arXiv 2502.16982) of the linear maps of mixers, FFN and experts; lr and weight_decay are AdamW's."""

    momentum: float = opt(0.95, "decay of the momentum", ge=0, lt=1)
    nesterov: bool = opt(True, "look one step of momentum ahead")
    steps: int = opt(5, "Newton-Schulz iterations that orthogonalise the momentum", ge=1, le=20)
    scale: float = opt(
        0.2, "a matrix's update is lr * scale * sqrt(max(rows, columns)): elements of about AdamW's size", gt=0
    )


@dataclass
class OptimizerConfig:
    type: str = opt(
        "adamw",
        "muon: for the linear maps of mixers, FFN and experts; AdamW for embeddings, head, routers and vectors",
        choices=("adamw", "muon"),
    )
    lr: float = opt(1e-3, "peak learning rate", gt=0)
    beta1: float = opt(0.9, "AdamW", ge=0, lt=1)
    beta2: float = opt(0.95, "AdamW", ge=0, lt=1)
    eps: float = opt(1e-8, "AdamW", gt=0)
    weight_decay: float = opt(0.1, "AdamW; not applied to norms, biases and per-head parameters", ge=0)
    moments: str = opt(
        "fp32",
        "what AdamW's moments and Muon's momentum are kept in; bf16, stochastically rounded, takes half the memory",
        choices=("fp32", "bf16"),
    )
    muon: MuonConfig = opt(MuonConfig, "for type: muon")
    clip: float = opt(1.0, "gradient-norm clipping; 0: off", ge=0)
    distributed: bool = opt(True, "shard the optimizer state over the data-parallel ranks (ZeRO-1)")
    overlap: bool = opt(False, "overlap gradient reduction (and the distributed optimizer's gather) with computation")


@dataclass
class ScheduleConfig:
    type: str = opt("cosine", "learning-rate decay after the warm-up", choices=("cosine", "wsd", "constant"))
    warmup_steps: int = opt(20, "linear warm-up from 0", ge=0)
    min_lr: float = opt(0.0, "final learning rate", ge=0)
    decay_steps: int | None = opt(
        None,
        "cosine: step at which min_lr is reached (null: training.steps); wsd: length of the final decay "
        "(null: a fifth of training.steps)",
        ge=1,
    )


@dataclass
class TrainingConfig:
    steps: int = opt(200, "optimizer steps", ge=1)
    sequence_length: int = opt(256, "tokens per sequence", ge=1)
    micro_batch: int = opt(4, "sequences per forward pass and rank", ge=1)
    global_batch: int = opt(8, "sequences per optimizer step over all ranks", ge=1)
    dtype: str = opt("bf16", "weights and activations; the optimizer keeps fp32", choices=("bf16", "fp32"))
    recompute: str = opt(
        "none",
        "what is computed again in the backward pass instead of kept: nothing, recompute_modules, or whole layers",
        choices=("none", "selective", "full"),
    )
    recompute_modules: list[str] = opt(
        list,
        f"with selective, any of {', '.join(MODULES)}: "
        + "; ".join(f"{k}: {v}" for k, v in MODULES.items())
        + ". With full, logits may be added",
    )
    recompute_layers: int | None = opt(
        None, "so many layers only, evenly spread over the model (of 12, 6: every second); null: all", ge=1
    )
    seed: int = opt(1234, "weights and data order", ge=0)
    eval_every: int = opt(100, "steps between validations; 0: only at the end", ge=0)
    eval_batches: int = opt(8, "global batches per validation", ge=1)
    timeout_minutes: float = opt(
        10.0, "a rank that others wait for longer ends the job, with a line that names it", gt=0, le=60 * 24 * 7
    )


@dataclass
class CheckpointConfig:
    every: int = opt(100, "steps between saves; 0: only at the end", ge=0)
    keep: int = opt(2, "newest checkpoints kept", ge=1)
    last: bool = opt(True, "save after the last step (benchmarks do not)")


@dataclass
class LoggingConfig:
    every: int = opt(1, "steps between log records", ge=1)
    routing_every: int = opt(50, "steps between records of the load of every expert; at those of `every`", ge=1)
    dead_after: int = opt(100, "warn of experts that no token has chosen for so many steps", ge=1)
    tensorboard: bool = opt(True, "write TensorBoard events")
    peak_tflops: float | None = opt(None, "peak bf16 TFLOP/s per device, for MFU; null: known GPUs, else no MFU", gt=0)


@dataclass
class Config:
    run: str = opt("runs/default", "run folder: resolved config, checkpoints, metrics, tokenizer")
    model: ModelConfig = opt(ModelConfig, "what is computed")
    parallel: ParallelConfig = opt(ParallelConfig, "how it is spread")
    data: DataConfig = opt(DataConfig, "what it reads")
    optimizer: OptimizerConfig = opt(OptimizerConfig, "how weights are updated")
    schedule: ScheduleConfig = opt(ScheduleConfig, "learning rate over steps")
    training: TrainingConfig = opt(TrainingConfig, "the loop")
    checkpoint: CheckpointConfig = opt(CheckpointConfig, "saving")
    logging: LoggingConfig = opt(LoggingConfig, "what is written about the run")

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict (YAML- and JSON-ready); loading it again gives an equal tree."""
        return dataclasses.asdict(self)
