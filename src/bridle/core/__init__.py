"""The equations, as pure torch functions on aligned tensors."""
