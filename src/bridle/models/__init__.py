"""Networks, sampling and guidance."""
