"""NxD Training (AWS Neuron) checkpoints: both styles, any parallel sizes, with or without torch_xla's references.

Parallel sizes, the placement of layers, the form of q, k and v and the copies of kv heads are found from file names
and tensors, and compared with what flags and configs say. The sizes of the model come from its config.json.
"""

from __future__ import annotations

import logging
import re
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckptconv import companions, families, lazy, numbers, stream
from ckptconv.containers import xser
from ckptconv.containers.rankdir import Rank
from ckptconv.errors import LayoutError, SourceError, UsageError, some
from ckptconv.formats import nxdt, nxdt_files, nxdt_flags
from ckptconv.formats.nxdt import Dialect
from ckptconv.formats.nxdt_heads import ORDERS, Heads
from ckptconv.joining import Shards
from ckptconv.layout import Layout
from ckptconv.lazy import LazyTensor
from ckptconv.messages import Expected
from ckptconv.metadata import Metadata, Origin
from ckptconv.spec import ModelSpec

log = logging.getLogger("ckptconv.loader")

EXPERTS = ("module", "upstream")


def recognises(load_dir: str) -> str | None:
    """Why a directory looks like ours, or None."""
    found = nxdt_files.recognise(load_dir)
    return f"it has {found}" if found else None


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of this loader."""
    flag = nxdt_flags.add(parser, "loader nxdt").add_argument
    flag("--true-vocab-size", type=numbers.positive, metavar="N",
         help="rows of the embedding that are tokens; the rest is padding and dropped")  # fmt: skip
    flag("--nxdt-kv-copies", choices=("strict", "first"), default="strict",
         help="copies of a kv head that differ: refuse, or take the first (default strict)")  # fmt: skip
    flag("--nxdt-experts", choices=EXPERTS,
         help="how experts lie: as the module has them, or as AWS's Mixtral converter writes them (default: by shape)")


def load_checkpoint(queue: Any, args: Namespace) -> None:
    """Send the model in args.load_dir. Raises SourceError, UsageError."""
    stream.send(queue, _Source(args))


class _Source:
    """One checkpoint: its rank files, the model they hold, and which of their tensors have been used."""

    def __init__(self, args: Namespace) -> None:
        self._args = args
        nxdt_flags.check_direction(args, True, getattr(args, "saver", None) in (None, "nxdt"))
        self.top, self._paths, self.ignored = nxdt_files.find(args.load_dir)
        self._tp, self._pp, self._ep = (1 + max(rank[axis] for rank in self._paths) for axis in range(3))
        self._yaml = nxdt_flags.training(args.nxdt_yaml_config)
        self._check_ranks()
        self._read()
        self._provenance = self._read_provenance()
        self._companions = self._find_companions()
        self._dialect = self._find_dialect()
        self._names = nxdt.NAMES[self._dialect.style]
        stages = self._stages()
        self.spec, padded = self._model(len(stages))
        self.layout = self._layout(stages)
        heads = self._settle_heads(self._find_heads())
        self._settle_experts()
        self._settle_rows()
        self._settle_head()
        if reasons := nxdt.refusals(self.spec, self._dialect.style):
            raise SourceError(f"{self._config}: is not of a model that NxDT's modules can be: {'; '.join(reasons)}.")
        table = self._dialect.table(heads)
        if args.nxdt_kv_copies == "first":
            table = tuple(_unchecked(row) for row in table)
        self._shards = Shards(self._tensors, self._paths, table, self.spec, self.layout, padded)
        self._shards.check()

    # Files

    def _check_ranks(self) -> None:
        """Raise UsageError when flags or the training config say other sizes than the file names."""
        strategy = "distributed_strategy.{}_model_parallel_size"
        for flag, axis, found in (("tp_size", "tensor", self._tp), ("pp_size", "pipeline", self._pp),
                                  ("ep_size", "expert", self._ep)):  # fmt: skip
            name = strategy.format(axis)
            said = {f"--{flag.replace('_', '-')}": getattr(self._args, flag),
                    f"{self._args.nxdt_yaml_config}: {name}": self._yaml.get(name) if self._yaml else None}  # fmt: skip
            for where, value in said.items():
                if value is not None and value != found:
                    raise UsageError(
                        f"{where} {value}: the files are those of {axis} parallel size {found} "
                        f"({next(iter(self._paths.values())).name}, ...). Read with other sizes, parts of the model "
                        "would be missing. Leave the size out, or add the missing files."
                    )

    def _read(self) -> None:
        self._tensors: dict[Rank, dict[str, LazyTensor]] = {}
        self._files: list[Path] = []
        for rank, path in self._paths.items():
            t, stage, ep_rank = rank
            base = self._paths[t, stage, 0] if ep_rank else None
            tensors, files, beside = xser.read(path, self._args.model_key, base)
            self._files += files
            self.ignored += [f"ignored {key}: beside the model" for key in beside]
            for rule in nxdt.IGNORE:
                for name in [name for name in tensors if name.endswith(rule.suffix)]:
                    del tensors[name]
                    self.ignored.append(f"ignored *{rule.suffix}: {rule.reason}")
            for mark, what in nxdt.FOREIGN.items():
                if found := next((name for name in tensors if mark in name), None):
                    raise SourceError(f"{path}: holds {found}: {what}, which is not read.")
            self._tensors[rank] = tensors
        self.ignored = list(dict.fromkeys(self.ignored))

    def _read_provenance(self) -> dict[str, Any] | None:
        """What we noted when we wrote this; None for a checkpoint of others."""
        path = self.top / companions.PROVENANCE
        if not path.is_file():
            return None
        noted = companions.read_json(path)
        if not isinstance(noted.get("spec"), dict) or not isinstance(noted.get("target"), dict):
            raise SourceError(f"{path}: is not a provenance file of ckptconv. Remove it to go on without it.")
        return noted

    def _noted(self, name: str) -> Any:
        """A setting of the run that wrote this."""
        return self._provenance["target"].get(name) if self._provenance else None

    def _find_companions(self) -> dict[str, str]:
        told = self._args.config
        folders = [Path(told).parent] if told else []
        for folder in (*folders, self.top / companions.FOLDER, self.top, self.top / nxdt_files.MODEL):
            found = companions.find(folder)
            if companions.CONFIG in found or (told and folder == folders[0]):
                return found | ({companions.CONFIG: str(told)} if told else {})
        return {}

    def _find_dialect(self) -> Dialect:
        names = {name for tensors in self._tensors.values() for name in tensors}
        first = next(iter(self._paths.values()))
        found = nxdt.dialect_of(names)
        if found is None:
            raise SourceError(
                f"{first}: its tensors are of no style that is known: {some(sorted(names))}. "
                "Is it NxDT's?"
            )
        style = "megatron" if found.style == "megatron" else "hf"
        said = {"--model-style": self._args.model_style,
                "model_source": self._yaml.get("model_source", str) if self._yaml else None}  # fmt: skip
        for where, value in said.items():
            if value not in (None, style):
                raise UsageError(f"{where} {value}: {first} has names of the {style} style. Leave it out.")
        return found

    # The model

    def _stages(self) -> list[int]:
        """The stage of each layer, found from names. Raises SourceError."""
        pattern = re.compile(re.escape(self._names.layer).replace(r"\{n\}", r"(\d{1,6})"))
        stages: dict[int, set[int]] = {}
        for (_, stage, _), tensors in self._tensors.items():
            for name in tensors:
                if match := pattern.match(name):
                    stages.setdefault(int(match[1]), set()).add(stage)
        missing = [str(layer) for layer in range(max(stages) + 1) if layer not in stages]
        twice = [str(layer) for layer, there in stages.items() if len(there) > 1]
        where = next(iter(self._paths.values())).parent
        if missing or twice:
            what = f"layer {some(missing)} is on no stage" if missing else f"layer {some(twice)} is on several stages"
            raise SourceError(f"{where}: {what}. Are the files of one checkpoint, and all stages there?")
        return [next(iter(stages[layer])) for layer in range(len(stages))]

    def _model(self, layers: int) -> tuple[ModelSpec, int]:
        """(what configs and tensors say together, rows of the embedding). Raises SourceError."""
        embedding = self._first(self._names.embedding, 0)
        padded = embedding.shape[0] * self._tp
        spec = self._known(layers, padded)
        config = companions.read_config(self._companions) or {}
        noted = self._provenance["spec"].get("vocab_size") if self._provenance else None
        said = (self._args.true_vocab_size, noted, config.get("vocab_size"))
        vocab = next((value for value in said if isinstance(value, int) and value > 0), padded)
        if vocab > padded:
            raise SourceError(
                f"{self._config}: a vocabulary of {vocab}, but the embeddings have {padded} rows together. "
                "Are ranks missing, or is it the config of another model?"
            )
        if spec.num_layers != layers:
            raise SourceError(
                f"{self._config}: says {spec.num_layers} layers, but the files hold {layers}. Is it the config of "
                "another model, or are stages missing?"
            )
        nxdt_flags.check_layers(self._args, layers)
        return spec.replace(dtype=embedding.dtype, vocab_size=vocab), padded

    def _first(self, name: str, stage: int, t: int = 0) -> LazyTensor:
        """A tensor of a rank. Raises SourceError."""
        tensor = self._tensors[t, stage, 0].get(name)
        if tensor is None:
            raise SourceError(f"{self._paths[t, stage, 0]}: lacks {name}; it has {some(self._tensors[t, stage, 0])}.")
        if not tensor.shape:
            raise SourceError(f"{self._paths[t, stage, 0]}: {name} is a single number, expected a matrix.")
        return tensor

    def _known(self, layers: int, padded: int) -> ModelSpec:
        """The model as flags, we ourselves, a config.json or a training config say."""
        if self._provenance and not self._args.config:
            self._config = str(self.top / companions.PROVENANCE)
            return ModelSpec.from_json(self._provenance["spec"], self._config)
        config = companions.read_config(self._companions)
        if config is None and self._yaml:
            config, self._config = self._from_yaml(layers, padded), self._yaml.path
        elif config is None:
            raise SourceError(
                f"{self.top}: nothing says the sizes of the heads: give the model's config.json with --config, or the "
                "training config with --nxdt-yaml-config."
            )
        else:
            self._config = self._companions[companions.CONFIG]
        return families.of_config(config, self._config).spec(config, self._config)

    def _from_yaml(self, layers: int, padded: int) -> dict[str, Any]:
        """config.json from a training config, completed by the shapes of tensors."""
        assert self._yaml is not None
        told = self._yaml.get("model.model_config", str)
        if told and Path(told).is_file():
            self._companions = companions.find(Path(told).parent) | {companions.CONFIG: told}
            return companions.read_json(told)
        get = self._yaml.get
        heads, hidden = get("model.num_attention_heads"), get("model.hidden_size")
        if heads is None or hidden is None:
            raise SourceError(
                f"{self._yaml.path}: model.hidden_size and model.num_attention_heads are needed without a config.json. "
                "Give that with --config."
            )
        experts = get("model.moe.num_experts")
        config = {
            "model_type": "mixtral" if experts else "mistral" if get("model.sliding_window") else "llama",
            "num_hidden_layers": get("model.num_layers"),
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": get("model.num_kv_heads"),
            "intermediate_size": get("model.ffn_hidden_size") or get("model.intermediate_size") or self._ffn(),
            "vocab_size": padded,
            "max_position_embeddings": get("model.max_position_embeddings") or get("model.encoder_seq_length"),
            "rms_norm_eps": get("model.layernorm_epsilon", float) or get("model.rms_norm_eps", float),
            "rope_theta": get("model.rope_theta", float),
            "sliding_window": get("model.sliding_window"),
            "tie_word_embeddings": get("model.share_embeddings_and_output_weights", bool),
            "num_local_experts": experts,
            "num_experts_per_tok": get("model.moe.top_k"),
        }
        return {key: value for key, value in config.items() if value is not None}

    def _ffn(self) -> int | None:
        """Rows of the first projection, where they are not padded."""
        if not self._names.l0:
            return None
        tensor = self._tensors[0, 0, 0].get(self._names.layer.format(n=0) + self._names.l0)
        return tensor.shape[0] * self._tp // 2 if tensor is not None else None

    def _layout(self, stages: list[int]) -> Layout:
        """The placement of layers as found: each run of layers that goes on to a later stage is a chunk's."""
        chunks = [[0] * self._pp]
        at = 0
        for stage in stages:
            if stage < at:
                chunks.append([0] * self._pp)
            at = stage
            chunks[-1][stage] += 1
        moe = self.spec.moe
        counts = tuple(number for chunk in chunks for number in chunk)
        layout = Layout(
            len(stages), self._tp, self._pp, self._ep, moe.num_experts if moe else 0, len(chunks), counts, apart=False
        )
        said = self._args.virtual_pp_size
        if said and said != layout.vpp and self._pp > 1:
            raise UsageError(
                f"--virtual-pp-size {said}: the layers lie in {layout.vpp} chunks on each stage. Leave it out."
            )
        return layout

    # Heads

    def _find_heads(self) -> Heads:
        """Copies and padding from shapes, checked against flags; in tiled order. Raises SourceError, LayoutError."""
        spec, tp, d = self.spec, self._tp, self.spec.kv_channels
        stage = self.layout.home_of(0)[0]
        prefix = self._names.layer.format(n=0)
        dense = self._first(prefix + self._names.dense, stage)
        forms = nxdt.MEGATRON_FORMS if self._dialect.style == "megatron" else nxdt.FORMS
        rows = sum(
            self._first(prefix + self._names.attention + name, stage).shape[0] for name in forms[self._dialect.form]
        )
        queries = dense.shape[-1] * tp // d
        keys = (rows * tp // d - queries) // 2
        where = self._paths[0, stage, 0]
        if keys < 1 or keys % spec.num_query_groups or queries < spec.num_attention_heads:
            raise SourceError(
                f"{where}: tp {tp} such ranks hold {queries} query and {keys} kv heads of {d}, but {self._config} says "
                f"{spec.num_attention_heads} and {spec.num_query_groups}. Is it the config of another model?"
            )
        copies = keys // spec.num_query_groups
        said = {"--kv-size-multiplier": self._args.kv_size_multiplier}
        if self._yaml:
            said["distributed_strategy.kv_replicator"] = self._yaml.get("distributed_strategy.kv_replicator")
        for name, value in said.items():
            if value is not None and value != copies:
                raise UsageError(f"{name} {value}: the files hold {copies} copies of each kv head. Leave it out.")
        try:
            return Heads(spec.num_attention_heads, spec.num_query_groups, d, tp, copies, "tiled", queries)
        except LayoutError as error:
            raise LayoutError(f"{where}: {error}") from error

    def _settle_heads(self, tiled: Heads) -> Heads:
        """The order of copies: as flags, we ourselves or the copies' values say. Raises UsageError, SourceError."""
        args = self._args
        told = nxdt_flags.order(args.nxdt_kv_layout, args.hw_backend)
        noted = self._noted("kv_order")
        if tiled.copies == 1:
            return tiled
        fitting: dict[str, Heads] = {}
        for order in ORDERS:
            try:
                heads = replace(tiled, order=order)
            except LayoutError:
                continue  # upstream pads no heads in that order
            if self._copies_fit(heads):
                fitting[order] = heads
        if not fitting and args.nxdt_kv_copies == "first":
            fitting = {told: replace(tiled, order=told)} if told else {}
            log.warning("loader: copies of kv heads differ; the first of each is taken.")
        if not fitting:
            raise SourceError(
                f"{self._paths[0, 0, 0].parent}: copies of the same kv head differ, whatever the layout. They were "
                "trained apart (a trn2 model initialised from scratch begins so) and cannot become one head. "
                "--nxdt-kv-copies first takes the first of each, with --hw-backend."
            )
        if args.nxdt_kv_layout is None and args.hw_backend == "trn2" and "upstream" not in fitting:
            told = "adjacent"  # as the trn2 runtime saves it
        known = fitting.get(noted or "")
        if known and told and replace(tiled, order=told).placed != known.placed:
            raise UsageError(
                f"--hw-backend {args.hw_backend} --nxdt-kv-layout {args.nxdt_kv_layout}: this checkpoint was written "
                f"with kv heads in {noted} order. Read otherwise, heads would be permuted. Leave the flags out."
            )
        if told is not None and told not in fitting:
            raise UsageError(
                f"--hw-backend {args.hw_backend} --nxdt-kv-layout {args.nxdt_kv_layout}: the copies of kv heads lie in "
                f"{some(fitting)} order, not {told}. Leave the flags out, or give the other backend."
            )
        choice = told or (noted if noted in fitting else None)
        distinct = {heads.placed for heads in fitting.values()}
        if choice is None and len(distinct) > 1:
            raise UsageError(
                f"{self._paths[0, 0, 0].parent}: each kv head is there {tiled.copies} times, in an order that "
                f"is {some(fitting)}. --hw-backend says for which hardware it was written; the tensors do not."
            )
        if choice == "upstream" and noted is None and len(distinct) > 1:
            log.warning(
                "loader: read as AWS's converter writes it for trn2. If this was converted or trained for trn1, query "
                "heads come out in the wrong order: say --hw-backend trn1 then."
            )
        return fitting[choice or next(iter(fitting))]

    def _copies_fit(self, heads: Heads) -> bool:
        """Whether the copies of every kv head of the first layer are equal in an order."""
        stage = self.layout.home_of(0)[0]
        prefix = self._names.layer.format(n=0) + self._names.attention
        first: dict[tuple[str, int], LazyTensor] = {}
        for name, kinds in nxdt.FORMS[self._dialect.form].items():
            for t in range(self._tp):
                tensor, one = self._first(prefix + name, stage, t), self._first(prefix + name, stage)
                if tensor.shape != one.shape:
                    raise SourceError(
                        f"{self._paths[t, stage, 0]}: {prefix}{name} is {list(tensor.shape)}, on rank 0 it is "
                        f"{list(one.shape)}. Are the files of one checkpoint?"
                    )
                own = len(heads.keys(t)) * heads.d
                for n, kind in enumerate(kind for kind in kinds[::-1] if kind != "q"):
                    top = tensor.shape[0] - (n + 1) * own
                    for number, head in enumerate(heads.keys(t)):
                        part = tensor.narrow_rows(top + number * heads.d, heads.d)
                        if not lazy.equal(first.setdefault((kind, head), part), part):
                            return False
        return True

    # What only shapes, values and flags tell

    def _settle_experts(self) -> None:
        """Whether experts are transposed as the module has them, and padded."""
        if self.spec.moe is None:
            return
        stage = self.layout.home_of(0)[0]
        inner = "expert_mlps." + ("mlp_op." if self._dialect.mlp_op else "")
        prefix = self._names.layer.format(n=0) + self._names.experts + inner
        up, down = (self._first(prefix + name, stage) for name in ("gate_up_proj.weight", "down_proj.weight"))
        h, m, tp = self.spec.hidden_size, self.spec.moe.ffn_hidden_size, self._tp
        if len(up.shape) != 3 or len(down.shape) != 3:
            raise SourceError(
                f"{self._paths[0, stage, 0]}: its experts are {list(up.shape)} and {list(down.shape)}, expected three "
                "dimensions. Was it saved by NxDT?"
            )
        forms = {"module": up.shape[1] == h and down.shape[2] == h,
                 "upstream": up.shape[1:] == (m, 2 * h // tp) and down.shape[1:] == (h // tp, m)}  # fmt: skip
        fitting = [form for form, fits in forms.items() if fits]
        told = self._args.nxdt_experts or self._noted("experts")
        if not fitting or (told and told not in fitting):
            raise SourceError(
                f"{self._paths[0, stage, 0]}: gate_up_proj is {list(up.shape)} and down_proj {list(down.shape)}, which "
                f"are not experts of {m} x {h} on {tp} ranks{f' as {told} has them' if told else ''}. Is the "
                "config of this model?"
            )
        if len(fitting) > 1 and not told and not self._provenance:
            raise UsageError(
                f"{self._paths[0, stage, 0]}: experts of {m} x {h} have the same shape transposed. --nxdt-experts says "
                "whether the trainer (module) or AWS's Mixtral converter (upstream) wrote them."
            )
        choice = told or fitting[0]
        if choice == "upstream":
            log.warning("loader: experts are as AWS's converter writes them, not as NxDT's module reads them.")
        padded = choice == "module" and down.shape[1] > m // tp
        self._dialect = replace(self._dialect, experts=choice, multiple=down.shape[1] if padded else 1)

    def _settle_rows(self) -> None:
        """Megatron style: rows of one kind together, or head by head, which values do not tell."""
        if self._dialect.style != "megatron":
            return
        told, noted = self._args.nxdt_megatron_qkv_layout, self._noted("rows")
        rows = {"runtime": nxdt.INTERLEAVED, "upstream": nxdt.BLOCKED}.get(told) or noted or nxdt.BLOCKED
        if self.spec.num_query_groups > self._tp:
            if noted and rows != noted:
                raise UsageError(
                    f"--nxdt-megatron-qkv-layout {told}: this checkpoint was written with {noted} rows. Read "
                    "otherwise, heads would be permuted. Leave the flag out."
                )
            if not told and not noted:
                log.warning(
                    "loader: fused qkv rows are read as AWS's converter writes them. A trained checkpoint has them "
                    "head by head: say --nxdt-megatron-qkv-layout runtime then."
                )
        self._dialect = replace(self._dialect, rows=rows)

    def _settle_head(self) -> None:
        """Tied as stored: an output layer unlike the embedding is a layer of its own."""
        if not self.spec.tied:
            return
        there = self._names.output in self._tensors[0, self._pp - 1, 0]
        self._dialect = replace(self._dialect, head=there)
        if not there:
            return
        for t in range(self._tp):
            one, other = self._first(self._names.output, self._pp - 1, t), self._first(self._names.embedding, 0, t)
            if not lazy.equal(one, other):
                log.warning("loader: the config says tied embeddings, but the output layer differs: taken as untied.")
                self.spec = self.spec.replace(tied=False)
                return

    # The stream

    def metadata(self) -> Metadata:
        """The first message."""
        tokenizer = self._companions.get("tokenizer.model")
        return Metadata(
            spec=self.spec,
            origin=Origin("nxdt", str(self.top), stream.stamps(self._files), self._companions, self.ignored),
            tp=self._tp,
            pp=self._pp,
            ep=self._ep,
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=str(Path(tokenizer).parent) if tokenizer else None,
        )

    def tensors(self, message: Expected) -> dict[str, LazyTensor]:
        """The full tensors of one message, not read."""
        return {key: self._shards.joined(message, key) for key in message.shapes}

    def holdings(self) -> stream.Holdings:
        """What lies on which rank."""
        return self._shards.holdings()


def _unchecked(row: Any) -> Any:
    """A row whose copies may differ."""
    return replace(row, cut=replace(row.cut, repeated=False)) if row.cut.repeated else row
