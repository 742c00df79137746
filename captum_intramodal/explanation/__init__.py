"""One call that explains an answer, and what it returns."""
