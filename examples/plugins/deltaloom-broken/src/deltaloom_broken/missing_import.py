"""A plugin whose module needs a package that nobody installed."""

import deltaloom_no_such_package  # type: ignore[import-not-found]

from deltaloom import Plugin

plugin = Plugin("broken_import", description=deltaloom_no_such_package.__name__)
