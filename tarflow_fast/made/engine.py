"""The sweep in C++ (stub)."""


class Plan:
    pass
