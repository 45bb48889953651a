"""The networks' parts. Imports go downwards: rope, masks, attention, kv_cache -> model -> causal_model; vae, text_encoder, clip alone."""
