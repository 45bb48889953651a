"""The puppet world: endless videos whose truth is known exactly, and the instruments that measure against it.

puppet (who does what, where every joint is) -> render (pixels), pose (DWPose drawings), captions (words) and tokenizer;
judges (small networks that read attributes and joints back), metrics (formulas), evaluate (the tables).
Nothing here imports another room of the repository.
"""
