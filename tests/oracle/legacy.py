"""The oracle for legacy models: Megatron-LM's own GPTModel and BertModel from before megatron-core, on CPU. A script.

    PYTHONPATH=<Megatron-LM checkout> python legacy.py jobs.json

Nothing of ckptconv is imported. jobs.json: a list of `Job` fields. A job goes through the trainer's parser, with
--use-checkpoint-args where its argv says so, builds all stages, and either loads them with the trainer's own
load_checkpoint (strictly, its qkv fix included), or gives them random weights and saves what generate_state_dict gives,
in the spelling and qkv order of `version`, with the trainer's own Namespace. Then logits are computed.

Each tensor rank is a fork (gloo); the pipeline stages of a rank are run one after the other in it. Replaced are device
queries, the CUDA kernel of LayerNorm (by torch's, the 1p weight is still made by the module) and absent packages.
Reference: Megatron-LM core_v0.12.0 `megatron/legacy`, `megatron/training/checkpointing.py`.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import trainer
from mcore import _OnCpu

RUN = [
    "--micro-batch-size", "1", "--train-iters", "1", "--lr", "1e-4", "--use-cpu-initialization",
    "--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion", "--attention-backend", "unfused",
    "--no-load-optim", "--no-load-rng", "--no-save-optim", "--no-save-rng", "--no-bias-swiglu-fusion",
    "--no-rope-fusion",
]  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One model. save: where a model of random weights goes, else it is loaded. ids: [b, s] tokens."""

    name: str
    argv: list[str]
    ids: list[list[int]]
    out: str
    bert: bool = False
    types: list[list[int]] = field(default_factory=list)
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    save: str = ""
    version: int = 3


def run(checkout: str, jobs: list[Job], work: Path) -> dict[str, dict[str, torch.Tensor] | str]:
    """What every job computes: {"logits": [b, s, v], "binary": [b, 2] of BERT}, or what went wrong in it."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
    here = Path(__file__).resolve().parent
    env = os.environ | {"PYTHONPATH": f"{checkout}{os.pathsep}{here}", "OMP_NUM_THREADS": "1", "RANK": "0",
                        "PYTHONWARNINGS": "ignore"}  # fmt: skip
    done = subprocess.run([sys.executable, str(here / "legacy.py"), str(work / "jobs.json")], env=env, timeout=500,
                          capture_output=True, text=True)  # fmt: skip
    return {
        job.name: torch.load(job.out) if Path(job.out).is_file() else Path(job.out + ".error").read_text()
        if Path(job.out + ".error").is_file() else done.stderr[-3000:]
        for job in jobs
    }  # fmt: skip


# In the process of Megatron-LM


def _norm(x: Any, weight: Any, bias: Any, shape: Any, eps: float) -> Any:
    """apex's fused_layer_norm_affine."""
    return torch.nn.functional.layer_norm(x, shape, weight, bias, eps)


def _prepare() -> Any:
    trainer.prepare()
    trainer.training_modules = trainer.training()  # type: ignore[attr-defined]
    trainer.stub("fused_layer_norm_cuda")
    legacy = importlib.import_module("megatron.legacy.model")
    importlib.import_module("megatron.legacy.model.fused_layer_norm").__dict__["fused_layer_norm_affine"] = _norm
    tracker = trainer.NoTracker()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.") and "get_cuda_rng_tracker" in vars(module):
            module.__dict__["get_cuda_rng_tracker"] = lambda *args, **kwargs: tracker
    return legacy


def _models(legacy: Any, args: Any, config: Any, job: Job) -> list[Any]:
    """Every virtual stage, in the order of its layers."""
    from megatron.core import parallel_state as state

    state.set_pipeline_model_parallel_world_size(job.pp)
    models = []
    for number in range(job.pp * job.vpp):
        _at(state, job, number)
        first, last = number == 0, number == job.pp * job.vpp - 1
        if job.bert:
            binary = args.bert_binary_head
            model = legacy.BertModel(config, 2 * binary, binary, False, first, last)
        else:
            model = legacy.GPTModel(config, 0, False, first, last)
        models.append(model.float().eval())
    return models


def _at(state: Any, job: Job, number: int) -> None:
    chunk, stage = divmod(number, job.pp)
    state.set_pipeline_model_parallel_rank(stage)
    if job.vpp > 1:
        state.set_virtual_pipeline_model_parallel_world_size(job.vpp)
        state.set_virtual_pipeline_model_parallel_rank(chunk)


def _random(models: list[Any], rank: int) -> None:
    """Weights of the same seeds in every layout: a rank's own where it has a slice of its own."""
    for number, model in enumerate(models):
        for name, value in model.named_parameters():
            own = rank if getattr(value, "tensor_model_parallel", False) else 0
            name = "head" if name == "word_embeddings.weight" or "word_embeddings" in name else name
            seed = zlib.crc32(f"{name} {number if '.layers.' in name else 0} {own}".encode())
            noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
            value.data.copy_(noise * 0.2 if value.dim() == 2 else 0.2 * noise + ("norm.weight" in name))


def _reordered(name: str, value: torch.Tensor, version: int, d: int) -> torch.Tensor:
    """qkv rows [n, 3, d] of one rank as older versions had them."""
    if value is None or "query_key_value" not in name or version > 1:
        return value
    rows = value.view(-1, 3, d, *value.shape[1:])
    rows = rows.transpose(0, 1) if version == 0 else rows.transpose(1, 2)
    return rows.reshape(value.shape)


def _older(model: dict[str, Any], version: int, d: int) -> dict[str, Any]:
    """The dicts of a stage as code of that version had them."""
    if version > 2:
        return model
    language = model["language_model"]
    layers = language.pop("encoder")
    language["transformer"] = {
        re.sub(r"_norm\.", "_layernorm.", name).replace(".self_attention.", ".attention."):
            _reordered(name, value, version, d)
        for name, value in layers.items()
    }  # fmt: skip
    if "lm_head" in model:
        model["lm_head"] = {name.replace("norm.", "layernorm."): value for name, value in model["lm_head"].items()}
    return model


def _save(checkpointing: Any, args: Any, models: list[Any], job: Job, rank: int) -> None:
    for stage in range(job.pp):
        chunks = models[stage :: job.pp]
        saved = checkpointing.generate_state_dict(args, chunks, None, None, None, iteration=7)
        saved["checkpoint_version"] = float(job.version)
        for key in [f"model{n}" for n in range(job.vpp)] if job.vpp > 1 else ["model"]:
            saved[key] = _older(saved[key], job.version, args.kv_channels)
        if job.version < 3:
            names = vars(saved["args"])
            names["model_parallel_size"] = names.pop("tensor_model_parallel_size")
            del names["pipeline_model_parallel_size"]
        place = Path(job.save, "iter_0000007", f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if job.pp > 1 else ""))
        place.mkdir(parents=True)
        torch.save(saved, place / "model_optim_rng.pt")
        if job.version < 3:
            names["tensor_model_parallel_size"] = names.pop("model_parallel_size")
            names["pipeline_model_parallel_size"] = job.pp
    Path(job.save, "latest_checkpointed_iteration.txt").write_text("7")


def _forward(models: list[Any], job: Job) -> dict[str, torch.Tensor]:
    ids, hidden = torch.tensor(job.ids), None
    mask = torch.triu(torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool), 1)
    for model in models:
        if hidden is not None:
            model.set_input_tensor(hidden)
        with torch.no_grad(), _OnCpu():
            if job.bert:
                hidden = model(ids, torch.ones_like(ids), torch.tensor(job.types) if job.types else None)
            else:
                hidden = model(ids, torch.arange(ids.shape[1]).expand_as(ids), mask)
    assert hidden is not None
    if not job.bert:
        return {"logits": hidden}
    return {"logits": hidden[0], **({"binary": hidden[1]} if hidden[1] is not None else {})}


def _rank(rank: int, job: Job, legacy: Any, store: str) -> None:
    from megatron.core import num_microbatches_calculator as calculator
    from megatron.core import parallel_state

    os.environ["WORLD_SIZE"] = str(job.tp * job.pp)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=job.tp)
    parallel_state.initialize_model_parallel(job.tp, 1)
    calculator.init_num_microbatches_calculator(0, None, 1, 1, 1)
    _, checkpointing = trainer.training_modules  # type: ignore[attr-defined]
    with _OnCpu():
        args, config = trainer.resolve(job.argv, True, {})
    args.consumed_train_samples = args.skipped_train_samples = args.consumed_valid_samples = 0
    args.model_type = importlib.import_module("megatron.core.enums").ModelType.encoder_or_decoder
    if getattr(args, "padded_vocab_size", None) is None:  # what the tokenizer does, which is not built
        multiple = args.make_vocab_size_divisible_by * job.tp
        args.padded_vocab_size = -(-args.vocab_size // multiple) * multiple
    sys.modules["megatron.training.global_vars"].__dict__["_GLOBAL_ARGS"] = args
    with _OnCpu():
        models = _models(legacy, args, config, job)
        if job.save:
            _random(models, rank)
            _save(checkpointing, args, models, job, rank)
        else:
            for stage in range(job.pp):
                _at(parallel_state, job, stage)
                chunks = models[stage :: job.pp]
                before = [value.clone() for model in chunks for value in model.parameters()]
                args.consumed_train_samples = args.skipped_train_samples = args.consumed_valid_samples = 0
                checkpointing.load_checkpoint(chunks, None, None, strict=True)
                after = [value for model in chunks for value in model.parameters()]
                untouched = [v.shape for v, w in zip(before, after, strict=True) if v.dim() == 2 and torch.equal(v, w)]
                if untouched:
                    raise ValueError(f"stage {stage}: nothing was loaded into {untouched}")
        _at(parallel_state, job, 0)
        found = _forward(models, job)
    if rank == 0:
        torch.save(found, job.out)
    torch.distributed.barrier()


def _fork(rank: int, job: Job, legacy: Any, store: str) -> None:
    try:
        _rank(rank, job, legacy, store)
    except BaseException:
        Path(job.out + ".error").write_text(f"rank {rank}: {traceback.format_exc()[-900:]}")
        os._exit(1)


def main(path: str) -> None:
    from torch import multiprocessing

    jobs = [Job(**fields) for fields in json.loads(Path(path).read_text())]
    legacy = _prepare()
    for job in jobs:
        with tempfile.TemporaryDirectory() as folder:
            start: Any = multiprocessing.start_processes  # type: ignore[attr-defined]
            try:
                start(_fork, (job, legacy, f"{folder}/store"), job.tp, start_method="fork")
            except Exception as error:  # this one has no result; the others go on
                print(f"{job.name}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
