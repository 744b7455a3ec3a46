"""Meta's own checkpoints (Llama 1 to 3.3, CodeLlama): names and cuts in `consolidated.NN.pth`, and `params.json`.

Source: Meta's `llama` (v1, v2), `codellama`, `llama3` and `llama-models` repositories, `model.py`: fairscale's
ColumnParallelLinear (dim 0), RowParallelLinear (dim 1), and the embedding ParallelEmbedding (dim 1) before Llama 3,
VocabParallelEmbedding (dim 0) from it on. Readers of these repositories that are dataclasses refuse unknown keys of
params.json, so only known ones are written. Its rotary rows are pairs (2j, 2j + 1).

Legend: h dim, f ffn, a heads, g kv heads, r = a/g, d = h/a, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptconv.cuts import COLUMN, REPLICATED, ROW, HeadsOfQKV
from ckptconv.errors import SourceError, near
from ckptconv.formats.table import Ignore, Row
from ckptconv.spec import ModelSpec, Rope, differences

PARAMS, TOKENIZER = "params.json", "tokenizer.model"

EMBEDDINGS, LAYER, FINAL, OUTPUT = "embeddings", "transformer layer {i}", "final norm", "output layer"
_L = "layers.{i}."


def _tied(spec: ModelSpec, layer: int | None) -> bool:
    return spec.tied


def table(spec: ModelSpec, rows: bool) -> tuple[Row, ...]:
    """The rows for a model's heads; `rows`: the embedding is cut on dim 0. The head is stored even when tied."""
    r, d = spec.heads_per_group, spec.kv_channels
    q, k = HeadsOfQKV(0, r, r + 2, d, pairs=True), HeadsOfQKV(r, 1, r + 2, d, pairs=True)
    v = HeadsOfQKV(r + 1, 1, r + 2, d)
    return (
        Row(EMBEDDINGS, ("word embeddings",), "tok_embeddings.weight", COLUMN if rows else ROW),
        Row(EMBEDDINGS, ("word embeddings",), "output.weight", COLUMN, double=True, when=_tied),
        Row(LAYER, ("input norm weight",),    _L + "attention_norm.weight", REPLICATED),
        Row(LAYER, ("qkv weight",),           _L + "attention.wq.weight", q),
        Row(LAYER, ("qkv weight",),           _L + "attention.wk.weight", k),
        Row(LAYER, ("qkv weight",),           _L + "attention.wv.weight", v),
        Row(LAYER, ("dense weight",),         _L + "attention.wo.weight", ROW),
        Row(LAYER, ("post norm weight",),     _L + "ffn_norm.weight", REPLICATED),
        Row(LAYER, ("mlp l0 weight W",),      _L + "feed_forward.w1.weight", COLUMN),
        Row(LAYER, ("mlp l0 weight V",),      _L + "feed_forward.w3.weight", COLUMN),
        Row(LAYER, ("mlp l1 weight",),        _L + "feed_forward.w2.weight", ROW),
        Row(FINAL, ("weight",),               "norm.weight", REPLICATED),
        Row(OUTPUT, ("weight",),              "output.weight", COLUMN),
    )  # fmt: skip


IGNORE = (Ignore("rope.freqs", "rotary frequencies are computed, not trained"),)


@dataclass(frozen=True)
class Version:
    """What a release's model code knows and its params.json does not say.

    positions: longest input it was trained for; rows: its embedding is cut on dim 0; factor: of `use_scaled_rope`.
    """

    positions: int
    rows: bool
    factor: float | None = None


VERSIONS = {
    "1":         Version(2048, rows=False),
    "2":         Version(4096, rows=False),
    "codellama": Version(16384, rows=False),
    "3":         Version(8192, rows=True),
    "3.1":       Version(131072, rows=True, factor=8.0),
    "3.2":       Version(131072, rows=True, factor=32.0),
    "3.3":       Version(131072, rows=True, factor=8.0),
}  # fmt: skip

#: Beside the factor, the same in all releases.
SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

#: Keys of params.json that say something of the model; head_dim, hidden_dim and sliding_window are Mistral's.
CARRIED = (
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps",
    "rope_theta", "use_scaled_rope", "max_seq_len", "head_dim", "hidden_dim", "sliding_window",
)  # fmt: skip
#: Keys of which these values (or null) mean nothing, and what any other one would mean.
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "vision_chunk_size":                 ((-1,), "a vision model"),
    "vision_num_cross_attention_layers": ((-1,), "a vision model"),
    "vision_max_num_chunks":             ((4,), "a vision model"),
    "vision_model":                      ((), "a vision model"),
    "quantization_args":                 ((), "quantised weights"),
    "lora_args":                         ((), "an adapter (LoRA), which has to be merged first"),
    "moe":                               ((), "a mixture of experts"),
    "moe_args":                          ((), "a mixture of experts"),
}
#: Keys about a run of the model and not the model.
OF_A_RUN = {"max_batch_size": "a setting of the run"}

_WHOLE = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "max_seq_len", "head_dim", "hidden_dim",
          "sliding_window")  # fmt: skip


def checked(params: Mapping[str, Any], where: str) -> dict[str, Any]:
    """params.json without nulls and what `NEUTRAL` and `OF_A_RUN` name. Raises SourceError for all that is unknown."""
    inner = params.get("model")
    params = inner if isinstance(inner, dict) else params
    known = (*CARRIED, *NEUTRAL, *OF_A_RUN)
    found = {}
    for key, value in params.items():
        if key not in known:
            hint = near(key, known)
            raise SourceError(f"{where}: says {key} {value!r}, which no rule knows.{hint} It would be lost.")
        values, meaning = NEUTRAL.get(key, ((), ""))
        if value is not None and meaning and value not in values:
            raise SourceError(f"{where}: {key} is {value!r}: {meaning}, which is not supported.")
        if value is not None and key in CARRIED:
            found[key] = value
    for key in ("dim", "n_layers", "n_heads", "norm_eps"):
        if key not in found:
            raise SourceError(f"{where}: {key} is missing. It is needed to read the weights.")
    for key, value in found.items():
        numeric = isinstance(value, int if key in _WHOLE else int | float) and (key == "vocab_size" or value > 0)
        if key == "use_scaled_rope" and not isinstance(value, bool):
            raise SourceError(f"{where}: {key} is {value!r}, expected true or false.")
        if key != "use_scaled_rope" and (isinstance(value, bool) or not numeric):
            raise SourceError(f"{where}: {key} is {value!r}, expected a number above 0.")
    if found["dim"] % found["n_heads"] and "head_dim" not in found:
        raise SourceError(f"{where}: dim {found['dim']} does not divide by n_heads {found['n_heads']}.")
    if (d := head_dim(found)) % 2:
        raise SourceError(f"{where}: heads of {d} numbers, expected an even number, as rotary rows are pairs.")
    if found.get("use_scaled_rope") and "rope_theta" not in found:
        raise SourceError(
            f"{where}: use_scaled_rope without rope_theta, for which readers assume 500000 or 10000. Add the right one."
        )
    return found


def head_dim(params: Mapping[str, Any]) -> int:
    """d of checked params."""
    return int(params.get("head_dim") or params["dim"] // params["n_heads"])


def ffn_size(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """f as Meta's FeedForward works it out."""
    size = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        size = int(multiplier * size)
    return multiple_of * -(-size // multiple_of)


def ffn_recipe(dim: int, ffn: int) -> tuple[int, float | None]:
    """(multiple_of, ffn_dim_multiplier) from which `ffn_size` gives `ffn`: a release's, else one that is exact."""
    unit = min(4096, ffn & -ffn)
    below = unit / 2 - 0.25 if unit > 1 else -0.5  # in the middle of what is rounded to ffn
    exact = (ffn - below) / int(2 * (4 * dim) / 3)
    pairs = [(of, by) for by in (None, 1.0, 1.3, 1.2, 1.5) for of in (256, 1024, 4096, unit)]
    return next((of, by) for of, by in [*pairs, (unit, exact)] if ffn_size(dim, of, by) == ffn)


def guess(params: Mapping[str, Any], tied: bool, vocab: int) -> str:
    """The release that fits checked params. All released models with a scaled rope and a tied head are Llama 3.2's."""
    if params.get("use_scaled_rope"):
        return "3.2" if tied else "3.1"
    theta = params.get("rope_theta", 1e4)
    if theta == 1e4:
        # Llama 1: 7B, 13B and 33B by their eps; 33B and 65B by their sizes without grouped queries.
        old = "n_kv_heads" not in params and (params["norm_eps"] == 1e-6 or params["dim"] in (6656, 8192))
        return "1" if old and "ffn_dim_multiplier" not in params else "2"
    return "codellama" if theta == 1e6 else "3" if theta == 5e5 or vocab >= 128000 else "2"


def rope(params: Mapping[str, Any], version: str, where: str) -> Rope:
    """The rotary settings. Raises SourceError when the release and params.json contradict each other."""
    factor, scaled = VERSIONS[version].factor, bool(params.get("use_scaled_rope"))
    if scaled != (factor is not None):
        raise SourceError(
            f"{where}: use_scaled_rope is {str(scaled).lower()}, which does not go with Llama {version}. "
            "Is --llama-version right?"
        )
    theta = float(params.get("rope_theta", 1e4))
    return Rope(theta, "llama3", {"factor": factor, **SCALING}) if scaled else Rope(theta)


def read(
    params: Mapping[str, Any], version: str, where: str, *, ffn: int, vocab: int, tied: bool, dtype: str
) -> ModelSpec:
    """The model of checked params and of what its tensors show. Raises SourceError."""
    positions = params.get("max_seq_len") or VERSIONS[version].positions
    return ModelSpec(
        family="",
        num_layers=params["n_layers"],
        hidden_size=params["dim"],
        ffn_hidden_size=ffn,
        num_attention_heads=params["n_heads"],
        num_query_groups=params.get("n_kv_heads", params["n_heads"]),
        kv_channels=head_dim(params),
        vocab_size=vocab,
        max_position_embeddings=positions,
        seq_length=positions,
        dtype=dtype,
        norm_epsilon=float(params["norm_eps"]),
        tied=tied,
        rope=rope(params, version, where),
        sliding_window=params.get("sliding_window"),
    )


def write(spec: ModelSpec, version: str) -> dict[str, Any]:
    """params.json. What it does not say is the business of `refusals`."""
    multiple_of, multiplier = ffn_recipe(spec.hidden_size, spec.ffn_hidden_size)
    theta = spec.rope.theta if spec.rope else 1e4
    optional = {
        "n_kv_heads": spec.num_query_groups if spec.num_query_groups != spec.num_attention_heads else None,
        "ffn_dim_multiplier": multiplier,
        # Readers before CodeLlama do not know the key, those of Llama 3 assume 500000.
        "rope_theta": theta if theta != 1e4 or VERSIONS[version].rows else None,
        "use_scaled_rope": True if spec.rope and spec.rope.kind == "llama3" else None,
    }
    return {
        "dim": spec.hidden_size,
        "n_layers": spec.num_layers,
        "n_heads": spec.num_attention_heads,
        "vocab_size": spec.vocab_size,
        "multiple_of": multiple_of,
        "norm_eps": spec.norm_epsilon,
        **{key: value for key, value in optional.items() if value is not None},
    }


#: What params.json does not say and no reader of it needs.
UNSAID = ("family", "dtype", "seq_length", "max_position_embeddings")


def version_for(spec: ModelSpec) -> str:
    """The release whose code reads a model."""
    return guess(write(spec, "2"), spec.tied, spec.vocab_size)


def refusals(spec: ModelSpec, version: str) -> list[str]:
    """In what Meta's readers would make another model of it; empty when they make the same."""
    if spec.kv_channels % 2:
        return [f"kv_channels (head dim): {spec.kv_channels} is odd, rotary rows are pairs"]
    try:
        said = read(
            write(spec, version), version, "params.json",
            ffn=spec.ffn_hidden_size, vocab=spec.vocab_size, tied=spec.tied, dtype=spec.dtype,
        )  # fmt: skip
    except SourceError as error:
        return [str(error)]
    return differences(said, spec, UNSAID)
