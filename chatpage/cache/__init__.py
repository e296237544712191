"""Paged KV memory: blocks, block tables, the content tree. Pure Python."""
