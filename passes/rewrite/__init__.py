"""The rewrite engine: rules in builder syntax, a matcher that says why it did not match, and the loop that applies them."""
