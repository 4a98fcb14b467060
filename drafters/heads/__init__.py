"""Networks that draft from a target's hidden states: their files, formats and engines."""
