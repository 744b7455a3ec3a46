"""`examples/megatron_llm.sh`, whose commands are those of the format's page, ends well; it compares the weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_example(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PATH": path}
    command = ["sh", str(ROOT / "examples" / "megatron_llm.sh"), str(tmp_path / "work")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("every weight is the same after three conversions\n")
