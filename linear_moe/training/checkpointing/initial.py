"""A run's first checkpoint, written from given weights by one process, without a model in memory and without groups."""

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
        name: the parameter's.
        shape: of the whole parameter.
        offset, size: where the box lies in it, and its shape.
        value: makes the box's content; called when it is written.
        prefix: with `name`, the tensor's key in the checkpoint.
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
    info = checkpoint_info(config, 0, 0, dtypes) | {"world": 0, "data": None, "imported": imported}
    nothing = io.BytesIO()
    torch.save({}, nothing)  # see `saved_objects` in state.py
    final = Path(config.run) / "checkpoints" / step_name(0)
    save_pieces(final, pieces, {"common_state/shard_0_1": nothing}, info)
    return final


def save_pieces(
    final: Path, pieces: list[TensorPiece], objects: Mapping[str, io.BytesIO], info: dict[str, Any], files: int = 1
) -> None:
    """Write the checkpoint `final` in this process alone, whole or not at all.

    Args:
        pieces: of its tensors.
        objects: its other content, by key; `Raw` as it is, others within one more layer of serialisation.
        info: what `checkpoint.json` says, but for what `publish` adds.
        files: to spread the pieces over, by size; as many pieces are in memory at a time, at most `THREADS`.

    Raises:
        SaveError: no space, no permission, ..., or the disk does not give back what was written; nothing is left of it.
    """
    partial = final.with_name(f".{final.name}.partial")
    writer = CheckpointWriter(partial, files)
    try:
        prepare(partial, sum(piece.nbytes + 2048 for piece in pieces) + 2**16)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is meant
            dcp.save(dict(objects), storage_writer=writer, planner=PiecePlanner(pieces), no_dist=True)
        for name, crc in writer.files.sums.items():
            if file_crc(partial / name) != crc:
                raise OSError(None, f"the disk does not give back what was written to {name}")
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


class Raw(io.BytesIO):
    """An object of another checkpoint, as its bytes are there."""


class PiecePlanner(DefaultSavePlanner):
    """Plans pieces that do not exist yet, beside the objects of the state dict."""

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
        return value.clone(memory_format=torch.contiguous_format)  # a view would be saved with all that it is a view of


def _item(index: MetadataIndex, piece: TensorPiece) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.size))
    properties = TensorProperties(dtype=piece.dtype)
    return WriteItem(
        index, WriteItemType.SHARD, tensor_data=TensorWriteData(chunk, properties, torch.Size(piece.shape))
    )
