"""What tests change in a rank, in its loader's process and its saver's: limits of time, and where the loader stops.

CKPTCONV_TEST is JSON: `constants`, module.NAME -> value; `hold`, rank -> [number of a message, path]: before it sends
that message the rank's loader makes the file and waits until it is gone.
"""

import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path

_asked = json.loads(os.environ.get("CKPTCONV_TEST", "{}"))
_saver = any("spawn_main" in word for word in sys.orig_argv)
_loader = "ckptconv" in sys.orig_argv or __name__ == "<run_path>"  # zygote.py runs this file
if _saver or _loader:
    for _name, _value in _asked.get("constants", {}).items():
        _module, _, _constant = _name.rpartition(".")
        setattr(import_module(f"ckptconv.{_module}"), _constant, _value)

_held = _asked.get("hold", {}).get(os.environ.get("RANK"))
if _held and _loader:
    from ckptconv import transport

    class _Holding(transport.Sender):
        _count = 0

        def put(self, item: object, *rest: object) -> None:
            number, path = _held
            if self._count == number:
                Path(path).touch()
                while Path(path).exists():
                    time.sleep(0.05)
            self._count += 1
            super().put(item, *rest)

    transport.Sender = _Holding
