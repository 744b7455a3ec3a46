"""torch_dist checkpoints through megatron-core's own `dist_checkpointing`, in the oracle's process (mcore.py).

What a trainer's save adds to the model is added by the library's own functions where it has some: the optimizer's
state by parameter (`make_sharded_optimizer_tensor`), flat buffers, objects of every rank.

Facts: megatron-core 0.16.1 `dist_checkpointing/serialization.py`, `dist_checkpointing/optimizer.py`,
`optimizer/distrib_optimizer.py`, `training/checkpointing.py`.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

Models = list[Any]


def _keys(models: Models) -> list[str]:
    return ["model"] if len(models) == 1 else [f"model{chunk}" for chunk in range(len(models))]


def load(models: Models, top: Path, strict: str) -> None:
    """Load what the tracker says into models full of NaN. Raises what megatron-core raises, ValueError for a NaN."""
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint.api import CheckpointException

    iteration = int((top / "latest_checkpointed_iteration.txt").read_text())
    directory = str(top / f"iter_{iteration:07d}")
    for model in models:
        for value in model.state_dict(keep_vars=True).values():
            if isinstance(value, torch.Tensor):
                value.data.fill_(float("nan"))
    common = dist_checkpointing.load_common_state_dict(directory)
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
    told = _grouped(metadata)
    wanted = {key: model.sharded_state_dict(metadata=told) for key, model in zip(_keys(models), models, strict=True)}
    try:
        got = dist_checkpointing.load(wanted, directory, strict=dist_checkpointing.validation.StrictHandling(strict))
    except CheckpointException as error:  # no Exception, it would end the process
        raise ValueError(str(error)) from error
    if got["iteration"] != iteration or got["checkpoint_version"] != 3.0 or got["args"].ckpt_format != "torch_dist":
        raise ValueError(f"common.pt says {got['iteration']}, {got['checkpoint_version']}, {got['args'].ckpt_format}")
    for key, model in zip(_keys(models), models, strict=True):
        model.load_state_dict(got[key], strict=True)
        lost = [name for name, value in model.state_dict().items() if value is not None and value.isnan().any()]
        if lost:
            raise ValueError(f"not filled: {lost}")


def _grouped(metadata: dict[str, Any] | None) -> dict[str, Any]:
    from megatron.core import parallel_state

    return {**(metadata or {}), "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def save(models: Models, args: Namespace, top: str, metadata: dict[str, Any], objects: str = "common.pt") -> None:
    """Save as a trainer does, with optimizer state. objects: `inside` as from core_v0.19 on, without a common.pt."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    directory = Path(top) / "iter_0000007"
    if rank == 0:
        directory.mkdir(parents=True)
    torch.distributed.barrier()
    torch.cuda.synchronize = lambda *args, **kwargs: None
    state: dict[str, Any] = {}
    for key, model in zip(_keys(models), models, strict=True):
        state[key] = model.sharded_state_dict(metadata=_grouped(metadata))
        state[f"optimizer {key}"] = _moments(model, state[key])
    flat = torch.arange(6.0) + rank
    state["buffers"] = ShardedTensor.from_rank_offsets(
        "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.bfloat16).bucket_idx_0.exp_avg",
        flat, (0, rank, world),
    )  # fmt: skip
    state["rng_state"] = ShardedObject("rng_state", [{"seed": rank}], (world,), (rank,), replica_id=0)
    state["rerun"] = ShardedObject("rerun_state_machine_state", {"mode": 0}, (world,), (rank,), replica_id=0)
    args.ckpt_format = "torch_dist"
    common = {
        "args": args, "checkpoint_version": 3.0, "iteration": 7, "num_floating_point_operations_so_far": 1e15,
        "optimizer": {"param_groups": [{"lr": 1e-4, "step": 7}]}, "opt_param_scheduler": {"max_lr": 1e-4},
    }  # fmt: skip
    if objects == "inside":
        common = {**common, "content_metadata": metadata}
        state["common"] = ShardedObject("common_state", common, (1,), (0,), replica_id=rank)
        common = {}
    dist_checkpointing.save({**state, **common}, str(directory), content_metadata=dict(metadata))
    if rank == 0:
        (Path(top) / "latest_checkpointed_iteration.txt").write_text("7")
        if objects == "inside":
            (directory / "common.pt").unlink()
    torch.distributed.barrier()


def _moments(model: Any, sharded: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's state of every parameter, in the keys of an optimizer that is not distributed."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

    found = {}
    for name, tensor in sharded.items():
        if isinstance(tensor, (ShardedTensor, ShardedTensorFactory)):
            for kind in ("exp_avg", "fp32_param"):
                moment = torch.full_like(tensor.data, 3.0, dtype=torch.float32)
                found[f"{kind} {name}"] = make_sharded_optimizer_tensor(tensor, moment, f"optimizer.state.{kind}")
    return found
