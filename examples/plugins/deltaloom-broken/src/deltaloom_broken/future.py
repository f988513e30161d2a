"""A plugin that was written for a deltaloom that does not exist yet."""

from deltaloom import Plugin

VERSION = (99, 0)

plugin = Plugin("broken_future", api=VERSION, ops={"broken_future.twice": "deltaloom_broken.twice:FutureTwice"})
