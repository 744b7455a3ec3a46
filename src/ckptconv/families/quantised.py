"""How quantised Hugging Face checkpoints name the parts of a weight, and which weights DeepSeek quantises.

Sources: config.json and weights index of deepseek-ai/DeepSeek-V3 and openai/gpt-oss-20b; transformers 5.23
`quantizers/quantizer_finegrained_fp8.py`, `integrations/mxfp4.py`. What the parts hold is ckptconv/quantised.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ckptconv import dtypes, quantised
from ckptconv.containers.plan import Slot
from ckptconv.errors import SourceError, some
from ckptconv.families.family import Config, Family, Row
from ckptconv.lazy import FileTensor, LazyTensor, Shape
from ckptconv.ops import PLAIN, TRANSPOSE
from ckptconv.quantised import E2M1, E4M3, Block, Dequantised
from ckptconv.spec import ModelSpec

#: The key of config.json that says how weights are quantised.
KEY = "quantization_config"

#: What weights are dequantised to and quantised from.
NUMBERS = ("float32", "float16", "bfloat16")

_ADVICE = "Fetch or copy the files again, or use an unquantised checkpoint of this model."


@dataclass(frozen=True)
class _Parts:
    """The two stored tensors of one weight, with their names."""

    codes: LazyTensor
    codes_name: str
    scales: LazyTensor
    scales_name: str

    def misfit(self, name: str, found: object, expected: object) -> SourceError:
        """An error that names the file."""
        tensor = self.codes if name == self.codes_name else self.scales
        return SourceError(f"{_file(tensor)}{name} is {found}, expected {expected}. {_ADVICE}")


@dataclass(frozen=True)
class Method:
    """One `quant_method`: NAME is stored as NAME + `codes` and NAME + `scales`, and read by `make`."""

    name: str
    codes: str
    scales: str
    make: Callable[[_Parts, Block, str], LazyTensor]
    block: Callable[[Config, str], Block]
    made_of: str


def _fp8(parts: _Parts, block: Block, dtype: str) -> LazyTensor:
    """codes [.., r, c] E4M3, scales [.., ceil(r / block rows), ceil(c / block cols)] -> the same shape."""
    codes, scales = parts.codes, parts.scales
    if codes.dtype != "float8_e4m3fn":
        raise parts.misfit(parts.codes_name, f"of type {codes.dtype}", f"float8_e4m3fn, as it has {parts.scales_name}")
    if scales.dtype not in NUMBERS:
        raise parts.misfit(parts.scales_name, f"of type {scales.dtype}", "float32 or bfloat16")
    want = quantised.scales_shape(codes.shape, block)
    if want is None or scales.shape != want:
        of = f"for {list(codes.shape)} in blocks of {block[0]}x{block[1]} (weight_block_size in config.json)"
        raise parts.misfit(parts.scales_name, list(scales.shape), f"{list(want) if want else 'a matrix'} {of}")
    return Dequantised(codes, scales, E4M3, block, dtype, codes.shape, parts.scales_name)


def _mxfp4(parts: _Parts, block: Block, dtype: str) -> LazyTensor:
    """codes [.., r, c / 32, 16], scales [.., r, c / 32] -> [.., c, r]: unquantised, gpt-oss stores [in, out]."""
    codes, scales = parts.codes, parts.scales
    for name, tensor in ((parts.codes_name, codes), (parts.scales_name, scales)):
        if tensor.dtype != "uint8":
            raise parts.misfit(name, f"of type {tensor.dtype}", "uint8")
    if len(codes.shape) < 3 or codes.shape[-1] * E2M1.per_byte != block[1]:
        raise parts.misfit(parts.codes_name, list(codes.shape), "[..., rows, columns / 32, 16]")
    if scales.shape != codes.shape[:-1]:
        want = f"{list(codes.shape[:-1])} as {parts.codes_name} is {list(codes.shape)}"
        raise parts.misfit(parts.scales_name, list(scales.shape), want)
    packed: Shape = (*codes.shape[:-2], codes.shape[-2] * codes.shape[-1])
    shape: Shape = (*packed[:-1], packed[-1] * E2M1.per_byte)
    made = Dequantised(codes.seen(packed), scales, E2M1, block, dtype, shape, parts.scales_name)
    return TRANSPOSE.seen(made)


def _block_size(config: Config, where: str) -> Block:
    size = config.get("weight_block_size")
    good = isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
    if not isinstance(size, list) or not good:
        raise SourceError(
            f"{where}: weight_block_size of {KEY} is {size!r}, expected two whole numbers above 0, such as [128, 128]."
        )
    if config.get("fmt") not in (None, "e4m3"):
        raise SourceError(f"{where}: fmt of {KEY} is {config['fmt']!r}, expected 'e4m3'. {_ADVICE}")
    return size[0], size[1]


METHODS = {method.name: method for method in (
    Method("fp8",   "",        "_scale_inv", _fp8,   _block_size,               "8-bit codes (E4M3)"),
    Method("mxfp4", "_blocks", "_scales",    _mxfp4, lambda config, where: (1, 32), "4-bit codes (E2M1)"),
)}  # fmt: skip


def without(config: Config, dtype: str) -> Config:
    """config.json of the same model when its weights are not quantised but `dtype`."""
    if KEY not in config:
        return config
    return {key: value for key, value in config.items() if key != KEY} | {"torch_dtype": dtype, "dtype": dtype}


def method_of(config: Config, where: str) -> Method | None:
    """How config.json says the weights are quantised; None when it does not. Raises SourceError."""
    said = config.get(KEY)
    if not said:
        return None
    kind = said.get("quant_method", "unknown") if isinstance(said, dict) else said
    if not isinstance(said, dict) or not isinstance(kind, str) or kind not in METHODS:
        raise SourceError(
            f"{where}: the weights are quantised ({kind}), which is not supported: converting them would not be "
            f"bit-exact ({some(METHODS)} can be read). Use the unquantised checkpoint of this model."
        )
    return METHODS[kind]


def target(config: Config, asked: str | None, where: str) -> str:
    """The element type that weights are dequantised to: `asked`, that of config.json, or bfloat16."""
    said = asked or dtypes.parse(config.get("torch_dtype") or config.get("dtype") or "bfloat16", where)
    return said if said in NUMBERS else "bfloat16"


def plain(
    tensors: dict[str, LazyTensor], config: Config, asked: str | None, where: str
) -> tuple[dict[str, LazyTensor], list[str]]:
    """(tensors by the names they have in an unquantised checkpoint, notes on what was dequantised).

    `config` is config.json, read from `where`. Raises SourceError: a method that is not known, parts without each
    other, wrong types or shapes.
    """
    method = method_of(config, where)
    if method is None:
        return tensors, []
    dtype, block = target(config, asked, where), method.block(config[KEY], where)
    made, parts = {}, set()
    for name, scales in tensors.items():
        if not name.endswith(method.scales):
            continue
        stem = name.removesuffix(method.scales)
        codes = tensors.get(stem + method.codes)
        if codes is None:
            raise SourceError(f"{_file(scales)}{name} has no {stem + method.codes} to scale. {_ADVICE}")
        made[stem] = method.make(_Parts(codes, stem + method.codes, scales, name), block, dtype)
        parts |= {name, stem + method.codes}
    for name, tensor in tensors.items():
        coded = name.endswith(method.codes) if method.codes else tensor.dtype.startswith("float8")
        if coded and name not in parts:
            scale = name.removesuffix(method.codes) + method.scales
            raise SourceError(
                f"{_file(tensor)}{name} is quantised ({tensor.dtype}), but {scale} is in no file. {_ADVICE}"
            )
    if not made:
        raise SourceError(
            f"{where}: says that weights are quantised ({method.name}), but the files hold none that are. Remove "
            f"{KEY} from it if they were dequantised."
        )
    rest = {name: tensor for name, tensor in tensors.items() if name not in parts}
    size = f"{block[0]}x{block[1]}"
    note = f"dequantised {len(made)} weights from {method.made_of} with a scale per {size} block to {dtype}"
    return {**rest, **made}, [note]


def _file(tensor: LazyTensor) -> str:
    return f"{tensor.path}: " if isinstance(tensor, FileTensor) else ""


# Writing

#: Message keys of the linears that DeepSeek's release has in fp8: all of attention and of the MLP, experts included,
#: in MTP layers too; not embeddings, output layer, router, norms and what joins an MTP layer to the model.
LINEARS = frozenset((
    "qkv weight", "q proj weight", "q down weight", "q up weight", "kv down weight", "kv up weight", "dense weight",
    "mlp l0 weight", "mlp l0 weight W", "mlp l0 weight V", "mlp l1 weight",
    "shared mlp l0 weight W", "shared mlp l0 weight V", "shared mlp l1 weight",
))  # fmt: skip

BLOCK: Block = (128, 128)
#: Families whose classes know by themselves that routers are not quantised.
RELEASED = ("deepseek_v3",)
SUFFIX = METHODS["fp8"].scales


def is_linear(row: Row) -> bool:
    """Whether `--quantize` quantises what a row stores."""
    return LINEARS.issuperset(row.keys)


def slots(name: str, shape: Shape) -> list[Slot]:
    """What a quantised weight is stored as."""
    scales = quantised.scales_shape(shape, BLOCK)
    assert scales is not None  # linears have rows and columns
    return [Slot(name, "float8_e4m3fn", shape), Slot(name + SUFFIX, "float32", scales)]


def refusals(family: Family, spec: ModelSpec, rows: Iterable[Row]) -> list[str]:
    """Why a model's weights cannot be stored in fp8 as others would read them; empty when they can."""
    linears = [row for row in rows if is_linear(row)]
    odd = {row.names[0]: row for row in linears if row.view != PLAIN or not row.names[0].endswith(".weight")}
    reasons = [f"{family.name} stores {some(odd)} otherwise than as [out, in] matrices"] if odd else []
    if spec.model_type != "GPT":
        reasons.append(f"only decoders are quantised, this is a {spec.model_type} model")
    if spec.dtype not in NUMBERS:
        reasons.append(f"weights are {spec.dtype}, and only {some(NUMBERS)} are quantised")
    return reasons


def config_of(family: Family, skipped: list[str]) -> dict[str, Any]:
    """`quantization_config` as in DeepSeek-V3's release. `skipped`: matrices of layers that stay as they are."""
    config: dict[str, Any] = {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": list(BLOCK),
    }  # fmt: skip
    if family.name in RELEASED or not skipped:
        return config
    return {**config, "modules_to_not_convert": [*skipped, "lm_head"]}
