"""The training engine: loop, optimizer, checkpoints, COCO evaluation, logs. Knows nothing of Ray."""
