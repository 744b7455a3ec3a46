"""`examples/megatron_mcore.sh` ends well, and what comes back is what went in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]


def test_the_example(hf: Callable[..., Path], tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT / "src")}
    command = ["sh", str(ROOT / "examples" / "megatron_mcore.sh"), str(hf("llama2")), str(tmp_path / "work")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--num-layers 4" in done.stdout
    back, want = (load_file(d / "model.safetensors") for d in (tmp_path / "work" / "hf", hf("llama2")))
    assert back.keys() == want.keys() and all(torch.equal(back[name], want[name]) for name in want)
