"""ChatPage: a chat page on a paged KV cache that you can watch."""
