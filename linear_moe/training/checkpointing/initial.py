"""A run's first checkpoint, written from given weights by one process.

It needs neither the whole model in memory nor process groups.
"""

from __future__ import annotations

import dataclasses
import io
import math
import shutil
import warnings
from collections.abc import Callable, Mapping
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

from linear_moe.checkpoints.reader import MODEL, file_crc, step_name
from linear_moe.config.schema import Config
from linear_moe.training.checkpointing.save import CheckpointWriter, SaveError, checkpoint_info, prepare, publish


@dataclass(frozen=True)
class TensorPiece:
    """A box of a tensor, by default of a weight in fp32.

    Attributes:
        name: the parameter's name.
        shape: shape of the whole tensor.
        offset, size: offset of the box in the tensor, and shape of the box.
        value: makes the box's content; called when the box is written.
        prefix: `prefix + name` is the tensor's key in the checkpoint.
        dtype: dtype of the content.
    """

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    value: Callable[[], Tensor]
    prefix: str = MODEL
    dtype: torch.dtype = torch.float32

    @property
    def nbytes(self) -> int:
        return math.prod(self.size) * self.dtype.itemsize


def save_initial(config: Config, pieces: list[TensorPiece], dtypes: dict[str, str], imported: dict[str, Any]) -> Path:
    """Writes the checkpoint of step 0, whole or not at all, and returns its folder.

    Unlike a checkpoint of `save`, it has no optimizer state and no random states: a training from it begins with fresh
    ones, at the first token of its data.

    Args:
        config: configuration of the run, which has no checkpoint yet.
        pieces: together, every parameter of the model; written in this order, one in memory at a time.
        dtypes: the parameters' dtypes in training, by parameter name.
        imported: the entry of `checkpoint.json` that says where the weights come from.

    Raises:
        SaveError: no space, no permission, ...; the partial checkpoint has been removed.
    """
    info = checkpoint_info(config, 0, 0, dtypes) | {"world": 0, "data": None, "imported": imported}
    nothing = io.BytesIO()
    torch.save({}, nothing)  # Megatron-Core 0.19.2 expects this object, see `saved_objects` in state.py
    final = Path(config.run) / "checkpoints" / step_name(0)
    save_pieces(final, pieces, {"common_state/shard_0_1": nothing}, info)
    return final


def save_pieces(
    final: Path, pieces: list[TensorPiece], objects: Mapping[str, io.BytesIO], info: dict[str, Any], files: int = 1
) -> None:
    """Writes the checkpoint `final` in this process alone, whole or not at all.

    Args:
        pieces: all boxes of all tensors of the checkpoint.
        objects: the other entries of the checkpoint, by key. The bytes of a `Raw` are written as they are; any other
            object is serialised once more.
        info: content of `checkpoint.json`, without the entries that `publish` adds.
        files: number of files to spread the pieces over, by size; as many pieces are in memory at a time, at most
            `THREADS`.

    Raises:
        SaveError: no space, no permission, ..., or a file read back differs from what was written. The partial
            checkpoint has been removed.
    """
    partial = final.with_name(f".{final.name}.partial")
    writer = CheckpointWriter(partial, files)
    try:
        prepare(partial, sum(piece.nbytes + 2048 for piece in pieces) + 2**16)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no_dist asks for just that
            dcp.save(dict(objects), storage_writer=writer, planner=PiecePlanner(pieces), no_dist=True)
        for name, crc in writer.files.sums.items():
            if file_crc(partial / name) != crc:
                raise OSError(None, f"the disk does not give back what was written to {name}")
        publish(partial, final, info, writer.files.sums)
    except BaseException as failure:
        shutil.rmtree(partial, ignore_errors=True)
        error = failure
        if isinstance(failure, CheckpointException):
            ((error, _),) = failure.failures.values()  # there is one process, so there is one error
        if not isinstance(error, OSError):
            raise error from None
        reason = f"checkpoint not saved: {error.strerror or error}"
        raise SaveError(
            str(final), ..., reason, fix="free some space or change `run`, and rerun the command"
        ) from error


class Raw(io.BytesIO):
    """Serialised bytes of an object, copied from another checkpoint."""


class PiecePlanner(DefaultSavePlanner):
    """Save planner for tensor pieces that are made only when they are written, and for the state dict's objects."""

    def __init__(self, pieces: list[TensorPiece]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = {MetadataIndex(piece.prefix + piece.name, piece.offset): piece for piece in pieces}
        assert len(self.pieces) == len(pieces)

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self.plan = dataclasses.replace(plan, items=[*plan.items, *map(_item, self.pieces, self.pieces.values())])
        return self.plan

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        return object if isinstance(object, Raw) else super().transform_object(write_item, object)

    def lookup_object(self, index: MetadataIndex) -> Any:
        piece = self.pieces.get(index)
        if piece is None:
            return super().lookup_object(index)
        value = piece.value()
        assert value.shape == piece.size and value.dtype is piece.dtype, (piece.name, value.shape, piece.size)
        return value.clone(memory_format=torch.contiguous_format)  # a view would be saved with its whole storage


def _item(index: MetadataIndex, piece: TensorPiece) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.size))
    properties = TensorProperties(dtype=piece.dtype)
    return WriteItem(
        index, WriteItemType.SHARD, tensor_data=TensorWriteData(chunk, properties, torch.Size(piece.shape))
    )
