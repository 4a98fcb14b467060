"""Many requests on one model: continuous batching over a paged cache, with prefix sharing and speculation."""
