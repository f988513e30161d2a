"""The errors that users see: each message is one or more sentences that name the thing, what was found and what to do."""


class DeltaloomError(Exception):
    """Base of every error that is a user's to mend; the command line prints it without a traceback and exits with 2."""


class GraphError(DeltaloomError):
    """A graph, an op's inputs or a graph text that is not legal."""


class VerifyError(GraphError):
    """A graph that breaks a rule of the IR; the message shows the lines around the fault."""


class ConfigError(DeltaloomError):
    """A model configuration, a run configuration or a flag that is unknown, contradictory or out of range."""


class CheckpointError(DeltaloomError):
    """A checkpoint's files that are missing, damaged, unreadable or do not belong to the model."""


class CompileError(DeltaloomError):
    """A graph that cannot be lowered as asked: no kernel, an impossible pass order, a backend that is not installed."""


class PluginError(DeltaloomError):
    """A plugin that was asked for and cannot be had: broken, blocked, written for another API, or in conflict with another one."""


class RequestError(DeltaloomError):
    """A prompt, a message list or a sampling parameter that cannot be served."""


class ExportError(DeltaloomError):
    """A graph that cannot be exported as asked: an op without a rule, a cut that is none, weights that cannot be referred to."""


def require(condition: bool, message: str, error: type[DeltaloomError] = GraphError) -> None:
    """Raise ``error(message)`` unless ``condition`` holds. ``message`` is a sentence: what was found, what was expected."""
    if not condition:
        raise error(message)
