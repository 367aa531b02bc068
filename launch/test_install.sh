#!/usr/bin/env bash
# Install sa3train plainly, as a user would, into temporary environments, and run launch/smoke.sh in each:
#   oldest    the oldest torch that pyproject.toml admits, everything else as pip resolves it today
#   newest    everything as pip resolves it today, with extras, which are run too
#   bounds    every dependency, and those of the extras, at the lower bound that pyproject.toml gives
#   bash launch/test_install.sh                 all rows (about 8 GB of TMPDIR, deleted at the end)
#   bash launch/test_install.sh oldest          some of them
#   PYTHON=python3.12 bash launch/test_install.sh
# A row that installs and cannot be imported or does not run is a bound of pyproject.toml to correct.
set -uo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
work="$(mktemp -d)"
extras=export,openvino,peers
trap 'rm -rf "$work"' EXIT
# Constraints from pip's configuration would hide what a plain install resolves to. The rows share one download cache.
export PIP_CONSTRAINT=/dev/null PIP_CACHE_DIR="$work/cache" PIP_DISABLE_PIP_VERSION_CHECK=1 TMPDIR="$work"

# A copy of the sources: pip builds in place, and would leave its build folder there.
mkdir "$work/source"
git -C "$root" ls-files -coz --exclude-standard -- sa3train conf launch pyproject.toml README.md LICENSE |
    while IFS= read -r -d '' file; do
        if [ -e "$root/$file" ]; then
            mkdir -p "$work/source/$(dirname "$file")" && cp "$root/$file" "$work/source/$file"
        fi
    done

lower_bounds() { # [NAME]: name==bound of each dependency, or of one
    "${PYTHON:-python3}" - "$root/pyproject.toml" "$@" <<END
import re, sys, tomllib

with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
extras = (project["optional-dependencies"][name] for name in "$extras".split(","))
dependencies = sum(extras, project["dependencies"])
bounds = dict(re.match(r"([\w.-]+)>=([\w.]+)", dependency).groups() for dependency in dependencies)
assert len(bounds) == len(dependencies), "a package has two bounds, of which one would not be tested"
print("\n".join(f"{name}=={bounds[name]}" for name in sys.argv[2:] or bounds))
END
}

run_extras() { # FOLDER OF THE COMMANDS
    "$1/python" -c "import diffusers" &&
        "$1/sa3-export" --model nano --check "$work/onnx" &&
        "$1/sa3-generate" --model nano --backend openvino -p piano --duration 2 -o "$work/clip.wav"
    local code=$?
    rm -rf "$work/onnx" "$work"/clip*
    return "$code"
}

test_row() { # ROW
    local row=$1 environment="$work/$1" chosen="" with="[$extras]"
    case "$row" in
        oldest) chosen=$(lower_bounds torch | tr '\n' ' ') with="" ;;
        newest) ;;
        bounds) chosen=$(lower_bounds | tr '\n' ' ') ;;
        *) printf 'error: unknown row %s: use oldest, newest or bounds\n' "$row" >&2 && return 2 ;;
    esac
    printf '\n%s: pip install .%s %s\n' "$row" "$with" "$chosen"
    # shellcheck disable=SC2086  # requirements without spaces
    "${PYTHON:-python3}" -m venv "$environment" &&
        "$environment/bin/python" -m pip install --quiet --quiet "$work/source$with" $chosen &&
        "$environment/bin/python" -m pip check &&
        INSTALLED=1 PYTHON="$environment/bin/python" bash "$work/source/launch/smoke.sh" &&
        { [ -z "$with" ] || run_extras "$environment/bin"; }
    local code=$?
    rm -rf "$environment"
    return "$code"
}

[ "$#" -gt 0 ] || set -- oldest newest bounds
results=()
status=0
for row in "$@"; do
    if test_row "$row"; then results+=("$row: passed"); else results+=("$row: FAILED") && status=1; fi
done
printf '\n%s\n' "${results[@]}"
exit "$status"
