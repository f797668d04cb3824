"""What a user may add by name: prompt styles, scorers, loaders, adapters.

Built-ins register through the same decorators as a user's file does. The files of `plugins: [..]`
are code that the user trusts; nothing else in Crossover runs code out of data.
"""

from __future__ import annotations

import hashlib
import sys
import traceback
import types
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from conf.errors import ConfigError
from conf.groups import TaskConfig

F = TypeVar("F", bound=Callable[..., Any])

# style(item, context): yields Ask or Think, is sent completions, returns the answer text.
Style = Callable[..., Generator[Any, str, str]]
# scorer(answer, item, task): a number in [0, 1], or a Score (evaluation/scoring).
Scorer = Callable[..., Any]
# loader(task_config): a list of row dictionaries, {split: such a list}, or a Source (loaders.py).
Loader = Callable[[TaskConfig], object]
# adapter(...): a peft configuration; the caller in training says with which arguments.
Adapter = Callable[..., Any]


class Registry(Generic[F]):
    """Functions of one kind by name; a name means one function, for ever.

    Args:
        noun: what the functions are, in words, for messages: "prompt style".
    """

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self._functions: dict[str, F] = {}

    def register(self, name: str) -> Callable[[F], F]:
        """A decorator that files a function under a name; a second owner raises ConfigError."""

        def add(function: F) -> F:
            if not name or name != name.strip():
                raise ConfigError(
                    "plugins", found=f"a {self.noun} named {name!r}", expected="a plain name"
                )
            present = self._functions.setdefault(name, function)
            if present is not function:
                raise ConfigError(
                    "plugins",
                    found=f"a second {self.noun} named {name!r}, in {function.__module__}",
                    expected=f"one {self.noun} of that name; {present.__module__} has it",
                    remedy="give yours another name",
                )
            return function

        return add

    def get(self, name: str, *, key: str) -> F:
        """The function of that name; else ConfigError at `key` that lists the known names."""
        if name not in self._functions:
            raise ConfigError(
                key,
                found=repr(name),
                expected=f"a {self.noun}: {', '.join(self.names())}",
                remedy=f"pick one of them, or register yours: plugins=[my_study.py] with "
                f"@{self.noun.replace(' ', '_')}({name!r})",
            )
        return self._functions[name]

    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(sorted(self._functions))

    def __contains__(self, name: object) -> bool:
        return name in self._functions

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    @contextmanager
    def unchanged_on_error(self) -> Iterator[None]:
        """Forget what was registered inside the block if the block raises."""
        before = dict(self._functions)
        try:
            yield
        except BaseException:
            self._functions = before
            raise


@dataclass(kw_only=True, slots=True, frozen=True)
class Plugins:
    """The four registries together, so that a caller can bring its own."""

    styles: Registry[Style]
    scorers: Registry[Scorer]
    loaders: Registry[Loader]
    adapters: Registry[Adapter]


STYLES: Registry[Style] = Registry("prompt style")
SCORERS: Registry[Scorer] = Registry("scorer")
LOADERS: Registry[Loader] = Registry("loader")
ADAPTERS: Registry[Adapter] = Registry("adapter")
PLUGINS = Plugins(styles=STYLES, scorers=SCORERS, loaders=LOADERS, adapters=ADAPTERS)

prompt_style = STYLES.register
scorer = SCORERS.register
loader = LOADERS.register
adapter = ADAPTERS.register

_executed: dict[str, str] = {}  # sha256 of a file -> its module's name


def load_plugins(paths: Sequence[str | Path]) -> tuple[str, ...]:
    """Execute the user's files, each content once per process; returns their sha256s in order.

    Raises:
        ConfigError: a file is missing, does not run, or takes a name that exists. Names that a
            failing file had registered are forgotten again.
    """
    return tuple(_load(Path(path), key=f"plugins[{i}]") for i, path in enumerate(paths))


def _load(path: Path, *, key: str) -> str:
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            key,
            found=f"{path}: {error.strerror}",
            expected="a Python file that can be read",
            remedy="write the path from the current directory, or an absolute one",
        ) from None
    sha256 = hashlib.sha256(source).hexdigest()
    if sha256 not in _executed:
        with (
            STYLES.unchanged_on_error(),
            SCORERS.unchanged_on_error(),
            LOADERS.unchanged_on_error(),
            ADAPTERS.unchanged_on_error(),
        ):
            _executed[sha256] = _execute(path, source, name=f"crossover_plugin_{sha256[:16]}")
    return sha256


def _execute(path: Path, source: bytes, *, name: str) -> str:
    """Run the file as a module of its own name; in sys.modules, as dataclasses look there."""
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except ConfigError:
        del sys.modules[name]
        raise
    except Exception as error:  # whatever the user's file raises is their message, with its line
        del sys.modules[name]
        raise ConfigError(
            f"{path}:{_line_of(error, path)}",
            found=f"{type(error).__name__}: {error}",
            expected="a Python file that runs from top to bottom",
            remedy=f"mend it, then check with: python {path}",
        ) from error
    return name


def _line_of(error: Exception, path: Path) -> int:
    """The last line of the user's file that the error passed through; 1 if none is known."""
    if isinstance(error, SyntaxError):
        return error.lineno or 1
    frames = traceback.extract_tb(error.__traceback__)
    return next((f.lineno or 1 for f in reversed(frames) if f.filename == str(path)), 1)
