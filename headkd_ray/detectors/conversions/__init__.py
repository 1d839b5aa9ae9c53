"""How mmdet's and torchvision's files hold each kind of detector: one module a kind, which its line in the registry names.

Nothing here imports ``weights``, which reads the files.
"""
