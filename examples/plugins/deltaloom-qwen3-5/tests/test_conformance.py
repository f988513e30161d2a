"""The family as deltaloom's conformance kit sees it; ``test_golden`` compares it with transformers."""

from deltaloom.testing import conformance

test_qwen3_5 = conformance("qwen3_5.")
