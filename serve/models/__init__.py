"""Which models are served: bundles, desired state, and the reconciling of the two."""
