"""What flows through a run."""
