"""Commands that are imported when they run: a list of them must not cost what they need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A command of a table: ``function`` names it inside ``module``, which is imported when the command runs.

    A ``typer.Typer`` in the function's place is a command with commands of its own.
    """

    module: str
    function: str
    help: str


class LazyGroup(TyperGroup):
    """The commands of a table: ``TABLE`` of a subclass."""

    TABLE: ClassVar[Mapping[str, Entry]] = {}

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, entry in self.TABLE.items():
            self.add_command(_LazyCommand(name, entry))


class _LazyCommand(TyperCommand):
    """Listed by name and help alone; becomes the real one to run."""

    def __init__(self, name: str, entry: Entry) -> None:
        super().__init__(name, help=entry.help)
        self._entry = entry

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        target = getattr(import_module(self._entry.module), self._entry.function)
        if isinstance(target, typer.Typer):
            app = target
        else:
            app = typer.Typer(add_completion=False)
            app.command(self.name)(target)
        return typer.main.get_command(app).make_context(info_name, args, parent=parent, **extra)
