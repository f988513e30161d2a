"""Two plugins that offer a backend under one name."""

from deltaloom import Plugin

first = Plugin("broken_clash", backends={"broken_twin": "deltaloom.backends.numpy.backend:NumpyBackend"})
second = Plugin("broken_clash_too", backends={"broken_twin": "deltaloom.backends.numpy.backend:NumpyBackend"})
