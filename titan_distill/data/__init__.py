"""Latents and text embeddings: from footage to parquet, and from parquet to the batches of any number of ranks."""
