"""Every op of the registry, checked by the conformance kit."""

from deltaloom.testing.conformance import conformance

test_ops = conformance()
