"""Everything that the plugin offers, held to deltaloom's conformance kit."""

from deltaloom.testing import conformance

test_kda = conformance("kda.")
