"""Tables of what followed what, for drafters that run no network."""
