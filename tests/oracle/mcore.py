"""The oracle for mp_rank files: NVIDIA's GPTModel (megatron-core 0.16.1) loads them strictly and runs them on CPU.

Nothing of ckptconv is imported. The model is configured from the config.json of the Hugging Face source by the rules
written out in settings.py and settings_*.py, so neither ckptconv's tables nor the `args` in the files can excuse a
wrong tensor.

`run` starts this file as a script in a process of its own: megatron-core is imported once and patched for CPU there,
and every rank of every layout is a fork of that process (gloo, pipeline hops by send and recv). Only the local layer
spec exists without Transformer Engine, and of experts only SequentialMLP. A model with MTP layers gives their logits,
too, which the library itself only turns into a loss. Legacy GroupedMLP is the real class with its kernel replaced.

Facts: megatron-core 0.16.1 `models/gpt/gpt_model.py`, `transformer/transformer_config.py`, `transformer/utils.py`.
Shape legend: b batch, s tokens, h hidden, v vocabulary, a query heads, g query groups, d head dim, f ffn.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import json
import os
import subprocess
import sys
import types
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import dist_files
import settings

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
    ep: int = 1
    grouped: str = ""  # where a model of random weights with legacy GroupedMLP is saved, which is run instead
    vpp: int = 1
    split: Config = field(default_factory=dict)  # TransformerConfig fields that place layers otherwise than evenly
    dist: Config = field(default_factory=dict)  # torch_dist (dist_files.py): `strict` of `load`, or what `save` takes

    @property
    def layout(self) -> tuple[int, int, int, int]:
        """tp, pp, ep, vpp."""
        return self.tp, self.pp, self.ep, self.vpp


@dataclass(frozen=True)
class Outcome:
    """Logits [b, s, v] by the names of `ids` (those of MTP layer N: `NAME mtp N`), or what went wrong."""

    logits: dict[str, torch.Tensor]
    error: str = ""


def transformer_settings(c: Config) -> dict[str, Any]:
    """TransformerConfig fields that a config.json stands for."""
    return settings.of(c).transformer_settings(c)


def model_settings(c: Config) -> dict[str, Any]:
    """GPTModel arguments that a config.json stands for."""
    return settings.of(c).model_settings(c)


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
    for file in sorted(work.glob("tp*.pt")):
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


class _Stream:
    """Stands where a CUDA stream is made but never used."""


def _prepare() -> None:
    """Import megatron-core, replace its questions to the CUDA runtime, and mend what is wrong in it without a GPU."""
    torch.set_num_threads(1)
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    torch.cuda.Stream = _Stream  # type: ignore[assignment, misc]
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs  # noqa: F401
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.moe import grouped_gemm_util, moe_utils

    # Dropout is 0 everywhere, so there is no random state to keep.
    CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()
    # The kernel of GroupedMLP is for GPUs.
    grouped_gemm_util.assert_grouped_gemm_is_available = lambda: None
    grouped_gemm_util.ops = types.SimpleNamespace(gmm=_gmm)
    # Names that are only bound where Transformer Engine is installed.
    moe_utils.te_general_gemm = None
    multi_latent_attention.HAVE_TE = False
    # Multi-latent attention tells the core attention its widths, which only Transformer Engine's understands.
    make = DotProductAttention.__init__

    def init(self: Any, *args: Any, k_channels: int = 0, v_channels: int = 0, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        if v_channels:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    DotProductAttention.__init__ = init


def _model(c: Config, case: Case, p: int, chunk: int) -> torch.nn.Module:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs, get_gpt_mtp_block_spec
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    ours = settings.of(c)
    said = ours.transformer_settings(c)
    kind = MLATransformerConfig if said.get("multi_latent_attention") else TransformerConfig
    fixed = {
        "activation_func": torch.nn.functional.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "masked_softmax_fusion": False,
        "moe_token_dispatcher_type": "allgather",  # the other one needs streams
        "moe_router_load_balancing_type": "none",  # of training
        "moe_aux_loss_coeff": 0.0,
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
        "tensor_model_parallel_size": case.tp,
        "pipeline_model_parallel_size": case.pp,
        "expert_model_parallel_size": case.ep,
        "expert_tensor_parallel_size": case.tp,  # as the rank files have it
        "moe_grouped_gemm": bool(case.grouped),
        "virtual_pipeline_model_parallel_size": case.vpp if case.vpp > 1 else None,
        **case.split,
    }
    config = kind(**{**fixed, **said})
    for name, value in ours.attributes(c).items():
        setattr(config, name, value)
    stage = {"vp_stage": chunk} if case.vpp > 1 else {}
    layers = ours.layer_spec(c, config, **stage)
    mtp: Config = {}
    if config.mtp_num_layers:
        inner = layers
        if config.num_moe_experts:  # the stage may have no layers to take it from
            inner = get_gpt_decoder_layer_specs(
                config, use_transformer_engine=False, normalization=config.normalization
            )[-1]
        mtp["mtp_block_spec"] = get_gpt_mtp_block_spec(config, inner, use_transformer_engine=False, **stage)
    model: torch.nn.Module = ours.model(
        c,
        config,
        layers,
        vocab_size=padded(c["vocab_size"], case.divisor, case.tp),
        pre_process=(p, chunk) == (0, 0),
        post_process=(p, chunk) == (case.pp - 1, case.vpp - 1),
        parallel_output=False,
        **mtp,
        **stage,
    )
    ours.after(model, c)
    return model.eval()


def _rank_file(case: Case, t: int, p: int, e: int) -> Path:
    root = Path(case.checkpoint)
    iteration = int((root / "latest_checkpointed_iteration.txt").read_text())
    rank = f"mp_rank_{t:02d}" + (f"_{p:03d}" if case.pp > 1 else "") + (f"_{e:03d}" if case.ep > 1 else "")
    return root / f"iter_{iteration:07d}" / rank / "model_optim_rng.pt"


def _read(case: Case, t: int, p: int, e: int) -> tuple[list[State], Config]:
    """Tensors of the file of one rank by virtual stage and the source's config.json, damaged if the case says so."""
    c = json.loads((Path(case.hf) / "config.json").read_text())
    if (layers := Path(case.checkpoint) / "ckptconv_layers.json").is_file():
        c["custom_layers"] = str(layers)
    if "strict" in case.dist:
        return [], c
    root = torch.load(_rank_file(case, t, p, e), map_location="cpu", weights_only=False)
    keys = [f"model{chunk}" for chunk in range(case.vpp)] if case.vpp > 1 else ["model"]
    states = [{k: value for k, value in root[key].items() if not k.endswith(EXTRA)} for key in keys]
    if case.damage:
        DAMAGE[case.damage](states[0], c)
    return states, c


def _fill(model: torch.nn.Module, state: State) -> None:
    """Put the tensors into the model. Raises ValueError if a key, a shape or a dtype differs."""
    want = {key: value for key, value in model.state_dict().items() if not key.endswith(EXTRA)}
    # megatron-core 0.17 renamed the layer inside an MTP layer; files have its name unless told otherwise.
    state = {key.replace(".mtp_model_layer.", ".transformer_layer."): value for key, value in state.items()}
    problems = [f"missing {key}" for key in sorted(want.keys() - state.keys())]
    problems += [f"unexpected {key}" for key in sorted(state.keys() - want.keys())]
    for key in sorted(want.keys() & state.keys()):
        have = (state[key].dtype, tuple(state[key].shape))
        if have != (want[key].dtype, tuple(want[key].shape)):
            problems.append(f"{key} is {have}, the model has {want[key].dtype}, {tuple(want[key].shape)}")
    if problems:
        raise ValueError("; ".join(problems[:6]))
    model.load_state_dict(state, strict=True)


def _save(model: torch.nn.Module, case: Case, t: int, p: int, e: int) -> None:
    """Give a model with GroupedMLP random weights and save it as Megatron does, with the args of `checkpoint`."""
    for module in model.modules():
        if type(module).__name__ == "GroupedMLP":  # it asserts bf16, but computes in what it is given
            module.config = copy.copy(module.config)
            module.config.bf16 = True
    for name, value in model.named_parameters():
        mine = (t, e) if ".experts." in name else (t,) if getattr(value, "tensor_model_parallel", False) else ()
        stage = p if "layers." in name else 0  # MTP's copy of the embedding is that of the first stage
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {stage} {mine}".encode()))
        noise = torch.randn(value.shape, generator=generator)
        value.data.copy_(noise / value.shape[1] ** 0.5 if value.dim() == 2 else 1 + 0.2 * noise)
    source = _rank_file(case, t, p, e)
    args = copy.copy(torch.load(source, map_location="cpu", weights_only=False)["args"])
    args.moe_grouped_gemm = True
    target = Path(case.grouped) / source.relative_to(case.checkpoint)
    target.parent.mkdir(parents=True)
    torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 1, "model": model.state_dict()}, target)
    (Path(case.grouped) / "latest_checkpointed_iteration.txt").write_text("1")


def _gmm(rows: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor, trans_b: bool = False) -> torch.Tensor:
    """What `grouped_gemm.ops.gmm` computes: every expert's rows [n, i] times its weight [i, o]."""
    parts = rows.split(counts.tolist())
    return torch.cat([part @ weight for part, weight in zip(parts, weights, strict=True)])


def _forward(models: list[Any], c: Config, ids: torch.Tensor, case: Case, rank: int) -> dict[str, torch.Tensor]:
    """Logits [b, s, v] on the last stage, by "" or " mtp N"; on the others a hidden state [s, b, h] is sent on."""
    stride = case.tp * case.ep
    p, others = rank // stride, rank % stride
    b, s = ids.shape
    found: dict[str, torch.Tensor] = {}
    for chunk, model in enumerate(models):
        if (p, chunk) != (0, 0):
            hidden = torch.empty(s, b, model.config.hidden_size)
            torch.distributed.recv(hidden, (p - 1) % case.pp * stride + others)
            model.set_input_tensor(hidden)
        further: dict[str, torch.Tensor] = {}
        with torch.no_grad(), _mtp_logits(model, further):
            out: dict[str, torch.Tensor] = settings.of(c).run(model, ids)
        if (p, chunk) != (case.pp - 1, case.vpp - 1):
            torch.distributed.send(out[""].contiguous(), (p + 1) % case.pp * stride + others)
        found = {**out, **further}
    return found


@contextlib.contextmanager
def _mtp_logits(model: Any, out: dict[str, torch.Tensor]) -> Iterator[None]:
    """Put the logits of MTP layers into `out`, and go on as without these layers: the model wants labels for them."""
    mtp = getattr(model, "mtp", None)
    if mtp is None:
        yield
        return
    count = model.config.mtp_num_layers
    tied = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None

    def hook(module: Any, args: Any, hidden: torch.Tensor) -> torch.Tensor:
        first, *others = hidden.chunk(1 + count, dim=0)
        for n, one in enumerate(others):
            out[f" mtp {n}"] = model.output_layer(one, weight=tied)[0].transpose(0, 1)
        model.config.mtp_num_layers = None
        return first

    handle = mtp.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
        model.config.mtp_num_layers = count


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
    t, e, p = rank % case.tp, rank // case.tp % case.ep, rank // (case.tp * case.ep)
    where = f"tp rank {t}, pp rank {p}, ep rank {e}"
    read, error = _together(lambda: _read(case, t, p, e), where)
    if error:
        return {}, error
    states, c = read
    # Copies of the embedding are made equal by a reduction that stages of MTP layers alone do not all take part in;
    # here the files have to.
    with mock.patch.object(torch.distributed, "all_reduce", return_value=None):
        models, error = _together(lambda: [_model(c, case, p, chunk) for chunk in range(case.vpp)], where)
    if error:
        return {}, error

    def filled() -> None:
        if case.grouped:
            _save(models[0], case, t, p, e)
            return
        if "strict" in case.dist:
            dist_files.load(models, Path(case.checkpoint), case.dist["strict"])
            return
        for model, state in zip(models, states, strict=True):
            _fill(model, state)
        if case.dist:
            args = torch.load(_rank_file(case, t, p, e), map_location="cpu", weights_only=False)["args"]
            dist_files.save(models, args, **case.dist)

    _, error = _together(filled, where)
    if error:
        return {}, error
    logits: dict[str, torch.Tensor] = {}
    for name, ids in case.ids.items():
        logits |= {name + kind: out for kind, out in _forward(models, c, torch.tensor(ids), case, rank).items()}
    return logits, ""


def _rank(rank: int, cases: dict[str, Case], tp: int, pp: int, ep: int, vpp: int, work: Path) -> None:
    """All cases of one layout on one rank. The first rank of the last stage writes the outcomes.

    Expert ranks are data-parallel ranks with the same input.
    """
    from megatron.core import parallel_state
    from torch import distributed

    name = f"tp{tp}pp{pp}ep{ep}vpp{vpp}"
    wait = datetime.timedelta(seconds=120)
    distributed.init_process_group(
        "gloo", init_method=f"file://{work}/meeting-{name}", rank=rank, world_size=tp * pp * ep, timeout=wait
    )
    parallel_state.initialize_model_parallel(
        tp, pp, vpp if vpp > 1 else None, expert_model_parallel_size=ep, expert_tensor_parallel_size=tp
    )
    outcomes = {}
    with _OnCpu():
        for key, case in cases.items():
            outcomes[key] = _outcome(case, rank)
    if rank == tp * ep * (pp - 1):
        torch.save(outcomes, work / f"{name}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def _layouts(cases: dict[str, Case]) -> Iterator[tuple[tuple[int, int, int, int], dict[str, Case]]]:
    for layout in sorted({case.layout for case in cases.values()}):
        yield layout, {key: case for key, case in cases.items() if case.layout == layout}


def main(work: Path) -> None:
    from torch import multiprocessing

    cases = {key: Case(**fields) for key, fields in json.loads((work / "cases.json").read_text()).items()}
    _prepare()
    for (tp, pp, ep, vpp), some in _layouts(cases):
        try:
            # Forks share the imports; nothing here has started a thread yet.
            start: Any = multiprocessing.start_processes  # type: ignore[attr-defined]
            start(_rank, (some, tp, pp, ep, vpp, work), tp * pp * ep, start_method="fork")
        except Exception as e:  # a rank died in the forward pass: the next layout can still run
            print(f"tp {tp} pp {pp} ep {ep} vpp {vpp}: {e}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
