"""The package's layout: short functions, few parameters, and imports that run down and in no circle."""

import ast
import graphlib
import importlib.util
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sdt_blocks"
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
LONGEST, MOST_PARAMETERS = 90, 8
# The signatures of what compilers and registries read are flat.
FLAT = ("triton.jit", "registered(", "register_fake")


OUTSIDE = {
    str(path.relative_to(PACKAGE.parent)): ast.parse(path.read_text(encoding="utf-8"))
    for folder in ("recipes", "datasets", "benchmarks")
    for path in sorted((PACKAGE.parent / folder).rglob("*.py"))
}


def functions(module: str) -> list[ast.FunctionDef]:
    tree = TREES[module] if module in TREES else OUTSIDE[module]
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def parameters(function: ast.FunctionDef) -> list[str]:
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def is_flat(function: ast.FunctionDef) -> bool:
    return any(mark in ast.unparse(decorator) for decorator in function.decorator_list for mark in FLAT)


def inside(module: str, *places: str) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def imports(module: str) -> set[str]:
    """The package's modules that one imports, within functions too."""
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            # `from .ops import lif` means the function, which hides the module of that name.
            own = {f"{base}.{alias.name}" for alias in node.names} & set(FILES) - {f"{base}.{n}" for n in defined(base)}
            found |= own if len(own) == len(node.names) else {base, *own}
    return (found & set(FILES)) - {module}


def defined(module: str) -> set[str]:
    """The names that a module's own import statements bind."""
    tree = TREES.get(module, ast.Module([], []))
    lines = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]
    return {alias.asname or alias.name for node in lines for alias in node.names}


def length(function: ast.FunctionDef) -> int:
    """In lines; of a Triton kernel without its signature, which has a line for every constant."""
    kernel = any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)
    first = function.body[0] if kernel else function
    return function.end_lineno - first.lineno + 1


@pytest.mark.parametrize("module", [*FILES, *OUTSIDE])
def test_functions_are_short(module: str) -> None:
    assert {f.name: length(f) for f in functions(module) if length(f) > LONGEST} == {}


@pytest.mark.parametrize("module", FILES)
def test_functions_have_few_parameters(module: str) -> None:
    # The options of a model are the signature of its class.
    exempt = {"__init__"} if inside(module, "sdt_blocks.models") else set()
    asked = [function for function in functions(module) if not is_flat(function) and function.name not in exempt]
    counts = {function.name: len(parameters(function)) for function in asked}
    assert {name: count for name, count in counts.items() if count > MOST_PARAMETERS} == {}


def test_no_circle_of_imports() -> None:
    graph = {module: imports(module) for module in FILES}
    assert sum(map(len, graph.values())) > len(FILES)
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
    ("place", "below"),
    [
        ("sdt_blocks.ops", ("sdt_blocks.ops", "sdt_blocks.surrogate", "sdt_blocks.files", "sdt_blocks.checks")),
        ("sdt_blocks.files", ()),
        ("sdt_blocks.checks", ()),
        ("sdt_blocks.surrogate", ("sdt_blocks.checks",)),
    ],
)
def test_ops_import_nothing_above_them(place: str, below: tuple[str, ...]) -> None:
    modules = [module for module in FILES if inside(module, place)]
    assert modules
    above = {(m, other) for m in modules for other in imports(m) if not inside(other, *below)}
    assert above == set()


def test_inference_knows_no_block_and_no_model() -> None:
    modules = [module for module in FILES if inside(module, "sdt_blocks.inference")]
    assert modules
    known = ("sdt_blocks", "sdt_blocks.blocks", "sdt_blocks.models")
    found = {(module, other) for module in modules for other in imports(module)}
    assert {pair for pair in found if inside(pair[1], *known[1:]) or pair[1] == known[0]} == set()
