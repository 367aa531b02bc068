"""What the repository promises about itself."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LISTED = subprocess.run(
    ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
).stdout.splitlines()
FILES = [name for name in LISTED if (ROOT / name).is_file()]
TEXTS = [
    name for name in FILES if Path(name).suffix in {".py", ".sh", ".md", ".toml", ".yaml", ".txt", ".sbatch", ".html"}
]
# Spelled apart, so that this file does not hold what it looks for.
REGISTRY_HOSTS = ["py" + "pi.org", "python" + "hosted.org", "registry." + "npmjs", "deb." + "debian.org"]


def test_no_registry_host_is_named() -> None:
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in TEXTS}
    assert [(name, host) for name, text in texts.items() for host in REGISTRY_HOSTS if host in text] == []


def test_links_between_documents_lead_somewhere() -> None:
    documents = [ROOT / name for name in TEXTS if name.endswith(".md")]
    links = [
        (path, link)
        for path in documents
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
        if "://" not in link and not link.startswith("mailto:")
    ]
    assert links and [(path, link) for path, link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("script", [name for name in FILES if name.endswith((".sh", ".sbatch")) or name == ".ci/run"])
def test_shell_scripts_parse(script: str) -> None:
    checked = subprocess.run(["bash", "-n", ROOT / script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def list_places() -> list[tuple[str, str]]:
    """List (file or folder, name in it or nothing) of the table "Where is X changed?" in CONTRIBUTING.md."""
    section = (
        (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Where is X changed?")[1].split("\n## ")[0]
    )
    places = []
    for path, names in re.findall(
        r"`((?:sa3train|conf|recipes|tests)/[\w./-]*)`(?::((?:,? `\w+`(?: \([^)]*\))?)+))?", section
    ):
        places += [(path, name) for name in re.findall(r"`(\w+)`", names)] or [(path, "")]
    places += [(path, name) for name, path in re.findall(r"`(\w+)` in `(sa3train/[\w./]+)`", section)]
    return places


def has_name(path: Path, name: str) -> bool:
    """Tell whether a file or folder exists, and defines a name where there is one."""
    return path.exists() and (
        not name or bool(re.search(rf"^(def |class )?{name}\b", path.read_text(encoding="utf-8"), re.MULTILINE))
    )


def test_places_where_things_are_changed_exist() -> None:
    places = list_places()
    assert places and [(path, name) for path, name in places if not has_name(ROOT / path, name)] == []
