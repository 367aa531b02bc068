#!/usr/bin/env bash
# Create .venv and install sa3train with its dependencies. Running it again does nothing if it is up to date.
#   bash launch/setup.sh          the commands
#   bash launch/setup.sh --ui     and the studio
#   bash launch/setup.sh --dev    and the tools of the tests (and Debian's chromium for the browser tests)
# For Linux and macOS, with Homebrew's Python; for Windows see docs/install.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=""
case "$*" in
    --dev) extras="[dev]" ;;
    --ui) extras="[ui]" ;;
    "") ;;
    *)
        sed -n '2,6s/^# //p' launch/setup.sh
        [ "$*" = --help ] || [ "$*" = -h ] && exit 0
        printf 'setup.sh: unknown arguments %s\n' "$*" >&2
        exit 2
        ;;
esac

say() { printf '%s\n' "$*"; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; elif command -v sudo >/dev/null; then sudo "$@"; else return 1; fi; }
debian_install() {
    command -v apt-get >/dev/null || return 1
    say "Installing Debian packages: $*"
    as_root apt-get update -qq && as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    say "Python 3.11 to 3.13 was not found. Install it (Debian/Ubuntu: sudo apt-get install python3 python3-venv," >&2
    say "macOS: brew install python@3.12), or give its path: PYTHON=/path/to/python3.12 bash launch/setup.sh" >&2
    return 1
}

# .venv/.installed* hold the hash of the files that an installation depends on. [dev] includes [ui].
digest() { if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi; } # the second on macOS
wanted=$(cat pyproject.toml constraints.txt | digest | cut -d' ' -f1)
installed() { [ "$(cat ".venv/.installed$1" 2>/dev/null)" = "$wanted" ]; }
if [ "$extras" = "[dev]" ] && ! command -v chromium >/dev/null; then
    debian_install chromium || {
        say "The browser tests need chromium, which could not be installed. Install it (macOS: brew install --cask chromium) and run this script again." >&2
        exit 1
    }
fi
if installed "[dev]" || installed "$extras" || { [ -z "$extras" ] && installed "[ui]"; }; then exit 0; fi

python=$(find_python)
if ! "$python" -c 'import ensurepip' 2>/dev/null; then
    debian_install python3-venv || {
        say "$python has no venv module. Install it (Debian/Ubuntu: sudo apt-get install python3-venv) and run this script again." >&2
        exit 1
    }
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
say "Installing sa3train${extras} into .venv (the first time takes a few minutes: PyTorch is large) ..."
quiet=--quiet
if [ -t 1 ]; then quiet=--progress-bar=on; fi # on a screen, show what is downloaded
.venv/bin/python -m pip install "$quiet" --disable-pip-version-check -c constraints.txt -e ".${extras}"
# Python looks for editable packages last, and would find the clone itself in the folder of a script beside it.
first='import sys; sys.meta_path.sort(key=lambda finder: getattr(finder, "__name__", "") != "_EditableFinder")'
printf '%s\n' "$first" >"$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sa3train_first.pth"
printf '%s' "$wanted" >".venv/.installed$extras"
say "Installed. Commands are in .venv/bin: $(cd .venv/bin && echo sa3-*)"
