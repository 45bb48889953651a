"""What the floors above share.

Downwards on this floor: puppet_latents, text_dataset, text_cache, video_folder, latent_folder > dataset, shards >
distributed, fingerprint, prompts, video > errors; checkpointer > training_state > sharding > distributed; heartbeat >
distributed; wan_wrapper > conditioning, scheduler; everything else stands alone.
"""
