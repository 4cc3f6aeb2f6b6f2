"""Images, layers and containers under a data root."""
