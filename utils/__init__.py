"""What the floors above share.

Downwards on this floor: puppet_latents, text_dataset, text_cache > dataset, shards > distributed, fingerprint;
text_dataset > prompts; wan_wrapper > conditioning, scheduler; everything else stands alone.
"""
