"""Files that outlive a run: traces, provenance, prompts."""
