"""Checkpoints in Megatron-Core's distributed format: saved whole or not at all, loaded into any layout."""

from linear_moe.training.checkpoint.load import check_data_unchanged, check_resume, imported_from, load, load_latest
from linear_moe.training.checkpoint.save import SaveError, save

__all__ = ["SaveError", "check_data_unchanged", "check_resume", "imported_from", "load", "load_latest", "save"]
