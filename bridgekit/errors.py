"""One family of errors: what is wrong, in which file and row, how to mend it."""

from __future__ import annotations

from bridgekit.plain import plain


class BridgekitError(Exception):
    """Something that the user can mend. The command line prints it without a traceback and exits with 2.

    Arguments:
        what: one sentence that says what is wrong.
        where: the file, row, column or name it is about.
        remedy: what to do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.remedy = remedy

    @property
    def reason(self) -> str:
        """What is wrong and what to do about it, in a line, for where the place is told beside it."""
        return f"{self.what}: {self.remedy}" if self.remedy else self.what

    def as_json(self) -> dict[str, dict[str, str | None]]:
        """For `--json` and for programs."""
        return {"error": {"what": self.what, "where": self.where, "fix": self.remedy}}

    def __str__(self) -> str:
        """One to three lines. What stands in them may be a stranger's, so a terminal shows it and does not obey it."""
        lines = [plain(" ".join(self.what.splitlines()))]
        if self.where:
            lines.append(f"  in: {plain(self.where)}")
        if self.remedy:
            lines.append(f"  fix: {plain(' '.join(self.remedy.splitlines()))}")
        return "\n".join(lines)


class ItemError(BridgekitError):
    """One item (a file or a text) cannot be used. Its row is set aside; the run goes on unless it is strict."""


class PluginError(BridgekitError):
    """A plugin is missing, broken, or does not keep its contract. The message names the plugin."""
