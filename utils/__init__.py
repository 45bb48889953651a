"""What the floors above share. Downwards on this floor: wan_wrapper > conditioning, scheduler; everything else stands alone."""
