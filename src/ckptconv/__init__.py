"""ckptconv: any LLM training checkpoint into any other, bit-exact, at the speed of the disk, in bounded memory."""

from __future__ import annotations

__all__: list[str] = []
