"""Checkpoints in Megatron-Core's distributed format: saved whole or not at all, loaded into any layout."""

from linear_moe.training.checkpointing.load import check_data_unchanged, check_resume, imported_from, load, load_latest
from linear_moe.training.checkpointing.save import SaveError, save

__all__ = ["SaveError", "check_data_unchanged", "check_resume", "imported_from", "load", "load_latest", "save"]
