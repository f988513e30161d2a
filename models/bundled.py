"""From what a user writes for a model to the folder that holds it: a path, or the name of a bundled model."""

import os
from importlib import resources
from pathlib import Path

from deltaloom.graph.errors import CheckpointError
from deltaloom.models.json_fields import as_path, reason

BUNDLED = {"tiny-next": "tiny_next"}  # name -> folder beside this file


def model_folder(reference: str | os.PathLike[str]) -> Path:
    """The folder with config.json that ``reference`` means. A bundled name wins; write ``./name`` for a path.

    Raises CheckpointError if it is neither; nothing is ever downloaded.
    """
    text = os.fspath(reference)
    if text in BUNDLED:
        return Path(str(resources.files("deltaloom.models").joinpath(BUNDLED[text])))
    path = as_path(reference, CheckpointError)
    bundled = ", ".join(sorted(BUNDLED))
    try:
        if path.is_dir():
            if not (path / "config.json").exists():
                raise CheckpointError(f"the folder {path} has no config.json, so it is not a checkpoint.")
            return path
        is_file = path.exists()
    except OSError as problem:
        raise CheckpointError(f"the model {text!r} cannot be read: {reason(problem)}.") from None
    if is_file:
        raise CheckpointError(f"the model {text!r} is a file; give the folder that holds config.json and the weights.")
    raise CheckpointError(
        f"the model {text!r} is neither a folder nor a bundled name (bundled: {bundled}). Nothing is downloaded: copy "
        "the checkpoint to this machine and give its folder."
    )
