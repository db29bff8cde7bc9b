"""The fixtures of the gateway's tests; what they are made of has a module of its own, which tests import by name."""

from gateway_setup import checkpoint, create_setup

__all__ = ["checkpoint", "create_setup"]
