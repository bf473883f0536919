"""When to write: what a policy is (``base``), the kinds there are, and how to get one (``factory``)."""
