"""The limits that keep the package readable: no import cycles, short files and functions, names that say something."""

import ast
import functools
from pathlib import Path

import grimp
import networkx
from house_metrics import ROOT, is_one_word, iterate_modules, list_public_names, starts_with_verb

LONGEST_FILE = 500
LONGEST_FUNCTION = 60
MOST_ONE_WORD_NAMES = 0.08
LEAST_VERBS = 0.45
FILES = list(iterate_modules("sa3train"))


@functools.cache
def list_nodes(path: Path) -> list[ast.AST]:
    """List the nodes of a file, which is parsed once for all tests."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def is_of_subprocess(call: ast.Call) -> bool:
    """Tell whether a function of `subprocess` is called."""
    module = call.func.value if isinstance(call.func, ast.Attribute) else None
    return isinstance(module, ast.Name) and module.id == "subprocess"


def test_there_is_no_import_circle() -> None:
    graph = grimp.build_graph("sa3train", exclude_type_checking_imports=True)
    imports = networkx.DiGraph(
        (module, imported) for module in graph.modules for imported in graph.find_modules_directly_imported_by(module)
    )
    assert [circle for circle in networkx.strongly_connected_components(imports) if len(circle) > 1] == []


def test_every_folder_is_a_package() -> None:
    assert {path.parent for path in FILES} == {path.parent for path in FILES if path.name == "__init__.py"}


def test_files_and_functions_are_short() -> None:
    lengths = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8").count("\n") for path in FILES}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}
    functions = [(path, node) for path in FILES for node in list_nodes(path) if isinstance(node, ast.FunctionDef)]
    lengths = {f"{path}: {node.name}": (node.end_lineno or 0) - node.lineno + 1 for path, node in functions}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}


def test_output_of_other_programs_is_read_in_a_named_encoding() -> None:
    calls = [node for path in FILES for node in list_nodes(path) if isinstance(node, ast.Call)]
    of_programs = [call for call in calls if is_of_subprocess(call)]
    unnamed = [call for call in of_programs if {word.arg for word in call.keywords} & {"text", "universal_newlines"}]
    assert of_programs and not [ast.unparse(call) for call in unnamed]


def test_public_names_say_what_they_are() -> None:
    names = list(list_public_names())
    functions = [name for _, name, is_function in names if is_function]
    assert sum(is_one_word(path, name) for path, name, _ in names) <= MOST_ONE_WORD_NAMES * len(names)
    assert sum(map(starts_with_verb, functions)) >= LEAST_VERBS * len(functions)
