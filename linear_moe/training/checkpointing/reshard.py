"""Rewrites a checkpoint in one process: other files, other pieces, with or without the optimizer's state.

Every checkpoint loads in any layout as it is. Rewritten for a layout, it loads faster there. A rank then reads whole
pieces of its own, instead of parts of larger pieces, or of the many small pieces that data-parallel ranks with a
distributed optimizer write.
"""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from linear_moe.checkpoints.inspect import NEEDED, OPTIMIZER
from linear_moe.checkpoints.reader import read_info, read_metadata, verify_checkpoint, weight_shapes
from linear_moe.checkpoints.run import EMBEDDING, check_no_checkpoints, find_checkpoint, is_run
from linear_moe.config.load import load_config, save_config
from linear_moe.config.schema import Config
from linear_moe.modeling.host import Host, ParameterSpec, spec_of
from linear_moe.modeling.model import LanguageModel
from linear_moe.options.errors import ConfigError
from linear_moe.options.load import from_dict
from linear_moe.training.checkpointing.initial import Raw, TensorPiece, save_pieces
from linear_moe.training.supervision.faults import lock_run

PIECE_BYTES = 256 * 2**20
"""Bytes from which on a piece is cut along its first dimension: a reader must read a piece whole for any part of it."""

AXES = ("tensor", "expert", "expert_tensor")
"""Parallel axes over which parameters are split."""


def reshard(
    source: Path,
    out: Path,
    step: int | None = None,
    *,
    files: int = 8,
    sizes: Mapping[str, int] | None = None,
    optimizer: bool = True,
) -> dict[str, Any]:
    """Rewrites the checkpoint `source` as the only one of the run folder `out`, with configuration and tokenizer.

    Tensors are streamed: at most eight pieces of `PIECE_BYTES`, and the source pieces that they are read from, are in
    memory at a time. The source is verified first, the written files are read back, and only then the folder gets its
    name.

    Args:
        source: a run folder, or the folder of a checkpoint.
        out: run folder, which must have no checkpoints.
        step: step of the checkpoint, if `source` is a run folder; None: its latest complete checkpoint.
        files: number of files to spread the tensors over.
        sizes: parallel axis of `AXES` -> number of ranks to cut the tensors for. An axis that is missing has the size
            of the source's configuration.
        optimizer: whether to keep the optimizer's state. Without it, a training that resumes goes on at the same step
            and token, with moments that begin anew.

    Returns:
        the object that `--json` prints: checkpoint, source, step, optimizer, layout, tensors, pieces, files, bytes,
        source_bytes.

    Raises:
        ConfigError: the source is damaged, `out` has checkpoints, sizes do not divide the model, or the disk is full.
    """
    folder = find_checkpoint(source, step)
    check_no_checkpoints("DST", out)
    verify_checkpoint(folder)
    info = read_info(folder, NEEDED)
    config = _config(folder, info)
    metadata = read_metadata(folder)
    layout = {axis: getattr(config.parallel, axis) or 1 for axis in AXES} | dict(sizes or {})
    specs = _specs(config, metadata)
    reader = _Reader(folder, metadata)
    pieces = list(_pieces(reader, specs, layout, optimizer))
    objects = {key: reader.raw(key) for key in reader.objects()}
    info = {key: value for key, value in info.items() if key not in ("files", "crc32")}
    info |= {"resharded": {"source": str(folder), "layout": layout, "optimizer": optimizer}}
    info |= {} if optimizer else {"optimizer_step": 0}
    config.run = str(out)
    with lock_run(out):  # the checkpoint is written last, so that a run folder with a checkpoint is complete
        tokenizer = folder.parent.parent / "tokenizer"
        if tokenizer.is_dir():
            shutil.copytree(tokenizer, out / "tokenizer", dirs_exist_ok=True)
        save_config(config, out / "config.yaml")
        final = out / "checkpoints" / folder.name
        save_pieces(final, pieces, objects, info, min(files, len(pieces)))
    written = read_info(final)["files"]
    return {
        "checkpoint": str(final),
        "source": str(folder),
        "step": info["step"],
        "optimizer": optimizer and any(piece.name.startswith(OPTIMIZER) for piece in pieces),
        "layout": layout,
        "tensors": len({piece.name for piece in pieces}),
        "pieces": len(pieces),
        "files": sum(name.endswith(".distcp") for name in written),
        "bytes": sum(written.values()),
        "source_bytes": sum(read_info(folder)["files"].values()),
    }


def _config(folder: Path, info: dict[str, Any]) -> Config:
    """Configuration of the run folder in which the checkpoint lies; without one, that saved in the checkpoint."""
    run = folder.parent.parent
    return load_config(run / "config.yaml") if is_run(run) else from_dict(Config, info["config"])


def _specs(config: Config, metadata: Metadata) -> dict[str, ParameterSpec]:
    """Shape and split of each parameter of the model, by name. ConfigError if the checkpoint has other parameters."""
    saved = weight_shapes(metadata)
    model = LanguageModel(config.model, saved.get(EMBEDDING, (1,))[0], Host(torch.float32, "meta"))
    specs: dict[str, ParameterSpec] = {name: spec_of(p) for name, p in model.named_parameters()}

    from linear_moe.training.checkpointing.load import check_shapes

    check_shapes(
        "SRC",
        {name: spec.shape for name, spec in specs.items()},
        saved,
        fix="reshard it with the version that saved it",
    )
    return specs


class _Reader:
    """Reads any box of a checkpoint's tensors, from whichever pieces they were saved in."""

    def __init__(self, folder: Path, metadata: Metadata):
        self.entries = metadata.state_dict_metadata
        self.storage = FileSystemReader(folder)
        self.storage.set_up_storage_reader(metadata, is_coordinator=True)

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        return {key: entry for key, entry in self.entries.items() if isinstance(entry, TensorStorageMetadata)}

    def objects(self) -> list[str]:
        return [key for key, entry in self.entries.items() if not isinstance(entry, TensorStorageMetadata)]

    def box(self, key: str, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """The box of shape `size` at `offset` of the tensor `key`, in the dtype in which it was saved."""
        entry = self.tensors()[key]
        chunk = ChunkStorageMetadata(torch.Size(offset), torch.Size(size))
        items = create_read_items_for_chunk_list(key, entry, [chunk])
        covered = sum(math.prod(item.lengths) for item in items)
        assert covered == math.prod(size), (key, offset, size, covered)
        target = torch.empty(size, dtype=entry.properties.dtype)
        self.storage.read_data(LoadPlan(items), _Into(target)).wait()
        return target

    def raw(self, key: str) -> Raw:
        """The serialised bytes of the object `key`."""
        index, none = MetadataIndex(key), torch.Size([0])
        into = _Into(torch.empty(0))
        item = ReadItem(LoadItemType.BYTE_IO, index, none, index, none, none)
        self.storage.read_data(LoadPlan([item]), into).wait()
        assert into.object is not None
        return into.object


class _Into(DefaultLoadPlanner):
    """Load planner that reads boxes into one tensor, or keeps one object."""

    def __init__(self, target: Tensor):
        super().__init__()
        self.target = target
        self.object: Raw | None = None

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        view = self.target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(dim, start, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None: ...

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        self.object = Raw(value.getvalue())


def _pieces(
    reader: _Reader, specs: dict[str, ParameterSpec], layout: dict[str, int], optimizer: bool
) -> Iterator[TensorPiece]:
    """Yields the pieces of every tensor, cut as `layout` cuts the parameter to which the tensor belongs."""
    for key, entry in sorted(reader.tensors().items()):
        if key.startswith(OPTIMIZER) and not optimizer:
            continue
        shape, dtype = tuple(entry.size), entry.properties.dtype
        spec = next((specs[name] for name in _suffixes(key) if name in specs and specs[name].shape == shape), None)
        for offset, size in _boxes(key, shape, dtype.itemsize, spec, layout):
            yield TensorPiece(key, shape, offset, size, partial(reader.box, key, offset, size), prefix="", dtype=dtype)


def _suffixes(key: str) -> Iterator[str]:
    """Yields the possible parameter names in a tensor's key, `model.NAME` or `optimizer.STATE.NAME`."""
    words = key.split(".")
    return (".".join(words[i:]) for i in range(1, len(words)))


def _boxes(
    key: str, shape: tuple[int, ...], itemsize: int, spec: ParameterSpec | None, layout: dict[str, int]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yields (offset, size) of the boxes of a tensor: one for each rank of the split, cut to `PIECE_BYTES`.

    ConfigError if the sizes of the layout do not divide the tensor's dimensions.
    """
    step = list(shape)
    for dim, axis in (spec.axes if spec else {}).items():
        ranks = layout[axis]
        if shape[dim] % ranks:
            path = f"--{axis.replace('_', '-')}"
            raise ConfigError(path, ranks, f"does not divide dimension {dim} of {key}, {shape[dim]}")
        step[dim] = shape[dim] // ranks
    if step and (rest := math.prod(step[1:]) * itemsize):
        rows = max(PIECE_BYTES // rest, 1)
        step[0] = min(step[0], math.ceil(step[0] / math.ceil(step[0] / rows))) if step[0] else 0
    starts = [range(0, n, s) if s else range(1) for n, s in zip(shape, step, strict=True)]
    for offset in itertools.product(*starts):
        yield offset, tuple(min(s, n - o) for s, n, o in zip(step, shape, offset, strict=True))
