"""Code that the recipes share: configuration, data loading, the training loop, the run folder."""
