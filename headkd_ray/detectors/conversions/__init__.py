"""Describe how mmdet's and torchvision's files hold each kind of detector: one module a kind, named by its registry line.

Each says by which keys a file is recognised, what its tensors are called here, and which spec follows from their shapes.
Reading the files is up to ``weights``, which nothing here imports.
"""
