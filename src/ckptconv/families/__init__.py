"""Model families: one module each, rows that say which Hugging Face tensors make which message key.

`FAMILIES` is the registry; its order is the order in which a family is chosen for a model whose source names none.
"""

from __future__ import annotations

from ckptconv.errors import SourceError, TargetError, UsageError, near, some
from ckptconv.families.bert import BERT, MEGATRON_BERT
from ckptconv.families.dbrx import DBRX
from ckptconv.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE_LITE, KIMI_K2
from ckptconv.families.falcon import FALCON
from ckptconv.families.family import Family
from ckptconv.families.gemma import GEMMA, GEMMA2, GEMMA3_TEXT
from ckptconv.families.glm import GLM, GLM4
from ckptconv.families.glm_moe import GLM4_MOE
from ckptconv.families.gpt2 import GPT2
from ckptconv.families.gpt_bigcode import GPT_BIGCODE
from ckptconv.families.gpt_neox import GPT_NEOX
from ckptconv.families.gpt_oss import GPT_OSS
from ckptconv.families.granite import GRANITE
from ckptconv.families.llama import LLAMA
from ckptconv.families.mistral import MINISTRAL, MISTRAL
from ckptconv.families.mixtral import MIXTRAL
from ckptconv.families.nemotron import NEMOTRON, STABLELM
from ckptconv.families.olmo import OLMO, OLMO2
from ckptconv.families.opt import OPT
from ckptconv.families.phi3 import PHI3
from ckptconv.families.qwen2 import QWEN2
from ckptconv.families.qwen2_moe import QWEN2_MOE
from ckptconv.families.qwen3 import QWEN3
from ckptconv.families.qwen3_moe import QWEN3_MOE
from ckptconv.families.smollm import SMOLLM3
from ckptconv.families.starcoder2 import STARCODER2
from ckptconv.families.t5 import T5
from ckptconv.spec import ModelSpec

FAMILIES: dict[str, Family] = {family.name: family for family in (
    LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, DBRX, QWEN2_MOE, QWEN3_MOE, DEEPSEEK_V2, DEEPSEEK_V3, KIMI_K2, GLM4_MOE,
    GLM4_MOE_LITE,
    GPT2, GPT_BIGCODE, STARCODER2, GPT_NEOX, FALCON, OPT, BERT, MEGATRON_BERT, T5,
    GEMMA, GEMMA2, GEMMA3_TEXT, GLM, GLM4, PHI3, GPT_OSS, MINISTRAL, OLMO2, GRANITE, SMOLLM3, NEMOTRON, STABLELM, OLMO,
)}  # fmt: skip


def get(name: str) -> Family:
    """The family called `name`. Raises UsageError."""
    if name not in FAMILIES:
        raise UsageError(f"unknown model family {name!r}, expected one of {some(FAMILIES, 12)}.{near(name, FAMILIES)}")
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
    if "vision_config" in config or "audio_config" in config:
        raise SourceError(
            f"{where}: model_type is {kind!r}, a multimodal model, which is not supported. Its language model can be "
            "converted when it is saved by itself (Gemma 3: Gemma3ForCausalLM)."
        )
    raise SourceError(
        f"{where}: model_type is {kind!r}, which is none of the supported families ({some(known)})."
        f"{near(str(kind), known)} Nothing was read."
    )


def for_spec(spec: ModelSpec) -> Family:
    """The first family whose config.json can say exactly this model. Raises TargetError naming what stops each."""
    reasons = []
    for family in FAMILIES.values():
        found = family.refusals(spec)
        if not found:
            return family
        reasons.append(f"{family.name}: {some(found, 2)}")
    raise TargetError(
        f"no Hugging Face family can express this model. {'; '.join(reasons)}. `ckptconv plugins` lists other savers."
    )


#: What older converters call a model -> our family, or Megatron's kind of model.
MODEL_TYPES = {
    "GPT": "GPT", "BERT": "BERT", "llama": "llama", "llama2": "llama", "llama3": "llama", "codellama": "llama",
    "mistral": "mistral", "qwen2": "qwen2", "mixtral": "mixtral", "dbrx": "dbrx",
    "deepseek_v2": "deepseek_v2", "deepseek_v3": "deepseek_v3", "deepseek_r1": "deepseek_v3",
    "moonlight": "deepseek_v3",
    "kimi_k2": "kimi_k2", "qwen3": "qwen3", "qwen2_moe": "qwen2_moe", "qwen3_moe": "qwen3_moe", "glm4_moe": "glm4_moe",
    "glm4_moe_lite": "glm4_moe_lite",
    "gpt_neox": "gpt_neox", "pythia": "gpt_neox", "falcon": "falcon", "bert": "bert",
    "megatron_bert": "megatron_bert", "gpt2": "gpt2", "gpt_bigcode": "gpt_bigcode", "starcoder": "gpt_bigcode",
    "starcoder2": "starcoder2", "opt": "opt", "t5": "t5",
    "gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text", "gemma3_text": "gemma3_text", "glm": "glm",
    "glm4": "glm4", "phi3": "phi3", "phi4": "phi3", "gpt_oss": "gpt_oss", "ministral": "ministral", "olmo": "olmo",
    "olmo2": "olmo2", "granite": "granite", "smollm3": "smollm3", "nemotron": "nemotron", "stablelm": "stablelm",
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
