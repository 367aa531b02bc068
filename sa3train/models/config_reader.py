"""Reads JSON configs of models. An unknown key is logged, since it may or may not change what the model computes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from sa3train.core.errors import CheckpointError
from sa3train.core.log import get_logger

logger = get_logger(__name__)

Value = TypeVar("Value")
SUPPORTED = "Only Stable Audio 3 and SAME are supported."


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a config of a model.

    Args:
        path: `model_config.json`, or a config in the layout of diffusers.

    Returns:
        The JSON object.

    Raises:
        CheckpointError: The file is missing or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing. Copy, save or download the model's folder whole.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON ({error}). Delete {path.resolve()} and download it again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should be a JSON object, not {type(content).__name__}.")
    return content


class ConfigReader:
    """A JSON object: typed access, errors that name the key, and what the keys that it leaves out stand for.

    Attributes:
        raw: The object.
        where: Its place in the file, such as "model.diffusion"; empty for the whole.
        source: Name of the file, for messages.
        advice: What to do where a key is missing.
        known: Keys that were asked for.
        missing: Values of keys where they are left out.
        children: Readers of objects inside, by key.
    """

    def __init__(self, raw: Any, where: str, source: str, advice: str = SUPPORTED) -> None:
        """Wrap an object.

        Args:
            raw: The object.
            where: Its place in the file.
            source: Name of the file.
            advice: What to do where a key is missing.

        Raises:
            CheckpointError: It is something else.
        """
        if not isinstance(raw, Mapping):
            raise CheckpointError(f"{source}: {where or 'the file'} should be a JSON object, not {type(raw).__name__}.")
        self.raw, self.where, self.source, self.advice, self.known = raw, where, source, advice, set[str]()
        self.missing: dict[str, Any] = {}
        self.children: dict[str, ConfigReader | list[ConfigReader]] = {}

    def _get_path(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def fail(self, key: str, problem: str) -> CheckpointError:
        """Make an error about a key.

        Args:
            key: The key.
            problem: What is wrong with it.

        Returns:
            The error.
        """
        return CheckpointError(f"{self.source}: {self._get_path(key)} {problem}. {SUPPORTED}")

    def _fail_missing(self, key: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {self._get_path(key)} is missing. {self.advice}")

    def child(self, key: str, default: Mapping[str, Any] | None = None) -> "ConfigReader":
        """Read an object inside.

        Args:
            key: Its key.
            default: What stands for it where it is left out; None if it must be there.

        Returns:
            Its reader.

        Raises:
            CheckpointError: It is missing or something else.
        """
        self.known.add(key)
        if key not in self.raw and default is None:
            raise self._fail_missing(key)
        child = ConfigReader(self.raw.get(key, default), self._get_path(key), self.source, self.advice)
        self.children[key] = child
        return child

    def list_children(self, key: str) -> "list[ConfigReader]":
        """Read a list of objects.

        Args:
            key: Its key.

        Returns:
            A reader for each.

        Raises:
            CheckpointError: It is missing or something else.
        """
        path, entries = self._get_path(key), self.get(key, list)
        found = [
            ConfigReader(entry, f"{path}[{index}]", self.source, self.advice) for index, entry in enumerate(entries)
        ]
        self.children[key] = found
        return found

    def get(self, key: str, kind: type[Value] | tuple[type, ...], default: Value | None = None) -> Value:
        """Read a value.

        Args:
            key: Its key.
            kind: Its type.
            default: What stands for it where it is left out; None if it must be there.

        Returns:
            The value.

        Raises:
            CheckpointError: It is missing or of another type.
        """
        self.known.add(key)
        value = self.raw.get(key, default)
        if value is None:
            raise self._fail_missing(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.fail(key, f"is {value!r}, of the wrong type")
        self.missing[key] = value
        return value  # type: ignore[return-value]

    def positive(self, key: str, default: int | None = None) -> int:
        """Read a whole number above 0.

        Args:
            key: Its key.
            default: As for `get`.

        Returns:
            The number.

        Raises:
            CheckpointError: It is missing or something else.
        """
        value = self.get(key, int, default)
        if value <= 0:
            raise self.fail(key, f"is {value}, but must be positive")
        return value

    def single(self, key: str, default: int | None = None) -> int:
        """Read the one element of a list.

        Args:
            key: The list's key.
            default: The element where the list is left out; None if it must be there.

        Returns:
            The element.

        Raises:
            CheckpointError: The list is missing, or is something else than one whole number.
        """
        values = self.get(key, list, None if default is None else [default])
        if len(values) != 1 or isinstance(values[0], bool) or not isinstance(values[0], int):
            raise self.fail(key, f"is {values!r}, but one stage is expected")
        return int(values[0])

    def accept(self, **accepted: tuple[Any, ...]) -> None:
        """Check keys that may be left out.

        Args:
            accepted: Values that are allowed, by key.

        Raises:
            CheckpointError: One has another value.
        """
        for key, values in accepted.items():
            self.known.add(key)
            if key in self.raw and self.raw[key] not in values:
                wanted = " or ".join(repr(value) for value in values)
                raise self.fail(key, f"is {self.raw[key]!r}, where {wanted} is expected")

    def require(self, **values: Any) -> None:
        """Check keys that stand for one value where they are left out.

        Args:
            values: That value by key.

        Raises:
            CheckpointError: One has another value.
        """
        self.accept(**{key: (value,) for key, value in values.items()})
        self.missing |= values

    def demand(self, **values: Any) -> None:
        """Check keys that must be there.

        Args:
            values: The one value that is allowed, by key.

        Raises:
            CheckpointError: One is missing or has another value.
        """
        for key in values:
            if key not in self.raw:
                raise self._fail_missing(key)
        self.require(**values)

    def ignore(self, *keys: str, **missing: Any) -> None:
        """Skip keys that change nothing here.

        Args:
            keys: Such keys.
            missing: Others, with the values that the released code needs where they are left out.
        """
        self.known.update(keys, missing)
        self.missing |= missing

    def finish(self) -> None:
        """Warn of keys that were not asked for, here and below."""
        unknown = sorted(set(self.raw) - self.known)
        if unknown:
            names = ", ".join(unknown)
            logger.warning(f"{self.source}: {self.where or 'top level'} has keys sa3train does not know: {names}")
        for child in self.children.values():
            for each in child if isinstance(child, list) else [child]:
                each.finish()

    def complete(self) -> dict[str, Any]:
        """Fill in the keys that are left out, here and below.

        Returns:
            The object with every key; nothing that is there is changed.
        """
        below = {
            key: [each.complete() for each in child] if isinstance(child, list) else child.complete()
            for key, child in self.children.items()
        }
        return {**self.missing, **self.raw, **below}
