"""Private names of other libraries, and workarounds for them: one file a library, nothing else may touch them."""
