from tests.cli.stand_ins import library

__all__ = ["library"]
