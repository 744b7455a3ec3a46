"""Every message with which ckptconv refuses to go on, read from the source: the body of docs/errors.md.

An expression in a message is shown as <what it stands for>. A message that only passes another one on is left out.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ckptconv.errors import BY_EXIT_CODE, CkptconvError

SOURCE = Path(__file__).parent.parent / "src" / "ckptconv"

#: What is raised by a function that reads the value of a flag: the command line says which flag, and exits with 2.
ARGUMENT = "ArgumentTypeError"

#: Exit code -> what it means for whoever sees it. The first sentence of the class says what it is.
ADVICE = {
    1: "Read on above: a process ended, a plugin called exit, or the system refused something.",
    2: "Mend the command. Nothing was read or written.",
    3: "Look at the checkpoint: is it complete, unchanged, and all of one model?",
    4: "A loader or saver of others sent or took what the metadata does not describe: "
       "`python -m ckptconv.testing` checks it.",
    5: "A mistake in ckptconv: please report it with the message and the model's config.",
    6: "Choose other parallel sizes.",
    7: "Choose another target, or make room; what was there before is unchanged.",
    8: "Two checkpoints are not the same. After --verify: do not use what was written.",
}  # fmt: skip


#: What is said and not listed, and why.
ELSEWHERE = (
    "what Python's argparse says of flags (`expected one argument`, `invalid choice`): it names the flag;",
    "the detail in brackets of a damaged file (`the pickle is damaged near its byte 12 (EOFError: ...)`): the way out "
    "is the same for all of them;",
    "what the system says of a file, behind its path (`Permission denied`), with exit code 1 where nothing else fits;",
    "what loaders and savers of others say, the Hugging Face hub, and the libraries of tokenizers: their words are "
    "passed on;",
    "mistakes in ckptconv itself, which end with a traceback and exit code 1: please report them;",
    "what `python -m ckptconv.testing` finds wrong with a plugin: it prints a report;",
    "warnings and notes, after which the conversion goes on.",
)

#: Tables of reasons: rows that end with a sentence.
TABLES = ("REFUSALS", "CUSTOM", "UNSUPPORTED")
#: Methods that show what they are called on.
_OF_TEXT = ("replace", "strip", "partition", "rpartition", "split", "removeprefix", "removesuffix", "lower", "upper")


@dataclass(frozen=True)
class Refusal:
    """One message: its exit code, the module it is in, and its text."""

    code: int
    module: str
    text: str


def page() -> str:
    """docs/errors.md."""
    refusals = list(found())
    lines = [
        "# Errors",
        "",
        "<!-- Written by docs/schema.py from the source. -->",
        "",
        "An error is one message on stderr, `ckptconv: error: ...`: where, what was found, what was expected, what to",
        "do. The exit code says of what kind it is. `-v` adds the traceback. In Python it is an exception, a",
        "`CkptconvError` with `exit_code`. Search this page for words of a message without its names and numbers.",
        "",
        "| exit code | | what to do |",
        "| --- | --- | --- |",
        "| 0 | done | |",
        *(f"| {code} | {_meaning(kind)} | {ADVICE[code]} |" for code, kind in sorted(BY_EXIT_CODE.items())),
        "| 130 | interrupted by Ctrl-C or SIGTERM | `--resume` goes on where it stopped. |",
    ]
    for code, kind in sorted(BY_EXIT_CODE.items()):
        modules: dict[str, list[str]] = {}
        for refusal in refusals:
            if refusal.code == code:
                modules.setdefault(refusal.module, []).append(refusal.text)
        lines += ["", f"## {code}: {kind.__name__}"]
        for module, texts in modules.items():
            lines += ["", f"`{module}`: {_summary(SOURCE / module)}", ""]
            lines += [f"- {text}" for text in dict.fromkeys(texts)]
    lines += ["", "## What messages list as reasons", "", "Of models that a format or a family has no words for."]
    listed: dict[str, list[str]] = {}
    for module, text in reasons():
        listed.setdefault(module, []).append(text)
    for module, texts in listed.items():
        lines += ["", f"`{module}`: {_summary(SOURCE / module)}", "", *(f"- {text}" for text in dict.fromkeys(texts))]
    lines += ["", "## What is not on this page", "", *(f"- {what}" for what in ELSEWHERE)]
    return "\n".join(lines) + "\n"


def found() -> Iterator[Refusal]:
    """All of them, module by module."""
    trees = _trees()
    codes, constants = _codes(list(trees.values())), _constants(list(trees.values()))
    for path, tree in trees.items():
        makers = _makers(tree, codes)
        for scope in _scopes(tree):
            names = constants | _constants([tree]) | _assigned(scope)
            for call in _calls(scope):
                name, given = _called(call), names
                if name in makers and makers[name].function is not scope:
                    made = makers[name]
                    given = names | {key: [value] for key, value in zip(made.parameters, call.args, strict=False)}
                    name, call = _called(made.call), made.call
                elif any(made.function is scope for made in makers.values()):
                    continue
                if name in codes and call.args:
                    text = _shown(call.args[0], given)
                    if name == ARGUMENT:
                        text = _marked("argument <flag>: ") + text + "."
                    if _says(text):
                        yield Refusal(codes[name], str(path.relative_to(SOURCE)), text)


@dataclass(frozen=True)
class _Maker:
    """A function that makes an error of a few words: `raise self.error("a field of no kind")`."""

    function: ast.AST
    parameters: list[str]
    call: ast.Call


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def _makers(tree: ast.Module, codes: dict[str, int]) -> dict[str, _Maker]:
    """Name -> function of a module that returns an error and takes the words of it."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and getattr(node.returns, "id", "") in codes:
            parameters = [argument.arg for argument in node.args.args if argument.arg != "self"]
            call = next((call for call in _calls(node) if _called(call) in codes), None)
            if parameters and call is not None:
                found[node.name] = _Maker(node, parameters, call)
    return found


def reasons() -> Iterator[tuple[str, str]]:
    """(module, what of a model a format or a family has no words for) as it is listed in messages."""
    trees = _trees()
    everywhere = _constants(list(trees.values()))
    for path, tree in trees.items():
        module, constants = str(path.relative_to(SOURCE)), everywhere | _constants([tree])
        for node in tree.body:
            name = getattr(getattr(node, "target", None), "id", "")
            if name in TABLES and isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Tuple):
                for row in node.value.elts:
                    if isinstance(row, ast.Tuple) and _is_text(row.elts[-1]):
                        attribute = f"`{row.elts[0].value}`: " if isinstance(row.elts[0], ast.Constant) else ""
                        yield module, attribute + _shown(row.elts[-1], constants)
        for scope in _scopes(tree):
            for call in _calls(scope):
                what = call.func
                if isinstance(what, ast.Attribute) and what.attr == "append" and isinstance(what.value, ast.Name) and (
                    what.value.id == "reasons" or getattr(scope, "name", "") in ("refusals", "unsupported")
                ) and _is_text(call.args[0]):  # fmt: skip
                    text = _shown(call.args[0], constants | _assigned(scope))
                    if _says(text):
                        yield module, text


def _says(text: str) -> bool:
    """Whether a message has words of its own."""
    return bool(re.search(r"[a-z]", re.sub(r"<[^<>]*>", "", text.replace("\\", ""))))


def _shown(node: ast.expr, names: dict[str, list[ast.expr]]) -> str:
    text = " ".join(_text(node, names).split())
    text = re.sub(r"\{0\.([\w.]+?)(?:\[(\w+)\])?\}", lambda field: f"<{_words(field[2] or field[1])}>", text)
    return _marked(text)


def _trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}


def _constants(trees: list[ast.Module]) -> dict[str, list[ast.expr]]:
    """The texts that modules have as constants: those with one meaning are shown instead of their names."""
    values: dict[str, list[ast.expr]] = {}
    for tree in trees:
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and _is_text(node.value):
                values.setdefault(node.targets[0].id, []).append(node.value)
    return {name: found for name, found in values.items() if len({ast.dump(value) for value in found}) == 1}


def _codes(trees: list[ast.Module]) -> dict[str, int]:
    """Class -> exit code, of the tree of errors and of classes made from it elsewhere."""
    codes = {kind.__name__: code for code, kind in BY_EXIT_CODE.items()} | {ARGUMENT: 2}
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name not in codes:
                bases = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id in codes]
                if bases:
                    codes[node.name] = codes[bases[0]]
    return codes


def _scopes(tree: ast.Module) -> Iterator[ast.AST]:
    """The module and every function: where a name has one meaning."""
    yield tree
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _own(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a scope without those of the functions in it, in the order of the source."""
    for child in ast.iter_child_nodes(scope):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from _own(child)


def _calls(scope: ast.AST) -> Iterator[ast.Call]:
    yield from (node for node in _own(scope) if isinstance(node, ast.Call))


def _assigned(scope: ast.AST) -> dict[str, list[ast.expr]]:
    """Name -> the texts that are assigned to it."""
    texts: dict[str, list[ast.expr]] = {}
    for node in _own(scope):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            texts.setdefault(node.targets[0].id, []).append(node.value)
    return texts


def _text(node: ast.expr, names: dict[str, list[ast.expr]]) -> str:
    """What an expression shows, with <placeholders>."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, names) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        shown = _text(node.value, names)
        return f"'{shown}'" if node.conversion == ord("r") and shown.startswith("<") else shown
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and (_is_text(node.left) or _is_text(node.right)):
        return _text(node.left, names) + _text(node.right, names)
    if isinstance(node, ast.IfExp):
        one, other = _text(node.body, names), _text(node.orelse, names)
        if not (one and other):
            return f"[{one or other}]"
        return f"[{one} | {other[1:-1] if isinstance(node.orelse, ast.IfExp) else other}]"
    if isinstance(node, ast.BoolOp):
        return _text(node.values[0], names)
    if isinstance(node, ast.Name):
        values = names.get(node.id, [])
        if len(values) == 1 and isinstance(values[0], ast.Call) and getattr(values[0].func, "id", "") == "near":
            return _placeholder(values[0], {})
        if len(values) == 1 and _is_text(values[0]):
            return _text(values[0], {name: said for name, said in names.items() if name != node.id})
        return f"<{_words(node.id)}>"
    return _placeholder(node, names)


def _is_text(node: ast.expr) -> bool:
    """Whether an expression is seen to be a text that is not empty."""
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Add) and (_is_text(node.left) or _is_text(node.right))
    if isinstance(node, ast.IfExp):
        return _is_text(node.body) or _is_text(node.orelse)
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str) and bool(node.value)
    )


def _placeholder(node: ast.expr, names: dict[str, list[ast.expr]]) -> str:
    """<what an expression stands for>, in few words."""
    if isinstance(node, ast.Attribute):
        return f"<{_words(node.attr)}>"
    if isinstance(node, ast.Subscript):
        index = node.slice
        named = isinstance(index, ast.Constant) and isinstance(index.value, str)
        return f"<{_words(index.value)}>" if named else _placeholder(node.value, names)  # type: ignore[attr-defined]
    if isinstance(node, ast.Name):
        return f"<{_words(node.id)}>"
    if isinstance(node, ast.Call):
        called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if called == "near":
            return " [Did you mean '<near name>'?]"
        if called == "why":
            return "<what the system says>."
        if called in ("len", "sum"):
            return "<number>"
        inner = node.args[called in ("map", "filter")] if node.args else getattr(node.func, "value", None)
        if isinstance(node.func, ast.Attribute) and called in _OF_TEXT:
            inner = node.func.value
        if isinstance(inner, ast.GeneratorExp | ast.ListComp):
            inner = inner.elt
        return _placeholder(inner, names) if isinstance(inner, ast.expr) else f"<{_words(called)}>"
    if isinstance(node, ast.JoinedStr):
        return _text(node, names)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        part = _text(node.right, names)
        if not isinstance(node.right, ast.Constant) or isinstance(node.right.value, str):
            return "<path>" if part == "<...>" else part  # of a file in a folder
    if isinstance(node, ast.BinOp | ast.UnaryOp | ast.Compare):
        return "<number>"
    if isinstance(node, ast.Starred):
        return _placeholder(node.value, names)
    if isinstance(node, ast.List | ast.Tuple | ast.Set) and node.elts:
        return _placeholder(node.elts[0], names)
    return "<...>"


def _words(name: str) -> str:
    return name.strip("_").replace("_", " ").lower() or "..."


def _marked(text: str) -> str:
    """Markdown takes <words> for tags, and stars and underscores for emphasis."""
    return re.sub(r"([<>*_])", r"\\\1", text)


def _meaning(kind: type[CkptconvError]) -> str:
    return "Anything else" if kind is CkptconvError else (kind.__doc__ or "").strip().split("\n")[0].rstrip(".")


def _summary(path: Path) -> str:
    said = ast.get_docstring(ast.parse(path.read_text())) or ""
    return said.split("\n\n")[0].replace("\n", " ")
