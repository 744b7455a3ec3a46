"""Starts ranks by forking: what they import is imported here once, torch alone would take each of them two seconds.

A line of JSON asks for a rank (its directory, environment, words and log) or for the exit code of one.
"""

import json
import os
import runpy
import subprocess
import sys

import torch.distributed  # noqa: F401

from ckptconv import conversion, families, together, verify, writing  # noqa: F401
from ckptconv.loaders import hf, megatron_mcore  # noqa: F401
from ckptconv.savers import hf as hf_saver  # noqa: F401
from ckptconv.savers import megatron_mcore as megatron_mcore_saver  # noqa: F401

for line in sys.stdin:
    asked = json.loads(line)
    if "poll" in asked:
        pid, status = os.waitpid(asked["poll"], os.WNOHANG)
        answer = os.waitstatus_to_exitcode(status) if pid else None
    else:
        answer = os.fork()
        if not answer:
            break
    print(json.dumps(answer), flush=True)
else:
    sys.exit()

os.setsid()
os.chdir(asked["cwd"])
log, nothing = os.open(asked["log"], os.O_WRONLY | os.O_CREAT), os.open(os.devnull, os.O_RDONLY)
for old, new in ((nothing, 0), (log, 1), (log, 2)):
    os.dup2(old, new)
os.environ.clear()
os.environ.update(asked["env"])
sys.path[:1] = asked["env"]["PYTHONPATH"].split(os.pathsep)
if asked["enter"]:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    with open(asked["enter"]) as namespace:
        if libc.setns(namespace.fileno(), 0):
            raise OSError(ctypes.get_errno(), "setns")
if asked["mounts"]:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000):  # CLONE_NEWNS
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    for source, target in asked["mounts"]:
        subprocess.run(["mount", "--bind", source, target], check=True)
sys.argv = ["ckptconv", *asked["words"]]
runpy.run_path(asked["meddling"])
try:
    runpy.run_module("ckptconv", run_name="__main__", alter_sys=True)
except SystemExit as end:
    if asked["properly"]:
        raise
    sys.stderr.flush()
    os._exit(end.code)  # to take the interpreter and torch down takes half a second
