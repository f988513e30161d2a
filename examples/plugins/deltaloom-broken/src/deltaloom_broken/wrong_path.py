"""A plugin one of whose ops is not where it says, so that only who asks for that one hears of it."""

from deltaloom import Plugin

plugin = Plugin(
    "broken_path",
    ops={"broken_path.twice": "deltaloom_broken.twice:PathTwice", "broken_path.thrice": "deltaloom_broken.twice:NoSuchClass"},
)
