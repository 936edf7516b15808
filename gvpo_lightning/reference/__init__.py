"""What the implicit reward is measured against."""
