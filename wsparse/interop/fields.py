"""The fields of a published config, none of which may be left that changes what the model computes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from wsparse.config import require
from wsparse.errors import UserError, closest, quoted


class Fields:
    """Fields by name, each to be taken once."""

    def __init__(self, values: Mapping[str, Any], *, ignored: Collection[str], section: str = ""):
        """Begins with all fields.

        Args:
          values: The fields.
          ignored: Names of those that do not change inference.
          section: Where in the config they are, for messages.
        """
        self._remaining, self._ignored, self._known = dict(values), frozenset(ignored), set(ignored)
        self._section = section

    def named(self, name: str) -> str:
        """Returns the name of a field with its section."""
        return f"{self._section}.{name}" if self._section else name

    def take(self, name: str, *default: Any) -> Any:
        """Returns a field, or the default where there is no such field.

        Raises:
          UserError: There is neither.
        """
        self._known.add(name)
        if name not in self._remaining and not default:
            raise UserError(f"the published config lacks the field {self.named(name)}")
        return self._remaining.pop(name, *default)

    def take_flag(self, name: str, default: bool) -> bool:
        """Returns a field that is true or false.

        Raises:
          UserError: It is something else.
        """
        value = self.take(name, default)
        require(isinstance(value, bool), f"{self.named(name)} must be true or false", value)
        return value

    def finish(self) -> None:
        """Raises a UserError if a field is left that is not to be ignored."""
        if unknown := sorted(set(self._remaining) - self._ignored):
            where = f" in {self._section}" if self._section else ""
            raise UserError(
                f"the published config has an unknown field {quoted(unknown[0])}"
                f"{closest(unknown[0], self._known)}{where}: it may change what the model computes"
            )
