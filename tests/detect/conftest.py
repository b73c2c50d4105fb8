from tests.journals import builders_are_alive

__all__ = ["builders_are_alive"]
