"""A trained policy as a Hugging Face folder."""
