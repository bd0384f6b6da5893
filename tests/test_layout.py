"""What the layout promises: imports form no circle, and nobody asks a regulariser for its type."""

import ast
from pathlib import Path

SRC = Path(__file__).parents[1] / "src" / "torch_bregman"
FILES = {tuple(path.relative_to(SRC).with_suffix("").parts): path for path in SRC.rglob("*.py")}
REGULARIZERS = {"Regularizer", "L1", "NonNegativeL1", "Grouped", "GroupL1", "SparseGroupL1", "CutGroups", "NuclearNorm"}


def module(parts):
    """The file that an import of `parts` (below the package) reads; the last part may be a name in it."""
    for candidate in (parts, (*parts, "__init__"), parts[:-1], (*parts[:-1], "__init__")):
        if candidate in FILES:
            return candidate
    return None


def imported(name, tree):
    """The files that one file imports, at its top, inside functions and under TYPE_CHECKING alike."""
    package = name[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [tuple(alias.name.split(".")) for alias in node.names]
            found = [parts[1:] for parts in found if parts[0] == "torch_bregman"]
        elif isinstance(node, ast.ImportFrom):
            stem = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                stem = package[: len(package) - node.level + 1] + stem
            elif stem[:1] == ("torch_bregman",):
                stem = stem[1:]
            else:
                continue
            found = [(*stem, alias.name) for alias in node.names]
        else:
            continue
        for parts in found:
            target = module(parts)
            if target is not None and target != name:
                yield target


TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
GRAPH = {name: set(imported(name, tree)) for name, tree in TREES.items()}


def circle(graph):
    """Some circle of a directed graph, or None."""
    state, path = {}, []

    def visit(node):
        state[node] = "open"
        path.append(node)
        for target in sorted(graph.get(node, ())):
            if state.get(target) == "open":
                return [*path[path.index(target) :], target]
            if target not in state and (found := visit(target)):
                return found
        path.pop()
        state[node] = "done"
        return None

    for node in sorted(graph):
        if node not in state and (found := visit(node)):
            return found
    return None


def test_the_search_finds_a_circle():
    assert circle({1: {2}, 2: {3}, 3: {1}}) == [1, 2, 3, 1]
    assert circle({1: {2, 3}, 2: {3}, 3: set()}) is None
    assert ("regularizers", "base") in GRAPH["regularizers", "groups"]


def test_imports_form_no_circle():
    found = circle(GRAPH)
    assert found is None, " -> ".join("/".join(name) for name in found)


def test_nobody_asks_a_regulariser_for_its_type():
    asked = []
    for name, tree in TREES.items():
        if name[0] == "regularizers":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
                types = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
            elif isinstance(node, ast.Compare) and any(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
                types = {n.id for n in node.comparators if isinstance(n, ast.Name)}
            else:
                continue
            if types & REGULARIZERS:
                asked.append(f"{'/'.join(name)}.py:{node.lineno}")
    assert not asked, asked
