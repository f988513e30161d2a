"""Every op and every rewrite rule of the registries; the kernels are held to the references in the files of their backends."""

from deltaloom.testing import conformance

test_conformance = conformance(backends=())
