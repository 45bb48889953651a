"""The networks' parts: causal_model > model > kv_cache, attention, rope > masks; vae; text_encoder; clip; > weights."""
