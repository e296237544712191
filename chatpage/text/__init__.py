"""Between text and token ids: chat templates, incremental decoding, stop strings."""
