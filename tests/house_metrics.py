"""Count lines of code and kinds of names, and print them: `python tests/house_metrics.py [--list]`.

Lines of code are those that hold a token other than a comment or a docstring. A name is a public top-level function or
class of the package, that is, one without a leading underscore.
"""

import argparse
import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SKIPPED_TOKENS = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
    tokenize.ENDMARKER,
}  # fmt: skip
VERBS = frozenset(
    """
    accumulate add align allow append apply arrange assert assign attach attend audit augment average await bake
    blend broadcast build cache call cancel cap capture carry cast center check choose claim clamp clear clip close
    code collate collect combine compare compile compose compress compute concatenate confirm connect convert copy
    count couple create crop cut decide declare decode decompress deduplicate define delete denoise dequantize
    derive describe detach detect differ disable discard discover display divide download draw drop edit embed
    enable encode end ensure enter escape estimate evaluate examine exclude exit expand explain export extend
    extract fetch fill filter find finish fit fix flatten flush fold follow force forget format forward free freeze
    fuse gather generate get give grow guess halt handle has hash have hide hold identify import include infer init
    initialize inject insert inspect install interpolate invalidate invert is iterate join judge keep kill know launch
    learn limit link list listen load localize locate lock log look lower make map mark mask match may measure merge
    migrate mix monitor move multiply must name needs normalize notify observe offload omit open override own pack pad
    parse partition patch patchify pause pick place plan play plot poll precompute predict prefetch preload prepare
    preserve preview print probe process propose protect prune publish pull push put quantize queue quote raise
    randomize read rebuild recommend recompute reconcile reconstruct record recover redraw reduce refresh refuse
    register reject release reload remember remove rename render reopen repeat replace replay report request requeue
    require resample rescale reserve reset reshape resize resolve restart restore resume retry return reuse revert
    rewrite rotate round run sample sanitize save scale scan scatter schedule search select send separate serialize
    serve set shard share shift shorten should show shuffle shut skip sleep slice smooth solve sort split start stop
    store stream strip submit subtract suggest sum summarize supports swap switch sync synchronize take tell
    terminate test thin time tokenize touch track train transfer transform translate transpose trim truncate try
    turn undo unfold unload unlock unpack unpatchify unwrap update upload use uses validate verify visit wait walk
    warn watch widen wire wrap write yield zero
    """.split()  # noqa: SIM905
)
"""First words that count as verbs. One-word names that are verbs (`merge`, `resize`) do not count as one-word names."""


def iterate_modules(folder: str) -> Iterator[Path]:
    """Yield the Python files below `folder` of the repository."""
    yield from sorted((ROOT / folder).rglob("*.py"))


def count_code_lines(source: str) -> int:
    """Count the lines that hold code."""
    docstrings = set[int]()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                docstrings.update(range(statement.lineno, statement.end_lineno + 1))
    lines = set[int]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SKIPPED_TOKENS:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def list_public_names(folder: str = "sa3train") -> Iterator[tuple[Path, str, bool]]:
    """Yield (file, name, whether a function) for each public top-level function and class."""
    for path in iterate_modules(folder):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            is_definition = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if is_definition and not node.name.startswith("_"):
                yield path, node.name, not isinstance(node, ast.ClassDef)


def is_sampler(path: Path) -> bool:
    """Tell whether the names of a file are the samplers' own."""
    return path.match("diffusion/samplers.py")


def is_one_word(path: Path, name: str) -> bool:
    """Tell whether a name is one lower-case word that is neither a bare verb nor a sampler's."""
    return name.islower() and "_" not in name and name not in VERBS and not is_sampler(path)


def starts_with_verb(name: str) -> bool:
    """Tell whether a function's name starts with a verb."""
    return name.split("_")[0] in VERBS or name in ("main",)


def list_one_word_names(folder: str = "sa3train") -> list[tuple[Path, str]]:
    """List the public names that are one lower-case word."""
    return [(path, name) for path, name, _ in list_public_names(folder) if is_one_word(path, name)]


def list_verbless_functions(folder: str = "sa3train") -> list[tuple[Path, str]]:
    """List the public functions whose name does not start with a verb."""
    names = list_public_names(folder)
    return [(path, name) for path, name, is_function in names if is_function and not starts_with_verb(name)]


def main() -> None:
    """Print the counts, and with `--list` the names that count against the goals."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="also list one-word names and functions without a verb")
    parser.add_argument("--under", default="sa3train", help="folder whose names are counted")
    arguments = parser.parse_args()
    for folder in ("sa3train", "tests"):
        counts = {path: count_code_lines(path.read_text(encoding="utf-8")) for path in iterate_modules(folder)}
        print(f"{folder}: {sum(counts.values())} lines of code in {len(counts)} files")
    names = list(list_public_names(arguments.under))
    functions = [name for _, name, is_function in names if is_function]
    one_word, verbless = list_one_word_names(arguments.under), list_verbless_functions(arguments.under)
    print(f"public names: {len(names)}, one lower-case word: {len(one_word)} ({len(one_word) / len(names):.1%})")
    share = 1 - len(verbless) / len(functions)
    print(f"public functions: {len(functions)}, starting with a verb: {len(functions) - len(verbless)} ({share:.1%})")
    if arguments.list:
        for title, found in (("one word", one_word), ("no verb", verbless)):
            print(f"\n{title}:")
            for path, name in found:
                print(f"  {path.relative_to(ROOT)}: {name}")


if __name__ == "__main__":
    main()
