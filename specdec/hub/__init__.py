"""Which models there are, and how they are fetched and loaded."""
