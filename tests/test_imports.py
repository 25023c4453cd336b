"""What holds for every source file: imports go one way, everything stays small, docstrings say what they must (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

SRC = Path(__file__).resolve().parents[1] / "src" / "subbyte"
# Low to high: a file imports from its own entry and from those before it.
ORDER = (
    "errors quantizers widths choices model run calibrate export budget allocate tune recipes assemble plan report result pipeline "
    "subbyte tasks cli"
).split()
RANK = {name: rank for rank, name in enumerate(ORDER)}
MAY_PRINT = {"run/terminal.py", "tasks/demo.py"}
MODULES = {path.relative_to(SRC).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SRC.rglob("*.py"))}

Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def stage(module: str) -> str:
    """The entry of ORDER that a file belongs to: its folder, or its own name at the root."""
    first = module.split("/")[0].removesuffix(".py")
    return {"__init__": "subbyte", "__main__": "cli"}.get(first, first)


def imported_stages(module: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and stage of every import from subbyte, wherever in the file it stands."""
    package = ["subbyte", *module.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for root, *rest in (name.split(".") for name in names):
            if root == "subbyte":
                yield node.lineno, rest[0] if rest and rest[0] in RANK or len(rest) > 1 else "subbyte"


def functions() -> Iterator[tuple[str, str, Function]]:
    """Module, place and node of every function, nested and private ones too."""
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield module, f"{module}:{node.lineno} {node.name}", node


def public(module: str, body: list[ast.stmt]) -> Iterator[tuple[str, Documented]]:
    """Place and node of every public class, function and method."""
    for node in body:
        if isinstance(node, Documented) and not node.name.startswith("_"):
            yield f"{module}:{node.lineno} {node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public(module, node.body)


PUBLIC = [item for module, tree in MODULES.items() for item in public(module, tree.body)]


def arguments(node: Function) -> list[ast.arg]:
    """Every argument but the first one of a method."""
    given = node.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, *(arg for arg in (given.vararg, given.kwarg) if arg)]
    return [arg for arg in named if arg.arg not in ("self", "cls")]


def is_command(node: ast.AST) -> bool:
    """Whether a function is a command of the command line: its parameters are options, its docstring is the help text."""
    return isinstance(node, Function) and any(".command" in ast.unparse(decorator) for decorator in node.decorator_list)


def raises(node: Documented) -> bool:
    """Whether calling it raises an error of its own; for a class, whether its construction does."""
    if isinstance(node, ast.ClassDef):
        return any(raises(part) for part in node.body if isinstance(part, Function) and part.name in ("__init__", "__post_init__"))
    return any(isinstance(part, ast.Raise) and part.exc is not None for part in ast.walk(node))


def has_tensors(annotation: ast.expr | None) -> bool:
    """Whether an annotation names Tensor, and not only as what a function takes or gives."""
    text = "" if annotation is None else ast.unparse(annotation)
    return "Callable" not in text and re.search(r"\bTensor\b", text) is not None


def says_shape(text: str) -> bool:
    """Whether a description gives a shape: in parentheses, or in words."""
    return re.search(r"\(|\bshape|\bbroadcastable\b", text) is not None


def described(docstring: str) -> dict[str, str]:
    """Argument -> its description, from the section "Args:"."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n|\n)*)", docstring + "\n", re.MULTILINE)
    entries = re.split(r"^ {4}(?=\S)", section.group(1), flags=re.MULTILINE) if section else []
    named = (re.match(r"\*{0,2}(\w+)(?: \(.*?\))?:(.*)", entry, re.DOTALL) for entry in entries)
    return {match.group(1): match.group(2) for match in named if match}


def test_there_is_source_to_check():
    assert MODULES, f"no Python file under {SRC}"


def test_every_file_has_a_place_in_the_order():
    homeless = [module for module in MODULES if stage(module) not in RANK]
    assert not homeless, "\n".join(homeless)


def test_imports_go_one_way():
    upward = [
        f"{module}:{line} {stage(module)} imports {imported}"
        for module, tree in MODULES.items()
        for line, imported in imported_stages(module, tree)
        if RANK.get(imported, len(ORDER)) > RANK.get(stage(module), -1)
    ]
    assert not upward, "\n".join(upward)


def test_files_have_at_most_400_lines():
    long = [module for module in MODULES if len((SRC / module).read_text(encoding="utf-8").splitlines()) > 400]
    assert not long, "\n".join(long)


def test_functions_have_at_most_50_lines_without_the_docstring():
    long = []
    for _, place, node in functions():
        first = node.body[0]
        documentation = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) is not None else 0
        begin = first.lineno if is_command(node) else node.lineno  # of a command, the parameters are the user's options
        if (lines := node.end_lineno - begin + 1 - documentation) > 50:
            long.append(f"{place}: {lines}")
    assert not long, "\n".join(long)


def test_functions_have_at_most_6_arguments():
    crowded = [
        place
        for module, place, node in functions()
        if len(arguments(node)) > 6 and not is_command(node) and (module, node.name) != ("pipeline.py", "quantize")  # the one door
    ]
    assert not crowded, "\n".join(crowded)


def test_only_the_edges_print():
    printing = [
        f"{module}:{node.lineno}"
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and module not in MAY_PRINT
    ]
    assert not printing, "\n".join(printing)


def test_everything_public_has_a_docstring():
    undocumented = [place for place, node in PUBLIC if not ast.get_docstring(node)]
    assert not undocumented, "\n".join(undocumented)


def test_docstrings_name_the_errors():
    silent = [place for place, node in PUBLIC if raises(node) and not is_command(node) and "Raises:" not in (ast.get_docstring(node) or "")]
    assert not silent, "\n".join(silent)


def test_docstrings_give_the_shape_of_every_tensor():
    shapeless = []
    for place, node in PUBLIC:
        if not isinstance(node, Function):
            continue
        docstring = ast.get_docstring(node) or ""
        told = described(docstring)
        if "Args:" not in docstring and len(arguments(node)) == 1 and says_shape(docstring):
            continue  # a single input may be described in the one sentence
        shapeless += [
            f"{place}: {arg.arg}" for arg in arguments(node) if has_tensors(arg.annotation) and not says_shape(told.get(arg.arg, ""))
        ]
        if has_tensors(node.returns) and not says_shape(docstring):
            shapeless.append(f"{place}: what it returns")
    assert not shapeless, "\n".join(shapeless)
