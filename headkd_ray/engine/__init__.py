"""The training engine: loop, optimizer, checkpoints, COCO evaluation and logs. It does not depend on Ray."""
