"""The bundled model: its texts, its training, its weights."""
