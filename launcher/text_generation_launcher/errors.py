"""Why the launcher ends: each error's text is the last error line of the log."""


class LauncherError(Exception):
    """The server cannot start or go on; exit code 1."""


class SettingsError(LauncherError):
    """Flags or variables that contradict each other, the model or the machine."""


class ChildDied(LauncherError):
    """A child process ended by itself; `last_lines` are the last of its log."""

    def __init__(self, reason: str, last_lines: list[str]) -> None:
        super().__init__(reason)
        self.last_lines = last_lines
