"""Logits of a checkpoint in any format, computed on a CPU from its messages in fp32: an independent look at a model.

It knows a ModelSpec and the keys of messages, and neither formats nor families nor another library's models: where it
gives the logits of transformers, a loader understood its source. Messages are taken one after the other, and of each
tensor no more than a block is in memory.

    embeddings -> transformer layer 0 -> ... -> final norm -> [output layer] -> logits
                  attention.py, mlp.py         norm.py

Not here: loaders (incoming.py runs them), what is printed (commands/logits.py).
"""

from __future__ import annotations

from ckptconv.forward.decoder import Result, check, refusal, run

__all__ = ["Result", "check", "refusal", "run"]
