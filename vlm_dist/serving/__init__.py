"""A trained model in use: one answer, a conversation, a folder for others."""
