"""Megatron-LM's own argument path on a machine without GPU: a script, run in a process of its own.

    PYTHONPATH=<Megatron-LM checkout> python trainer.py jobs.json results.json

jobs.json: a list of {name, argv, lenient, world} (world: the number of ranks to believe in). Each job goes through
parse_args, load_args_from_checkpoint (when argv has --use-checkpoint-args), validate_args and
core_transformer_config_from_args, then (unless bert) through the stock GPT builder with a GPTModel that only records
what it is given. code: {attribute of args: Python expression}, set before the config is made, as a user's copy of
pretrain_gpt.py would. The last job may add {ids, logits}: then the real GPTModel is built, loads the checkpoint of
--load strictly, and saves its logits [b, s, v] there; layers: a folder with ckptconv_layers.py to import from; builder:
whether the builder is that module's. results.json: per name {config, args, model} or {error}.

Only device queries, absent packages and `megatron/training/__init__.py` (which starts the whole trainer) are replaced;
no argument code is. Reference: Megatron-LM core_v0.12.0 to core_v0.19.0.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import io
import json
import os
import sys
import traceback
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typing_extensions

from mcore import _OnCpu

#: Package that may be absent -> modules to stand in for: itself, or those that import it unasked.
ABSENT = {
    "six": ("six",),
    "einops": ("einops",),
    "triton": (
        "megatron.core.transformer.custom_layers.batch_invariant_kernels",
        "megatron.core.transformer.moe.paged_stash",
        "megatron.core.transformer.moe.ops.paged_stash",
    ),
}


def stub(name: str, **attributes: object) -> types.ModuleType:
    """Put an empty package in sys.modules; what is asked of it and not given is a function that returns False."""
    module = types.ModuleType(name)
    module.__dict__.update(attributes, __path__=[])

    def missing(attribute: str) -> Callable[..., bool]:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return lambda *args, **kwargs: False

    module.__getattr__ = missing  # type: ignore[method-assign]
    sys.modules[name] = module
    return module


def prepare() -> None:
    """Everything that has to be in place before the first import of megatron."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    cuda: Any = torch.cuda
    cuda.get_device_capability = lambda *args, **kwargs: (9, 0)
    cuda.get_device_properties = lambda *args, **kwargs: types.SimpleNamespace(major=9, minor=0)
    cuda.current_device = lambda: torch.device("cpu")
    cuda.device_count = lambda: 1
    if not hasattr(typing, "override"):  # 0.18 and 0.19 want Python 3.12, but for no other reason
        typing.override = typing_extensions.override  # type: ignore[attr-defined]
    for package, names in ABSENT.items():
        if importlib.util.find_spec(package) is None:
            for name in names:
                stub(name)


def training() -> tuple[Any, Any]:
    """`megatron.training.arguments` and `.checkpointing` without running `megatron/training/__init__.py`."""
    megatron: Any = importlib.import_module("megatron")
    package: Any = types.ModuleType("megatron.training")
    package.__path__ = [str(Path(p, "training")) for p in megatron.__path__ if Path(p, "training").is_dir()]
    sys.modules["megatron.training"] = megatron.training = package
    variables = importlib.import_module("megatron.training.global_vars")
    for name in dir(variables):
        if name.startswith("get_"):
            setattr(package, name, getattr(variables, name))
    package.print_rank_0 = importlib.import_module("megatron.training.utils").print_rank_0
    return (importlib.import_module("megatron.training.arguments"),
            importlib.import_module("megatron.training.checkpointing"))  # fmt: skip


def resolve(argv: list[str], lenient: bool, code: dict[str, str]) -> tuple[argparse.Namespace, Any]:
    """The Namespace and TransformerConfig the trainer would work with. lenient: unknown flags are ignored."""
    arguments, checkpointing = training_modules
    sys.argv = ["pretrain_gpt.py", *argv]
    args = arguments.parse_args(ignore_unknown_args=lenient)
    if args.use_checkpoint_args:
        checkpointing.load_args_from_checkpoint(args)
    arguments.validate_args(args)
    known = {"torch": torch, "functools": functools, "megatron": sys.modules["megatron"]}
    for name, expression in code.items():
        setattr(args, name, eval(expression, known))
    return args, arguments.core_transformer_config_from_args(args)


def build(args: argparse.Namespace, config: Any) -> dict[str, object] | None:
    """What the stock trainer gives to GPTModel besides the config; None where it cannot be asked (before 0.15)."""
    checkout = Path(sys.modules["megatron.training.arguments"].__file__ or "").parents[2]
    if (checkout / "megatron/training/models/gpt.py").exists():  # 0.19: pretrain_gpt.py builds through a config
        made = importlib.import_module("megatron.training.argument_utils").gpt_config_from_args(args, config)
        return {name: getattr(made, name) for name in (
            "rotary_base", "rotary_percent", "rope_scaling", "rope_scaling_factor", "seq_len_interpolation_factor",
            "position_embedding_type", "vocab_size", "share_embeddings_and_output_weights",
        )} | {"max_sequence_length": made.seq_length}  # fmt: skip
    if not (checkout / "gpt_builders.py").exists():
        return None
    if "megatron.legacy.model" not in sys.modules:
        megatron = sys.modules["megatron"]
        megatron.__dict__["legacy"] = stub(
            "megatron.legacy", model=stub("megatron.legacy.model")
        )  # --use-legacy-models
    sys.path.insert(0, str(checkout))
    builders: Any = importlib.import_module("gpt_builders")
    state: Any = importlib.import_module("megatron.core.parallel_state")
    state.set_pipeline_model_parallel_rank(0)
    state.set_pipeline_model_parallel_world_size(args.pipeline_model_parallel_size)
    sys.modules["megatron.training.global_vars"].__dict__["_GLOBAL_ARGS"] = args
    given: dict[str, object] = {}
    real, builders.GPTModel = builders.GPTModel, lambda **kwargs: given.update(kwargs)
    builders.gpt_builder(args, True, True, config=config)
    builders.GPTModel = real
    return {name: value for name, value in given.items() if name not in ("config", "transformer_layer_spec")}


class NoTracker:
    """Stands in for the tracker of CUDA random states."""

    def fork(self, *args: object, **kwargs: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def add(self, *args: object, **kwargs: object) -> None:
        """Nothing to keep."""

    def is_initialized(self) -> bool:
        return True


def forward(args: argparse.Namespace, config: Any, ids: list[list[int]], builder: str) -> torch.Tensor:
    """Logits [b, s, v] of what gpt_builder of `builder` makes, loaded strictly from --load; one rank, float32."""
    distributed: Any = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    importlib.import_module("megatron.core.parallel_state").initialize_model_parallel(1, 1)
    tracker = NoTracker()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and hasattr(module, "get_cuda_rng_tracker"):
            module.__dict__["get_cuda_rng_tracker"] = lambda *args, **kwargs: tracker
    mask = torch.triu(torch.ones(1, 1, len(ids[0]), len(ids[0]), dtype=torch.bool), 1)
    model: Any = importlib.import_module(builder).gpt_builder(args, True, True, config=config).float().eval()
    saved = torch.load(Path(args.load, "release/mp_rank_00/model_optim_rng.pt"), weights_only=False)["model"]
    kept = model.load_state_dict(saved, strict=False)
    missing = [key for key in kept.missing_keys if not key.endswith("_extra_state")]
    if missing or kept.unexpected_keys:
        raise ValueError(f"missing {missing}, unexpected {kept.unexpected_keys}")
    tokens = torch.tensor(ids)
    with torch.no_grad(), _OnCpu():  # windows ask for a mask on "cuda"
        found: torch.Tensor = model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), mask)
    return found


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """What JSON can hold; functions by their name, the rest by its repr."""

    def one(value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, list | tuple):
            return [one(v) for v in value]
        return getattr(value, "__name__", None) or repr(value)

    return {name: one(value) for name, value in values.items()}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One job: {config, args, model} or {error}."""
    said = io.StringIO()
    os.environ["WORLD_SIZE"] = str(job["world"])
    if "layers" in job:
        sys.path.insert(0, job["layers"])
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            args, config = resolve(job["argv"], job["lenient"], job.get("code", {}))
            model = None if job.get("bert") else build(args, config)
            if "ids" in job:
                builder = "ckptconv_layers" if job.get("builder") else "gpt_builders"
                torch.save(forward(args, config, job["ids"], builder), job["logits"])
    except (Exception, SystemExit):  # reported by name; the other jobs go on
        return {"error": said.getvalue()[-2000:] + traceback.format_exc()[-3000:]}
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    fields |= {name: value for name, value in vars(config).items() if name.startswith("yarn_")}  # not declared
    return {"config": plain(fields), "args": plain(vars(args)), "model": None if model is None else plain(model)}


if __name__ == "__main__":
    prepare()
    training_modules = training()
    jobs, target = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    results = {job["name"]: run(job) for job in jobs}
    target.write_text(json.dumps(results))
