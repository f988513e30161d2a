"""Plugins that are broken on purpose; see the README."""
