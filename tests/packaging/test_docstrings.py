"""Every public function and class of the package has a Google-style docstring.

A summary line that ends with a period (for functions in the imperative), `Args:` for each parameter, `Returns:` or
`Yields:` where something comes back, `Raises:` for each of our own errors that the body raises.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from house_metrics import ROOT, VERBS, iterate_modules

from sa3train.core import errors

OWN_ERRORS = {name for name, value in vars(errors).items() if isinstance(value, type)}
SECTION = re.compile(r"^(Args|Returns|Yields|Raises):$", re.MULTILINE)
Function = ast.FunctionDef | ast.AsyncFunctionDef
UNDOCUMENTED_METHODS = {"forward", "backward", "setup_context"}
"""Methods whose contract is PyTorch's; Lightning's hooks (`on_…`) and overrides of `torch.nn.Module` likewise."""


def iterate_public(path: Path) -> Iterator[tuple[str, ast.ClassDef | Function]]:
    """Yield (name, node) of the public functions and classes of a file, and the public methods of these classes."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef | Function) or node.name.startswith("_"):
            continue
        yield node.name, node
        for inner in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(inner, Function) and not inner.name.startswith("_"):
                yield f"{node.name}.{inner.name}", inner


def split_sections(docstring: str) -> dict[str, str]:
    """Split a docstring into its sections by name; the text before the first has the name ''."""
    parts = SECTION.split(docstring)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def list_raised(node: Function) -> set[str]:
    """List our own errors that the body raises itself."""
    raised = set()
    for inner in ast.walk(node):
        error = inner.exc if isinstance(inner, ast.Raise) else None
        name = error.func if isinstance(error, ast.Call) else error
        if isinstance(name, ast.Name) and (name.id in OWN_ERRORS or name.id.endswith("Error")):
            raised.add(name.id)
    return raised & (OWN_ERRORS | {"StudioError"})


def find_faults(name: str, node: ast.ClassDef | Function) -> Iterator[str]:
    """Yield what is wrong with a docstring."""
    docstring = ast.get_docstring(node)
    is_method = "." in name
    if not docstring:
        if not (is_method and (node.name in UNDOCUMENTED_METHODS or node.name.startswith("on_"))):
            yield "has no docstring"
        return
    summary = docstring.split("\n\n")[0].splitlines()
    if len(summary) != 1 or not summary[0].endswith("."):
        yield f"its summary is not one line that ends with a period: {summary[0]!r}"
    if isinstance(node, ast.ClassDef):
        return
    decorators = {ast.unparse(decorator).split("(")[0].split(".")[-1] for decorator in node.decorator_list}
    if decorators & {"property", "cached_property", "setter"}:
        return
    first = re.split(r"\W", summary[0])[0].lower()
    if first not in VERBS:
        yield f"its summary does not start with an imperative verb: {summary[0]!r}"
    if is_method and (node.name in UNDOCUMENTED_METHODS or node.name.startswith("on_") or "override" in decorators):
        return
    sections = split_sections(docstring)
    arguments = node.args
    parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    parameters += [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    for parameter in parameters:
        written = re.escape(parameter.arg)
        listed = re.search(
            rf"^\s+(?:[\w*]+, )*\*{{0,2}}{written}(?:, [\w*]+)*( \(.*\))?:", sections.get("Args", ""), re.MULTILINE
        )
        if parameter.arg not in {"self", "cls"} and not parameter.arg.startswith("_") and not listed:
            yield f"its Args do not list {parameter.arg}"
    returns = node.returns
    gives_nothing = returns is None or (isinstance(returns, ast.Constant) and returns.value is None)
    never = isinstance(returns, ast.Name) and returns.id in {"NoReturn", "Never"}
    if not (gives_nothing or never or {"Returns", "Yields"} & sections.keys()):
        yield "it has neither Returns nor Yields"
    for error in sorted(list_raised(node)):
        if error not in sections.get("Raises", ""):
            yield f"its Raises do not list {error}"


def test_docstrings_are_complete() -> None:
    faults = []
    for path in iterate_modules("sa3train"):
        place = path.relative_to(ROOT)
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))):
            faults.append(f"{place} has no docstring")
        for name, node in iterate_public(path):
            faults += [f"{place}: {name} {what}" for what in find_faults(name, node)]
    assert not faults, f"{len(faults)} faults\n" + "\n".join(faults)
