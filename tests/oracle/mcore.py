"""The oracle for mp_rank files: NVIDIA's GPTModel (megatron-core 0.16.1) loads them strictly and runs them on CPU.

Nothing of ckptconv is imported. The model is configured from the config.json of the Hugging Face source by the rules
written out below, so neither ckptconv's tables nor the `args` in the files can excuse a wrong tensor.

`run` starts this file as a script in a process of its own: megatron-core is imported once and patched for CPU there,
and every rank of every layout is a fork of that process (gloo, pipeline hops by send and recv). Only the local layer
spec exists without Transformer Engine.

Facts: megatron-core 0.16.1 `models/gpt/gpt_model.py`, `transformer/transformer_config.py`, `transformer/utils.py`.
Shape legend: b batch, s tokens, h hidden, v vocabulary, a query heads, g query groups, d head dim, f ffn.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

Config = dict[str, Any]
State = dict[str, torch.Tensor]
EXTRA = "_extra_state"


@dataclass(frozen=True)
class Case:
    """One checkpoint to load and run. `ids`: [b, s] lists by name; `damage`: a name of DAMAGE, to see it noticed."""

    hf: str
    checkpoint: str
    tp: int
    pp: int
    ids: dict[str, list[list[int]]]
    divisor: int = 128  # the vocabulary is padded to a multiple of divisor * tp
    damage: str = ""


@dataclass(frozen=True)
class Outcome:
    """Logits [b, s, v] by the names of `ids`, or what went wrong."""

    logits: dict[str, torch.Tensor]
    error: str = ""


def transformer_settings(c: Config) -> dict[str, Any]:
    """TransformerConfig fields that a Llama, Mistral or Qwen2 config.json stands for."""
    heads = c["num_attention_heads"]
    window = c.get("sliding_window") if c.get("use_sliding_window", True) else None
    return {
        "num_layers": c["num_hidden_layers"],
        "hidden_size": c["hidden_size"],
        "ffn_hidden_size": c["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": c.get("num_key_value_heads", heads),
        "kv_channels": c.get("head_dim", c["hidden_size"] // heads),
        "normalization": "RMSNorm",
        "layernorm_epsilon": c["rms_norm_eps"],
        "gated_linear_unit": True,
        # All linears or none: one kind of bias in the source makes the others zeros.
        "add_bias_linear": bool(c.get("attention_bias") or c.get("mlp_bias")),
        "add_qkv_bias": c["model_type"] == "qwen2",
        # (left, right) keys beside the query itself; Hugging Face counts the query too.
        "window_size": None if window is None else (window - 1, 0),
    }


def model_settings(c: Config) -> dict[str, Any]:
    """GPTModel arguments that a config.json stands for."""
    rope = c.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type")
    settings = {
        "max_sequence_length": c["max_position_embeddings"],
        "share_embeddings_and_output_weights": c["tie_word_embeddings"],
        "position_embedding_type": "rope",
        "rotary_base": c.get("rope_theta", 10000.0),
    }
    if kind == "llama3":
        # The other three numbers are constants in megatron-core.
        fixed = (rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"])
        assert fixed == (8192, 1, 4), f"megatron-core cannot express llama3 rope scaling {fixed}"
        settings |= {"rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    elif kind == "linear":
        settings |= {"seq_len_interpolation_factor": rope["factor"]}
    else:
        assert kind is None, f"no settings for rope scaling {kind}"
    return settings


def padded(vocab_size: int, divisor: int, tp: int) -> int:
    """Rows of the embedding in the files of all tp ranks together."""
    return -(-vocab_size // (divisor * tp)) * divisor * tp


# Damage is what a wrong converter would have done, at TP 1. Each function changes the state or the config in place.


def _swap_gate_up(state: State, c: Config) -> None:
    key = "decoder.layers.1.mlp.linear_fc1.weight"
    gate, up = state[key].chunk(2)
    state[key] = torch.cat([up, gate])


def _swap_norms(state: State, c: Config) -> None:
    one, two = "decoder.layers.1.input_layernorm.weight", "decoder.layers.1.pre_mlp_layernorm.weight"
    state[one], state[two] = state[two], state[one]


def _ungroup_qkv(state: State, c: Config) -> None:
    """Rows as [all q | all k | all v] in one layer."""
    key = "decoder.layers.1.self_attention.linear_qkv.weight"
    sizes = transformer_settings(c)
    d, g = sizes["kv_channels"], sizes["num_query_groups"]
    heads = sizes["num_attention_heads"] // g
    q, k, v = torch.split(state[key].view(g, (heads + 2) * d, -1), [heads * d, d, d], dim=1)
    state[key] = torch.cat([part.reshape(-1, part.shape[-1]) for part in (q, k, v)])


def _no_qkv_bias(state: State, c: Config) -> None:
    state["decoder.layers.1.self_attention.linear_qkv.bias"].zero_()


def _rope_factor(state: State, c: Config) -> None:
    c["rope_scaling"] = c["rope_scaling"] | {"factor": 8.0 if c["rope_scaling"]["factor"] != 8.0 else 32.0}


def _rope_theta(state: State, c: Config) -> None:
    c["rope_theta"] = 10000.0


def _no_window(state: State, c: Config) -> None:
    c["sliding_window"] = None


def _norm_missing(state: State, c: Config) -> None:
    del state["decoder.layers.1.input_layernorm.weight"]


def _bias_added(state: State, c: Config) -> None:
    state["decoder.layers.1.mlp.linear_fc2.bias"] = torch.zeros(c["hidden_size"])


DAMAGE: dict[str, Callable[[State, Config], None]] = {
    "gate and up swapped": _swap_gate_up,
    "norms swapped": _swap_norms,
    "qkv not grouped": _ungroup_qkv,
    "qkv bias zero": _no_qkv_bias,
    "rope factor wrong": _rope_factor,
    "rope theta lost": _rope_theta,
    "window lost": _no_window,
    "norm missing": _norm_missing,
    "bias added": _bias_added,
}


def run(cases: dict[str, Case], work: Path, timeout: float = 300) -> dict[str, Outcome]:
    """Load and run every case; the outcomes have the same keys. `work` is an empty directory for the exchange."""
    (work / "cases.json").write_text(json.dumps({key: asdict(case) for key, case in cases.items()}))
    # One thread in each rank, and no torch.compile of small helpers.
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    log = work / "log.txt"
    with log.open("w") as stream, contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [sys.executable, __file__, str(work)], stdout=stream, stderr=stream, env=env, timeout=timeout, check=False
        )
    outcomes: dict[str, Outcome] = {}
    for file in sorted(work.glob("tp*pp*.pt")):
        for key, (logits, error) in torch.load(file, weights_only=True).items():
            outcomes[key] = Outcome(logits, error)
    lost = Outcome({}, "the oracle gave no result:\n" + log.read_text()[-2000:])
    return {key: outcomes.get(key, lost) for key in cases}


# Everything below runs in the process that `run` starts.


class _OnCpu(torch.overrides.TorchFunctionMode):
    """Tensors that megatron-core asks for on "cuda" are made on the CPU. No arithmetic is changed."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def _prepare() -> None:
    """Import megatron-core and replace its two questions to the CUDA runtime."""
    torch.set_num_threads(1)
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs  # noqa: F401
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    # Dropout is 0 everywhere, so there is no random state to keep.
    CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()


def _model(c: Config, case: Case, first: bool, last: bool) -> torch.nn.Module:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings = TransformerConfig(
        **transformer_settings(c),
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
    )
    model: torch.nn.Module = GPTModel(
        settings,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=padded(c["vocab_size"], case.divisor, case.tp),
        pre_process=first,
        post_process=last,
        parallel_output=False,
        **model_settings(c),
    )
    return model.eval()


def _rank_file(case: Case, t: int, p: int) -> Path:
    root = Path(case.checkpoint)
    iteration = int((root / "latest_checkpointed_iteration.txt").read_text())
    rank = f"mp_rank_{t:02d}" if case.pp == 1 else f"mp_rank_{t:02d}_{p:03d}"
    return root / f"iter_{iteration:07d}" / rank / "model_optim_rng.pt"


def _read(case: Case, t: int, p: int) -> tuple[State, Config]:
    """Tensors of the file of one rank and the source's config.json, damaged if the case says so."""
    c = json.loads((Path(case.hf) / "config.json").read_text())
    model = torch.load(_rank_file(case, t, p), map_location="cpu", weights_only=False)["model"]
    state: State = {key: value for key, value in model.items() if not key.endswith(EXTRA)}
    if case.damage:
        DAMAGE[case.damage](state, c)
    return state, c


def _fill(model: torch.nn.Module, state: State) -> None:
    """Put the tensors into the model. Raises ValueError if a key, a shape or a dtype differs."""
    want = {key: value for key, value in model.state_dict().items() if not key.endswith(EXTRA)}
    problems = [f"missing {key}" for key in sorted(want.keys() - state.keys())]
    problems += [f"unexpected {key}" for key in sorted(state.keys() - want.keys())]
    for key in sorted(want.keys() & state.keys()):
        have = (state[key].dtype, tuple(state[key].shape))
        if have != (want[key].dtype, tuple(want[key].shape)):
            problems.append(f"{key} is {have}, the model has {want[key].dtype}, {tuple(want[key].shape)}")
    if problems:
        raise ValueError("; ".join(problems[:6]))
    model.load_state_dict(state, strict=True)


def _forward(model: Any, ids: torch.Tensor, case: Case, rank: int) -> torch.Tensor:
    """Logits [b, s, v] on the last stage; on the others the hidden state [s, b, h] that was sent on."""
    p = rank // case.tp
    b, s = ids.shape
    if p > 0:
        hidden = torch.empty(s, b, model.config.hidden_size)
        torch.distributed.recv(hidden, rank - case.tp)
        model.set_input_tensor(hidden)
    with torch.no_grad():
        out: torch.Tensor = model(ids, torch.arange(s).expand(b, s), None)
    if p < case.pp - 1:
        torch.distributed.send(out.contiguous(), rank + case.tp)
    return out


def _together(step: Callable[[], Any], where: str) -> tuple[Any, str]:
    """What `step` returns, and the errors of all ranks: whether to go on is decided by all, or one would wait."""
    result, error = None, ""
    try:
        result = step()
    except Exception as e:  # the outcome of this case; the others go on
        error = f"{where}: {type(e).__name__}: {e}"
    errors = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(errors, error)
    return result, "\n".join(filter(None, errors))


def _outcome(case: Case, rank: int) -> tuple[dict[str, torch.Tensor], str]:
    """One case on one rank."""
    t, p = rank % case.tp, rank // case.tp
    where = f"tp rank {t}, pp rank {p}"
    read, error = _together(lambda: _read(case, t, p), where)
    if error:
        return {}, error
    state, c = read
    model = _model(c, case, first=p == 0, last=p == case.pp - 1)
    _, error = _together(lambda: _fill(model, state), where)
    if error:
        return {}, error
    return {name: _forward(model, torch.tensor(ids), case, rank) for name, ids in case.ids.items()}, ""


def _rank(rank: int, cases: dict[str, Case], tp: int, pp: int, work: Path) -> None:
    """All cases of one layout on one rank. The first rank of the last stage writes the outcomes."""
    from megatron.core import parallel_state
    from torch import distributed

    meeting = f"file://{work}/meeting-tp{tp}pp{pp}"
    wait = datetime.timedelta(seconds=120)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=tp * pp, timeout=wait)
    parallel_state.initialize_model_parallel(tp, pp)
    outcomes = {}
    with _OnCpu():
        for key, case in cases.items():
            outcomes[key] = _outcome(case, rank)
    if rank == tp * (pp - 1):
        torch.save(outcomes, work / f"tp{tp}pp{pp}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def _layouts(cases: dict[str, Case]) -> Iterator[tuple[int, int, dict[str, Case]]]:
    for tp, pp in sorted({(case.tp, case.pp) for case in cases.values()}):
        yield tp, pp, {key: case for key, case in cases.items() if (case.tp, case.pp) == (tp, pp)}


def main(work: Path) -> None:
    from torch import multiprocessing

    cases = {key: Case(**fields) for key, fields in json.loads((work / "cases.json").read_text()).items()}
    _prepare()
    for tp, pp, some in _layouts(cases):
        try:
            # Forks share the imports; nothing here has started a thread yet.
            start: Any = multiprocessing.start_processes  # type: ignore[attr-defined]
            start(_rank, (some, tp, pp, work), tp * pp, start_method="fork")
        except Exception as e:  # a rank died in the forward pass: the next layout can still run
            print(f"tp {tp} pp {pp}: {e}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
