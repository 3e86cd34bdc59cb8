"""The exceptions users see: what is wrong, where, and how to fix it."""

from __future__ import annotations

from bridgekit.plain import plain


class BridgekitError(Exception):
    """An error the user can fix. The command line prints it without a traceback and exits with code 2.

    Arguments:
        what: what is wrong, in one sentence.
        where: the file, row, column or name concerned.
        remedy: how to fix it.
    """

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.remedy = remedy

    @property
    def reason(self) -> str:
        """What is wrong and how to fix it, on one line, for callers that print the location themselves."""
        return f"{self.what}: {self.remedy}" if self.remedy else self.what

    def as_json(self) -> dict[str, dict[str, str | None]]:
        """For `--json` and for programs."""
        return {"error": {"what": self.what, "where": self.where, "fix": self.remedy}}

    def __str__(self) -> str:
        """One to three lines, safe to print: control characters from untrusted input are escaped."""
        lines = [plain(" ".join(self.what.splitlines()))]
        if self.where:
            lines.append(f"  in: {plain(self.where)}")
        if self.remedy:
            lines.append(f"  fix: {plain(' '.join(self.remedy.splitlines()))}")
        return "\n".join(lines)


class ItemError(BridgekitError):
    """One item (a file or a text) cannot be used. Its row is set aside; the run continues unless it is strict."""


class PluginError(BridgekitError):
    """A plugin is missing, broken, or violates its contract. The message names the plugin."""


def one_line(error: Exception) -> str:
    """An exception's message on one line of at most 300 characters, or its type if the message is empty."""
    return " ".join(str(error).split())[:300] or type(error).__name__
