"""What Megatron-LM's loader `llama_mistral` was called at core_v0.5.0 to core_v0.7.0."""

from __future__ import annotations

from ckptconv.loaders.llama_mistral import add_arguments, from_hub, load_checkpoint, recognises

__all__ = ["add_arguments", "from_hub", "load_checkpoint", "recognises"]
