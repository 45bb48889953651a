"""Skeletons from files and videos: `keypoints` (read), `backends` (find), `retarget` (fit to a body), `draw`."""
