"""Train the project's GANs with PyTorch. Start it with ``python -m train``; it knows nothing of export or serve."""
