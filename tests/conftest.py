"""How many cases Hypothesis draws: few by default, twenty times as many with `--hypothesis-profile=all`."""

from hypothesis import settings

settings.register_profile("few", max_examples=10, deadline=None, print_blob=True)
settings.register_profile("all", parent=settings.get_profile("few"), max_examples=200)
settings.load_profile("few")
