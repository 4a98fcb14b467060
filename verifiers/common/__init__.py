"""What verification rules share."""
