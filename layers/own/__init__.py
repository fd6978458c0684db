"""Classes of the user's in place of ours: a block, or its feed-forward, norm or attention."""
