"""What a detector gets right and wrong on a split: NumPy functions of COCO ground truth and COCO results."""
