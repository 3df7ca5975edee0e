"""What a row keeps of its tokens: one protocol, one file a method."""
