"""A plugin that offers its own op under a name of the core."""

from deltaloom import Plugin

plugin = Plugin("broken_name", ops={"linear": "deltaloom_broken.twice:KernelTwice"})
