"""Kernels of our own: `<op>/reference.py` beside `<op>/triton.py`. None yet: operations run on torch's and cuDNN's."""
