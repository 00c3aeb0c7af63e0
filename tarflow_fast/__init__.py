"""Fast exact normalizing flows: TarFlow (arXiv 2412.06329) with the same weights, calls and numbers, at hardware speed."""

__version__ = "0.1.0"
