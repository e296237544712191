"""The model: loading, attention over the paged pool, one step, sampling. torch lives here."""
