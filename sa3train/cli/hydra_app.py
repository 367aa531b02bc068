"""What every command shares: errors without tracebacks, and Hydra set up once.

A command with plain flags:

    def main(argv: list[str] | None = None) -> int:
        return run_job(lambda: generate(parser.parse_args(argv)))   # SA3Error -> "error: …" on stderr, exit code 1

A command with a Hydra configuration (`conf/encode.yaml`); heavy imports go inside `encode`:

    @dataclasses.dataclass
    class EncodeConfig: ...                          # every key of encode.yaml, typed (see core.config)

    def main(argv: list[str] | None = None) -> int:
        return run_hydra_job(
            "encode", EncodeConfig, encode, shorthand={"model": "model.name"}, paths=("source", "out"), argv=argv
        )

    def encode(config: EncodeConfig) -> int | None:  # passes plain keyword arguments to the library

Unknown keys, on the command line or in any YAML, are refused with the closest known one. The primary YAML must start
with the defaults of `conf/encode.yaml` and `conf/train.yaml`: `_self_` first, Hydra's own logging off.

Set `SA3TRAIN_DEBUG=1` to see the traceback of a user error.
"""

import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from sa3train.core.config import MISSING, build, describe_unknown_keys, is_known, list_keys
from sa3train.core.errors import ConfigError, SA3Error
from sa3train.core.files import get_config_dir
from sa3train.core.imports import explain_imports

_HELP_FLAGS = ("--help", "-h")


@contextmanager
def _share_help_queries(arguments: Sequence[str]) -> Iterator[None]:
    """Let Hydra's queries without overrides share one copy of the configuration while `--help` is printed.

    Hydra lists every group's options by a query of its own, and deep-copies the composed configuration's sources for
    each: 110 copies took half of the second that `sa3-train --help` needs on a slow core. It has no public switch for
    that, so its private loader is patched here and nowhere else; a test fails when it changes.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    name = "_parse_overrides_and_create_caching_repo"
    original = getattr(ConfigLoaderImpl, name, None)
    if original is None or not set(_HELP_FLAGS) & set(arguments):  # another Hydra: leave it alone
        yield
        return
    known: dict[int, Any] = {}

    def shared(self: ConfigLoaderImpl, config_name: str | None, overrides: list[str]) -> Any:
        if config_name is not None or overrides:
            return original(self, config_name, overrides)
        if id(self) not in known:
            known[id(self)] = original(self, config_name, overrides)
        return known[id(self)]

    setattr(ConfigLoaderImpl, name, shared)
    try:
        yield
    finally:
        setattr(ConfigLoaderImpl, name, original)


Schema = TypeVar("Schema")

CONF = str(get_config_dir())
QUIET_OVERRIDES = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")
"""Overrides of a resumed run; the primary YAML of a fresh run sets the same."""

MAX_SPINS = "1000"
"""Turns of a waiting thread's loop: some microseconds, so that the many short products of a small model stay fast."""


def run_job(job: Callable[[], int | None]) -> int:
    """Run a command and turn its errors into one line and an exit code.

    Args:
        job: The command; what it returns is the exit code, None for 0.

    Returns:
        Exit code: that of the job, 1 for an `SA3Error` (printed as `error: …` on stderr), 130 when interrupted.
    """
    from sa3train.core.log import set_up_logging

    limit_thread_spinning()
    set_up_logging()
    try:
        with explain_imports():
            return job() or 0
    except SA3Error as error:
        if os.environ.get("SA3TRAIN_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the pipe, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def limit_thread_spinning() -> None:
    """Limit how long waiting threads spin, unless the environment says how they are to wait.

    torch computes with GNU OpenMP, whose threads spin 300 000 times before they sleep. Where another program wants a
    core, a spinning thread keeps the one it waits for from running. OpenMP reads this once, when torch is imported: so
    this comes first in every command, and no command imports torch before. Measurements: docs/performance.md.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", MAX_SPINS)


def run_hydra_job(
    config_name: str,
    schema: type[Schema],
    job: Callable[[Schema], int | None],
    *,
    shorthand: Mapping[str, str] | None = None,
    paths: Sequence[str] = (),
    resume: str | None = None,
    argv: Sequence[str] | None = None,
) -> int:
    """Run a command with a Hydra configuration.

    Multirun and launchers work as in any Hydra application.

    Args:
        config_name: Name of the primary YAML in `conf/`, without suffix.
        schema: Dataclass of the whole configuration.
        job: The command; what it returns is the exit code, None for 0.
        shorthand: `model=VALUE` means `model.name=VALUE` for {"model": "model.name"}, unless `conf/model/VALUE.yaml`
            exists: then it selects that group option.
        paths: Keys whose value is taken as written, so that spaces, brackets and equals signs need no quoting.
        resume: Key that takes the folder of an earlier run, whose `config.yaml` is then the configuration; further
            overrides act on it.
        argv: Command-line arguments; None for `sys.argv`.

    Returns:
        Exit code; the largest of the jobs that ran in this process.
    """

    def run() -> int:
        given = list(sys.argv[1:] if argv is None else argv)
        folder = find_config_dir(given)
        expanded = [expand_argument(argument, shorthand or {}, paths, folder) for argument in given]
        arguments = [_open_mapping_key(schema, argument) for argument in expanded]
        check_overrides(schema, arguments)
        return _run_hydra(schema, job, arguments, _find_primary_config(config_name, resume, arguments))

    return run_job(run)


def _run_hydra(
    schema: type[Schema], job: Callable[[Schema], int | None], arguments: list[str], primary: tuple[str, str, list[str]]
) -> int:
    import hydra
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    register_resolvers()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        get_run_stamp()  # inherited by every process started from here
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come to us unchanged; we print one line
    config_path, config_name, extra = primary
    codes: list[int] = [0]
    failures: list[SA3Error] = []
    pid = os.getpid()

    def task(config: DictConfig) -> None:
        register_resolvers()  # a launcher may run this in a process of its own
        try:
            values = cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True))
            codes.append(job(build(schema, values)) or 0)
        except SA3Error as error:
            if os.getpid() != pid:  # in a launcher's own process, which carries the error back
                raise
            _clear_frames(error)
            failures.append(error)  # hidden from Hydra, which would print around it; a sweep continues

    saved, sys.argv = sys.argv, [sys.argv[0], *arguments, *extra]
    try:
        with _share_help_queries(arguments):
            hydra.main(version_base="1.3", config_path=config_path, config_name=config_name)(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error
    finally:
        sys.argv = saved
    if failures:
        raise failures[0]
    return max(codes)


def _clear_frames(error: BaseException) -> None:
    """Clear the local variables of the calls that failed: a stored error would keep a model on a GPU alive."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__


def expand_argument(
    argument: str, shorthand: Mapping[str, str], paths: Sequence[str], extra: Path | None = None
) -> str:
    """Expand the shorthand of one argument, and quote its value where Hydra's grammar could not read it.

    Args:
        argument: Of the command line.
        shorthand: Full key by shorthand.
        paths: Keys whose value is taken as written.
        extra: Folder given with `--config-dir`, whose group options count too.

    Returns:
        The argument for Hydra.
    """
    key, equals, value = argument.partition("=")
    if not equals or key.startswith(("-", "~")):
        return argument
    if key in shorthand:
        folders, options = filter(None, (get_config_dir(), extra)), (value, *value.split(","))
        if any((folder / key / f"{option}.yaml").is_file() for folder in folders for option in options):
            return argument
        key = shorthand[key]
    if key in paths or key in shorthand.values():
        return f"{key}={_quote(value)}"
    return argument


def _open_mapping_key(schema: type, argument: str) -> str:
    """`key=value` for a new key inside a free-form dictionary as `++key=value`, which Hydra requires for it."""
    key, equals, _ = argument.partition("=")
    free = equals and "." in key and key[0].isalpha() and is_known(schema, key) and key not in list_keys(schema)
    return f"++{argument}" if free else argument


def find_config_dir(arguments: Sequence[str]) -> Path | None:
    """Find the folder given with `--config-dir` or `-cd`.

    Args:
        arguments: Of the command line.

    Returns:
        The folder, or None.
    """
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in ("--config-dir", "-cd"):
            following = arguments[index + 1] if index + 1 < len(arguments) else ""
            return Path(value if equals else following)
    return None


def _quote(value: str) -> str:
    """`value` as Hydra reads it back unchanged: bare if possible, so that sweeps like `a,b` work, else quoted."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if value in ("", "null", MISSING):
        return value
    try:
        parsed = OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return value if parsed.is_sweep_override() or isinstance(parsed.value(), str) else f'"{value}"'


def check_overrides(schema: type, arguments: Sequence[str]) -> None:
    """Check that the keys of overrides are in a schema; groups and Hydra's own keys are left to Hydra.

    Args:
        schema: Dataclass of the whole configuration.
        arguments: Of the command line.

    Raises:
        ConfigError: A key is unknown.
    """
    unknown = []
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        name = key.lstrip("+")
        if not equals or key.startswith(("-", "~")) or name.partition(".")[0] == "hydra" or "/" in name or "@" in name:
            continue
        if not is_known(schema, name) and not (get_config_dir() / name).is_dir():
            unknown.append(name)
    if unknown:
        raise ConfigError(describe_unknown_keys(schema, unknown))


def _find_primary_config(config_name: str, resume: str | None, arguments: list[str]) -> tuple[str, str, list[str]]:
    """Folder and name of the primary configuration, and what is appended to the command line."""
    given = [argument for argument in arguments if resume and argument.startswith(f"{resume}=")]
    folder = given[-1].partition("=")[2].strip('"') if given else ""
    if not folder or folder == "null":
        return CONF, config_name, []
    saved = Path(folder).absolute()
    if not (saved / "config.yaml").is_file():
        raise ConfigError(
            f"cannot resume {folder}: there is no config.yaml in it. "
            f"Give the folder of an earlier run, such as {resume}=runs/NAME."
        )
    return str(saved), "config", list(QUIET_OVERRIDES)


def register_resolvers() -> None:
    """Register `${stamp:}`: the name from `get_run_stamp`, with the number of the job in a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    def stamp() -> str:
        if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
            job = HydraConfig.get().job
            return get_run_stamp() if OmegaConf.is_missing(job, "num") else f"{get_run_stamp()}/{job.num:03d}"
        return get_run_stamp()

    OmegaConf.register_new_resolver("stamp", stamp, replace=True)


def get_run_stamp() -> str:
    """Get the name of this run: the scheduler's job number, else the time of the first call.

    Returns:
        The same in every rank and every later process of one run.

    Raises:
        ConfigError: Ranks were started together without anything to agree on.
    """
    known = os.environ.get("SA3TRAIN_RUN_STAMP")
    if known:
        return known
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    elastic = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if job:
        stamp = "-".join(["slurm", job, *filter(None, [os.environ.get("SLURM_ARRAY_TASK_ID")])])
    elif elastic != "none":
        stamp = elastic
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "several ranks were started without a common run name. "
            "Set run_dir=FOLDER, or start them with launch/torchrun.sh, which names the run."
        )
    else:
        stamp = time.strftime("%Y%m%d-%H%M%S")
    # processes started from here on (Lightning's ranks, loader workers) use the same
    os.environ["SA3TRAIN_RUN_STAMP"] = stamp
    return stamp


def _explain(error: Exception) -> str:
    """A Hydra or OmegaConf error without advice to append unknown keys; plug-ins with the command to install them."""
    text = str(error).strip()
    group = re.match(r"Could not override '([^']+)'", text)
    if group and (get_config_dir() / group[1]).is_dir():
        return (
            f"'{group[1]}' cannot be chosen here: this command, or the run that is resumed, has no such group. "
            f"See --help for its settings; a single one is written a.b=value."
        )
    if "submitit" in text:
        return 'launcher=slurm needs the submitit launcher: pip install "sa3train[slurm]".'
    text = text.partition("Config search path:")[0]  # where it looked says nothing about what to do
    lines = [line for line in text.splitlines() if "use +" not in line]
    cause = error.__cause__
    if isinstance(cause, Exception) and str(cause).strip() and str(cause).strip() not in text:
        lines += [line for line in str(cause).strip().splitlines() if "object_type" not in line]
    return "\n       ".join(line for line in lines if line.strip())
