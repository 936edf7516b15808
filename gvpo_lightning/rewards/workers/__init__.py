"""The processes and the event loop that rewards run in."""
