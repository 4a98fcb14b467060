"""Every default that the library and the command line share. Imports nothing, so that ``--help`` can show them."""

DEFAULT_DRAFTER = "ngram"
DEFAULT_VERIFIER = "match"
DEFAULT_MAX_NODES = 16  # nodes below the root; beyond 8 to 16 a larger tree rarely pays on a CPU
DEFAULT_MAX_NEW_TOKENS = 128
