"""MNIST, or another set of its format: found in a folder or fetched, checked, and made tensors."""
