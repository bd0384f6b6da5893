"""Why torch's exporters refuse a network, in one sentence that names the operator and says what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torch.export import ExportedProgram

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_MISSING = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)'")
_NODE = re.compile(r"Error when translating node %(\w+) : .*?\[target=(?:torch\.ops\.)?([\w.]+)\]")
#: what makes a network of Transformers do without an operator
_TRANSFORMERS = {
    "attention": 'set_attn_implementation("eager")',
    "grouped_mm": 'set_experts_implementation("batched_mm")',
}
_UNKNOWN_TYPE = re.compile(r"Found <class '([\w.]+)'> in (input|output)")


def reason(error: BaseException) -> str:
    """One sentence of what torch says on many lines."""
    text = _COLOURS.sub("", str(error))
    if "data-dependent" in text or "GuardOnDataDependent" in type(error).__name__:
        place = next((line.strip() for line in reversed(text.splitlines()) if line.strip().startswith("File ")), "")
        return f"its path depends on the values of the inputs{f' ({place})' if place else ''}."
    if "Constraints violated" in text or "specialized" in text:
        return "it works with one batch size only (a number of samples is written into its computation)."
    if found := _UNKNOWN_TYPE.search(text):
        name = found[1].rpartition(".")[2]
        where = "returns" if found[2] == "output" else "takes"
        cache = " (of a language model: model.config.use_cache = False)" if "Cache" in name else ""
        return f"it {where} a {name}, which torch.export does not know; expected tensors, or lists of them{cache}."
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".") + "."


def onnx_reason(error: BaseException, program: ExportedProgram) -> str:
    """Which operator of the network ONNX does not have, the module that calls it, and what to do."""
    chain = list(_causes(error))
    texts = [_COLOURS.sub("", str(one)) for one in chain]
    node = next((found for text in texts if (found := _NODE.search(text))), None)
    missing = next((found[1] for text in texts if (found := _MISSING.search(text))), None)
    if node is None and missing is None:
        return reason(error)
    operator = missing or (node[2].removesuffix(".default") if node else "")
    where = _called_in(program, node[1] if node else "", operator)
    why = "ONNX has no operator for it" if missing else reason(chain[-1]).rstrip(".")
    advice = "write it with other operations, or use save_program"
    for part, call in _TRANSFORMERS.items():
        if part in operator:
            advice = f"use plain operations there (of Transformers: model.{call}), or save_program"
    return f"{operator}{where}: {why}; {advice}."


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, the first cause last."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__


def _called_in(program: ExportedProgram, node: str, operator: str) -> str:
    """Where the network calls the operator; empty where that is not known."""
    stack: dict[str, Any] = {}
    with suppress(Exception):  # in the program, or in the parts of its operators
        for graph in (program.graph, program.run_decompositions().graph):
            nodes = [n for n in graph.nodes if n.op == "call_function" and str(n.target).startswith(operator)]
            called = [n for n in nodes if n.name == node] or nodes
            if called:
                stack = called[0].meta.get("nn_module_stack") or {}
                break
    if not stack:
        return ""
    path, kind = list(stack.values())[-1]
    kind = kind if isinstance(kind, str) else kind.__name__
    path = path.removeprefix("L['self'].")
    return f" in {path} ({kind.rpartition('.')[2]})" if path else f" in {kind.rpartition('.')[2]}"
