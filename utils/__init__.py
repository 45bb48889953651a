"""What the floors above share.

Downwards on this floor: puppet_latents > dataset > distributed; wan_wrapper > conditioning, scheduler; everything else
stands alone.
"""
