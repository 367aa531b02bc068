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

import dataclasses
import errno
import functools
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, cast

from sa3train.cli.config_files import adapt_options, check_config_dir, find_config_dir, read_config, suggest_runs
from sa3train.cli.hydra_hooks import check_jobs_first, share_help_queries
from sa3train.cli.parser import name_flags
from sa3train.cli.precedence import build_composed
from sa3train.cli.version import describe_version
from sa3train.core.config import MISSING, describe_unknown_keys, is_known, list_keys
from sa3train.core.errors import ConfigError, SA3Error
from sa3train.core.files import get_config_dir, path_exists
from sa3train.core.imports import explain_imports
from sa3train.core.overrides import format_override, format_value, is_quoted, quote_text, unescape_interpolations
from sa3train.core.signals import Interrupted, handle_signals, watch_stop_file
from sa3train.core.text import suggest_name
from sa3train.core.user_files import suggest_path

_VALUE_FLAGS = (
    "--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--info",
    "-i", "--experimental-rerun",
)  # fmt: skip
"""Flags of Hydra that take the next argument."""


Schema = TypeVar("Schema")

CONF = str(get_config_dir())
QUIET_OVERRIDES = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")
"""Overrides of a resumed run; the primary YAML of a fresh run sets the same."""

MAX_SPINS = "1000"
"""Turns of a waiting thread's loop: some microseconds, so that the many short products of a small model stay fast."""


def run_job(job: Callable[[], int | None], flags: Mapping[str, str] = MappingProxyType({})) -> int:
    """Run a command and turn its errors into one line and an exit code.

    Args:
        job: The command; what it returns is the exit code, None for 0.
        flags: Flag by the name of a parameter, for messages that name parameters as Python does.

    Returns:
        Exit code: that of the job, 1 for an `SA3Error` or a path that is too long (printed as `error: …` on stderr),
        128 + the number of the signal that stopped it: 130 for Ctrl-C, 143 for SIGTERM.
    """
    from sa3train.core.log import set_up_logging

    limit_thread_spinning()
    try:
        with handle_signals(), explain_imports():
            watch_stop_file()
            set_up_logging()
            return job() or 0
    except SA3Error as error:
        if os.environ.get("SA3TRAIN_DEBUG"):
            raise
        print(f"error: {name_flags(str(error), flags) if flags else error}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # another Ctrl-C while Python exits ends it without a traceback
        print(stop, file=sys.stderr)
        return 128 + stop.number
    except BrokenPipeError:  # the reader of the pipe, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"error: {str(error.filename)[:80]}… is too long for a file name. Choose a shorter one.", file=sys.stderr)
        return 1


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
    lists: Sequence[str] = (),
    resume: str | None = None,
    suggest: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    check: Callable[[Schema], object] | None = None,
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
        paths: Keys whose value is a path, taken as written (`expand_argument`).
        lists: Keys whose value may be written `a,b` for `[a,b]`, except in a sweep.
        resume: Key that takes the folder of an earlier run, whose `config.yaml` is then the configuration; further
            overrides act on it.
        suggest: Gives values that suit the others, see `build_composed`; not for a resumed run.
        check: Checks the settings; for every job of a sweep before the first one starts.
        argv: Command-line arguments; None for `sys.argv`.

    Returns:
        Exit code; the largest of the jobs that ran in this process.
    """

    def run() -> int:
        given = list(sys.argv[1:] if argv is None else argv)
        if "--version" in given:  # Hydra would print its own
            print(describe_version())
            return 0
        _check_form(schema, shorthand or {}, given)
        given.sort(key=_is_override)  # Hydra takes no flags after the first
        folder, is_sweep = find_config_dir(given), not {"-m", "--multirun"}.isdisjoint(given)
        given = given if is_sweep else [_bracket_list(argument, lists) for argument in given]
        expanded = [expand_argument(argument, shorthand or {}, paths, folder, is_sweep) for argument in given]
        arguments = [_open_mapping(schema, argument) for argument in expanded]
        check_overrides(schema, arguments)
        if folder is not None:
            check_config_dir(folder, arguments)
        action = job
        if {"--cfg", "job", "--resolve"} <= set(arguments):  # Hydra would show what the command refuses or changes
            arguments = [*(each for each in arguments if each not in ("--cfg", "job", "--resolve")), "hydra.mode=RUN"]
            action = _print_settings
        primary = _find_primary_config(config_name, resume, arguments)
        arguments = adapt_options(arguments, shorthand or {}, is_resumed=primary[0] != CONF)
        suggested, checked = (suggest if primary[0] == CONF else None), (check if action is job else None)
        compose = functools.partial(build_composed, schema, suggest=suggested, check=checked)
        return _run_hydra(compose, action, arguments, primary)

    return run_job(run)


def _is_override(argument: str) -> bool:
    return argument[:1] != "-" and ("=" in argument or argument[:1] == "~")


def _print_settings(settings: Any) -> None:
    from sa3train.reports.run_files import format_settings

    print(format_settings(dataclasses.asdict(settings)), end="")


def _run_hydra(
    compose: Callable[[dict[str, Any], str], Schema],
    job: Callable[[Schema], int | None],
    arguments: list[str],
    primary: tuple[str, str, list[str]],
) -> int:
    import hydra
    from hydra.core.hydra_config import HydraConfig
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
    pid, in_sweep = os.getpid(), False

    def build(config: DictConfig) -> Schema:
        return compose(cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True)), config_name)

    def task(config: DictConfig) -> None:
        nonlocal in_sweep
        in_sweep = is_sweep_job()
        register_resolvers()  # a launcher may run this in a process of its own
        try:
            codes.append(job(build(config)) or 0)
            if codes[-1] > 128 and os.getpid() == pid and in_sweep:  # stopped: the rest is not to be started
                raise Interrupted(codes[-1] - 128)
        except SA3Error as error:
            if os.getpid() != pid:  # in a launcher's own process, which carries the error back
                raise
            _clear_frames(error)
            failures.append(error)  # hidden from Hydra, which would print around it; a sweep continues
            if in_sweep:
                print(f"error: job {HydraConfig.get().job.num:03d}: {error}", file=sys.stderr)

    saved, sys.argv = sys.argv, [sys.argv[0], *arguments, *extra]
    try:
        with share_help_queries(arguments), check_jobs_first(build):
            hydra.main(version_base="1.3", config_path=config_path, config_name=config_name)(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, arguments)) from error
    except RuntimeError as error:
        if "srun" not in str(error):  # submitit's
            raise
        raise ConfigError("launcher=slurm needs srun, and this machine has none: run it where SLURM is.") from error
    finally:
        sys.argv = saved
    if failures and in_sweep:
        raise SA3Error(f"{len(failures)} of {len(failures) + len(codes) - 1} jobs of the sweep failed: see above.")
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
    argument: str, shorthand: Mapping[str, str], paths: Sequence[str], extra: Path | None = None, is_sweep: bool = False
) -> str:
    """Expand the shorthand of one argument, and quote a path so that Hydra gives it back as written.

    Three things in a path setting are Hydra's nevertheless: a value wholly in quotes; `${…}`; and, in a sweep, what
    lists several values, such as `a,b`. A path that exists is a path, whatever it looks like.

    Args:
        argument: Of the command line.
        shorthand: Full key by shorthand.
        paths: Keys whose value is a path.
        extra: Folder given with `--config-dir`, whose group options count too.
        is_sweep: Whether `--multirun` is given.

    Returns:
        The argument for Hydra; expanding it again changes nothing.
    """
    key, equals, value = argument.partition("=")
    if not equals or key.startswith(("-", "~")):
        return argument
    if key in shorthand:
        folders, options = filter(None, (get_config_dir(), extra)), (value, *value.split(","))
        if any((folder / key / f"{option}.yaml").is_file() for folder in folders for option in options):
            return argument
        key = shorthand[key]
    if key not in paths and key not in shorthand.values():
        return argument
    if value in ("", "null", MISSING) or is_quoted(value):
        return f"{key}={value}"
    if not path_exists(value):
        if is_sweep and _is_sweep(value):
            return f"{key}={value}"
        if "${" in value:
            return f"{key}={quote_text(value)}"
    return format_override(key, value)


def _is_sweep(value: str) -> bool:
    parsed = _parse(f"key={value}")
    return parsed is not None and parsed.is_sweep_override()


def _parse(argument: str) -> Any:
    """Parse an override; None for one that Hydra cannot read."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def _bracket_list(argument: str, lists: Sequence[str]) -> str:
    key, _, value = argument.partition("=")
    return f"{key}=[{value}]" if key in lists and value and not value.startswith("[") else argument


def _check_form(schema: type, shorthand: Mapping[str, str], arguments: Sequence[str]) -> None:
    """Check for what Hydra answers with its usage or not at all: settings written as flags, words, endless numbers."""
    if {"--cfg", "--resolve"} <= set(arguments) and not {"-m", "--multirun"}.isdisjoint(arguments):
        raise ConfigError("--cfg job --resolve shows the settings of one run: leave out --multirun.")
    before = ""
    for argument in arguments:
        key = argument.lstrip("-").partition("=")[0]
        if re.search(r"\d{1000}", argument):  # Python reads no more than 4300, and Hydra does not catch that
            raise ConfigError(f"{key} must not have a number of 1000 digits.")
        name = key.replace("-", "_")
        if argument.startswith("--") and (name in shorthand or is_known(schema, name)):
            raise ConfigError(f"{argument} is no flag. Settings are written without dashes: {name}=VALUE.")
        if "=" not in argument and argument[:1] not in ("-", "~") and before not in _VALUE_FLAGS:
            meant = f", a value with spaces in quotes: '{before} {argument}'" if "=" in before else ""
            raise ConfigError(f"cannot use {argument or 'an empty argument'}. Settings are written KEY=VALUE{meant}.")
        before = argument


def _open_mapping(schema: type, argument: str) -> str:
    """Make a free-form mapping settable as a whole, and a new key in one: Hydra takes neither by itself.

    A mapping replaces the default one. It becomes JSON text, which `build` reads, because the keys that people write
    (`layers[0-11]`) are no names in Hydra's grammar.
    """
    key, equals, value = argument.partition("=")
    if not equals or not key[:1].isalpha() or not is_known(schema, f"{key}.*"):
        return argument
    if key not in list_keys(schema):
        return f"++{argument}"
    return f"{key}={','.join(_list_mappings(value))}" if value.startswith("{") else argument


def _list_mappings(text: str) -> list[str]:
    """List the mappings of a value or a sweep, each as JSON text; what is none is left to Hydra's message."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    override = _parse(f"key={text}")
    if override is not None and override.is_sweep_override():
        return [found for item in override.sweep_string_iterator() for found in _list_mappings(item)]
    try:
        mapping = OmegaConf.create(text if override is None else override.value())  # text: with quoted keys
        return [format_value(json.dumps(OmegaConf.to_container(mapping, resolve=True)))]
    except YAMLError:
        return [text]
    except OmegaConfBaseException as error:
        raise ConfigError(f"cannot use {text}: {str(error).splitlines()[0]}. Write the value itself.") from error


def check_overrides(schema: type, arguments: Sequence[str]) -> None:
    """Check that the keys of overrides are in a schema; groups and Hydra's own keys are left to Hydra.

    Args:
        schema: Dataclass of the whole configuration.
        arguments: Of the command line.

    Raises:
        ConfigError: A key is unknown, or a mapping is set twice over.
    """
    unknown = []
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        name = key.lstrip("+")
        if not equals or key.startswith(("-", "~")) or name.partition(".")[0] == "hydra" or "/" in name or "@" in name:
            continue
        if not is_known(schema, name) and not (get_config_dir() / name).is_dir():
            unknown.append(name)
        if is_known(schema, f"{name}.*") and any(other.lstrip("+").startswith(f"{name}.") for other in arguments):
            raise ConfigError(f"{name} is set as a whole and by key. Set all of it at once: {name}={{KEY: VALUE, …}}.")
    if unknown:
        raise ConfigError(describe_unknown_keys(schema, unknown))


def _find_primary_config(config_name: str, resume: str | None, arguments: list[str]) -> tuple[str, str, list[str]]:
    """Folder and name of the primary configuration, and what is appended to the command line."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    given = [argument for argument in arguments if resume and argument.startswith(f"{resume}=")]
    if not given:
        return CONF, config_name, []
    override = OverridesParser.create().parse_override(given[-1])
    if override.is_sweep_override():
        raise ConfigError(f"{given[-1]} names several folders. Resume one run at a time.")
    if override.value() is None:
        return CONF, config_name, []
    folder = unescape_interpolations(str(override.value()))
    saved = Path(folder).absolute()
    if not folder or not (saved / "config.yaml").is_file():
        of_step = re.fullmatch(r"(.+)@\d+", folder)
        if of_step and (Path(of_step[1]) / "config.yaml").is_file():
            way = f"another run starts from this one with adapter.start_from={folder}"
            hint = f"{resume}={of_step[1]} goes on from its last step; {way}."
        else:
            hint = suggest_runs(folder, f"{resume}=") or suggest_path(folder)
            hint = hint or f"Give the folder of an earlier run, such as {resume}=runs/NAME."
        problem = "there is no config.yaml in it" if saved.is_dir() else "there is no such folder"
        raise ConfigError(f"cannot resume {folder or 'an empty path'}: {problem}. {hint}")
    read_config(saved / "config.yaml")
    return str(saved), "config", list(QUIET_OVERRIDES)


def register_resolvers() -> None:
    """Register `${stamp:}`: the name from `get_run_stamp`."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("stamp", get_run_stamp, replace=True)


def is_sweep_job() -> bool:
    """Check whether this is a job of a sweep.

    Returns:
        Whether it is.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


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
        stamp = re.sub(r"[^\w.-]+", "-", elastic)
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


def _explain(error: Exception, arguments: Sequence[str]) -> str:
    """A Hydra or OmegaConf error without advice to append unknown keys; plug-ins with the command to install them."""
    text = str(error).strip()
    group = re.match(r"Could not override '([^']+)'", text)
    if group and group[1] == "data" and "recipe=decoder" in arguments:
        return "recipe=decoder trains on audio, not on latents. Write source=FOLDER in place of data=…"
    if group and (get_config_dir() / group[1]).is_dir():
        return (
            f"'{group[1]}' cannot be chosen here: this command, or the run that is resumed, has no such group. "
            f"See --help for its settings; a single one is written a.b=value."
        )
    if missing := re.search(r"Could not find '(\w+)/(.*)'", text):
        options = [option for option in re.findall(r"\n\t(\S+)(?=\n|$)", text) if option != "base"]
        hint = suggest_name(missing[2], options, f"Choose from: {', '.join(options)}.")
        return f"{missing[1]}={missing[2]} is unknown. {hint}"
    if "override_grammar" in text:
        wrong = next((each for each in arguments if "=" in each and _parse(each) is None), "an argument")
        return f"""cannot read {wrong}: {text.splitlines()[0]}. Quote text with other characters: key='"a, b"'."""
    if "submitit" in text:
        return 'launcher=slurm needs the submitit launcher: pip install "sa3train[slurm]".'
    text = text.partition("Config search path:")[0]  # where it looked says nothing about what to do
    lines = [line for line in text.splitlines() if "use +" not in line]
    cause = error.__cause__
    if isinstance(cause, Exception) and str(cause).strip() and str(cause).strip() not in text:
        lines += [line for line in str(cause).strip().splitlines() if "object_type" not in line]
    return "\n       ".join(line for line in lines if line.strip())
