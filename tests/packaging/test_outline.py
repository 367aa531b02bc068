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


@pytest.mark.parametrize("name", TEXTS)
def test_no_registry_host_is_named(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert [host for host in REGISTRY_HOSTS if host in text] == []


@pytest.mark.parametrize("name", [name for name in TEXTS if name.endswith(".md")])
def test_links_between_documents_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", (ROOT / name).read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    assert [link for link in local if not ((ROOT / name).parent / link).exists()] == []


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


@pytest.mark.parametrize(("path", "name"), list_places())
def test_places_where_things_are_changed_exist(path: str, name: str) -> None:
    assert (ROOT / path).exists()
    if name:
        assert re.search(rf"^(def |class )?{name}\b", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
