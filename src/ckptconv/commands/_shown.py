"""What commands print: sizes, models, layouts, for a reader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptconv.joining import Shards
    from ckptconv.ops import Tile
    from ckptconv.sharding import Placement
    from ckptconv.spec import ModelSpec

#: Ranks whose slices are listed one by one.
_LISTED = 8


def size(nbytes: int) -> str:
    """`1.5 GB`: three digits, powers of ten as disks are sold."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.3g} {name}" if nbytes < 999.5 * unit else f"{nbytes / unit:.0f} {name}"
    return f"{nbytes} bytes"


def count(number: int, what: str) -> str:
    """`1 file`, `2 files`."""
    return f"{number:,} {what}" + "s" * (number != 1)


def table(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Lines under heads; a head is said once."""
    lines, last = [], ""
    for head, text in rows:
        for line in text.splitlines():
            lines.append(f"{head if head != last else '':<12}{line}")
            last = head
    return lines


def span(numbers: Sequence[int]) -> str:
    """`3`, `0..3`, or with gaps `0, 2, 4`."""
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}..{numbers[-1]}"
    return ", ".join(map(str, numbers))


# The model


def model(spec: ModelSpec) -> Iterator[str]:
    """What a model is, in a few lines."""
    yield (
        f"{spec.num_layers} layers of {spec.hidden_size}, ffn {spec.ffn_hidden_size}, {spec.num_attention_heads} heads "
        f"of {spec.kv_channels} in {count(spec.num_query_groups, 'query group')}, vocabulary {spec.vocab_size}, "
        f"{spec.max_position_embeddings} positions"
    )
    head = "tied to the embedding" if spec.tied else "untied"
    norm = f"{spec.norm} {spec.norm_epsilon:g}"
    yield f"{norm}, {spec.activation}{' gated' if spec.gated else ''}, output layer {head}, {spec.dtype}"
    if spec.encoder_layers:
        yield f"encoder of {spec.encoder_layers} layers"
    if spec.moe:
        moe = spec.moe
        shared = f", shared experts of {moe.shared_ffn_hidden_size}" if moe.shared_ffn_hidden_size else ""
        yield (
            f"{moe.num_experts} experts of {moe.ffn_hidden_size} in {count(sum(moe.layers), 'layer')}, {moe.topk} per "
            f"token by {moe.score}{shared}"
        )
    if spec.mla:
        mla = spec.mla
        yield (
            f"multi-latent attention: latents q {mla.q_lora_rank or 'none'}, kv {mla.kv_lora_rank}; head dims "
            f"{mla.qk_head_dim} + {mla.qk_rope_head_dim} rotary, values {mla.v_head_dim}"
        )
    if spec.mtp_layers:
        yield count(spec.mtp_layers, "layer") + " for multi-token prediction"
    yield "positions: " + _positions(spec)


def _positions(spec: ModelSpec) -> str:
    kinds = [name for name, has in (("learned", spec.learned_positions), ("alibi", spec.alibi),
                                    ("relative buckets", spec.relative_buckets)) if has]  # fmt: skip
    if spec.rope:
        text = f"rope theta {spec.rope.theta:g}"
        if spec.rope.kind != "default":
            text += f", {spec.rope.kind} " + " ".join(f"{key} {value}" for key, value in spec.rope.scaling.items())
        kinds.append(text + (f", {100 * spec.rope.percent:g} % of a head" if spec.rope.percent != 1 else ""))
    if spec.sliding_window:
        kinds.append(f"window {spec.sliding_window}")
    return ", ".join(kinds) or "none"


# The layout


def layout(shards: Shards) -> dict[str, Any]:
    """Sizes, what each stage holds (a list for each of its chunks), and the slices of ranks, one layer of each kind."""
    found = shards.layout
    stages: list[list[dict[str, Any]]] = [
        [{"layers": list(found.layers_of(stage, chunk)), "also": []} for chunk in range(found.vpp)]
        for stage in range(found.pp)
    ]
    slices: dict[tuple[str, tuple[str, ...]], list[dict[str, Any]]] = {}
    for message in shards.messages.values():
        placed = shards.placed(message)
        if message.layer is None or message.layer >= found.num_layers or message.template.startswith("encoder"):
            for placement in placed:
                chunk = placement.chunk if placement.chunk is not None else found.vpp - 1 if placement.stage else 0
                also = stages[placement.stage][chunk]["also"]
                name = message.name + " (copy)" * placement.row.copy
                if name not in also and not (placement.row.copy and message.name in also):
                    also.append(name)
        slices.setdefault((message.template, tuple(message.shapes)), _slices(message.name, placed))
    return {
        "tp": found.tp, "pp": found.pp, "vpp": found.vpp, "ep": found.ep, "stages": stages,
        "experts": [
            [e for e in range(found.num_experts) if found.expert_of(e)[0] == rank] for rank in range(found.ep)
        ] if found.num_experts else [],
        "slices": [one for each in slices.values() for one in each],
    }  # fmt: skip


def _slices(message: str, placed: Iterable[Placement]) -> list[dict[str, Any]]:
    """What of each key a tensor rank holds: of an expert's key the first expert's."""
    found = []
    for placement in placed:
        if placement.row.copy or placement.expert:
            continue
        for key, shape in zip(placement.keys, placement.shapes, strict=True):
            tiles: dict[int, list[Tile]] = {}
            for tile in placement.tiles(key):
                tiles.setdefault(tile.part, []).append(tile)
            whole = placement.row.cut.replicated or placement.tp == 1
            ranks = [] if whole else [rectangles(tiles.get(rank, []), shape) for rank in range(placement.tp)]
            found.append({
                "message": message, "key": key, "shape": list(shape), "tensor": placement.name, "ranks": ranks,
                "of_each_expert": placement.row.expert,
            })  # fmt: skip
    return found


def rectangles(tiles: Sequence[Tile], shape: Sequence[int]) -> str:
    """`rows 0:8+16:24`, columns where those are cut, `all`, or `nothing`."""
    from ckptconv.lazy import matrix

    if not tiles:
        return "nothing"
    rows, cols = _ranges((t.row, t.rows) for t in tiles), _ranges((t.col, t.cols) for t in tiles)
    cut = {name: text for name, text, size in zip(("rows", "columns"), (rows, cols), matrix(tuple(shape)), strict=True)
           if text != f"0:{size}"}  # fmt: skip
    return " ".join(f"{name} {text}" for name, text in cut.items()) or "all"


def _ranges(spans: Iterable[tuple[int, int]]) -> str:
    """Runs of numbers, those that touch joined."""
    found: list[list[int]] = []
    for start, length in sorted(set(spans)):
        if found and start <= found[-1][1]:
            found[-1][1] = max(found[-1][1], start + length)
        else:
            found.append([start, start + length])
    return "+".join(f"{start}:{stop}" for start, stop in found)


def layout_lines(found: dict[str, Any]) -> Iterator[str]:
    """The map: sizes, a line for each stage, then how tensor ranks share what."""
    sizes = {name: found[name] for name in ("tp", "pp", "vpp", "ep")}
    yield " ".join(f"{name} {value}" for name, value in sizes.items() if value > 1 or name in ("tp", "pp"))
    for number, chunks in enumerate(found["stages"]):
        yield f"stage {number}: " + " | ".join(_chunk(chunk) for chunk in chunks)
    if found["ep"] > 1:
        yield "experts: " + " | ".join(f"{span(experts)} on ep {n}" for n, experts in enumerate(found["experts"]))
    if found["tp"] == 1:
        return
    yield f"slices of tensor ranks 0..{found['tp'] - 1}, of one layer of each kind:"
    for message in dict.fromkeys(one["message"] for one in found["slices"]):
        own = [one for one in found["slices"] if one["message"] == message]
        keys = [one["key"] for one in own]
        yield f"  {message}"
        for one in own:
            ranks = one["ranks"] if len(one["ranks"]) <= _LISTED else [*one["ranks"][:2], "...", one["ranks"][-1]]
            short = [*ranks[:1], *(rank.removeprefix("rows ").removeprefix("columns ") for rank in ranks[1:])]
            where = " of each expert" if one["of_each_expert"] else ""
            where += f" in {one['tensor']}" if keys.count(one["key"]) > 1 else ""
            if short:
                yield f"    {one['key']} {one['shape']}{where}: {' | '.join(short)}"
        if same := dict.fromkeys(one["key"] for one in own if not one["ranks"]):
            yield f"    the same on all: {', '.join(same)}"


def _chunk(chunk: dict[str, Any]) -> str:
    """What one chunk holds, the embeddings before its layers."""
    layers = chunk["layers"]
    before = [name for name in chunk["also"] if name.startswith(("embeddings", "encoder")) and "copy" not in name]
    after = [name for name in chunk["also"] if name not in before]
    of = [f"layer{'s' * (len(layers) > 1)} {span(layers)}"] if layers else []
    return ", ".join([*before, *of, *after]) or "nothing"
