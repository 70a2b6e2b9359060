"""A run's first checkpoint, written from given weights by one process, without a model in memory and without groups."""

from __future__ import annotations

import dataclasses
import io
import math
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from linear_moe.config.schema import Config
from linear_moe.inference.checkpoint_reader import MODEL, step_name
from linear_moe.training.checkpoint.save import SaveError, Writer, checkpoint_info, prepare, publish


@dataclass(frozen=True)
class Piece:
    """A box of a weight, in fp32.

    Attributes:
        name: the parameter's.
        shape: of the whole parameter.
        offset, size: where the box lies in it, and its shape.
        value: makes the box's content; called when it is written.
    """

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    value: Callable[[], Tensor]


def save_initial(config: Config, pieces: list[Piece], dtypes: dict[str, str], imported: dict[str, Any]) -> Path:
    """Write the checkpoint of step 0, whole or not at all, and return its folder.

    As `save` does, but without optimizer state and random states: training from it begins with fresh ones, at its first
    token.

    Args:
        config: of the run, which has no checkpoint yet.
        pieces: together, every parameter of the model; written in this order, one in memory at a time.
        dtypes: of the parameters in training, by name.
        imported: what `checkpoint.json` says of the weights' origin.

    Raises:
        SaveError: no space, no permission, ...; what was written is removed.
    """
    checkpoints = Path(config.run) / "checkpoints"
    final, partial = checkpoints / step_name(0), checkpoints / f".{step_name(0)}.partial"
    needed = sum(4 * math.prod(piece.size) + 2048 for piece in pieces) + 2**16
    info = checkpoint_info(config, 0, 0, dtypes) | {"world": 0, "data": None, "imported": imported}
    nothing = io.BytesIO()
    torch.save({}, nothing)  # see `saved_objects` in state.py
    writer = Writer(partial)
    try:
        prepare(partial, needed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is meant
            objects = {"common_state/shard_0_1": nothing}
            dcp.save(objects, storage_writer=writer, planner=_Planner(pieces), no_dist=True)
        publish(partial, final, info, writer.files.sums)
    except BaseException as failure:
        shutil.rmtree(partial, ignore_errors=True)
        error = failure
        if isinstance(failure, CheckpointException):
            ((error, _),) = failure.failures.values()  # of this process alone
        if not isinstance(error, OSError):
            raise error from None
        reason = f"checkpoint not saved: {error.strerror or error}"
        raise SaveError(
            str(final), ..., reason, fix="free some space or change `run`, and rerun the command"
        ) from error
    return final


class _Planner(DefaultSavePlanner):
    """Plans pieces that do not exist yet, beside the objects of the state dict."""

    def __init__(self, pieces: list[Piece]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = {MetadataIndex(MODEL + piece.name, piece.offset): piece for piece in pieces}
        assert len(self.pieces) == len(pieces)

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self.plan = dataclasses.replace(plan, items=[*plan.items, *map(_item, self.pieces, self.pieces.values())])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        piece = self.pieces.get(index)
        if piece is None:
            return super().lookup_object(index)
        value = piece.value()
        assert value.shape == piece.size and value.dtype is torch.float32, (piece.name, value.shape, piece.size)
        return value.clone(memory_format=torch.contiguous_format)  # a view would be saved with all that it is a view of


def _item(index: MetadataIndex, piece: Piece) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.size))
    properties = TensorProperties(dtype=torch.float32)
    return WriteItem(
        index, WriteItemType.SHARD, tensor_data=TensorWriteData(chunk, properties, torch.Size(piece.shape))
    )
