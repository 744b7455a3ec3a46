"""ckptconv: any LLM training checkpoint into any other, bit-exact, at the speed of the disk, in bounded memory.

    import ckptconv

    ckptconv.convert("llama", "mcore", saver="megatron_mcore", target_tp=2)
    for message in ckptconv.open("mcore"):
        print(message.name, message["qkv weight"].norm() if "qkv weight" in message else "")

api.py says what these do. Nothing else is imported before one of them is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptconv.api import Checkpoint, Message, convert, open
    from ckptconv.errors import CkptconvError

__all__ = ["Checkpoint", "CkptconvError", "Message", "convert", "open"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ckptconv' has no attribute {name!r}")
    from ckptconv import api

    return getattr(api, name)
