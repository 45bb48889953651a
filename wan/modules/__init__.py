"""The networks' parts: causal_model > model > kv_cache, attention, masks, rope; vae; text_encoder; clip; > weights."""
