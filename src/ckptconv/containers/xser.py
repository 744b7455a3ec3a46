"""torch_xla's serialisation: a main file whose tensors are references to files of one tensor each, without torch_xla.

`X` holds the dict with `TensorReference(tid)` for tensors, `X.tensors/tensor_<tid>.pt` the tensors, and `X.info.pt`
their element types and shapes. Real files vary: tensors may lie in `X` itself (AWS's converter writes that, with an
empty `X.tensors`), the info file may lack (neuronx-distributed up to 0.6), and a rank of the expert parallel group
above 0 keeps only its experts and refers for the rest to the files of rank 0.

Source: torch_xla 2.9 `utils/serialization.py`; neuronx-distributed 0.18 `parallel_layers/checkpointing.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ckptconv import nested
from ckptconv.containers import torchzip
from ckptconv.containers.inert import DTypeName, Inert
from ckptconv.containers.pickling import Instance
from ckptconv.containers.plan import PlannedFile, Slot
from ckptconv.errors import SourceError, some
from ckptconv.lazy import LazyTensor

MODULE, CLASS = "torch_xla.utils.serialization", "TensorReference"
TENSORS, INFO = ".tensors", ".info.pt"
#: What a tensor's own file calls it in a plan: the file holds nothing else.
SLOT = "tensor"


def read(
    path: Path, model_key: str = "model", base: Path | None = None
) -> tuple[dict[str, LazyTensor], list[Path], list[str]]:
    """(tensors by name, files they lie in, keys beside the model) of a main file of any variant, plain ones included.

    model_key: the dict with tensors, where the file has more than those. base: the main file of expert rank 0.
    Raises SourceError: no dict of tensors, a missing tensor file, one unlike what the info file says.
    """
    root = torchzip.read(path)
    if not isinstance(root, dict):
        raise SourceError(f"{path}: holds a {type(root).__name__}, expected a dict of tensors. Is it the right file?")
    beside: list[str] = []
    if isinstance(root.get(model_key), dict):
        beside = [str(key) for key in root if key != model_key]
        root = root[model_key]
    files, found, missing = [path], {}, []
    info = _info(path)
    for name, value in nested.flat(root):
        number = reference(value)
        if isinstance(value, LazyTensor):
            found[name] = value
        elif number is None:
            raise SourceError(
                f"{path}: {name} is a {_kind(value)}, expected a tensor. "
                "If the model is in a dict inside, --model-key names it."
            )
        else:
            said = info.get(number)
            home = base if base and said and said.get("expert_model_parallel") is False else path
            file = tensor_file(home, number)
            if not file.is_file():
                missing.append(f"{name} ({file.name})")
                continue
            files.append(file)
            found[name] = _checked(file, name, torchzip.read(file), said)
    if missing:
        raise SourceError(
            f"{tensor_file(path, 0).parent}: {len(missing)} of {len(missing) + len(found)} tensors are not there, "
            f"{some(missing, 3)}. Either the folder was not copied, or the trainer saved with "
            "avoid_saving_lower_precision_weights, so that the weights are only in optim/: save once without it."
        )
    return found, files, beside


def reference(value: object) -> int | None:
    """The number of the tensor that a stand-in refers to, or None for something else."""
    if isinstance(value, Inert) and (value.module, value.name) == (MODULE, CLASS):
        number = value.fields.get("tid")
        return number if type(number) is int and number >= 0 else None
    return None


def tensor_file(path: Path, number: int) -> Path:
    """Where the tensor of a reference lies."""
    return path.with_name(path.name + TENSORS) / f"tensor_{number}.pt"


def _kind(value: object) -> str:
    return str(value) if isinstance(value, Inert) else type(value).__name__


def _info(path: Path) -> dict[object, dict[str, object]]:
    """What the info file says of each tensor; empty without one. Raises SourceError."""
    file = path.with_name(path.name + INFO)
    if not file.is_file():
        return {}
    said = torchzip.read(file)
    if not isinstance(said, dict) or not all(isinstance(value, dict) for value in said.values()):
        raise SourceError(
            f"{file}: holds no references of torch_xla, expected a dict of dicts by number. "
            "Copy it again."
        )
    return said


def _checked(file: Path, name: str, value: object, said: Mapping[str, object] | None) -> LazyTensor:
    if not isinstance(value, LazyTensor):
        raise SourceError(f"{file}: holds a {_kind(value)}, expected the tensor {name}. Copy it again.")
    wanted = (str(said.get("dtype")), said.get("shape")) if said else None
    if wanted and wanted != (f"torch.{value.dtype}", value.shape):
        raise SourceError(
            f"{file}: {name} is {value.dtype} {list(value.shape)}, but the info file says {wanted[0]} "
            f"{wanted[1]}. Are the files of one checkpoint?"
        )
    return value


# Writing


@dataclass
class Planned:
    """Files of a checkpoint with references: planned ones, whole small ones, and where slots of main files went."""

    plans: dict[str, PlannedFile] = field(default_factory=dict)
    small: dict[str, bytes] = field(default_factory=dict)
    where: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    _known: dict[Slot, PlannedFile] = field(default_factory=dict)

    def add(self, file: str, slots: Sequence[Slot], experts: Collection[str] = (), shared: bool = False) -> None:
        """A main file with references to `slots`. experts: those of an expert parallel rank; shared: all others lie
        in the files of rank 0 of the expert parallel group, of the same numbers.
        """
        self.small[file] = dump({
            slot.name: Instance(MODULE, CLASS, {"tid": number}) for number, slot in enumerate(slots)
        })  # fmt: skip
        self.small[file + INFO] = dump({
            number: {
                "dtype": DTypeName(slot.dtype),
                "shape": Instance("torch", "Size", args=(slot.shape,)),
                "expert_model_parallel": slot.name in experts,
            }
            for number, slot in enumerate(slots)
        })  # fmt: skip
        for number, slot in enumerate(slots):
            if not shared or slot.name in experts:
                name = f"{file}{TENSORS}/tensor_{number}.pt"
                self.plans[name] = self._plan(Slot(SLOT, slot.dtype, slot.shape, slot.seen))
                self.where[file, slot.name] = name, SLOT

    def _plan(self, slot: Slot) -> PlannedFile:
        """Files of tensors of the same shape have the same layout."""
        if slot not in self._known:
            self._known[slot] = torchzip.plan(slot)
        return self._known[slot]


def dump(root: object) -> bytes:
    """A `torch.save` file without tensors."""
    plan = torchzip.plan(root)
    data = bytearray(plan.size)

    def write(offset: int, part: bytes) -> None:
        data[offset : offset + len(part)] = part

    plan.finish(write, {})
    return bytes(data)
