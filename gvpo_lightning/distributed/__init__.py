"""Who has which data and which weights."""
