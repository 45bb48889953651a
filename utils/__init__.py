"""What the floors above share.

Downwards on this floor: dataset > distributed; wan_wrapper > conditioning, scheduler; everything else stands alone.
"""
