"""One engine for many clients: OpenAI's API over HTTP, and conversations in a terminal."""
