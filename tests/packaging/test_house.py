"""The limits that keep the package readable: no import cycles, short files and functions, names that say something."""

import ast
from pathlib import Path

import grimp
import networkx
import pytest
from house_metrics import ROOT, iterate_modules, list_one_word_names, list_public_names, list_verbless_functions

LONGEST_FILE = 500
LONGEST_FUNCTION = 60
MOST_ONE_WORD_NAMES = 0.08
LEAST_VERBS = 0.45
FILES = list(iterate_modules("sa3train"))


def test_there_is_no_import_circle() -> None:
    graph = grimp.build_graph("sa3train", exclude_type_checking_imports=True)
    imports = networkx.DiGraph(
        (module, imported) for module in graph.modules for imported in graph.find_modules_directly_imported_by(module)
    )
    assert [circle for circle in networkx.strongly_connected_components(imports) if len(circle) > 1] == []


def test_every_folder_is_a_package() -> None:
    assert {path.parent for path in FILES} == {path.parent for path in FILES if path.name == "__init__.py"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_are_short(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= LONGEST_FILE
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}


def test_output_of_other_programs_is_read_in_a_named_encoding() -> None:
    trees = [ast.parse(path.read_text("utf-8")) for path in FILES]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    of_programs = [call for call in calls if ast.unparse(call.func).startswith("subprocess.")]
    unnamed = [call for call in of_programs if {word.arg for word in call.keywords} & {"text", "universal_newlines"}]
    assert of_programs and not [ast.unparse(call) for call in unnamed]


def test_public_names_say_what_they_are() -> None:
    names = list(list_public_names())
    functions = [name for _, name, is_function in names if is_function]
    assert len(list_one_word_names()) <= MOST_ONE_WORD_NAMES * len(names)
    assert len(list_verbless_functions()) <= (1 - LEAST_VERBS) * len(functions)
