"""Text -> tokenizer -> Megatron's indexed dataset -> its GPT dataset -> micro-batches."""

from linear_moe.training.data.loader import TrainLoader, validation_batches
from linear_moe.training.data.prepare import check_data, prepare_data
from linear_moe.training.data.prepared import PreparedData

__all__ = ["PreparedData", "TrainLoader", "check_data", "prepare_data", "validation_batches"]
