"""Intel Gaudi's Megatron-LM (HabanaAI) checkpoints: Llama 2, 3, 3.1 and Mixtral of any tp, pp and ep.

Read as megatron-core's; the flags are those of its convert_mlm_to_hf_checkpoint.py, whose command lines run as they
are. Writes `source_megatron_args.json`, and with --save-capacity-bins `capacity_bins.pt`, beside the model.
"""

from __future__ import annotations

import atexit
import json
import logging
import shutil
import tempfile
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckptconv import companions, families, lazy, stream
from ckptconv.containers import rankdir, torchzip
from ckptconv.containers.rankdir import Rank
from ckptconv.errors import SourceError, UsageError
from ckptconv.formats import gaudi
from ckptconv.lazy import LazyTensor, Transposed
from ckptconv.loaders import _megatron, _rankfiles
from ckptconv.loaders._megatron import Found
from ckptconv.metadata import Metadata

log = logging.getLogger("ckptconv.loader")


def recognises(load_dir: str) -> str | None:
    """Why a directory looks like ours, or None."""
    return _megatron.recognised(load_dir, "megatron_gaudi")


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of this loader."""
    _megatron.add_arguments(parser, "megatron_gaudi")
    add = parser.add_argument_group("loader megatron_gaudi").add_argument
    add("--ckpt-dir-name", metavar="NAME", help="folder of the iteration, as iter_0000004 (default: the tracker's)")
    add("--source-model-type", choices=tuple(gaudi.TYPES),
        help="the model, which tells what args do not: longest input, scaled rope (3.1), special tokens, tokenizer "
        "(default: only what the args say)")  # fmt: skip
    add("--instruct", action=BooleanOptionalAction, default=False,
        help="an instruct model: its end tokens, chat template and sampling")  # fmt: skip
    add("--save-capacity-bins", action="store_true", help=f"write the routers' capacity bins to {gaudi.BINS_FILE}")


def load_checkpoint(queue: Any, args: Namespace) -> None:
    """Send the model in args.load_dir. Raises SourceError, UsageError."""
    top, name = Path(args.load_dir), getattr(args, "ckpt_dir_name", None)
    if name and not (top / name).is_dir():
        raise UsageError(f"--ckpt-dir-name {name}: {top / name} is no directory.")
    directory, iteration = rankdir.find_iteration(top / name if name else top, args.iteration)
    paths, said = rankdir.rank_files(directory)
    _check_layout(str(paths[0, 0, 0]), said)
    reader = _Reader(paths, said)
    found = _rankfiles.read(directory, paths, gaudi.ASSUMED | said, reader.tensors)
    source = _megatron.Source(args, "megatron_gaudi", top, directory, iteration, found)
    stream.send(queue, _Told(source, args, paths, said, reader.bins))


def _check_layout(where: str, said: Mapping[str, Any]) -> None:
    """Raise SourceError for experts cut in a way that is not known."""
    if said.get("moe_extended_tp"):
        raise SourceError(
            f"{where}: its args say moe_extended_tp: experts are cut over all tensor and expert ranks at once. In "
            "which order they lie is said otherwise by Megatron and by Gaudi's converter (which also drops half of "
            "what it joined), and there is no checkpoint to tell, so it is not read. Train or save it without the flag."
        )


class _Reader:
    """Reads the tensors of rank files; sets aside the routers' capacity bins: rank -> (layer, buffer) -> tensor."""

    def __init__(self, paths: Mapping[Rank, Path], said: Mapping[str, Any]) -> None:
        self.bins: dict[Rank, dict[tuple[int, str], LazyTensor]] = {rank: {} for rank in paths}
        self._ranks = {path: rank for rank, path in paths.items()}
        self._said = said

    def tensors(self, path: Path, model: dict[Any, Any], found: Found, chunk: int | None) -> dict[str, LazyTensor]:
        """The tensors of a stage by megatron-core's names."""
        rank, kept = self._ranks[path], {}
        experts = found.arguments.get("num_experts") or 0
        first = rank[2] * (experts // found.sizes[2])
        for name, value in model.items():
            name = str(name).removeprefix("module.")
            buffer = gaudi.buffer(name)
            if buffer and isinstance(value, LazyTensor):
                self.bins[rank][buffer] = value
                found.ignored["*.router.capacity_bins.*"] = "capacity bins, of which Hugging Face's models know nothing"
                continue
            name, dynamic = gaudi.plain(name, first, str(path))
            kept[name] = self._turned(name, value) if dynamic and isinstance(value, LazyTensor) else value
        return _rankfiles.core_tensors(path, kept, found, chunk)

    def _turned(self, name: str, tensor: LazyTensor) -> LazyTensor:
        """An expert's weight as megatron-core has it: [2m, h] and [h, m], where dynamic experts may be transposed."""
        hidden = self._said.get("hidden_size")
        if len(tensor.shape) != 2:
            return tensor  # which is noticed later
        want = tensor.shape[-1 if ".linear_fc1." in name else 0]
        other = tensor.shape[0 if ".linear_fc1." in name else -1]
        square = want == other and self._said.get("moe_permuted_weights") is False
        return Transposed(tensor) if square or (want != hidden and other == hidden) else tensor


class _Told:
    """A source with what flags say, and the files that go with the model."""

    def __init__(
        self, source: _megatron.Source, args: Namespace, paths: Mapping[Rank, Path], said: Mapping[str, Any],
        bins: Mapping[Rank, Mapping[tuple[int, str], LazyTensor]],
    ) -> None:  # fmt: skip
        self.tensors, self.holdings = source.tensors, source.holdings
        self._source, self._said, where = source, said, str(paths[0, 0, 0])
        self._type, self._instruct = getattr(args, "source_model_type", None), bool(getattr(args, "instruct", False))
        self.spec = gaudi.typed(source.spec, self._type, where) if self._type else source.spec
        if self._instruct and not self._type:
            raise UsageError("--instruct: --source-model-type is needed with it.")
        raw: Any = torchzip.read(where)
        files = {gaudi.ARGS_FILE: gaudi.as_json(vars(raw["args"]))}
        if getattr(args, "save_capacity_bins", False):
            files[gaudi.BINS_FILE] = _nested(source, bins)
        if companions.CONFIG in source.metadata().origin.companions:
            if self._instruct:
                log.warning("loader: --instruct is not used: the config.json kept with the checkpoint goes along")
        elif self._type:
            files |= self._config()
        self._files = _written(files)

    def _config(self) -> dict[str, bytes]:
        assert self._type is not None
        added = gaudi.config_of(self.spec, self._type, self._instruct, self._said)
        config = families.get(self.spec.family).config(self.spec) | added
        files = {companions.CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}
        if self._instruct and not self.spec.moe:
            ids = {key: added[key] for key in ("bos_token_id", "eos_token_id")}
            files["generation_config.json"] = (json.dumps(ids | gaudi.SAMPLING, indent=2) + "\n").encode()
        return files

    def metadata(self) -> Metadata:
        """The first message."""
        metadata = self._source.metadata()
        origin = replace(metadata.origin, companions=metadata.origin.companions | self._files)
        tokenizer = metadata.tokenizer_type
        if self._type and not Path(metadata.tokenizer_model or "").is_dir():  # that is Hugging Face's, from 1.20 on
            tokenizer = gaudi.TYPES[self._type].tokenizer[self._instruct]
        return replace(metadata, spec=self.spec, origin=origin, tokenizer_type=tokenizer)


def _nested(source: _megatron.Source, bins: Mapping[Rank, Mapping[tuple[int, str], LazyTensor]]) -> bytes:
    """capacity_bins.pt: buffer -> layer of the model -> stage -> expert rank -> tensor rank -> tensor.

    A stage has an empty dict in the place of tensors of layers that are not its own, as the fork's own loader expects.
    """
    import io

    import torch

    layout = source.layout
    tps, stages, eps = (range(size) for size in (layout.tp, layout.pp, layout.ep))
    names = [name for name in gaudi.BUFFERS if any(key[1] == name for own in bins.values() for key in own)]
    if not names:
        log.warning("loader: --save-capacity-bins: there are none, %s is empty", gaudi.BINS_FILE)

    def of(rank: Rank, layer: int, name: str) -> Any:
        stage, _, local = layout.home_of(layer)
        tensor = bins[rank].get((local, name)) if stage == rank[1] else None
        return {} if tensor is None else lazy.to_torch(tensor)

    data = {
        name: {
            layer: {p: {e: {t: of((t, p, e), layer, name) for t in tps} for e in eps} for p in stages}
            for layer in range(layout.num_layers)
        }
        for name in names
    }
    file = io.BytesIO()
    torch.save(data, file)
    return file.getvalue()


def _written(files: Mapping[str, bytes]) -> dict[str, str]:
    """name -> path of small files that the saver carries along; they are gone when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="ckptconv-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return {name: str(folder / name) for name in files}
