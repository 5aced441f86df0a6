"""Pure science of scans: verified reading, normalisation, slice stacks, shards. Neither Ray nor MLflow nor configs."""
