"""A decoder from token ids to logits, message by message.

Legend: s tokens, h hidden, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ckptconv.errors import UsageError
from ckptconv.forward.attention import attention
from ckptconv.forward.mlp import ACTIVATIONS, add_experts, choose, mlp
from ckptconv.forward.norm import norm
from ckptconv.forward.weights import Weights, product, rows
from ckptconv.incoming import Message, Stream
from ckptconv.lazy import LazyTensor
from ckptconv.messages import EXPERT_KEYS
from ckptconv.spec import NORMS, ModelSpec

Tensor = torch.Tensor


@dataclass
class Result:
    """logits: [s, v]; states: name of a message -> what the last token's hidden state [h] is after it."""

    logits: Tensor
    states: dict[str, Tensor] = field(default_factory=dict)


def refusal(spec: ModelSpec) -> str | None:
    """Why there are no logits of this model; None for a decoder."""
    name = spec.family or spec.model_type
    if spec.encoder_layers:
        return f"{name} has an encoder: logits are computed of decoders only."
    if spec.model_type == "BERT" or spec.lm_head or spec.num_tokentypes:
        return f"{name} is no decoder (it sees later tokens, too): logits are computed of decoders only."
    known = {"norms": NORMS, "norm": ("RMSNorm", "LayerNorm"), "activation": tuple(ACTIVATIONS),
             "qk_norm": (None, "head", "full")}  # fmt: skip
    for field_name, values in known.items():
        if getattr(spec, field_name) not in values:
            return f"{name} has {field_name} {getattr(spec, field_name)!r}, for which `logits` has no rule."
    if spec.moe and (spec.moe.score not in ("softmax", "sigmoid") or spec.moe.group_score not in ("max", "top2")):
        return f"{name} chooses experts by {spec.moe.score}/{spec.moe.group_score}, for which `logits` has no rule."
    return None


def run(stream: Stream, ids: Sequence[int], seen: Callable[[str], None] = lambda name: None) -> Result:
    """Logits of all tokens; `seen` is told of every message.

    Raises UsageError (no decoder, ids the model does not have) and what the stream raises.

    All messages of the stream are taken; layers of multi-token prediction have no part in logits and are not read.
    """
    spec = stream.metadata.spec
    check(spec, ids)
    x, head, result = torch.empty(0), None, Result(torch.empty(0))
    messages = iter(stream)
    for message in messages:
        name, kind = message.want.name, message.want.template
        m = Weights(name, message.tensors)
        if kind == "embeddings":
            x = _embedded(spec, m, message, ids)
            head = message.keep("word embeddings") if spec.tied else head
        elif kind == "transformer layer {i}":
            x = _layer(spec, m, message, messages, x)
        elif kind == "final norm":
            x = norm(spec, m, "", x)
        elif kind == "output layer":
            m.skip("weight")
            if "final norm" in result.states:
                result.logits = _logits(spec, message.tensors["weight"], x)
            else:  # loaders of some formats send it early
                head = message.keep("weight")
        elif kind.startswith("mtp "):
            m.skip(*message.tensors)
        m.check()
        result.states |= {} if kind in ("output layer", "mtp layer {i}") else {name: x[-1].clone()}
        seen(name)
    if head is not None:
        result.logits = _logits(spec, head, x)
    return result


def check(spec: ModelSpec, ids: Sequence[int]) -> None:
    """Raise UsageError where `run` would: no decoder, ids that the model does not have."""
    if reason := refusal(spec):
        raise UsageError(reason)
    wrong = [token for token in ids if not 0 <= token < spec.vocab_size]
    if wrong or not ids:
        raise UsageError(f"token ids {wrong or list(ids)}: expected one or more of 0 to {spec.vocab_size - 1}.")
    if spec.learned_positions and len(ids) > spec.max_position_embeddings:
        raise UsageError(f"{len(ids)} tokens: the model has positions for {spec.max_position_embeddings}.")


def _embedded(spec: ModelSpec, m: Weights, message: Message, ids: Sequence[int]) -> Tensor:
    """[s, h]: only the rows of these tokens are read."""
    m.skip("word embeddings", "position offset rows")
    words = message.tensors["word embeddings"]
    x = torch.cat([rows(words, token, 1) for token in ids]) * spec.embedding_multiplier
    if spec.learned_positions:
        m.skip("position embeddings")
        x = x + rows(message.tensors["position embeddings"], 0, len(ids))
    return x


def _logits(spec: ModelSpec, head: LazyTensor, x: Tensor) -> Tensor:
    out = product(x, head) * spec.logit_multiplier
    return out if spec.logit_softcap is None else torch.tanh(out / spec.logit_softcap) * spec.logit_softcap


def _layer(spec: ModelSpec, m: Weights, message: Message, messages: Iterator[Message], x: Tensor) -> Tensor:
    """x [s, h] after one layer. `messages` follow it: experts of a big layer may come in messages of their own."""
    layer = message.want.layer
    assert layer is not None

    def before(name: str, value: Tensor) -> Tensor:
        return value if spec.norms == "output" else norm(spec, m, name, value)

    def behind(name: str, value: Tensor) -> Tensor:
        inside = spec.norms in ("sandwich", "output")
        return (norm(spec, m, name, value) if inside else value) * spec.residual_multiplier

    read = before("input norm ", x)
    x = read if spec.norms == "post" else x
    attended = behind("attention output norm ", attention(spec, m, layer, read))
    summed = x + attended
    normed = read if spec.shared_norm else before("post norm ", x if spec.parallel_residual else summed)
    summed = normed if spec.norms == "post" else summed
    made = _experts(spec, m, message, messages, normed) if spec.has_experts(layer) else mlp(spec, m, normed)
    return summed + behind("mlp output norm ", made)


def _experts(spec: ModelSpec, m: Weights, message: Message, messages: Iterator[Message], x: Tensor) -> Tensor:
    """x [s, h] -> [s, h] through the chosen experts, wherever they come from."""
    assert spec.moe is not None
    m.skip(*EXPERT_KEYS)  # nobody may have chosen any
    choice, want = choose(spec, spec.moe, m, x), message.want
    if want.experts is None:
        add_experts(spec, m, x, choice, range(spec.moe.num_experts))
    else:  # what is needed behind them
        m.add({key: message.keep(key) for key in message.tensors if key.startswith("mlp output norm ")})
    while want.experts is not None and want.experts.stop < want.num_experts:
        message = next(messages)
        want = message.want
        add_experts(spec, Weights(want.name, message.tensors), x, choice, want.experts or range(0))
    return choice.out
