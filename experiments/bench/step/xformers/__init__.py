"""The few names of xformers that facebookresearch/dinov2 imports, by torch, for a CPU. See `../official.py`."""
