"""Training data: text is tokenized into Megatron's indexed dataset, and read by its GPT dataset as micro-batches."""

from linear_moe.training.data.loader import TrainLoader, validation_batches
from linear_moe.training.data.prepare import check_data, prepare_data
from linear_moe.training.data.prepared import PreparedData

__all__ = ["PreparedData", "TrainLoader", "check_data", "prepare_data", "validation_batches"]
