"""Rank files with an optimizer far larger than memory should be: the weights are read, of the rest nothing is kept."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import legacy_models as hand
import torch
from legacy_models import GPT

from ckptconv.containers import torchzip
from ckptconv.containers.plan import Slot

#: Bytes of Adam's two states in each of two rank files; holes on the disk, but not in memory.
STATE = 1 << 30
MOST = 32 << 20


def sparse(path: Path, root: dict[str, Any], states: int) -> None:
    """The file with `root`'s tensors, and an optimizer of that many states of holes."""
    tensors: dict[str, torch.Tensor] = {}

    def slots(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {key: slots(item, f"{name}.{key}") for key, item in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        tensors[name] = value
        return Slot(name, "float32", tuple(value.shape))

    args = Namespace(**{key: value for key, value in vars(root["args"]).items() if key != "params_dtype"})
    state = {n: {kind: Slot(f"{kind} {n}", "float32", (STATE // 8,)) for kind in ("exp_avg", "exp_avg_sq")}
             for n in range(states)}  # fmt: skip
    more = {"optimizer": {"optimizer": {"state": state, "param_groups": [{"lr": 1e-4, "params": [0]}]}},
            "rng_state": [{"random_rng_state": (3, list(range(624)), None)}]}  # fmt: skip
    whole = root | {"args": args, "model": slots(root["model"], "model"), **(more if states else {})}
    plan = torchzip.plan(whole)
    with open(path, "wb") as file:
        file.truncate(plan.size)
        for name, tensor in tensors.items():
            file.seek(plan.offsets[name])
            file.write(tensor.numpy().tobytes())

        def put(at: int, data: bytes) -> None:
            file.seek(at)
            file.write(data)

        plan.finish(put, dict.fromkeys(plan.slots, 0))


def peak(source: Path, out: Path) -> int:
    """Most resident bytes of a process of the conversion."""
    command = [sys.executable, "-m", "ckptconv", "--load-dir", source, "--save-dir", out, "--saver", "hf"]
    process = subprocess.Popen([*map(str, command), "--true-vocab-size", "131"], stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return used.ru_maxrss << 10


def test_peak_memory_does_not_grow_with_the_optimizer(tmp_path: Path) -> None:
    w, found = hand.weights(GPT), {}
    for states in (0, 1):
        source = hand.write(
            tmp_path / f"{states}", GPT, w, pp=2,
            change=lambda t, p, root: vars(root["args"]).pop("params_dtype"),
        )  # fmt: skip
        for path in sorted(source.glob("*/*/model_optim_rng.pt")):
            sparse(path, torch.load(path, weights_only=False), states)
        out = tmp_path / f"hf {states}"
        found[states] = peak(source, out), {p.name: p.read_bytes() for p in out.glob("*.safetensors")}
        total = sum(path.stat().st_size for path in source.glob("*/*/model_optim_rng.pt"))
        assert (total > STATE) == (states > 0)
    assert found[1][1] == found[0][1]
    assert found[1][0] < found[0][0] + MOST < STATE
