"""Floor 0: networks. Tensors in, tensors out; imports torch and nothing of ours."""
