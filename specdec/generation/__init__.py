"""``generate()`` with speculation, through transformers' own hook."""
