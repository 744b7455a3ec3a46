"""Model families: one module each, rows that say which Hugging Face tensors make which message key.

`FAMILIES` is the registry; its order is the order in which a family is chosen for a model whose source names none.
"""

from __future__ import annotations

from ckptconv.errors import SourceError, UsageError, near, some
from ckptconv.families.family import Family
from ckptconv.families.llama import LLAMA
from ckptconv.families.mistral import MISTRAL
from ckptconv.families.qwen2 import QWEN2
from ckptconv.spec import ModelSpec

FAMILIES: dict[str, Family] = {family.name: family for family in (LLAMA, MISTRAL, QWEN2)}


def get(name: str) -> Family:
    """The family called `name`. Raises UsageError."""
    if name not in FAMILIES:
        raise UsageError(f"unknown model family {name!r}; known: {some(FAMILIES)}.{near(name, FAMILIES)}")
    return FAMILIES[name]


def of_config(config: dict[str, object], where: str) -> Family:
    """The family that config.json names in `model_type` (or in `architectures`). Raises SourceError."""
    kind = config.get("model_type")
    for family in FAMILIES.values():
        if kind == family.model_type:
            return family
    classes = config.get("architectures")
    for family in FAMILIES.values():
        if kind is None and isinstance(classes, list) and family.architecture in classes:
            return family
    known = [family.model_type for family in FAMILIES.values()]
    raise SourceError(
        f"{where}: model_type is {kind!r}, which is none of the supported families ({some(known)})."
        f"{near(str(kind), known)} Nothing was read."
    )


def for_spec(spec: ModelSpec) -> Family:
    """The first family whose config.json can say exactly this model. Raises SourceError naming what stops each."""
    reasons = []
    for family in FAMILIES.values():
        found = family.refusals(spec)
        if not found:
            return family
        reasons.append(f"{family.name}: {some(found, 2)}")
    raise SourceError("no Hugging Face family can express this model. " + "; ".join(reasons))


#: What older converters call a model -> our family, or Megatron's kind of model.
MODEL_TYPES = {
    "GPT": "GPT", "BERT": "BERT", "llama": "llama", "llama2": "llama", "llama3": "llama", "codellama": "llama",
    "mistral": "mistral", "qwen2": "qwen2",
}  # fmt: skip


def model_type(name: str) -> str:
    """What `--model-type NAME` stands for. Raises UsageError for an unknown name."""
    if name not in MODEL_TYPES:
        hint = near(name, MODEL_TYPES)
        raise UsageError(f"--model-type {name}: unknown, expected one of {some(MODEL_TYPES, 12)}.{hint}")
    return MODEL_TYPES[name]


def check_model_type(name: str, spec: ModelSpec) -> None:
    """Raise UsageError when the source is not what `--model-type` says. A source that names no family passes."""
    wanted = model_type(name)
    found = spec.model_type if wanted in ("GPT", "BERT") else spec.family or wanted
    if wanted != found:
        raise UsageError(f"--model-type {name}: the source is {found}. Leave the flag out, or give another source.")
