"""Errors that the user can mend: the command line prints them in one line. Needs neither torch nor onnx."""

from __future__ import annotations

from serving.contract.limits import LimitsError


class UserError(Exception):
    """Base class of this package's errors about what the user passed in."""


class ConfigError(UserError, ValueError):
    """A configuration that contradicts itself or names something unknown."""


class CheckpointError(UserError, ValueError):
    """A checkpoint that cannot be read, or whose weights are not those of its configuration."""


class ExportError(UserError, RuntimeError):
    """A reader that cannot be exported as requested, or a graph that differs from its specification."""


class CompileError(UserError, RuntimeError):
    """A library kernel that cannot be compiled for its architecture."""


class PassError(UserError, RuntimeError):
    """A graph that cannot be rewritten for the older opset."""


class UsageError(UserError, ValueError):
    """A command-line value that is not valid."""


class Interrupted(BaseException):
    """SIGTERM. A BaseException, so that no `except Exception` swallows it and every clean-up runs."""


def user_errors() -> tuple[type[BaseException], ...]:
    """All classes that are reported in one line: this package's, those of serving/contract, and the operating system's."""
    from serving.contract.manifest import EngineError, ManifestError  # imports NumPy

    return UserError, LimitsError, ManifestError, EngineError, OSError
