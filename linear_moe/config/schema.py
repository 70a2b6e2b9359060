"""The whole configuration as one tree of dataclasses, with the documentation and constraint of every field.

`options/load.py` turns YAML and overrides into the tree and checks types and constraints of single fields;
`checks/validate.py` checks constraints between fields. The model's options are in `modeling/config.py`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from linear_moe.config.strategies import AttentionStrategy, SequenceLayout, StateExchangeStrategy, values
from linear_moe.modeling.activations import MODULES
from linear_moe.modeling.config import ModelConfig
from linear_moe.options.fields import opt


@dataclass
class ParallelConfig:
    """Sizes of all kinds of parallelism but data parallelism, whose size is world / (tensor * sequence * pipeline)."""

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
        "layers of each of the pipeline * virtual_pipeline chunks, in the model's order; null: a split whose costliest "
        "stage has the fewest FLOPs (of its layers, and of the head)",
    )
    expert: int = opt(1, "ranks that share out the routed experts", ge=1, le=2**16)
    expert_tensor: int = opt(1, "tensor-parallel ranks inside an expert", ge=1, le=2**16)
    sequence: int = opt(1, "ranks that share out every sequence (Megatron-Core: context parallel)", ge=1, le=2**16)
    sequence_layout: str = opt(
        SequenceLayout.ZIGZAG.value,
        "which tokens of a sequence a rank holds: consecutive ones (contiguous), or the n-th piece from the start and "
        "the n-th from the end of twice as many pieces as ranks, which balances causal softmax attention (zigzag)",
        choices=values(SequenceLayout),
    )
    sequence_pieces: int | None = opt(
        None,
        "pieces of every sequence on a rank, which recurrences compute side by side: a few rows of long sequences "
        "alone do not fill a GPU. Can be set without parallel.sequence. null: two in zigzag, else one",
        ge=1,
        le=256,
    )
    sequence_exchange: str = opt(
        StateExchangeStrategy.ALL_GATHER.value,
        "how recurrent states travel: those of all pieces at once (all_gather), or in blocks from piece to piece "
        "(ring), where the bytes that a rank sends and receives do not grow with the number of ranks",
        choices=values(StateExchangeStrategy),
    )
    sequence_attention: str = opt(
        AttentionStrategy.ALL_GATHER.value,
        "how softmax attention sees the other ranks' tokens: all keys and values are gathered (all_gather); they go "
        "from rank to rank while a rank attends to the ones it has (ring); or ranks exchange tokens for heads, and "
        "each attends with all tokens of its share of the heads (ulysses)",
        choices=values(AttentionStrategy),
    )
    sequence_dtype: str = opt(
        "fp32",
        "dtype in which recurrent states and their gradients travel between ranks; the ranks compute with fp32",
        choices=("fp32", "bf16"),
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
    """Options of Muon (arXiv 2502.16982) for the linear maps of mixers, FFN and experts.

    The learning rate and weight decay are optimizer.lr and optimizer.weight_decay, as for AdamW.
    """

    momentum: float = opt(0.95, "decay of the momentum", ge=0, lt=1)
    nesterov: bool = opt(True, "look one step of momentum ahead")
    steps: int = opt(5, "Newton-Schulz iterations that orthogonalise the momentum", ge=1, le=20)
    scale: float = opt(
        0.2,
        "a matrix is updated by lr * scale * sqrt(max(rows, columns)) times its orthogonalised momentum: by elements "
        "about as large as AdamW's updates",
        gt=0,
    )


@dataclass
class OptimizerConfig:
    type: str = opt(
        "adamw",
        "muon: Muon for the linear maps of mixers, FFN and experts, AdamW for embeddings, head, routers and vectors",
        choices=("adamw", "muon"),
    )
    lr: float = opt(1e-3, "peak learning rate", gt=0)
    beta1: float = opt(0.9, "AdamW: decay of the first moment", ge=0, lt=1)
    beta2: float = opt(0.95, "AdamW: decay of the second moment", ge=0, lt=1)
    eps: float = opt(1e-8, "AdamW: added to the root of the second moment", gt=0)
    weight_decay: float = opt(0.1, "decoupled weight decay; not applied to norms, biases and per-head parameters", ge=0)
    moments: str = opt(
        "fp32",
        "dtype of AdamW's moments and Muon's momentum; bf16, stochastically rounded, takes half the memory",
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
        "activations that the backward pass computes again, so that they need not be kept: none, those of "
        "recompute_modules (selective), or those of whole layers (full)",
        choices=("none", "selective", "full"),
    )
    recompute_modules: list[str] = opt(
        list,
        f"with recompute=selective, any of {', '.join(MODULES)}: "
        + "; ".join(f"{k}: {v}" for k, v in MODULES.items())
        + ". With recompute=full, only logits can be given",
    )
    recompute_layers: int | None = opt(
        None,
        "number of layers that recompute activations, evenly spread over the model (6 of 12: every second); null: all",
        ge=1,
    )
    seed: int = opt(1234, "weights and data order", ge=0)
    eval_every: int = opt(100, "steps between validations; 0: only at the end", ge=0)
    eval_batches: int = opt(8, "global batches per validation", ge=1)
    timeout_minutes: float = opt(
        10.0,
        "the job ends, with a line that names the rank, when other ranks have waited for a rank longer than this",
        gt=0,
        le=60 * 24 * 7,
    )


@dataclass
class CheckpointConfig:
    every: int = opt(100, "steps between saves; 0: only at the end", ge=0)
    keep: int = opt(2, "newest checkpoints kept", ge=1)
    last: bool = opt(True, "save after the last step (benchmarks turn it off)")


@dataclass
class LoggingConfig:
    every: int = opt(1, "steps between log records", ge=1)
    routing_every: int = opt(
        50, "steps between records of the load of every expert, if they fall on a step with a log record", ge=1
    )
    dead_after: int = opt(100, "steps after which an expert that no token has chosen causes a warning", ge=1)
    tensorboard: bool = opt(True, "write TensorBoard events")
    peak_tflops: float | None = opt(None, "peak bf16 TFLOP/s per device, for MFU; null: known GPUs, else no MFU", gt=0)


@dataclass
class Config:
    run: str = opt("runs/default", "run folder: resolved config, checkpoints, metrics, tokenizer")
    model: ModelConfig = opt(ModelConfig, "the language model")
    parallel: ParallelConfig = opt(ParallelConfig, "spread of model and sequences over ranks")
    data: DataConfig = opt(DataConfig, "corpus and tokenizer")
    optimizer: OptimizerConfig = opt(OptimizerConfig, "update of the weights")
    schedule: ScheduleConfig = opt(ScheduleConfig, "learning rate over steps")
    training: TrainingConfig = opt(TrainingConfig, "batches, precision and length of the training")
    checkpoint: CheckpointConfig = opt(CheckpointConfig, "saving of checkpoints")
    logging: LoggingConfig = opt(LoggingConfig, "records of the run: metrics, TensorBoard, routing")

    def to_dict(self) -> dict[str, Any]:
        """Returns the tree as nested dicts that YAML and JSON can hold; loading them gives an equal tree."""
        return dataclasses.asdict(self)
