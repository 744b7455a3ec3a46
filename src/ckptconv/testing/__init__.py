"""Whether a loader or a saver of yours keeps to the protocol, and what is wrong with it in plain words.

    python -m ckptconv.testing loader_mine --load-dir DIR [flags of the loader]
    python -m ckptconv.testing saver_mine [--loader NAME] [flags of the saver]

A loader is run on a checkpoint, and all that it sends is checked, also after the first mistake. A saver gets small
models of several kinds: it has to take every tensor of a model or to refuse the model, and to stop at `exit`. With
--loader, what it wrote is read back with that loader and has to be what was sent, bit for bit. Nothing is written
outside a temporary directory. Exit code 4 when something is wrong.

In a test: `assert not ckptconv.testing.check_loader("mine", "a/checkpoint").wrong`.
"""

from __future__ import annotations

from ckptconv.testing.loading import check_loader
from ckptconv.testing.report import Report
from ckptconv.testing.saving import check_saver

__all__ = ["Report", "check_loader", "check_saver"]
