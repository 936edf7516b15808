"""A model made ready, and its log-probs."""
